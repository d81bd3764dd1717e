"""Readers of the tables measured on Ampere: vTrain, Korthikanti et al., Skywork."""

from collections.abc import Iterator

from megatron_ext.plan.layout import Layout, Shape
from megatron_ext.plan.published import Row, gpt, padded


def vtrain(cells: dict, models: dict) -> Iterator[Row]:
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


def korthikanti(cells: dict, models: dict) -> Iterator[Row]:
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


def skywork(cells: dict, models: dict) -> Iterator[Row]:
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
