"""A rank that holds the others up is named in real runs on gloo ranks; clean runs name nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.resilience.drill import SLOW_SECONDS
from megatron_ext.resilience.stragglers import known
from megatron_ext.train.read_metrics import read
from tests.distributed.resilience.test_bad_steps import fit

STEPS = "phases=[{tokens:3840}]"  # 30 steps
EVERY_5 = "watch.straggler_interval_steps=5"


def _named(run_dir: Path) -> list[dict]:
    path = run_dir / "stragglers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"), [("slow", 2, []), ("late", 4, ["parallel=tp2"])]
)
def test_the_slow_rank_is_named_within_twenty_steps(tmp_path, kind, ranks, layout):
    rank = ranks - 1
    fit(tmp_path / "run", STEPS, EVERY_5, *layout, kind=kind, rank=rank, ranks=ranks)
    (found,) = _named(tmp_path / "run")
    assert (found["rank"], found["over"]) == (rank, False)
    assert found["step"] <= 6 + 20
    assert found["seconds"] > SLOW_SECONDS / 2  # a busy machine hides some of it
    rows = [row for row in read(tmp_path / "run" / "metrics.jsonl") if "slowest_rank" in row]
    (then,) = [row for row in rows if row["step"] == found["step"]]
    assert (then["slowest_rank"], then["slowest_ratio"]) == (rank, found["ratio"])
    assert f"rank {rank} on " in known(tmp_path / "run", attempt="")[0].line()


def test_a_clean_run_on_a_loaded_machine_names_nobody(tmp_path):
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(len(os.sched_getaffinity(0)) + 1)
    ]
    try:
        fit(tmp_path / "run", STEPS, EVERY_5, ranks=4)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert _named(tmp_path / "run") == []
    rows = [row for row in read(tmp_path / "run" / "metrics.jsonl") if "slowest_rank" in row]
    assert len(rows) == 6
