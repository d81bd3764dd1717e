"""What FP8 training keeps beside its weights is saved as plain tensors and comes back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import run_on_ranks
from tests.te.fake_extension import pretending
from tests.te.test_layout import STATE, build, start
from tests.te.test_recipes import precise


@contextmanager
def histories_on_the_cpu() -> Iterator[None]:
    """Transformer Engine allocates them on CUDA unless told another device."""
    import torch
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState as State

    original = State.__init__

    def on_cpu(self, *args, device=None, **kwargs):  # type: ignore[no-untyped-def]
        original(self, *args, device=torch.device("cpu"), **kwargs)

    with mock.patch.object(State, "__init__", on_cpu), pretending():
        yield


def delayed(tp: int, history: int = 16) -> RunConfig:
    run = precise("index_1p9b", "fp8_delayed")
    run.precision.fp8_amax_history_len = history
    run.parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    return run


def _round_trip(folder: str, tp: int) -> None:
    import torch

    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.models.fp8_history import histories, prepare

    run = delayed(tp)
    groups = start(run)
    trained, fresh, longer = (build(run, groups) for _ in range(3))
    common = {"optimizer": None, "groups": groups}
    with histories_on_the_cpu():
        prepare(trained, run)
        before = dict(histories(trained))
        assert len(before) == 4 * 4 * 4  # layers, linears, scale and history of both sides
        for number, tensor in enumerate(before.values()):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number)
        path = save(Path(folder), run=run, chunks=trained, state=STATE, **common)
        load(path, run=run, chunks=fresh, **common)
        after = dict(histories(fresh))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key
        other = delayed(tp, history=32)
        rebuilt = build(other, groups)
        load(path, run=other, chunks=rebuilt, **common)
        changed = dict(histories(rebuilt))
        for key, tensor in changed.items():
            if key.endswith("amax_history"):
                assert tensor.shape[0] == 32 and not tensor.any(), key
        bf16 = precise("index_1p9b", "bf16")
        bf16.parallel = run.parallel
        load(path, run=bf16, chunks=longer, **common)
        assert not dict(histories(longer))


@pytest.mark.parametrize("tp", [1, 2])
def test_scaling_history_survives_a_checkpoint_and_begins_anew_where_it_must(
    tp: int, tmp_path: Path
) -> None:
    run_on_ranks(_round_trip, str(tmp_path), tp, world_size=tp)
