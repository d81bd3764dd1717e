"""Readers of the tables of NVIDIA's own stack: DGX Cloud, NeMo, Megatron's README and CI."""

from collections.abc import Iterator

from megatron_ext.plan.layout import Layout
from megatron_ext.plan.published import Row, gpt, known_model, named, padded

RECOMPUTED = {None: None, "selective": "selective"}
"""Words of the CI table; any other is a way of recomputing whole layers."""


def dgxc(cells: dict, models: dict) -> Iterator[Row]:
    tp, pp, vpp = cells["tp"], cells["pp"], cells["vpp"] or 1
    model = cells["model"]
    known = known_model(model, models)
    if known is None:
        return
    shape = named(known, tp, cells["layers"])
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


def weak(cells: dict, models: dict) -> Iterator[Row]:
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


def nemo(cells: dict, models: dict) -> Iterator[Row]:
    known = known_model(cells["model"], models)
    if known is None or cells["task"] != "pretrain":
        return
    shape = named(known, cells["tp"])
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


def golden(cells: dict, models: dict) -> Iterator[Row]:
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
