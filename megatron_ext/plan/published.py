"""What a published measurement says, and the shapes that tables name."""

from dataclasses import dataclass

from megatron_ext.plan.layout import Layout, Shape


@dataclass(kw_only=True, frozen=True)
class Row:
    """One published measurement."""

    table: str
    name: str
    group: str
    """Model or size: what a leave-one-out fit leaves out."""

    hardware: str
    network: str
    shape: Shape
    layout: Layout
    seconds: float | None = None
    peak_bytes: float | None = None
    allocated_bytes: float | None = None
    out_of_memory: bool = False


def gpt(*, layers: int, hidden: int, heads: int, vocab: int, **more: object) -> Shape:
    """A GPT block: four hidden widths, biases, LayerNorm, learned positions, tied embeddings."""
    known: dict = {
        "ffn": 4 * hidden,
        "groups": heads,
        "gated": False,
        "tied": True,
        "norm_vectors": 2,
        "qkv_bias": True,
        "linear_bias": True,
        "dropout": True,
        "rotary": False,
    }
    known.update(more)
    return Shape(
        layers=layers, hidden=hidden, heads=heads, head_dim=hidden // heads, vocab=vocab, **known
    )


def padded(vocab: int, tp: int) -> int:
    """Rows of an embedding padded to a multiple of 128 x TP."""
    return -(-vocab // (128 * tp)) * 128 * tp


def known_model(name: str, models: dict) -> dict | None:
    """The shape that ``name`` spells in its own way (``Llama-3.1-8B`` is Llama-3-8B's shape)."""
    wanted = _plain(name)
    return next((shape for known, shape in models.items() if _plain(known) == wanted), None)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("3.1-", "3-") if c.isalnum())


def named(model: dict, tp: int, layers: int | None = None) -> Shape:
    gated = model["gated"]
    common = {
        "layers": layers or model["layers"],
        "hidden": model["hidden"],
        "heads": model["heads"],
        "groups": model["kv"] or model["heads"],
        "vocab": padded(model["vocab"], tp),
        "ffn": model["ffn"],
        "tied": model["tied"],
    }
    if gated:
        return Shape(head_dim=model["hidden"] // model["heads"], **common)
    rotary = model.get("act") == "squared_relu"
    # Nemotron: LayerNorm, no bias, no dropout, rotary; GPT-3 in these recipes: biases, no dropout.
    return gpt(**common, dropout=False, linear_bias=not rotary, rotary=rotary)
