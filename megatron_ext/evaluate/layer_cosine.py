"""How much each layer changes the stream: cosine between its input and output, by Yi's rule."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.evaluate import alone


def layer_cosines(model: Any, texts: list[Tensor]) -> list[float]:
    """Mean over the tokens of all texts, layer by layer; near 1 the layer changes little."""
    totals = [0.0] * len(model.decoder.layers)
    tokens = sum(ids.numel() for ids in texts)
    handles = []
    for number, layer in enumerate(model.decoder.layers):

        def hook(module: Any, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            totals[number] += float(cosine.sum())

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        for ids in texts:
            alone.logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return [total / tokens for total in totals]


def nearest_block(cosines: list[float], size: int) -> tuple[int, int]:
    """The contiguous block of ``size`` layers whose mean cosine is nearest 1, half-open.

    Raises:
        ValueError: there is no block of that size.
    """
    if not 1 <= size <= len(cosines):
        raise ValueError(
            f"--auto {size}: a block of {size} of {len(cosines)} layers cannot be chosen; "
            f"use 1 to {len(cosines)}."
        )
    starts = range(len(cosines) - size + 1)
    best = max(starts, key=lambda start: sum(cosines[start : start + size]))
    return best, best + size


def draw(cosines: list[float], block: tuple[int, int] | None, path: Path) -> None:
    """The cosines as a picture, the chosen block shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    if block:
        axes.axvspan(block[0] - 0.5, block[1] - 0.5, alpha=0.2, label=f"{block[0]}:{block[1]}")
        axes.legend()
    axes.plot(range(len(cosines)), cosines, marker="o")
    axes.set(xlabel="layer", ylabel="cosine of input and output", xlim=(-0.5, len(cosines) - 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def as_text(cosines: list[float], block: tuple[int, int] | None) -> str:
    """The same chart in characters."""
    low = min(0.0, *cosines)
    lines = []
    for number, cosine in enumerate(cosines):
        bar = "#" * round(40 * (cosine - low) / (1 - low))
        mark = " *" if block and block[0] <= number < block[1] else ""
        lines.append(f"  layer {number:3} {cosine:.4f} {bar}{mark}")
    return "\n".join(lines)
