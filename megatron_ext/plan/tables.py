"""Published step times and memory peaks, read into shapes and layouts."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from megatron_ext.plan.layout import Layout, Shape

log = logging.getLogger(__name__)

RECOMPUTED = {None: None, "selective": "selective"}
"""Words of the CI table; any other is a way of recomputing whole layers."""


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


def _vtrain(cells: dict, models: dict) -> Iterator[Row]:
    tp = cells["tp"]
    shape = gpt(
        layers=cells["layers"],
        hidden=cells["hidden"],
        heads=cells["heads"],
        vocab=padded(50257, tp),
    )
    layout = Layout(
        world_size=cells["gpus"],
        tp=tp,
        pp=cells["pp"],
        micro_batch=cells["mbs"],
        global_batch=cells["gbs"],
        seq_length=cells["seq"],
        recompute="full",
        dtype="fp16",
        fp32_gradients=False,
        flash_attention=False,
    )
    yield Row(
        table="vtrain_multi",
        name=f"{cells['params_b']}B tp{tp} pp{cells['pp']} dp{cells['dp']} mbs{cells['mbs']}",
        group=str(cells["params_b"]),
        hardware="a100",
        network="ib_hdr_4x200",
        shape=shape,
        layout=layout,
        seconds=cells["iter_ms"] / 1e3,
    )


def _korthikanti(cells: dict, models: dict) -> Iterator[Row]:
    shape = gpt(
        layers=cells["layers"],
        hidden=cells["hidden"],
        heads=cells["heads"],
        vocab=cells["vocab"],
    )
    for column, recompute, vpp in (
        ("iter_s_full_recompute", "full", cells["vpp_full"]),
        ("iter_s_present_work", "selective", cells["vpp_present"]),
    ):
        layout = Layout(
            world_size=cells["gpus"],
            tp=cells["tp"],
            pp=cells["pp"],
            vpp=vpp or 1,
            micro_batch=cells["mbs"],
            global_batch=cells["gbs"],
            seq_length=cells["seq"],
            sequence_parallel=recompute == "selective",
            recompute=recompute,
            dtype="fp16",
            fp32_gradients=False,
            flash_attention=False,
        )
        yield Row(
            table="korthikanti_table3_5",
            name=f"{cells['model']} {recompute}",
            group=cells["model"],
            hardware="a100",
            network="ib_hdr_8x200",
            shape=shape,
            layout=layout,
            seconds=cells[column],
        )


def _skywork(cells: dict, models: dict) -> Iterator[Row]:
    shape = Shape(
        layers=cells["layers"],
        hidden=cells["hidden"],
        ffn=cells["ffn"],
        heads=cells["heads"],
        groups=cells["heads"],
        head_dim=cells["hidden"] // cells["heads"],
        vocab=cells["vocab"],
    )
    layout = Layout(
        world_size=cells["gpus"],
        tp=cells["tp"],
        pp=cells["pp"],
        micro_batch=cells["mbs"],
        global_batch=cells["gbs"],
        seq_length=cells["seq"],
        sequence_parallel=cells["tp"] > 1,
        distributed_optimizer=True,
        fused_kernels=False,
    )
    rate = cells["tok_s_gpu"]
    tokens = cells["gbs"] * cells["seq"] / cells["gpus"]
    memory = cells["mem_gb"]
    yield Row(
        table="skywork_table10",
        name=f"{cells['model']} dp{cells['dp']} tp{cells['tp']} pp{cells['pp']}",
        group=cells["model"],
        hardware="a800",
        network="roce_800",
        shape=shape,
        layout=layout,
        seconds=tokens / rate if rate else None,
        peak_bytes=memory * 1e9 if isinstance(memory, (int, float)) else None,
        out_of_memory=memory == "OOM",
    )


def _model(name: str, models: dict) -> dict | None:
    """The shape that ``name`` spells in its own way (``Llama-3.1-8B`` is Llama-3-8B's shape)."""
    wanted = _plain(name)
    return next((shape for known, shape in models.items() if _plain(known) == wanted), None)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("3.1-", "3-") if c.isalnum())


def _named(model: dict, tp: int, layers: int | None = None) -> Shape:
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


def _dgxc(cells: dict, models: dict) -> Iterator[Row]:
    tp, pp, vpp = cells["tp"], cells["pp"], cells["vpp"] or 1
    model = cells["model"]
    known = _model(model, models)
    if known is None:
        return
    shape = _named(known, tp, cells["layers"])
    layout = Layout(
        world_size=cells["gpus"],
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cells["cp"],
        micro_batch=cells["mbs"],
        global_batch=cells["gbs"],
        seq_length=cells["seq"],
        sequence_parallel=tp > 1,
        distributed_optimizer=True,
        ends_are_layers=shape.layers % (pp * vpp) != 0,
        fp8="hybrid" if cells["precision"] == "FP8" else None,
        fp32_gradients=False,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        tp_comm_overlap=tp > 1,
    )
    yield Row(
        table="dgxc_h100_gb200",
        name=f"{cells['release']} {model} {cells['precision']} {cells['gpus']} {cells['gpu']}",
        group=f"{model}",
        hardware=cells["gpu"].lower(),
        network="ib_ndr_8x400",
        shape=shape,
        layout=layout,
        seconds=cells["iter_s"],
    )


def _weak(cells: dict, models: dict) -> Iterator[Row]:
    if cells["pp"] > 1:
        return  # The interleaving is not published, and moves the bubble from 3 to 17 %.
    shape = gpt(
        layers=cells["layers"],
        hidden=cells["hidden"],
        heads=cells["heads"],
        vocab=cells["vocab"],
        dropout=False,
    )
    layout = Layout(
        world_size=cells["gpus"],
        tp=cells["tp"],
        pp=cells["pp"],
        micro_batch=cells["mbs"] or 1,
        global_batch=cells["gbs"],
        seq_length=cells["seq"],
        sequence_parallel=True,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        tp_comm_overlap=True,
    )
    yield Row(
        table="mcore_h100_weak",
        name=cells["model"],
        group=cells["model"],
        hardware="h100",
        network="ib_ndr_8x400",
        shape=shape,
        layout=layout,
        seconds=cells["iter_s_derived"],
    )


def _golden(cells: dict, models: dict) -> Iterator[Row]:
    """Megatron's own CI: the memory of the last rank."""
    tp, case = cells["tp"], cells["case"]
    large = "15b" in case
    vocab = cells["vocab_arg"] or (256000 if large else 50257)
    gated = bool(cells["swiglu"])
    shape = gpt(
        layers=cells["layers"],
        hidden=cells["hidden"],
        heads=cells["heads"],
        groups=cells["kv_groups"] or cells["heads"],
        vocab=padded(vocab, tp),
        ffn=cells["ffn"] or 4 * cells["hidden"],
        gated=gated,
        tied=not cells["untied"],
        rotary=large,
        dropout=not large,
        linear_bias=not (large or gated),
    )
    # The 15B rows state no GPU count; 6 + 12/d fits d = 16.
    world = cells["gpus"] or 16 * tp * cells["pp"] * cells["cp"]
    dp = world // (tp * cells["pp"] * cells["cp"])
    layout = Layout(
        world_size=world,
        tp=tp,
        pp=cells["pp"],
        vpp=cells["vpp"] or 1,
        cp=cells["cp"],
        micro_batch=cells["mbs"],
        global_batch=cells["gbs"] or 8 * dp * cells["mbs"],
        seq_length=cells["seq"],
        sequence_parallel=bool(cells["sp"]),
        ends_are_layers="account_for" in case,
        distributed_optimizer=bool(cells["dist_opt"]),
        recompute=RECOMPUTED.get(cells["recompute"], "full"),
        dtype=cells["dtype"] or "bf16",
        fp32_gradients=cells["dtype"] != "fp16",
        # The small cases ask for the unfused back end, which knows no context parallelism.
        flash_attention=cells["hidden"] > 512 or cells["cp"] > 1,
        fp8="delayed" if cells["fp8"] else None,
    )
    yield Row(
        table="mcore_ci_golden",
        name=f"{case} {cells['gpu']}",
        group=case.split("_")[1] if large or "7b" in case else "small",
        hardware={"a100": "a100", "h100": "h100"}.get(cells["gpu"], "gb200"),
        network="ib_ndr_8x400",
        shape=shape,
        layout=layout,
        allocated_bytes=cells["mem_allocated_bytes"],
        peak_bytes=cells["mem_max_allocated_bytes"],
    )


def _nemo(cells: dict, models: dict) -> Iterator[Row]:
    known = _model(cells["model"], models)
    if known is None or cells["task"] != "pretrain":
        return
    shape = _named(known, cells["tp"])
    layout = Layout(
        world_size=cells["gpus"],
        tp=cells["tp"],
        pp=cells["pp"],
        vpp=cells["vpp"] or 1,
        cp=cells["cp"],
        micro_batch=cells["mbs"],
        global_batch=cells["gbs"],
        seq_length=cells["seq"],
        sequence_parallel=cells["tp"] > 1,
        distributed_optimizer=True,
        fp8="hybrid",
        fp32_gradients=False,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        tp_comm_overlap=cells["tp"] > 1,
    )
    yield Row(
        table="nemo_24_07",
        name=f"{cells['model']} {cells['gpus']} tp{cells['tp']} pp{cells['pp']} cp{cells['cp']}",
        group=cells["model"],
        hardware="h100",
        network="ib_ndr_8x400",
        shape=shape,
        layout=layout,
        seconds=cells["iter_s_derived"],
    )


READERS = {
    "mcore_ci_golden": _golden,
    "vtrain_multi": _vtrain,
    "korthikanti_table3_5": _korthikanti,
    "skywork_table10": _skywork,
    "nemo_24_07": _nemo,
    "dgxc_h100_gb200": _dgxc,
    "mcore_h100_weak": _weak,
}


def unread(path: Path) -> list[str]:
    """Tables of ``path`` that print no layout, or nothing that is predicted here."""
    return [table["id"] for table in _load(path)["tables"] if table["id"] not in READERS]


@cache
def _load(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read(path: Path) -> list[Row]:
    """Every row of ``path`` that this module knows how to lay out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    stored = _load(path)
    rows: list[Row] = []
    for table in stored["tables"]:
        reader = READERS.get(table["id"])
        if reader is None:
            continue
        for cells in table["rows"]:
            named = dict(zip(table["columns"], cells, strict=True))
            try:
                read_here = list(reader(named, stored["models"]))
                for row in read_here:
                    row.layout.chunk_layers(row.shape.layers)
                rows += read_here
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                log.warning("%s: %s cannot be laid out: %s", table["id"], cells, error)
    return rows
