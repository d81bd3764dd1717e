"""Delayed scaling's history as plain tensors: what Transformer Engine pickles into _extra_state.

The scale of an FP8 tensor follows from the largest values of past steps, so a run that resumes
without them is another run. Every rank of a tensor- or data-parallel group holds the same values:
Transformer Engine agrees on them at each step.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.config import RunConfig

PREFIX = "fp8."
"""Of these tensors' keys in a checkpoint."""

SIDES = ("scaling_fwd", "scaling_bwd")
PARTS = ("scale", "amax_history")


def histories(chunks: Sequence[Any]) -> Iterator[tuple[str, "Tensor"]]:
    """Checkpoint key and live tensor of every history; nothing without delayed scaling."""
    for name, module in _linears(chunks):
        for side in SIDES:
            state = module.fp8_meta.get(side)
            for part in PARTS:
                if hasattr(state, part):
                    yield f"{PREFIX}{name}.{side}.{part}", getattr(state, part)


def prepare(chunks: Sequence[Any], run: "RunConfig") -> None:
    """Make the histories that a checkpoint will fill, as the first forward would.

    Only for runs with ``precision=fp8_delayed``.
    """
    if run.precision.word() != "fp8_delayed":
        return
    new = [m for _, m in _linears(chunks) if not m.fp8_meta_tensors_initialized]
    if not new:
        return
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch import fp8_autocast

    recipe = get_fp8_recipe(new[0].config)
    with fp8_autocast(enabled=True, fp8_recipe=recipe):  # the layers ask which recipe is on
        for module in new:
            module.fp8_meta["recipe"] = recipe
            module.fp8_meta["num_gemms"] = 1  # each of a block's linears is one matmul
            module.init_fp8_meta_tensors(recipe)


def _linears(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linears, by the names they have in a model that is not cut in stages."""
    from megatron.core.utils import unwrap_model

    for chunk in unwrap_model(list(chunks)):
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "fp8_meta") and hasattr(module, "weight"):
                    yield f"decoder.layers.{layer.layer_number - 1}.{name}", module
