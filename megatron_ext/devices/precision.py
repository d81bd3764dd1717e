"""A precision's way into Megatron's own fields, and the sizes FP8 demands."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import PrecisionConfig
from megatron_ext.legal import nearest
from megatron_ext.models.config import ModelConfig
from megatron_ext.parallel.config import ParallelConfig


def transformer_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig, apart from the torch dtypes.

    ``bf16``, ``fp16``, ``params_dtype`` and ``pipeline_dtype`` follow from ``precision.dtype``.
    """
    if precision.fp8 is None:
        return {}
    fields: dict[str, Any] = {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": precision.fp8_param,
        "tp_only_amax_red": precision.tp_only_amax_red,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }
    if precision.fp8_recipe == "delayed":
        fields |= {
            "fp8_margin": precision.fp8_margin,
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
            "fp8_wgrad": precision.fp8_wgrad,
        }
    return fields


def ddp_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron-core's DistributedDataParallelConfig."""
    fields: dict[str, Any] = {"grad_reduce_in_fp32": precision.grad_reduce_in_fp32}
    if precision.fp8 is not None and precision.fp8_param:
        fields["fp8_param_gather"] = True
        if precision.fp8_recipe == "mxfp8":
            # MXFP8 weights have no flat buffer to gather into: the gradient buffer serves.
            fields["reuse_grad_buf_for_mxfp8_param_ag"] = True
    return fields


def optimizer_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of megatron-core's OptimizerConfig, apart from ``params_dtype``."""
    fields: dict[str, Any] = {
        "bf16": precision.dtype == "bf16",
        "fp16": precision.dtype == "fp16",
    }
    if precision.dtype == "fp16":
        fields["initial_loss_scale"] = precision.initial_loss_scale
        fields["loss_scale_window"] = precision.loss_scale_window
    if precision.fp8 is not None:
        fields["fp8_recipe"] = precision.fp8_recipe
        if precision.fp8_param and precision.fp8_recipe == "mxfp8":
            fields["reuse_grad_buf_for_mxfp8_param_ag"] = True
    return fields


@dataclass(frozen=True)
class Gemm:
    """One linear layer of a block as one TP rank holds it."""

    name: str
    key: str
    """What a person would change."""

    rows: int
    columns: int


def block_gemms(model: ModelConfig, tensor_parallel_size: int) -> list[Gemm]:
    """Weight shapes of a block's four matmuls on one rank: the ones that FP8 computes."""
    tp, hidden, head = tensor_parallel_size, model.hidden_size, model.head_dim()
    heads, groups = model.num_attention_heads, model.query_groups()
    ffn = model.ffn_hidden_size // tp
    return [
        Gemm("linear_qkv", "model.num_query_groups", (heads + 2 * groups) * head // tp, hidden),
        Gemm("linear_proj", "model.num_attention_heads", hidden, heads * head // tp),
        Gemm("linear_fc1", "model.ffn_hidden_size", 2 * ffn, hidden),
        Gemm("linear_fc2", "model.ffn_hidden_size", hidden, ffn),
    ]


def fp8_multiple(recipe: str) -> int:
    """What every dimension of an FP8 matmul must be a multiple of (megatron-core's own rule)."""
    return 32 if recipe == "mxfp8" else 16


def refuse_fp8_shapes(
    model: ModelConfig, parallel: ParallelConfig, *, recipe: str, tokens: int
) -> None:
    """Refuse block matmuls that FP8 tensor cores cannot take on one rank.

    ``tokens`` is what one rank feeds a block's matmul at once: the third dimension.

    Raises:
        ValueError: naming the layer, the arithmetic and a way out.
    """
    multiple, tp = fp8_multiple(recipe), parallel.tensor_model_parallel_size
    for gemm in block_gemms(model, tp):
        for side, size in (("rows", gemm.rows), ("columns", gemm.columns)):
            if size % multiple:
                key = "model.hidden_size" if size == model.hidden_size else gemm.key
                legal = [t for t in (1, 2, 4, 8, 16) if not _misfits(model, t, multiple)]
                way_out = f"a tensor_model_parallel_size of {nearest(legal, tp)}, or " * bool(legal)
                raise ValueError(
                    f"precision.fp8_recipe={recipe} needs multiples of {multiple}, but "
                    f"{gemm.name} has {size} {side} on each of "
                    f"parallel.tensor_model_parallel_size={tp} ranks ({key}; {size} / {multiple} "
                    f"= {size / multiple:.2f}): use {way_out}precision=bf16."
                )
    if tokens % multiple:
        raise ValueError(
            f"precision.fp8_recipe={recipe} needs multiples of {multiple}, but a block sees "
            f"{tokens} tokens at once on each rank (micro_batch_size * seq_length / "
            f"(context_parallel_size * tensor_model_parallel_size if sequence_parallel)): change "
            f"batch.seq_length or batch.micro_batch_size, or use precision=bf16."
        )


def _misfits(model: ModelConfig, tp: int, multiple: int) -> bool:
    sizes = (model.num_attention_heads, model.query_groups(), model.ffn_hidden_size)
    if any(size % tp for size in sizes):
        return True
    gemms = block_gemms(model, tp)
    return any(size % multiple for gemm in gemms for size in (gemm.rows, gemm.columns))


def check(run: RunConfig, *, seq_lengths: list[int]) -> None:
    """Refuse what a precision and the rest of the run cannot be together.

    ``seq_lengths`` are those of the run's phases.

    Raises:
        ValueError: naming the dotted keys, the arithmetic and the way out.
    """
    precision, parallel = run.precision, run.parallel
    if precision.fp8 is None:
        return
    if precision.fp8_param:
        raise ValueError(
            "precision.fp8_param=true cannot be trained: our initial weights are drawn after the "
            "layers are built, and Megatron takes the fp32 masters of FP8 weights from before; set "
            "it to false (the matmuls stay FP8, weights are gathered in bf16)."
        )
    if run.kernels.transformer_impl == "local":
        raise ValueError(
            f"precision.fp8={precision.fp8} needs Transformer Engine's layers, and "
            f"kernels.transformer_impl=local leaves them out: set it to auto, or use "
            f"precision=bf16."
        )
    _check_ends(run)
    shared = parallel.context_parallel_size
    if parallel.sequence_parallel:
        shared *= parallel.tensor_model_parallel_size
    for length in sorted(set(seq_lengths)):
        tokens = run.batch.micro_batch_size * length // shared
        refuse_fp8_shapes(run.model, parallel, recipe=precision.fp8_recipe, tokens=tokens)


def _check_ends(run: RunConfig) -> None:
    """Megatron's limit: bf16 blocks at an end must fit into one pipeline stage."""
    if not run.precision.first_last_layers_bf16:
        return
    stages = run.parallel.pipeline_model_parallel_size
    most = run.model.num_layers // stages
    for end in ("start", "end"):
        key = f"num_layers_at_{end}_in_bf16"
        asked = getattr(run.precision, key)
        if not 0 <= asked <= most:
            raise ValueError(
                f"precision.{key}={asked} must lie between 0 and the layers of one pipeline stage "
                f"(model.num_layers / PP = {run.model.num_layers} / {stages} = {most})."
            )
