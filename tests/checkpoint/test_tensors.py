"""Boxes, the table of a checkpoint, and what one process writes and reads of it."""

import os
import pickle
import random
import time
from math import prod

import pytest
import torch

from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.index import Piece, StoredTensor
from megatron_ext.checkpoint.reader import TensorReader
from megatron_ext.checkpoint.rectangles import Box, cut, overlap, uncovered, whole
from megatron_ext.checkpoint.shard import Slot, write_shard


def _take(tensor, box):
    for axis, (start, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor


def test_cut_boxes_hold_exactly_the_flat_range_in_order():
    noise = random.Random(0)
    for _ in range(1000):
        shape = tuple(noise.randint(1, 5) for _ in range(noise.randint(0, 4)))
        numbers = torch.arange(prod(shape)).reshape(shape)
        start = noise.randint(0, numbers.numel())
        stop = noise.randint(start, numbers.numel())
        found = [n for box in cut(shape, start, stop) for n in _take(numbers, box).flatten()]
        assert found == list(range(start, stop))


def test_a_flat_range_of_a_matrix_needs_at_most_three_boxes():
    assert cut((4, 10), 7, 33) == [Box((0, 7), (1, 3)), Box((1, 0), (2, 10)), Box((3, 0), (1, 3))]
    assert cut((4, 10), 12, 15) == [Box((1, 2), (1, 3))]
    assert cut((4, 10), 10, 10) == []


def test_overlap_is_what_both_boxes_hold():
    assert overlap(Box((0, 0), (3, 3)), Box((2, 1), (5, 1))) == Box((2, 1), (1, 1))
    assert overlap(Box((0, 0), (3, 3)), Box((3, 0), (1, 3))) is None


def test_gaps_overlaps_and_overhangs_are_told_apart():
    halves = [Box((0, 0), (2, 3)), Box((2, 0), (2, 3))]
    assert uncovered((4, 3), halves) is None
    assert "6 of 12" in uncovered((4, 3), halves[:1])
    assert "outside" in uncovered((3, 3), halves)
    assert "overlap" in uncovered((4, 3), [Box((0, 0), (2, 3)), Box((1, 0), (2, 3))])


def test_the_check_for_gaps_agrees_with_painting_the_boxes():
    noise = random.Random(0)
    for _ in range(500):
        shape = tuple(noise.randint(1, 4) for _ in range(noise.randint(0, 3)))
        ends = sorted(noise.randint(0, prod(shape)) for _ in range(noise.randint(0, 4)))
        boxes = []
        for start, stop in zip([0, *ends], [*ends, prod(shape)], strict=True):
            boxes += cut(shape, start, stop)
        if boxes and noise.random() < 0.7:  # one of them lies elsewhere now
            spoilt = boxes.pop(noise.randrange(len(boxes)))
            offset = tuple(noise.randint(0, n - s) for n, s in zip(shape, spoilt.size, strict=True))
            boxes.append(Box(offset, spoilt.size))
        noise.shuffle(boxes)
        painted = torch.zeros(shape)
        for box in boxes:
            _take(painted, box).add_(1)
        assert (uncovered(shape, boxes) is None) == bool((painted == 1).all())


def test_a_hundred_thousand_boxes_are_checked_in_a_second():
    layers = [Box((layer, 8 * part, 0), (1, 8, 64)) for layer in range(52) for part in range(64)]
    start = time.process_time()
    for _ in range(30):
        assert uncovered((52, 512, 64), layers) is None
    assert time.process_time() - start < 3.0


def _saved(tmp_path):
    """A vector, a matrix in flat ranges, a stack of bf16 layers in two files."""
    tensors = {
        "vector": torch.randn(7),
        "matrix": torch.randn(11, 5),
        "stack": torch.randn(4, 3, 2).bfloat16(),
    }
    slots = [Slot("vector", (7,), whole((7,)), tensors["vector"])]
    for start, stop in ((0, 3), (3, 44), (44, 55)):
        for box in cut((11, 5), start, stop):
            flat = tensors["matrix"].view(-1)[start : start + box.numel()]
            slots.append(Slot("matrix", (11, 5), box, flat))
            start += box.numel()
    layers = [
        Slot("stack", (4, 3, 2), Box((layer, 0, 0), (1, 3, 2)), tensors["stack"][layer])
        for layer in range(4)
    ]
    shards = [
        write_shard(tmp_path / "__0_0.distcp", slots + layers[:2]),
        write_shard(tmp_path / "__1_0.distcp", layers[2:]),
    ]
    table = index.write(index.merge(shard.tensors for shard in shards))
    (tmp_path / index.INDEX).write_bytes(table)
    return tensors


def test_what_was_written_is_read_whole_and_in_parts(tmp_path):
    tensors = _saved(tmp_path)
    reader = TensorReader(tmp_path)
    for key, tensor in tensors.items():
        assert torch.equal(reader.read(key), tensor)
    part = Box((1, 1, 0), (2, 2, 1))
    assert torch.equal(reader.read("stack", part), tensors["stack"][1:3, 1:3, :1])


def test_only_the_bytes_of_a_view_are_written(tmp_path):
    big = torch.randn(1000, 100)
    shard = write_shard(tmp_path / "x", [Slot("a", (10, 100), whole((10, 100)), big[5:15])])
    assert shard.bytes < 10 * 100 * 4 + 2000


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_loader_reads_the_folder(tmp_path):
    import torch.distributed.checkpoint as dcp

    tensors = _saved(tmp_path)
    found = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_checkpoints_are_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    tensor = torch.randn(5, 3)
    dcp.save({"a": tensor, "number": 3}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(TensorReader(tmp_path).read("a"), tensor)


def test_a_tensor_saved_by_halves_is_not_sealed():
    piece = Piece(Box((0,), (2,)), "x", 0, 10)
    with pytest.raises(ValueError, match="do not save a exactly once: 2 of 4"):
        index.write({"a": StoredTensor((4,), torch.float32, (piece,))})


class _Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_table_that_is_a_program_is_not_run(tmp_path):
    with pytest.raises(ValueError, match=r"posix\.mkdir is not allowed"):
        index.read(pickle.dumps(_Canary(tmp_path / "canary")))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "torch.serialization load"])
def test_only_inert_types_are_on_the_allow_list(name):
    module, attribute = name.split()
    data = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(ValueError, match=f"{attribute} is not allowed"):
        index.read(data)


def test_a_table_cannot_point_outside_its_folder():
    piece = Piece(Box((0,), (4,)), "../../secret", 0, 10)
    data = index.write({"a": StoredTensor((4,), torch.float32, (piece,))})
    with pytest.raises(ValueError, match="outside its folder"):
        index.read(data)


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_a_table_that_is_none_is_refused(data):
    with pytest.raises(ValueError, match="is not a table of tensors"):
        index.read(data)


def test_old_torch_is_refused(tmp_path, monkeypatch):
    _saved(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ValueError, match=r"torch 2\.9\.1 cannot read checkpoints safely"):
        TensorReader(tmp_path)
