"""Depth up-scaling of a distributed checkpoint of any layout, streaming: one tensor in memory.

Everything that is not a layer comes from the parent as it is: RoPE base, epsilon, vocabulary,
head. Nothing is looked up by a model's name.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import seal, verify
from megatron_ext.checkpoint.shard import Slot
from megatron_ext.convert.described import ASSET, RUN, STATE, as_json, model_of
from megatron_ext.convert.sharded_reader import ShardedFolder, open_sharded
from megatron_ext.convert.sharded_writer import Files, add_files, finish, slot, write_tensors
from megatron_ext.convert.unfinished import whole_or_absent
from megatron_ext.convert.workers import Progress
from megatron_ext.surgery.layer_map import NewLayer

MOMENTS = ("copy", "zero", "drop")
OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""What a layer adds to the stream goes through these two: at zero, the layer is the identity."""


@dataclass(frozen=True)
class _Job:
    key: str
    parent: int | None
    """Layer to read; None for what is not stacked."""

    layer: int | None
    zero: bool = False


def upscale(
    source: Path,
    target: Path,
    layers: Sequence[NewLayer],
    *,
    moments: str = "zero",
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the checkpoint whose layers are ``layers`` of ``source``.

    Args:
        source: a checkpoint folder.
        target: must not exist yet.
        layers: the map, first layer first.
        moments: ``copy`` gives copies their parent's Adam moments, ``zero`` starts copies at 0,
            ``drop`` leaves the moments out (fp32 master weights stay).
        workers: threads.
        progress: told bytes done and bytes in all.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    meta = verify(source)
    folder = open_sharded(source)
    jobs = _jobs(folder, layers, moments)
    with whole_or_absent(target) as aside:

        def cost(job: _Job) -> int:
            tensor = folder.tensors[job.key]
            lead = 1 if job.layer is None else tensor.shape[0]
            return prod(tensor.shape) // lead * tensor.dtype.itemsize

        def make(job: _Job) -> Slot:
            tensor = folder.tensors[job.key].read(job.parent)
            if job.zero:
                tensor.zero_()
            return slot(job.key, tensor, layer=job.layer, layers=len(layers))

        done = Progress(sum(map(cost, jobs)), progress)
        table, files = write_tensors(aside, jobs, make, cost=cost, workers=workers, done=done)
        files = files | finish(aside, table, {"step": meta["step"]})
        files = files | _documents(source, aside, len(layers))
        seal(aside, _description(source, meta, layers, moments), files)


def _jobs(folder: ShardedFolder, layers: Sequence[NewLayer], moments: str) -> list[_Job]:
    jobs = []
    for key in folder.tensors:
        is_moment = key.startswith(("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."))
        if key.startswith("rng.") or (is_moment and moments == "drop"):
            continue  # random streams belong to a layout, and start anew
        if ".layers." not in key:
            jobs.append(_Job(key, None, None))
            continue
        for number, new in enumerate(layers):
            fresh = is_moment and moments == "zero" and new.copy
            silenced = new.identity and key.endswith(OUTPUTS)
            jobs.append(_Job(key, new.parent, number, zero=fresh or silenced))
    return jobs


def _documents(source: Path, aside: Path, num_layers: int) -> Files:
    run = json.loads((source / RUN).read_text())
    run["model"]["num_layers"] = num_layers
    small = {RUN: as_json(run), STATE: (source / STATE).read_bytes()}
    small |= {file.name: file.read_bytes() for file in source.glob(f"{ASSET}*")}
    return add_files(aside, small)


def _description(
    source: Path, meta: dict[str, Any], layers: Sequence[NewLayer], moments: str
) -> dict[str, Any]:
    described = {key: value for key, value in meta.items() if key not in ("files", "pinned")}
    described.pop("format_version")
    parent, _ = model_of(source)
    return described | {
        "layer_map": [new.parent for new in layers],
        "identity_layers": [number for number, new in enumerate(layers) if new.identity],
        "upscaled_from": {
            "checkpoint": source.name,
            "num_layers": parent.num_layers,
            "layer_map": meta.get("layer_map"),
            "moments": moments,
        },
        "optimizer": None if moments == "drop" else meta.get("optimizer"),
        "layout": None,
    }
