"""Buffers through which Transformer Engine overlaps TP traffic with the matmuls."""

from megatron_ext.config import RunConfig


def start_buffers(run: RunConfig) -> None:
    """Allocate them where ``parallel.tp_comm_overlap`` asks; every rank must call this.

    They have one size, micro-batch x sequence x hidden: ``overlap.check`` has refused runs whose
    phases differ in length. Megatron's layers find them by name.
    """
    if not run.parallel.tp_comm_overlap:
        return
    import torch
    from transformer_engine.pytorch.module.base import (
        UserBufferQuantizationMode as Mode,
    )
    from transformer_engine.pytorch.module.base import initialize_ub

    length = run.phases[0].seq_length or run.batch.seq_length
    tokens = run.batch.micro_batch_size * length // run.parallel.context_parallel_size
    modes = [Mode.NONE] if run.precision.fp8 is None else [Mode.FP8]
    if run.precision.first_last_layers_bf16:
        modes = [Mode.FP8, Mode.NONE]  # the ends are bf16, the rest FP8
    initialize_ub(
        shape=[tokens, run.model.hidden_size],
        tp_size=run.parallel.tensor_model_parallel_size,
        quantization_modes=modes,
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
