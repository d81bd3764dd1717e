"""Maps of published recipes, and the sentences that refuse others."""

import pytest

from megatron_ext.evaluate.layer_cosine import as_text, nearest_block
from megatron_ext.surgery.layer_map import (
    copy_blocks,
    insert_identities,
    join_ranges,
    parse_ranges,
    spell,
)


def parents(layers):
    return [new.parent for new in layers]


def test_yi_9b_is_0_to_27_then_12_to_31():
    new = copy_blocks(32, parse_ranges("12:28"))
    assert parents(new) == [*range(28), *range(12, 28), *range(28, 32)]
    assert [place for place, layer in enumerate(new) if layer.copy] == list(range(28, 44))
    assert spell(parents(new)) == "[0..27] + [12..31]"


def test_solar_joins_two_overlapping_ranges():
    new = join_ranges(32, parse_ranges("0:24,8:32"))
    assert parents(new) == [*range(24), *range(8, 32)] and len(new) == 48
    assert sum(layer.copy for layer in new) == 16


def test_llama_pro_puts_a_silent_copy_behind_every_fourth_layer():
    new = insert_identities(8, 4)
    assert parents(new) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert [layer.identity for layer in new] == [i in (4, 9) for i in range(10)]


def test_two_blocks_are_each_repeated_in_place():
    assert parents(copy_blocks(6, [(1, 2), (3, 5)])) == [0, 1, 1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: copy_blocks(32, [(12, 33)]), r"12:33 is not a range of layers 0:32"),
        (lambda: copy_blocks(32, [(20, 12)]), r"20:12 is not a range"),
        (lambda: copy_blocks(32, [(4, 9), (8, 12)]), r"4:9,8:12: block 8:12 overlaps 4:9"),
        (lambda: copy_blocks(32, [(8, 12), (2, 4)]), r"block 2:4 comes before 8:12"),
        (lambda: join_ranges(32, [(8, 32), (0, 24)]), r"= \[8\.\.31\] \+ \[0\.\.23\]: 0:24 does"),
        (lambda: join_ranges(32, [(0, 8), (16, 32)]), r"loses layers \[8\.\.15\] of 32"),
        (lambda: join_ranges(32, [(0, 32), (4, 40)]), r"4:40 is not a range"),
        (lambda: insert_identities(30, 4), r"every=4 does not divide the 30 layers"),
        (lambda: parse_ranges("12-28"), r"'12-28' is not a list of layer ranges"),
        (lambda: parse_ranges("1:2:3"), r"write them as"),
        (lambda: nearest_block([0.5] * 4, 5), r"--auto 5: a block of 5 of 4"),
    ],
)
def test_an_impossible_map_is_refused_and_written_out(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_auto_takes_the_block_that_changes_least():
    cosines = [0.2, 0.7, 0.9, 0.95, 0.9, 0.6]
    assert nearest_block(cosines, 3) == (2, 5)
    assert as_text(cosines, (2, 5)).count("*") == 3
