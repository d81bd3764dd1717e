"""Each precision maps to Megatron's own fields, and is refused where it cannot run."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_ext.config import RunConfig
from megatron_ext.devices import cuda, precision
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.train.config import PhaseConfig

CONF = Path(__file__).parents[2] / "conf"
PRECISIONS = sorted(path.stem for path in (CONF / "precision").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))

# gpu_stack table of Transformer Engine 2.20.2's own check, driven by a faked capability.
TRANSFORMER_ENGINE_SAYS = {
    "fp8_delayed": {(8, 0): 0, (8, 9): 1, (9, 0): 1, (10, 0): 1, (12, 0): 1},
    "fp8_current": {(8, 0): 0, (8, 9): 1, (9, 0): 1, (10, 0): 1, (12, 0): 1},
    "fp8_block": {(8, 0): 0, (8, 9): 0, (9, 0): 1, (10, 0): 1, (12, 0): 1},
    "mxfp8": {(8, 0): 0, (8, 9): 0, (9, 0): 0, (10, 0): 1, (12, 0): 0},
}


def load(name: str) -> PrecisionConfig:
    return PrecisionConfig(**yaml.safe_load((CONF / "precision" / f"{name}.yaml").read_text()))


def fields(name: str) -> dict[str, object]:
    """A model file with the files it builds on."""
    own = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    below = [fields(base) for base in own.pop("defaults", []) if base != "_self_"]
    return {key: value for part in [*below, own] for key, value in part.items()}


def model(name: str) -> ModelConfig:
    return ModelConfig(**fields(name))  # type: ignore[arg-type]


def run(**parts: object) -> RunConfig:
    shape = ModelConfig(
        num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=100
    )
    base = RunConfig(name="x", model=shape, phases=[PhaseConfig(tokens=1)])
    return replace(base, **parts)  # type: ignore[arg-type]


def megatron_fields(module: str, class_names: set[str]) -> set[str]:
    """Field names of megatron-core's config dataclasses, read from source: importing costs 7 s."""
    core = importlib.util.find_spec("megatron")
    assert core is not None and core.submodule_search_locations
    source = (Path(next(iter(core.submodule_search_locations))) / module).read_text()
    return {
        node.target.id
        for cls in ast.walk(ast.parse(source))
        if isinstance(cls, ast.ClassDef) and cls.name in class_names
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_the_promised_precisions_are_there() -> None:
    assert set(PRECISIONS) == {"bf16", "fp16", "fp32", *TRANSFORMER_ENGINE_SAYS}


@pytest.mark.parametrize("name", PRECISIONS)
def test_each_precision_is_legal_and_named_like_its_file(name: str) -> None:
    loaded = load(name)
    loaded.check()
    assert loaded.word() == name


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_mapped_field_is_one_of_megatrons(name: str) -> None:
    for fp8_param in (False, True):
        asked = replace(load(name), fp8_param=fp8_param)
        transformer = megatron_fields(
            "core/transformer/transformer_config.py", {"TransformerConfig"}
        )
        assert set(precision.transformer_fields(asked)) <= transformer
        ddp = megatron_fields(
            "core/distributed/distributed_data_parallel_config.py",
            {"DistributedDataParallelConfig"},
        )
        assert set(precision.ddp_fields(asked)) <= ddp
        optimizer = megatron_fields("core/optimizer/optimizer_config.py", {"OptimizerConfig"})
        assert set(precision.optimizer_fields(asked)) <= optimizer


def test_fp8_settings_reach_megatron_only_where_the_recipe_has_them() -> None:
    assert precision.transformer_fields(load("bf16")) == {}
    delayed = precision.transformer_fields(load("fp8_delayed"))
    assert delayed["fp8_amax_history_len"] == 1024 and delayed["fp8"] == "hybrid"
    assert "fp8_amax_history_len" not in precision.transformer_fields(load("mxfp8"))
    gathered = replace(load("mxfp8"), fp8_param=True)
    assert precision.ddp_fields(gathered)["reuse_grad_buf_for_mxfp8_param_ag"]


@pytest.mark.parametrize("name", sorted(TRANSFORMER_ENGINE_SAYS))
def test_capabilities_agree_with_transformer_engines_own_check(name: str) -> None:
    for capability, says in TRANSFORMER_ENGINE_SAYS[name].items():
        assert cuda.can_run(name, capability) is bool(says), capability
    assert not cuda.can_run(name, None)


def test_a_refused_precision_names_the_nearest_device_and_the_nearest_precision() -> None:
    with pytest.raises(ValueError, match="nearest device being b200") as hopper:
        cuda.refuse_precision("mxfp8", (9, 0), where="cluster.hardware=h100")
    assert "precision=fp8_block" in str(hopper.value)
    with pytest.raises(ValueError, match="nearest device being rtx4090") as cpu:
        cuda.refuse_precision("fp8_current", None, where="this machine")
    assert "a CPU" in str(cpu.value) and "precision=bf16" in str(cpu.value)
    with pytest.raises(ValueError, match="precision=fp16"):
        cuda.refuse_precision("bf16", (7, 0), where="cluster.hardware=v100")


@pytest.mark.parametrize(
    "name, chip", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GB200", "gb200"), ("Tesla K80", "")]
)
def test_the_drivers_name_of_a_gpu_finds_its_chip(name: str, chip: str) -> None:
    assert cuda.chip_of_name(name) == chip


def test_every_hardware_file_has_a_capability_that_agrees_with_its_fp8_recipes() -> None:
    files = sorted((CONF / "hardware").glob("*.yaml"))
    words = {"delayed": "fp8_delayed", "tensorwise": "fp8_current", "blockwise": "fp8_block"}
    for file in files:
        capability = cuda.capability_of(file.stem)
        stated = {words.get(r, r) for r in yaml.safe_load(file.read_text())["fp8_recipes"]}
        assert {p for p in TRANSFORMER_ENGINE_SAYS if cuda.can_run(p, capability)} == stated, file
        chip = next(c for c in cuda.CHIPS if file.stem.split("_")[0] == c)
        peak = yaml.safe_load(file.read_text())["bf16_tflops"]["value"]
        assert cuda.DENSE_TFLOPS[chip] == peak
    assert set(cuda.DENSE_TFLOPS) == set(cuda.CHIPS)
    assert cuda.capability_of("cpu") is None
    with pytest.raises(ValueError, match=r"cluster\.hardware=abacus is not known"):
        cuda.capability_of("abacus")


PUBLISHED = ("index_1p9b", "stablelm2_1p6b", "skywork_13b", "yi_6b", "yi_9b", "yi_34b")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe, multiple", [("delayed", 16), ("mxfp8", 32)])
def test_every_model_at_every_legal_tp_is_judged_by_its_smallest_dimensions(
    name: str, recipe: str, multiple: int
) -> None:
    shape = model(name)
    for tp in (1, 2, 3, 4, 8):
        parallel = ParallelConfig(tensor_model_parallel_size=tp)
        try:
            shape.check(parallel)
        except ValueError:
            continue
        heads = shape.num_attention_heads + 2 * shape.query_groups()
        head = shape.head_dim()
        sizes = [heads * head / tp, shape.num_attention_heads * head / tp]
        sizes += [shape.ffn_hidden_size / tp, shape.hidden_size]
        if all(size % multiple == 0 for size in sizes):
            precision.refuse_fp8_shapes(shape, parallel, recipe=recipe, tokens=4096)
            continue
        assert name not in PUBLISHED, (name, tp, sizes)
        with pytest.raises(ValueError, match=f"needs multiples of {multiple}"):
            precision.refuse_fp8_shapes(shape, parallel, recipe=recipe, tokens=4096)


def test_a_shape_that_fp8_cannot_take_is_refused_with_the_arithmetic() -> None:
    shape = replace(model("index_1p9b"), ffn_hidden_size=5880)
    with pytest.raises(ValueError, match=r"linear_fc2 has 5880 columns.*5880 / 16 = 367\.50"):
        parallel = ParallelConfig()
        precision.refuse_fp8_shapes(shape, parallel, recipe="tensorwise", tokens=4096)


def test_tp_that_breaks_fp8_names_one_that_does_not() -> None:
    shape = ModelConfig(
        num_layers=2, hidden_size=256, ffn_hidden_size=544, num_attention_heads=8, vocab_size=100
    )
    with pytest.raises(ValueError, match="tensor_model_parallel_size of 1 or 2"):
        parallel = ParallelConfig(tensor_model_parallel_size=4)
        precision.refuse_fp8_shapes(shape, parallel, recipe="delayed", tokens=4096)


def test_tokens_of_a_rank_count_too() -> None:
    fp8 = run(
        precision=load("fp8_delayed"),
        parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
    )
    precision.check(fp8, seq_lengths=[4096])
    with pytest.raises(ValueError, match="a block sees 30 tokens"):
        precision.check(fp8, seq_lengths=[4096, 120])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"fp8": "e5m2"}, "precision.fp8=e5m2"),
        ({"dtype": "fp16"}, "needs precision.dtype=bf16"),
        ({"fp8_recipe": "nvfp4"}, "precision.fp8_recipe=nvfp4"),
        ({"first_last_layers_bf16": True}, "fp8_recipe=delayed"),
        ({"fp8_amax_history_len": 0}, "at least 1"),
        ({"fp8": None, "fp8_param": True}, "precision.fp8 is null"),
        ({"fp8_recipe": "tensorwise", "fp8_margin": 1}, "reach precision.fp8_recipe=delayed"),
    ],
)
def test_illegal_fp8_combinations_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(load("fp8_delayed"), **changed).check()  # type: ignore[arg-type]


def test_fp8_weights_are_refused_and_fp8_needs_transformer_engine() -> None:
    fp8 = replace(load("fp8_delayed"), fp8_param=True)
    with pytest.raises(ValueError, match="fp8_param=true cannot be trained"):
        precision.check(run(precision=fp8), seq_lengths=[4096])
    with pytest.raises(ValueError, match="and kernels"):
        local = KernelsConfig(transformer_impl="local")
        precision.check(run(precision=load("fp8_delayed"), kernels=local), seq_lengths=[4096])


def test_bf16_ends_must_fit_a_pipeline_stage() -> None:
    ends = replace(load("fp8_current"), num_layers_at_end_in_bf16=3)
    two_stages = ParallelConfig(pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"num_layers_at_end_in_bf16=3 .* 4 / 2 = 2"):
        precision.check(run(precision=ends, parallel=two_stages), seq_lengths=[4096])
