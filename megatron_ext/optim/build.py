"""Megatron's own optimizer for a run: AdamW behind its plain or its distributed wrapper."""

from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.devices.precision import optimizer_fields
from megatron_ext.optim.moments import reset_moments as reset_moments

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_optimizer(
    run: "RunConfig", chunks: list[Any], groups: "ProcessGroupCollection"
) -> "MegatronOptimizer":
    """AdamW over the DDP-wrapped ``chunks``; norms and biases are not decayed.

    The learning rate is the peak until ``set_learning_rate`` is called. Nothing in it is ever
    read from a checkpoint, so what the configuration asks for is what a resumed run does.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    asked = run.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=asked.lr,
        min_lr=asked.min_lr,
        weight_decay=asked.weight_decay,
        adam_beta1=asked.adam_beta1,
        adam_beta2=asked.adam_beta2,
        adam_eps=asked.adam_eps,
        clip_grad=asked.clip_grad,
        params_dtype=DTYPES[run.precision.dtype],
        **optimizer_fields(run.precision),
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        config, chunks, use_gloo_process_groups=True, pg_collection=None
    )
    _apply_weight_decay(optimizer, asked.weight_decay)
    _fuse(optimizer)
    return optimizer


def set_learning_rate(optimizer: "MegatronOptimizer", lr: float) -> None:
    """Make ``lr`` the rate of the next update.

    Megatron's groups carry a peak and a floor of their own, from which its scheduler would compute
    another rate; they are set too, so that no stale one is left anywhere.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] = group["min_lr"] = lr


def _apply_weight_decay(optimizer: "MegatronOptimizer", weight_decay: float) -> None:
    """Megatron marks groups with ``wd_mult`` and leaves it to its scheduler, which we replace."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]


def _fuse(optimizer: "MegatronOptimizer") -> None:
    """torch's Adam, used where neither Transformer Engine nor apex is, has a fused kernel."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
