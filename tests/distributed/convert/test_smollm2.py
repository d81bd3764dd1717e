"""A real pretrained model: SmolLM2-135M through every layout that its 9 and 3 heads allow."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from launch.compose import compose
from megatron_ext.convert.described import model_of
from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.evaluate import alone, parity
from megatron_ext.testing import env, meeting, run_on_ranks
from megatron_ext.train.read_metrics import read
from tests.convert.smollm2 import GOLDEN, folder, token_ids
from tests.distributed.convert.test_layouts import assert_same_bits

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "imported"
    report = to_megatron(folder(), target)
    assert report.parameters == 134_515_008 and report.tied
    return target


def batch(ids):
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0  # nothing follows the last token
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": mask,
        "position_ids": torch.arange(len(ids))[None],
    }


def losses_and_save(imported, target, ids, tp, pp):
    from megatron_ext.checkpoint.load import load
    from megatron_ext.checkpoint.save import save
    from megatron_ext.models.gpt import build_model
    from megatron_ext.parallel import groups
    from megatron_ext.train.step import run_schedule

    run = alone.alone(model_of(imported)[0])
    run.parallel = replace(
        run.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    collection = groups.start(run.parallel, env(), seed=1, init_method=meeting())
    chunks = build_model(run, collection, wrap_ddp=False)
    state = load(imported, run=run, chunks=chunks, optimizer=None, groups=collection)
    for name, row in ids.items():
        with torch.no_grad():
            total, count = run_schedule(
                [chunks[0].eval()],
                lambda row=row: iter([batch(row)]),
                num_microbatches=1,
                micro_batch_size=1,
                seq_length=len(row),
                forward_only=True,
                groups=collection,
            )
        assert total / count == pytest.approx(GOLDEN[name][2], abs=1e-3), name
    save(target, run=run, chunks=chunks, optimizer=None, state=state, groups=collection)


@pytest.mark.parametrize("tp, pp", [(1, 1), (3, 1), (1, 2), (1, 5)])
def test_losses_are_the_golden_ones_and_not_a_bit_is_lost(tp, pp, imported, tmp_path):
    ids = token_ids()
    for name, (count, first, _, _) in GOLDEN.items():
        assert len(ids[name]) == count and ids[name][:5] == first
    if tp * pp > 1:
        ids = {"code": ids["code"]}  # the shortest: layouts are about the weights
    run_on_ranks(losses_and_save, imported, tmp_path, ids, tp, pp, world_size=tp * pp, timeout=300)
    to_huggingface(tmp_path / "step_00000000", tmp_path / "back")
    assert_same_bits(folder(), tmp_path / "back")
    shutil.rmtree(tmp_path)


def compare(imported, ids):
    texts = {name: torch.tensor([row]) for name, row in ids.items()}
    reference = parity.reference_model(folder())
    theirs = {name: parity._run_reference(reference, row) for name, row in texts.items()}
    reference.double()  # what both fp32 models are rounded from
    with torch.no_grad():
        exact = {name: reference(row, use_cache=False).logits for name, row in texts.items()}
    del reference
    with alone.loaded(imported) as model:
        ours = {name: parity._run_ours(model, row) for name, row in texts.items()}
    for name, row in texts.items():
        found = parity.compare(name, theirs[name], ours[name], row)
        assert found.agrees, found.as_text()
        assert found.layers["logits"] < 1e-5 and found.same_next_token == 1.0
        errors = {
            "apart": found.largest_difference,
            "transformers": float((theirs[name].logits - exact[name]).abs().max()),
            "ours": float((ours[name].logits - exact[name]).abs().max()),
        }
        print(f"{name}, transformers and ours against fp64: {errors}")
        assert max(errors.values()) < 1e-4, (name, errors)  # of logits up to 48: 26 ulp


def test_logits_are_those_of_transformers(imported):
    ids = {name: row[:160] for name, row in token_ids().items()}
    run_on_ranks(compare, imported, ids, world_size=1, timeout=600)


STEPS = 20


def continued(imported, folder):
    """20 steps of the trainer on the code passage, one window a step, at PP 2."""
    from megatron_ext.parallel import groups
    from megatron_ext.train.build import build_trainer

    job = compose(
        [
            "name=smollm2",
            f"run_dir={folder / 'run'}",
            "model=smollm2_135m",
            "parallel=pp2",
            "precision=fp32",
            f"checkpoint.load={imported}",
            "checkpoint.load_optimizer=false",
            "batch.seq_length=175",
            "batch.global_batch_size=1",
            "optimizer.lr=1e-4",
            f"phases=[{{tokens: {175 * STEPS}, schedule: {{warmup_tokens: 350}}}}]",
            f"+data.sources.code={{path: {folder / 'code'}, max_epochs: {STEPS + 1}}}",
            "logging.tensorboard=false",
        ]
    )
    joined = groups.start(job.parallel, env(), seed=job.seed, init_method=meeting())
    trainer = build_trainer(job, env=env(), groups=joined)
    assert trainer.fit() == "finished"


def test_it_trains_twenty_steps_and_its_loss_falls(imported, tmp_path):
    row = token_ids()["code"]
    with CorpusWriter(tmp_path / "code", dtype=np.uint16) as corpus:
        corpus.add_document(row)
    (tmp_path / "run").mkdir()
    run_on_ranks(continued, imported, tmp_path, world_size=2, timeout=600)
    losses = [r["loss"] for r in read(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(GOLDEN["code"][2], abs=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    shutil.rmtree(tmp_path)  # a checkpoint of 1.6 GB
