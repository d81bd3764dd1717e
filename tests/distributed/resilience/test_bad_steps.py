"""Bad steps and diverging replicas, struck by drills in real runs on gloo ranks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from launch.compose import compose
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.parallel.env import Env
from megatron_ext.resilience import attempts, lease, suspicions
from megatron_ext.testing import RankFailure, meeting, run_on_ranks
from megatron_ext.train.read_metrics import read
from megatron_ext.train.state import TrainState

TINY = [
    "model=llama_tiny",
    "model.num_layers=2",
    "precision=fp32",
    "data.synthetic=true",
    "batch.seq_length=32",
    "batch.global_batch_size=4",
    "phases=[{tokens:1536}]",
    "checkpoint.interval_steps=4",
    "logging.tensorboard=false",
    "logging.gradient_share_interval=0",
]
STEPS, STRUCK = 12, 6


def _fit(run_dir: Path, overrides: list[str], environ: dict[str, str]) -> None:
    run_dir.mkdir(exist_ok=True)
    os.environ |= {k: v.replace("RANK", os.environ["RANK"]) for k, v in environ.items()}
    from megatron_ext.devices import device

    device.start()
    import logging

    logging.basicConfig(filename=run_dir / "logs.txt", force=True)
    from megatron_ext.parallel import groups
    from megatron_ext.train.build import build_trainer

    job = compose([*TINY, f"name={run_dir.name}", f"run_dir={run_dir}", *overrides])
    env = Env.read(os.environ)
    joined = groups.start(job.parallel, env, seed=job.seed, init_method=meeting())
    trainer = build_trainer(job, env=env, groups=joined)
    assert trainer.fit() == "finished"
    trainer.stop.remove()
    groups.stop()


def fit(
    run_dir: Path,
    *overrides: str,
    kind: str = "",
    rank: int = 0,
    ranks: int = 1,
    step: int = STRUCK,
    times: int = 1,
    environ: dict[str, str] | None = None,
) -> list:
    """Step, loss and gradient norm of a run that meets ``kind``."""
    fault = f"{{kind:{kind},rank:{rank},step:{step},times:{times}}}"
    drill = [f"watch.drill=[{fault}]"] if kind else []
    run_on_ranks(_fit, run_dir, [*overrides, *drill], environ or {}, world_size=ranks)
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read(run_dir / "metrics.jsonl")]


def decisions(run_dir: Path) -> list[dict]:
    """What the run decided to pass over."""
    path = run_dir / "decisions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_that_is_gone_when_run_again_leaves_no_trace_in_the_curve(tmp_path, ranks):
    whole = fit(tmp_path / "whole", ranks=ranks)
    struck = fit(tmp_path / "struck", kind="nan", rank=ranks - 1, ranks=ranks)
    assert struck == whole
    assert decisions(tmp_path / "struck") == []


@pytest.mark.parametrize(("policy", "first"), [("skip", STRUCK * 4), ("rewind", 16)])
def test_a_nan_that_stays_is_passed_over_and_written_down(tmp_path, policy, first):
    whole = fit(tmp_path / "whole")
    struck = fit(tmp_path / "struck", f"watch.on_bad_step={policy}", kind="nan_stays")
    assert [step for step, _, _ in struck] == list(range(1, STEPS + 1)), "one curve, not two"
    assert struck[: first // 4] == whole[: first // 4]
    (decision,) = decisions(tmp_path / "struck")
    assert (decision["first"], decision["past"]) == (first, (STRUCK + 1) * 4)


def test_decisions_are_replayed_by_an_attempt_that_never_saw_the_fault(tmp_path):
    struck = fit(tmp_path / "struck", kind="nan_stays")
    (tmp_path / "again").mkdir()
    (tmp_path / "struck" / "decisions.jsonl").rename(tmp_path / "again" / "decisions.jsonl")
    assert fit(tmp_path / "again") == struck


def test_decisions_are_not_replayed_on_other_text(tmp_path):
    for name in "ab":
        with CorpusWriter(tmp_path / name, dtype=np.uint16) as writer:
            for _ in range(60):
                writer.add_document(np.arange(100))
    text = [f"data.sources.{name}.path={tmp_path / name}" for name in "ab"]

    def phases(**mixture: float) -> list[str]:
        shares = ",".join(f"{name}:{share}" for name, share in mixture.items())
        return [f"phases=[{{tokens:2304,mixture:{{{shares}}}}}]", "data.synthetic=false", *text]

    run = tmp_path / "run"
    faults = f"{{kind:nan_stays,step:{STRUCK}}},{{kind:exception,step:9}}"
    with pytest.raises(RankFailure, match="drill: exception"):
        fit(run, *phases(a=0.5, b=0.5), f"watch.drill=[{faults}]")
    (before,) = decisions(run)
    assert (before["first"], before["past"]) == (24, 28)
    assert len(fit(run, *phases(a=0.7, b=0.3))) == 18
    assert (run / "logs.txt").read_text().count("passing over") == 1
    assert decisions(run) == [before]
    stored = json.loads((run / "checkpoints" / "step_00000018" / "state.json").read_text())
    lines = stored["consumed"].values()
    assert sum(line["tokens"] for line in lines) == (18 + 1) * 4 * 32
    assert sum(line["skipped_windows"] for line in lines) == 4


def test_a_run_that_wants_no_intervention_ends_with_the_cause(tmp_path):
    with pytest.raises(RankFailure, match="gradient is not finite at step 7 again"):
        fit(tmp_path / "run", "watch.on_bad_step=stop", kind="nan_stays")


def nodes(*, attempt: str = "", spare: bool = True) -> dict[str, str]:
    """As if each rank were on a node of its own."""
    found = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURMD_NODENAME": f"{attempt}nRANK"}
    return found | {"MEGATRON_EXT_SPARE_NODE": str(int(spare)), "MEGATRON_EXT_ATTEMPT": attempt}


def begin(run_dir: Path, name: str) -> dict[str, str]:
    """An attempt on nodes that no earlier one had."""
    run_dir.mkdir(exist_ok=True)
    past = attempts.history(run_dir)
    lease.take(run_dir, name, after=None)
    own = [f"{name}n0", f"{name}n1"]
    attempts.append(run_dir, attempts.Attempt(number=len(past), attempt=name, nodes=own))
    return nodes(attempt=name)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_nan_of_one_node_is_gone_on_others_and_the_curve_is_whole(tmp_path, overlap):
    more = [f"parallel.overlap_grad_reduce={str(overlap).lower()}"]
    whole = fit(tmp_path / "whole", *more, ranks=2)
    run, struck = tmp_path / "run", {"kind": "nan_on_node", "rank": 1, "ranks": 2, "times": 0}
    with pytest.raises(RankFailure, match="on rank 1 of an1 first: the step is to be taken on"):
        fit(run, *more, **struck, environ=begin(run, "a"))
    assert fit(run, *more, **struck, environ=begin(run, "b")) == whole
    (found,) = suspicions.known(run).values()
    assert (found.node, found.step, found.verdict) == ("an1", STRUCK + 1, "hardware")
    assert decisions(run) == []


def test_a_nan_that_stays_elsewhere_is_the_datas_and_is_passed_over(tmp_path):
    run, struck = tmp_path / "run", {"kind": "nan_stays", "rank": 1, "ranks": 2, "times": 0}
    with pytest.raises(RankFailure, match="to be taken on other nodes"):
        fit(run, **struck, environ=begin(run, "a"))
    assert len(fit(run, **struck, environ=begin(run, "b"))) == STEPS
    (found,) = suspicions.known(run).values()
    assert (found.node, found.verdict) == ("an1", "workload")
    assert [d["first"] for d in decisions(run)] == [STRUCK * 4]


def test_a_nan_that_stays_on_the_same_nodes_proves_nothing(tmp_path):
    run, struck = tmp_path / "run", {"kind": "nan_on_node", "rank": 1, "ranks": 2, "times": 0}
    with pytest.raises(RankFailure, match="to be taken on other nodes"):
        fit(run, **struck, environ=begin(run, "a"))
    lease.take(run, "b")
    own = attempts.history(run)[0].nodes  # Slurm gave the same ones
    attempts.append(run, attempts.Attempt(number=1, attempt="b", nodes=own))
    same = nodes(attempt="a") | {"MEGATRON_EXT_ATTEMPT": "b"}
    assert len(fit(run, **struck, environ=same)) == STEPS
    (found,) = suspicions.known(run).values()
    assert (found.node, found.verdict) == ("an1", "")
    assert [d["first"] for d in decisions(run)] == [STRUCK * 4]


def test_without_a_spare_node_a_nan_of_one_node_is_passed_over_in_place(tmp_path):
    fit(tmp_path / "run", kind="nan_on_node", rank=1, ranks=2, environ=nodes(spare=False))
    assert len(decisions(tmp_path / "run")) == 1
    assert suspicions.known(tmp_path / "run") == {}


LONG = ["phases=[{tokens:2560}]", "checkpoint.interval_steps=8"]  # long enough for a median


def test_a_steep_gradient_alone_is_run_again_and_leaves_no_trace(tmp_path):
    whole = fit(tmp_path / "whole", *LONG, ranks=2)
    struck = fit(tmp_path / "struck", *LONG, kind="steep", step=18, rank=1, ranks=2)
    assert struck == whole
    assert "running the step again" in (tmp_path / "struck" / "logs.txt").read_text()
    assert decisions(tmp_path / "struck") == []


def test_a_steep_gradient_that_stays_is_passed_over_and_replayed(tmp_path):
    struck = fit(tmp_path / "struck", *LONG, kind="steep_stays", step=18)
    (decision,) = decisions(tmp_path / "struck")
    assert (decision["first"], decision["past"]) == (18 * 4, 19 * 4)
    assert decision["reason"].startswith("gradient norm ")
    norms = [norm for _, _, norm in struck]
    assert max(norms) < 10 * sorted(norms)[len(norms) // 2]
    (tmp_path / "again").mkdir()
    (tmp_path / "struck" / "decisions.jsonl").rename(tmp_path / "again" / "decisions.jsonl")
    assert fit(tmp_path / "again", *LONG) == struck


def test_a_resumed_run_compares_with_the_steps_before_its_checkpoint(tmp_path):
    def steep_and(*faults: str) -> str:
        return f"watch.drill=[{{kind:steep_stays,step:18,times:0}}{''.join(faults)}]"

    whole = fit(tmp_path / "whole", *LONG, steep_and())
    assert [d["first"] for d in decisions(tmp_path / "whole")] == [18 * 4]
    with pytest.raises(RankFailure, match="drill: exception"):
        fit(tmp_path / "run", *LONG, steep_and(",{kind:exception,step:17}"))
    stored = tmp_path / "run" / "checkpoints" / "step_00000016" / "state.json"
    state = TrainState.from_dict(json.loads(stored.read_text()))
    assert state.recent_losses == [loss for _, loss, _ in whole[:16]], "to the last bit"
    assert state.recent_norms == [norm for _, _, norm in whole[:16]]
    assert fit(tmp_path / "run", *LONG, steep_and()) == whole
    assert decisions(tmp_path / "run") == decisions(tmp_path / "whole")


def test_a_steep_gradient_is_taken_where_nobody_looks(tmp_path):
    off = "watch.grad_spike_factor=0"
    struck = fit(tmp_path / "struck", *LONG, off, kind="steep_stays", step=18)
    assert decisions(tmp_path / "struck") == []
    assert max(norm for _, _, norm in struck) > 1000


@pytest.mark.parametrize("kind", ["flip", "ulp"])
def test_a_changed_bit_in_one_replica_is_found_before_the_next_save(tmp_path, kind):
    with pytest.raises(RankFailure, match="replica checksums differ at step 8"):
        fit(tmp_path / "run", kind=kind, rank=1, ranks=2)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_00000004"
    ]
