"""Whole runs of the real trainer on gloo ranks: learning, stopping, resuming, layouts."""

import json
from pathlib import Path

import pytest

from launch.compose import compose, save
from megatron_ext.checkpoint.parent import trained_length
from megatron_ext.convert.described import model_of
from megatron_ext.parallel.env import Env
from megatron_ext.testing import meeting, run_on_ranks
from megatron_ext.train.read_metrics import read

TINY = [
    "model=index_tiny",
    "precision=fp32",
    "data.synthetic=true",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=1",
    "batch.seq_length=32",
    "optimizer.lr=0.003",
    "logging.gradient_share_interval=1",
    "logging.tensorboard=false",
    "phases=[{tokens: 768, name: stable, schedule: {warmup_tokens: 256}},"
    " {tokens: 512, name: decay, schedule: {name: linear}}]",
]
STEPS = 10  # 6 of the first phase and 4 of the second, 128 tokens each


def _fit(run_dir: Path, overrides: list[str], stop_at: int | None = None) -> None:
    """On one rank: the run from where it stands, stopped after step ``stop_at`` if given."""
    import os

    from megatron_ext.devices import device

    device.start()
    from megatron_ext.parallel import groups
    from megatron_ext.train.build import build_trainer
    from megatron_ext.train.callback import Callback

    job = compose([*TINY, f"name={run_dir.name}", f"run_dir={run_dir}", *overrides])
    env = Env.read(os.environ)
    joined = groups.start(job.parallel, env, seed=job.seed, init_method=meeting())
    trainer = build_trainer(job, env=env, groups=joined)

    class StopAt(Callback):
        def after_step(self, trainer, metrics):
            # Only the last rank is asked: all of them must leave together.
            if metrics["step"] == stop_at and env.rank == env.world_size - 1:
                os.kill(os.getpid(), 15)

    trainer.callbacks.append(StopAt())
    if env.rank == 0:
        run_dir.mkdir(exist_ok=True, parents=True)
        save(job, run_dir / "config.yaml")
    outcome = trainer.fit()
    assert outcome == ("finished" if stop_at is None else "stopped")
    trainer.stop.remove()
    groups.stop()


def fit(run_dir: Path, *overrides: str, ranks: int = 1, stop_at: int | None = None) -> list[dict]:
    """The metrics of a run taken on ``ranks`` ranks."""
    run_on_ranks(_fit, run_dir, list(overrides), stop_at, world_size=ranks)
    return [r for r in read(run_dir / "metrics.jsonl") if "loss" in r]


def exact(records: list[dict]) -> list[tuple]:
    """What must be equal to the last bit."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in records]


TP2 = ["parallel.tensor_model_parallel_size=2"]
LAYOUTS = {
    "one rank": (1, []),
    "TP 2 with SP": (2, [*TP2, "parallel.sequence_parallel=true"]),
    "PP 2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "DP 2, distributed optimizer": (2, ["parallel.use_distributed_optimizer=true"]),
}


CASES = [*((name, "fp32") for name in LAYOUTS), ("DP 2, distributed optimizer", "bf16")]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_a_stopped_run_resumes_as_if_it_had_not_been(tmp_path, layout, precision):
    ranks, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"precision={precision}"]
    whole = fit(tmp_path / "whole", *overrides, ranks=ranks)
    assert len(whole) == STEPS
    fit(tmp_path / "parts", *overrides, ranks=ranks, stop_at=3)
    # Torn by hand: a line of a step that the resume takes again, and half a line.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**whole[3], "loss": 0.0}) + "\n" + '{"step": 5, "lo')
    resumed = fit(tmp_path / "parts", *overrides, ranks=ranks)
    assert [r["step"] for r in resumed] == list(range(1, STEPS + 1)), "one curve, not two"
    assert exact(resumed) == exact(whole)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine["gradient_share"] == theirs["gradient_share"]


def test_a_checkpoint_tells_what_its_weights_were_trained_at_not_what_comes_next(tmp_path):
    fit(tmp_path / "run", "phases.1.rotary_base=320000", "phases.1.seq_length=64", stop_at=7)
    for step, base, length in ((6, 10000.0, 32), (7, 320000.0, 64)):
        path = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        assert model_of(path)[0].rotary_base == base and trained_length(path) == length


def test_every_step_reports_what_a_person_wants_to_know(tmp_path):
    run = fit(tmp_path / "run")
    # Norm-Head: logits of unit variance over 509 words cost ln 509 + 0.5 on random tokens.
    assert run[0]["loss"] == pytest.approx(6.73, abs=0.3)
    assert run[0]["lr"] == 0.0 and run[3]["lr"] == 0.003
    assert run[-1]["phase"] == "decay"
    for record in run:
        assert sum(record["gradient_share"].values()) == pytest.approx(1)
        assert set(record) >= {"tokens_per_second", "mfu", "memory_gib", "eta_seconds"}
    assert run[-1]["eta_seconds"] == 0


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, TP2),
        (2, [*TP2, "parallel.sequence_parallel=true"]),
        (2, ["parallel.pipeline_model_parallel_size=2"]),
        (
            2,
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
        ),
        (2, []),
        (2, ["parallel.use_distributed_optimizer=true"]),
        (4, [*TP2, "parallel.pipeline_model_parallel_size=2"]),
        (1, ["parallel.recompute_granularity=full"]),
    ],
    ids=["TP2", "TP2+SP", "PP2", "PP2 interleaved", "DP2", "DP2 ZeRO-1", "TP2xPP2", "recompute"],
)
def test_every_layout_gives_the_losses_of_one_rank(tmp_path, ranks, overrides, one_rank):
    checkpoint, losses, shares = one_rank
    run = fit(tmp_path / "run", f"checkpoint.load={checkpoint}", PHASE_20, *overrides, ranks=ranks)
    assert len(run) == 20
    worst = max(abs(a["loss"] - b) / b for a, b in zip(run, losses, strict=True))
    print(f"largest relative difference of loss over 20 steps: {worst:.2e}")
    assert worst < 1e-5
    for record, share in zip(run, shares, strict=True):
        assert record["gradient_share"] == pytest.approx(share, rel=1e-3, abs=1e-6)


PHASE_20 = "phases=[{tokens: 2560}]"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A checkpoint that every layout starts from, and what one rank makes of it."""
    folder = tmp_path_factory.mktemp("reference")
    fit(folder / "start", "phases=[{tokens: 128}]")
    checkpoint = folder / "start" / "checkpoints" / "step_00000001"
    run = fit(folder / "run", f"checkpoint.load={checkpoint}", PHASE_20)
    return checkpoint, [r["loss"] for r in run], [r["gradient_share"] for r in run]
