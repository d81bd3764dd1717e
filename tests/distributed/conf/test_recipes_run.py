"""Every recipe trains through all of its phases, small, on the text that the repository ships."""

import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import compose
from launch.status import lines
from launch.truth import look
from megatron_ext.data.corpus import shipped
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.parallel.env import Env
from megatron_ext.testing import meeting, run_on_ranks
from megatron_ext.train.phases import Plan
from megatron_ext.train.read_metrics import read

RECIPES = [r for r in compose.choices("recipe") if "/" in r]

# What stands for the real corpus's domains where only the shipped text is at hand.
STANDS_FOR = {
    "zh-gov": "zh-rules",
    "zh-legal": "zh-rules",
    "zh-finance": "zh-tech",
    "zh-reference": "zh-nature",
    "zh-literature": "zh-stories",
    "zh-instruct": "zh-instruct",
    "en-web": "en-cooking",
    "en-encyclopaedia": "en-nature",
    "en-books": "en-stories",
    "en-movies": "en-stories",
    "code": "code",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The shipped text by domain; its tokens are its bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = defaultdict(list)
    for document in shipped.documents():
        texts[document.domain].append(document.text.encode())
    for part in ("train", "validation"):
        (folder / part).mkdir()
        for domain, source in STANDS_FOR.items():
            with CorpusWriter(folder / part / domain, dtype=np.uint16) as writer:
                for text in texts[source]:
                    writer.add_document(np.frombuffer(text, dtype=np.uint8))
    return folder


def _fit(words: list[str]) -> None:
    from megatron_ext.devices import device

    device.start()
    from megatron_ext.parallel import groups
    from megatron_ext.train.build import build_trainer

    job = compose.compose(words)
    env = Env.read(os.environ)
    joined = groups.start(job.parallel, env, seed=job.seed, init_method=meeting())
    trainer = build_trainer(job, env=env, groups=joined)
    folder = Path(job.folder())
    if env.rank == 0:
        folder.mkdir(exist_ok=True, parents=True)
        compose.save(job, folder / "config.yaml")
    assert trainer.fit() == "finished"
    if env.rank == 0:
        (folder / "ledger.json").write_text(json.dumps(trainer.state.ledger))
    trainer.stop.remove()
    groups.stop()


def fit(recipe: str, corpus: Path, folder: Path, *, ranks: int = 1, more: tuple[str, ...] = ()):
    """The job, its plan and its metrics after a whole run."""
    words = [f"recipe={recipe}", "scale=tiny", f"scale.corpus={corpus}", f"scale.ranks={ranks}"]
    words += [f"run_dir={folder}", "logging.tensorboard=false", *more]
    run_on_ranks(_fit, words, world_size=ranks)
    job = compose.load(folder / "config.yaml")
    return job, Plan.of(job), [r for r in read(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_whole(recipe, corpus, tmp_path):
    job, plan, records = fit(recipe, corpus, tmp_path)
    assert len(records) == plan.steps or any(
        p.batch_growth.max_global_batch_size for p in job.phases
    )
    assert [r["phase"] for r in records[:: max(len(records) - 1, 1)]] == [
        plan.phases[0].name,
        plan.phases[-1].name,
    ]
    assert {r["phase"] for r in records} == {p.name for p in plan.phases}
    assert all(math.isfinite(r["loss"]) and r["updated"] for r in records)
    # Final states have unit RMS, so logits vary by 1 under Norm-Head and by width * std^2 without.
    model = job.model
    variance = 1.0 if model.norm_head else model.hidden_size * model.init_method_std**2
    expected = math.log(model.vocab_size) + variance / 2
    assert records[0]["loss"] == pytest.approx(expected, abs=0.35)
    read_from = {name for name, facts in json.loads((tmp_path / "ledger.json").read_text()).items()
                 if facts["tokens"]}  # fmt: skip
    mixed = {name for p in job.phases for name, share in p.mixture.items() if share >= 0.1}
    assert mixed <= read_from


def test_skywork_runs_on_its_two_pipeline_stages_and_shows_what_it_consumed(corpus, tmp_path):
    drawn = ("logging.tensorboard=true",)
    job, plan, records = fit("skywork_13b/stage2", corpus, tmp_path, ranks=2, more=drawn)
    assert job.parallel.pipeline_model_parallel_size == 2
    assert len(records) == plan.steps
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert sum(line["tokens"] > 0 for line in ledger.values()) > 1
    state = look(tmp_path)
    assert state.ledger == ledger and state.saved_step == plan.steps
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for source, line in ledger.items():
        assert f"{line['tokens']:,} tokens" in next(t for t in lines(state) if source in t)
        for count in ("tokens", "documents", "epochs", "skipped_windows"):
            last = events.Scalars(f"ledger_{count}/{source}")[-1]
            assert (last.step, last.value) == (plan.steps, pytest.approx(line[count]))


def test_the_batch_of_yi_9b_grows_on_plateaus_and_stays_grown_in_the_next_stage(corpus, tmp_path):
    words = ("phases.0.batch_growth={patience_steps: 1, smoothing_steps: 1, threshold: 0.9}",)
    job, _, records = fit("yi_9b/continued", corpus, tmp_path, more=words)
    sizes = [r["global_batch_size"] for r in records if r["phase"] == "stage1"]
    assert sizes[0] == job.batch.global_batch_size and sizes[-1] > sizes[0]
    assert sizes == sorted(sizes)
    second = [r["global_batch_size"] for r in records if r["phase"] == "stage2"]
    assert second[0] >= sizes[-1]
