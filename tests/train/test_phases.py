"""The plan of a run: phases resolved, cut into steps, and refused when they cannot work."""

import math

import pytest

from megatron_ext.check import check_run
from megatron_ext.config import RunConfig
from megatron_ext.data.config import SourceConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.optim.config import ScheduleConfig
from megatron_ext.train.config import BatchConfig, BatchStep, PhaseConfig, PlateauGrowth
from megatron_ext.train.phases import Plan
from megatron_ext.train.state import TrainState


def run(*phases: PhaseConfig, **changes) -> RunConfig:
    base = RunConfig(
        name="test",
        model=ModelConfig(
            num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=100
        ),
        phases=list(phases) or [PhaseConfig(tokens=6400)],
        batch=BatchConfig(global_batch_size=4, micro_batch_size=2, seq_length=16),
    )
    base.data.sources = {"web": SourceConfig(path="w"), "books": SourceConfig(path="b")}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        setattr(getattr(base, part), name, value) if name else setattr(base, part, value)
    return base


def test_a_phase_is_rounded_up_to_whole_steps():
    plan = Plan.of(run(PhaseConfig(tokens=65), PhaseConfig(tokens=64)))
    assert [p.steps for p in plan.phases] == [2, 1]
    assert [p.tokens for p in plan.phases] == [128, 64]
    assert [p.start_tokens for p in plan.phases] == [0, 128]


def test_what_a_phase_leaves_out_comes_from_the_run_and_theta_stays():
    plan = Plan.of(
        run(
            PhaseConfig(tokens=64),
            PhaseConfig(tokens=64, rotary_base=3.2e5, seq_length=32),
            PhaseConfig(tokens=64),
        )
    )
    assert [p.seq_length for p in plan.phases] == [16, 32, 16]
    assert [p.rotary_base for p in plan.phases] == [10000.0, 3.2e5, 3.2e5]


def test_batch_steps_take_hold_at_their_tokens():
    growing = PhaseConfig(
        tokens=64 * 10 + 128 * 5, batch_steps=[BatchStep(after_tokens=640, global_batch_size=8)]
    )
    phase = Plan.of(run(growing)).phases[0]
    assert phase.batches() == [(10, 4, 0), (5, 8, 640)]
    assert phase.global_batch_size(639) == 4
    assert phase.global_batch_size(640) == 8


def test_steps_left_count_down_to_zero():
    plan = Plan.of(run(PhaseConfig(tokens=640), PhaseConfig(tokens=640)))
    state = TrainState()
    assert plan.steps_left(state) == 20
    state.phase, state.phase_tokens = 1, 640 - 64
    assert plan.steps_left(state) == 1
    state.phase, state.phase_tokens = 2, 0
    assert plan.steps_left(state) == 0 and plan.finished(state)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (run(parallel__tensor_model_parallel_size=3),
         ["model.num_attention_heads=4", "tensor_model_parallel_size=3", "1, 2 or 4"]),
        (run(parallel__pipeline_model_parallel_size=3),
         ["model.num_layers=4", "3 stages", "2 or 4"]),
        (run(batch__global_batch_size=5), ["batch.global_batch_size=5", "2*1 = 2", "4 or 6"]),
        (run(model__padded_vocab_size=101, parallel__tensor_model_parallel_size=2),
         ["model.padded_vocab_size=101", "tensor_model_parallel_size=2", "100 or 102"]),
        (run(model__vocab_size=300, model__padded_vocab_size=256), ["256", "smaller", "300"]),
        (run(parallel__sequence_parallel=True), ["sequence_parallel", "at least 2"]),
        (run(PhaseConfig(tokens=64, mixture={"web": 0.5, "books": 0.4})), ["0.5 + 0.4 = 0.9"]),
        (run(PhaseConfig(tokens=64, mixture={"wed": 1.0})), ["phases.0.mixture.wed", "web"]),
        (run(PhaseConfig(tokens=64, mixture={"web": 1.5, "books": -0.5})),
         ["phases.0.mixture.web=1.5", "between 0 and 1"]),
        (run(PhaseConfig(tokens=64, mixture={"web": math.nan, "books": 1.0})),
         ["phases.0.mixture.web=nan", "between 0 and 1"]),
        (run(PhaseConfig(tokens=64, mixture={"web": 1.0}, mixture_end={"web": 0.6})),
         ["phases.0.mixture_end", "0.6 = 0.6"]),
        (run(PhaseConfig(tokens=64, mixture_end={"web": 1.0})),
         ["phases.0.mixture_end needs phases.0.mixture"]),
        *((run(PhaseConfig(tokens=64, ramp_power=power)), [f"phases.0.ramp_power={power}", "x **"])
          for power in (0.0, math.nan, math.inf)),
        (run(PhaseConfig(tokens=64), PhaseConfig(tokens=64, rotary_base=0.0)),
         ["phases.1.rotary_base=0 must", "base **"]),
        (run(model__rotary_base=-1e4), ["model.rotary_base=-10000 must"]),
        (run(PhaseConfig(tokens=64, seq_length=0)), ["phases.0.seq_length=0", "null"]),
        (run(PhaseConfig(tokens=64, global_batch_size=0)), ["phases.0.global_batch_size=0"]),
        (run(data__sources={"web": SourceConfig(path="w", max_epochs=math.nan)}),
         ["data.sources.web.max_epochs=nan must be above 0"]),
        (run(PhaseConfig(tokens=64, batch_steps=[BatchStep(after_tokens=64, global_batch_size=8)])),
         ["phases.0.batch_steps.0.after_tokens=64", "phases.0.tokens=64"]),
        (run(PhaseConfig(tokens=64, packing="tight")), ["packing=tight", "crossdoc"]),
        (run(PhaseConfig(tokens=64, optimizer_state="drop")), ["optimizer_state=drop", "reset"]),
        (run(PhaseConfig(tokens=64, schedule=ScheduleConfig(name="wds"))), ["name=wds", "wsd"]),
        (run(PhaseConfig(tokens=64, schedule=ScheduleConfig(warmup_tokens=65))),
         ["phases.0.schedule.warmup_tokens=65", "64 tokens"]),
        (run(PhaseConfig(tokens=640, batch_steps=[BatchStep(after_tokens=9, global_batch_size=7)])),
         ["phases.0.batch_steps.0.global_batch_size=7", "6 or 8"]),
        (run(PhaseConfig(tokens=64, batch_growth=PlateauGrowth(max_global_batch_size=7))),
         ["batch_growth.max_global_batch_size=7"]),
        (run(batch__seq_length=0), ["batch.seq_length=0", "at least 1"]),
        (run(PhaseConfig(tokens=64, global_batch_size=-2)), ["phases.0.global_batch_size=-2"]),
        (run(PhaseConfig(tokens=640, batch_steps=[BatchStep(after_tokens=9, global_batch_size=0)])),
         ["phases.0.batch_steps.0.global_batch_size=0", "at least 1"]),
        (run(parallel__pipeline_model_parallel_size=2,
             parallel__virtual_pipeline_model_parallel_size=0),
         ["virtual_pipeline_model_parallel_size=0", "null"]),
        (run(name="a/b"), ["name='a/b'"]),
        (run(model__num_query_groups=3), ["num_query_groups=3", "1, 2 or 4"]),
        (run(model__norm_head=True, model__untie_embeddings_and_output_weights=False),
         ["norm_head", "untie"]),
    ],
)  # fmt: skip
def test_an_impossible_run_is_refused_with_key_arithmetic_and_way_out(config, words):
    world = config.parallel.model_parallel_size()
    with pytest.raises(ValueError) as refusal:
        check_run(config, world_size=world)
    sentence = str(refusal.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_a_world_size_that_holds_no_whole_model_is_refused():
    config = run(parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"world size 6 is not a multiple of .* 2\*2\*1 = 4") as no:
        check_run(config, world_size=6)
    assert "tensor_model_parallel_size to 1 or 3" in str(no.value)


def test_uneven_stages_are_counted_and_leftovers_refused():
    config = run(parallel__pipeline_model_parallel_size=3)
    config.parallel.num_layers_in_first_pipeline_stage = 1
    config.parallel.num_layers_in_last_pipeline_stage = 1
    assert config.parallel.layers_per_stage(4) == [1, 2, 1]
    config.parallel.pipeline_model_parallel_size = 2
    with pytest.raises(ValueError, match="leave 2 of"):
        config.parallel.layers_per_stage(4)
    config.parallel.pipeline_model_parallel_size = 6
    # 10 layers between the ends: 1, 2, 5 or 10 stages there, and the two ends.
    with pytest.raises(ValueError, match=r"10 layers / 4 middle stages\): use 3, 4 or 7 stages"):
        config.parallel.layers_per_stage(12)


def test_padding_follows_megatrons_rule():
    index = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=65029
    )
    assert [index.padded_vocab(tp) for tp in (1, 2, 4, 8)] == [65152, 65280, 65536, 65536]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"checkpoint__interval_steps": 0}, "checkpoint.interval_steps=0"),
        ({"checkpoint__keep": -1}, "checkpoint.keep=-1"),
        ({"logging__interval_steps": 0}, "logging.interval_steps=0"),
        ({"evaluation__interval_steps": -1}, "evaluation.interval_steps=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_counts_that_mean_nothing_are_refused(changes, key):
    with pytest.raises(ValueError, match=f"{key} must"):
        check_run(run(**changes), world_size=1)
