"""Writing a distributed checkpoint tensor by tensor, without a model or a process group.

The folder is torch's own format, as Megatron saves it, and loads under any parallel sizes. Each
worker thread appends to a file of its own.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.index import StoredTensor
from megatron_ext.checkpoint.rectangles import Box, whole
from megatron_ext.checkpoint.shard import Shard, Slot, write_shard
from megatron_ext.convert.workers import BUDGET, Budget

Job = TypeVar("Job")
Files = dict[str, tuple[int, str]]
"""Bytes and SHA-256 of each written file."""

# What megatron-core 0.16 writes beside a torch_dist checkpoint, and looks for before loading it.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def slot(
    key: str,
    tensor: Tensor,
    *,
    layer: int | None,
    layers: int,
    blocks: Iterator[memoryview] | None = None,
) -> Slot:
    """All of ``key``, or one layer of the stack of ``layers``; ``blocks`` as in Slot."""
    shape = tuple(tensor.shape)
    if layer is None:
        return Slot(key, shape, whole(shape), tensor, blocks=blocks)
    box = Box((layer, *(0 for _ in shape)), (1, *shape))
    return Slot(key, (layers, *shape), box, tensor, blocks=blocks)


def write_tensors(
    folder: Path,
    jobs: Sequence[Job],
    make: Callable[[Job], Slot],
    *,
    cost: Callable[[Job], int],
    workers: int,
    done: Callable[[int], None] = lambda size: None,
    budget: int = BUDGET,
) -> tuple[dict[str, StoredTensor], Files]:
    """Make and write every job's tensor on ``workers`` threads; the first failure is raised."""
    purse, failed, lock = Budget(budget), threading.Event(), threading.Lock()
    left = iter(jobs)

    def slots() -> Iterator[Slot]:
        while not failed.is_set():
            with lock:
                job = next(left, None)
            if job is None:
                return
            size = cost(job)
            purse.take(size)
            try:
                yield make(job)  # returns here when it is written
            finally:
                purse.give(size)
            done(size)

    def one(number: int) -> Shard:
        try:
            return write_shard(folder / f"__{number}_0.distcp", slots())
        except BaseException:
            failed.set()
            raise

    # write_shard turns the zip records' CRC off and back on; with threads, once around them all.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            futures = [pool.submit(one, number) for number in range(workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                failed.set()
                raise
            shards = [future.result() for future in futures]
    finally:
        torch.serialization.set_crc32_options(before)
    table = index.merge(shard.tensors for shard in shards)
    return table, {shard.name: (shard.bytes, shard.sha256) for shard in shards}


def finish(folder: Path, table: dict[str, StoredTensor], common: dict[str, Any]) -> Files:
    """Write what makes the tensors' files a checkpoint that Megatron loads."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    small = {
        index.INDEX: index.write(table),
        "common.pt": buffer.getvalue(),
        "metadata.json": json.dumps(FORMAT).encode(),
    }
    return add_files(folder, small)


def add_files(folder: Path, small: dict[str, bytes]) -> Files:
    """Small files beside the tensors, flushed to disk."""
    for name, data in small.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in small.items()}
