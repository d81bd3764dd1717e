"""From a run's configuration to its model chunks."""

from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.devices import device
from megatron_ext.devices.precision import ddp_fields, transformer_fields

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def transformer_config(run: RunConfig, *, meta: bool = False) -> "TransformerConfig":
    """Megatron's description of the blocks. ``meta`` is for weights that will hold no values."""
    device.start()
    from megatron.core.transformer import TransformerConfig

    from megatron_ext.models.init import no_init

    model, dtype = run.model, run.precision.dtype
    with device.expected_warnings():
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups(),
            kv_channels=model.head_dim(),
            normalization=model.normalization,
            layernorm_epsilon=model.layernorm_epsilon,
            add_bias_linear=False,
            add_qkv_bias=model.add_qkv_bias,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method=no_init,
            output_layer_init_method=no_init,
            use_cpu_initialization=meta,
            perform_initialization=not meta,
            params_dtype=DTYPES[dtype],
            pipeline_dtype=DTYPES[dtype],
            bf16=dtype == "bf16",
            fp16=dtype == "fp16",
            attention_softmax_in_fp32=True,
            calculate_per_token_loss=True,
            cuda_graph_scope=[],
            **transformer_fields(run.precision),
            **(_parallel_fields(run) | _kernel_fields(run)),
        )


def _parallel_fields(run: RunConfig) -> dict[str, Any]:
    parallel = run.parallel
    full = parallel.recompute_granularity == "full"
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    overlap = parallel.overlap_p2p_comm and interleaved
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "sequence_parallel": parallel.sequence_parallel,
        "tp_comm_overlap": parallel.tp_comm_overlap,
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": not overlap,
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": parallel.recompute_num_layers if full else None,
        "recompute_modules": parallel.recompute_modules,
    }


def uses_transformer_engine(run: RunConfig) -> bool:
    """Whether the blocks are Transformer Engine's here, by the one decision in devices/paths.py."""
    from megatron_ext.devices import paths, probe

    found = probe.guard(cuda=device.current().name == "cuda")
    return paths.uses_transformer_engine(run, found)


def _kernel_fields(run: RunConfig) -> dict[str, Any]:
    """Fused kernels of the place where this runs; later keys override the parallel fields."""
    from megatron_ext.devices import paths, probe

    if uses_transformer_engine(run):
        from megatron_ext.models.te_spec import attention_backend

        found = probe.guard(cuda=True)
        return {
            "attention_backend": attention_backend(run.kernels),
            "gradient_accumulation_fusion": paths.fuses_weight_gradients(run, found),
            "bias_dropout_fusion": True,
            "bias_activation_fusion": True,
            "apply_rope_fusion": True,
        }
    fields = {"use_te_activation_func": True}  # Megatron's name for "the spec brings its own"
    if device.current().name == "cpu":
        from megatron_ext.devices import cpu

        fields |= cpu.transformer_fields()
    return fields


def _block_spec(
    run: RunConfig, config: "TransformerConfig", groups: "ProcessGroupCollection", stage: int | None
) -> "TransformerBlockSubmodules | Any":
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    if uses_transformer_engine(run):
        from megatron_ext.models.te_spec import te_layer_spec

        return te_layer_spec()
    from megatron_ext.models.local_spec import local_block_spec

    layers = get_num_layers_to_build(config, stage, groups.pp.rank())
    return local_block_spec(run.model, layers)


def build_model(
    run: RunConfig,
    groups: "ProcessGroupCollection",
    *,
    wrap_ddp: bool = True,
    meta: bool = False,
) -> list[Any]:
    """This rank's model chunks, one per virtual stage, with their initial weights.

    ``meta`` builds shapes only, for a dry run: call it under ``torch.device("meta")``.
    """
    config = transformer_config(run, meta=meta)
    if not wrap_ddp:  # the buffer that matmuls would add into is DDP's
        config.gradient_accumulation_fusion = False
    stages = run.parallel.virtual_pipeline_model_parallel_size
    chunks = [
        _build_chunk(run, config, groups, stage if stages else None) for stage in range(stages or 1)
    ]
    if not meta:
        from megatron_ext.models.init import initialise

        for chunk in chunks:
            initialise(chunk, run.model, tp_rank=groups.tp.rank(), seed=run.seed)
    return _wrap_ddp(run, config, chunks) if wrap_ddp else chunks


def _build_chunk(
    run: RunConfig, config: "TransformerConfig", groups: "ProcessGroupCollection", stage: int | None
) -> Any:
    from megatron_ext.models.gpt_model import GPT

    model, parallel = run.model, run.parallel
    last_stage = (parallel.virtual_pipeline_model_parallel_size or 1) - 1
    return GPT(
        model,
        config=config,
        transformer_layer_spec=_block_spec(run, config, groups, stage),
        vocab_size=model.padded_vocab(parallel.tensor_model_parallel_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.pp.rank() == 0 and stage in (None, 0),
        post_process=groups.pp.rank() == groups.pp.size() - 1 and stage in (None, last_stage),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        vp_stage=stage,
    )


def _wrap_ddp(run: RunConfig, config: "TransformerConfig", chunks: list[Any]) -> list[Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )

    parallel = run.parallel
    wrapped = []
    for number, chunk in enumerate(chunks):
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            **ddp_fields(run.precision),
        )
        wrapped.append(DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0))
    return wrapped
