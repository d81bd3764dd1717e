"""Each layer's share of the squared gradient norm: Index-1.9B's look at its LM head."""

import re
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.train.callback import Callback, Metrics

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class GradientShare(Callback):
    """Adds ``gradient_share``: embedding, each layer by its global number, final norm, head.

    The Index-1.9B release observes that the LM head owns most of the gradient norm; the shares
    sum to 1. Costs one pass over the gradients, so it is taken every ``interval`` steps.
    """

    def __init__(self, *, interval: int):
        self.interval = interval

    def after_step(self, trainer: "Trainer", metrics: Metrics) -> None:
        """One all-reduce of ``num_layers + 3`` numbers over the job."""
        if metrics["step"] % self.interval:
            return
        layers = trainer.run.model.num_layers
        place = next(trainer.model[0].parameters()).device
        squares = torch.zeros(layers + 3, dtype=torch.float64, device=place)
        for chunk in trainer.model:
            _add_squares(chunk, squares, trainer.groups)
        torch.distributed.all_reduce(squares)
        names = ["embedding", *(f"layer{i}" for i in range(layers)), "final_norm", "head"]
        total = float(squares.sum()) or 1.0
        shares = (squares / total).tolist()
        metrics["gradient_share"] = dict(zip(names, shares, strict=True))


def _add_squares(chunk: Any, squares: torch.Tensor, groups: Any) -> None:
    """Add this rank's own part of each parameter's squared gradient to its slot."""
    offsets = _layer_numbers(chunk.module)
    for name, param in chunk.module.named_parameters():
        # A parameter that TP ranks hold whole, alike, is counted by the first of them only.
        if not getattr(param, "tensor_model_parallel", False) and groups.tp.rank():
            continue
        # A tied output layer's copy on the last stage is counted with the embedding.
        if getattr(param, "shared", False):
            continue
        for gradient in _own_gradient(chunk, param, groups.dp_cp):
            # A norm of the gradient's own format: a copy in fp64 would cost ten times the pass.
            norm = torch.linalg.vector_norm(gradient).double()
            squares[_slot(name, offsets, len(squares))] += norm * norm


def _layer_numbers(module: Any) -> list[int]:
    return [layer.layer_number - 1 for layer in module.decoder.layers]


def _slot(name: str, numbers: list[int], slots: int) -> int:
    if found := LAYER.search(name):
        return 1 + numbers[int(found[1])]
    if "final_layernorm" in name:
        return slots - 2
    return slots - 1 if "output_layer" in name else 0


def _own_gradient(chunk: Any, param: Any, dp_group: Any) -> list[torch.Tensor]:
    """The pieces of ``param``'s summed gradient that this data-parallel rank answers for.

    With the distributed optimizer only the own shard of each bucket holds the sum; without it
    every rank holds all of it, and the first one speaks.
    """
    gradient = param.main_grad
    if not chunk.ddp_config.use_distributed_optimizer:
        return [gradient] if dp_group.rank() == 0 else []
    bucket = chunk.param_to_bucket_group[param].param_to_bucket[param]
    size = bucket.grad_data.numel() // dp_group.size()
    first = bucket.grad_data.data_ptr() + dp_group.rank() * size * bucket.grad_data.element_size()
    start = (gradient.data_ptr() - first) // gradient.element_size()
    flat = gradient.reshape(-1)
    piece = flat[max(0, -start) : max(0, min(flat.numel(), size - start))]
    return [piece] if piece.numel() else []
