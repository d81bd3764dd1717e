"""Are the ranks fit together: clocks, each device, each link, an all-reduce. Before the first step.

What a node can find out by itself is launch/health.py.
"""

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launch.cluster_config import ClusterConfig
from launch.health import MAX_CLOCK_SECONDS, leave_word
from megatron_ext.parallel.gather import of_every_rank
from megatron_ext.parallel.hosts import host_of_ranks
from megatron_ext.train.callback import Callback

if TYPE_CHECKING:
    from megatron_ext.train.loop import Trainer

log = logging.getLogger(__name__)
ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""fp32 numbers that are sent: 1 MiB, 64 MiB."""

MATRIX = {"cpu": 256, "cuda": 4096}
REPEATS = 3  # the best one counts, so that a busy moment does not


class Unfit(RuntimeError):
    """Ranks that cannot be trained on; the message names them and the rule that they break."""


class FitTogether(Callback):
    """Ends the attempt before its first step, and leaves word which nodes to stay off."""

    def __init__(self, cluster: ClusterConfig, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder

    def before_training(self, trainer: "Trainer") -> None:
        """Every rank takes part, and all come to the same verdict.

        Raises:
            Unfit: on all ranks.
        """
        place = next(trainer.model[0].parameters()).device
        hosts, began = host_of_ranks(place), time.perf_counter()
        bad, slow = check_together(self._cluster, place)
        log.info("ranks checked together in %.1f s", time.perf_counter() - began)
        words = [f"rank {rank} on {hosts[rank]}: {why}" for rank, why in bad.items()]
        if trainer.env.rank == 0:
            for rank, why in bad.items():
                leave_word(self._folder, hosts[rank], why)
        if words or slow:
            raise Unfit("; ".join([*words, slow]).strip("; "))


def check_together(cluster: ClusterConfig, place: torch.device) -> tuple[dict[int, str], str]:
    """Why which ranks are unfit, and what is wrong with no one in particular.

    Every rank of the job must call this; all get the same answer.
    """
    world = dist.get_world_size()
    dist.barrier()
    mine = [time.time(), *_product(place), *_link(place), *_all_reduce(place)]
    here = torch.tensor(mine, dtype=torch.float64, device=place)
    rows = torch.stack(of_every_rank(here))
    clocks, right, tflops, whole, link, summed, bus = rows.T.tolist()
    bad: dict[int, str] = {}
    for rank in range(world):
        offset = clocks[rank] - statistics.median(clocks)
        if abs(offset) > MAX_CLOCK_SECONDS:
            bad[rank] = f"the clock is {offset:+.0f} s off the other ranks'"
        elif not right[rank]:
            bad[rank] = "a matrix product came out wrong"
        elif tflops[rank] < cluster.min_device_tflops:
            bad[rank] = _below("a matrix product runs", tflops[rank], cluster, "min_device_tflops")
        elif not whole[rank]:
            bad[rank] = "what it received is not what was sent"
    slow = {rank for rank in range(world) if link[rank] < cluster.min_link_gbytes}
    for rank in slow:
        # The next rank waits for what this one sends late: the first of a row is the cause.
        if (rank - 1) % world not in slow or len(slow) == world:
            bad.setdefault(rank, _below("receives", link[rank], cluster, "min_link_gbytes"))
    if not all(summed):
        return bad, "an all-reduce came out wrong"
    if min(bus) < cluster.min_allreduce_gbytes:
        return bad, _below("an all-reduce runs", min(bus), cluster, "min_allreduce_gbytes")
    return bad, ""


def _below(what: str, rate: float, cluster: ClusterConfig, key: str) -> str:
    unit = "TFLOP/s" if key.endswith("tflops") else "GB/s"
    return f"{what} at {rate:.2f} {unit}, below cluster.{key}={getattr(cluster, key):g}"


def _best(work: Callable[[], object], place: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    taken = []
    for _ in range(REPEATS + 1):
        began = _clock(place)
        work()
        taken.append(_clock(place) - began)
    return min(taken[1:])


def _clock(place: torch.device) -> float:
    """The time once everything queued so far is done."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def _product(place: torch.device) -> tuple[float, float]:
    """Whether ones times ones is the size everywhere, and TFLOP/s."""
    size = MATRIX[place.type]
    ones = torch.ones(size, size, dtype=torch.bfloat16, device=place)
    seconds = _best(lambda: ones @ ones, place)
    return float(bool((ones @ ones == size).all())), 2 * size**3 / seconds / 1e12


def _link(place: torch.device) -> tuple[float, float]:
    """Whether the rank before sent what it should, and GB/s from there to here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return 1.0, float("inf")
    mine = torch.full((ELEMENTS[place.type],), float(rank), device=place)
    got = torch.empty_like(mine)
    before = (rank - 1) % world

    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()  # or one late rank would make the whole ring late, round by round
        began = _clock(place)
        send = dist.P2POp(dist.isend, mine, (rank + 1) % world)
        receive = dist.P2POp(dist.irecv, got, before)
        requests = dist.batch_isend_irecv([send, receive])
        requests[-1].wait()
        taken.append(_clock(place) - began)
        for request in requests[:-1]:
            request.wait()
    return float(bool((got == before).all())), mine.nbytes / min(taken[1:]) / 1e9


def _all_reduce(place: torch.device) -> tuple[float, float]:
    """Whether the sum is right, and GB/s as nccl-tests count: 2 (n - 1) / n x bytes / time."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ones = torch.full((ELEMENTS[place.type],), float(rank + 1), device=place)
    total = torch.empty_like(ones)

    def work() -> None:
        total.copy_(ones)
        dist.all_reduce(total)

    seconds = _best(work, place)
    right = bool((total == world * (world + 1) / 2).all())
    bus = 2 * (world - 1) / world * ones.nbytes / seconds / 1e9
    return float(right), bus if world > 1 else float("inf")
