"""Closed forms of the planner against schedules listed operation by operation."""

from fractions import Fraction

import pytest

from megatron_ext.plan.schedule import (
    bubble,
    held,
    held_in_closed_form,
    operations,
    play,
)

CASES = [
    (stages, chunks, micro)
    for stages in (2, 3, 4, 8)
    for chunks in (1, 2, 3, 5)
    for micro in (stages, 2 * stages, 4 * stages, 8 * stages)
] + [(4, 1, 1), (4, 1, 3), (8, 1, 5), (3, 1, 7)]


@pytest.mark.parametrize(("stages", "chunks", "micro"), CASES)
def test_activations_held_equal_the_enumeration(stages, chunks, micro):
    for stage in range(stages):
        listed = operations(stage, stages, chunks, micro)
        assert len(listed) == len(set(listed)) == 2 * micro * chunks
        assert held(listed) == held_in_closed_form(stage, stages, chunks, micro)
        # The forms of the literature, written out again.
        if chunks == 1:
            assert held(listed) == min(micro, stages - stage)
        else:
            ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
            assert held(listed) == min(ahead, micro * chunks)


@pytest.mark.parametrize(("stages", "chunks", "micro"), CASES)
def test_the_bubble_of_equal_stages_is_exactly_p_minus_1_over_v_m(stages, chunks, micro):
    placed = play(stages, chunks, micro, lambda _, op: 1 if op.forward else 2)
    assert Fraction(bubble(placed)).limit_denominator(10**6) == Fraction(stages - 1, chunks * micro)


def test_a_heavier_last_stage_sets_the_pace():
    seconds = [[1, 2], [1, 2], [1, 2], [2, 4]]
    placed = play(4, 1, 16, lambda stage, op: seconds[stage][not op.forward])
    end = max(stage[-1].end for stage in placed)
    # Slowest stage back to back, plus one micro-batch through the others: the planner's formula.
    assert end == pytest.approx(16 * 6 + 9)


def test_interleaving_needs_whole_groups_of_micro_batches():
    with pytest.raises(ValueError, match="multiple"):
        operations(0, 4, 2, 6)
