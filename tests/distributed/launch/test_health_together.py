"""Ranks that cannot be trained on are named by all of them, before the first step."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import health_together
from launch.cluster_config import ClusterConfig
from megatron_ext.parallel import groups
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import env, meeting, run_on_ranks

RANKS, ODD = 4, 2
CPU = torch.device("cpu")


def _check(cluster: ClusterConfig, fault: str, bad: set[int], says: str) -> None:
    groups.start(ParallelConfig(), env(), seed=1, init_method=meeting())
    _strike(fault)
    named, common = health_together.check_together(cluster, CPU)
    assert set(named) == bad, (named, common)
    assert all(says in why for why in named.values()), named
    assert bool(common) == (fault == "sum"), common


def _strike(fault: str) -> None:
    """What is wrong on rank ODD alone."""
    if dist.get_rank() != ODD:
        return
    true_time, exchange, all_reduce = time.time, dist.batch_isend_irecv, dist.all_reduce

    def late(*args: Any) -> Any:
        time.sleep(0.5)
        return exchange(*args)

    def spoilt(tensor: torch.Tensor, **options: Any) -> Any:
        tensor[0] += 1
        return all_reduce(tensor, **options)

    if fault == "clock":
        time.time = lambda: true_time() - 90
    elif fault == "product":
        health_together._product = lambda _place: (0.0, 1.0)
    elif fault == "send":
        dist.batch_isend_irecv = late
    elif fault == "sum":
        dist.all_reduce = spoilt


@pytest.mark.parametrize(
    ("fault", "asked", "bad", "says"),
    [
        ("", {}, set(), ""),
        ("clock", {}, {ODD}, "the clock is -90 s off"),
        ("product", {}, {ODD}, "product came out wrong"),
        ("send", {"min_link_gbytes": 0.005}, {ODD}, "below cluster.min_link_gbytes=0.005"),
        ("", {"min_link_gbytes": 1e6}, set(range(RANKS)), "below cluster.min_link_gbytes=1e+06"),
        ("sum", {}, set(), ""),
    ],
)
def test_who_is_unfit(fault: str, asked: dict, bad: set[int], says: str) -> None:
    run_on_ranks(_check, ClusterConfig(**asked), fault, bad, says, world_size=RANKS)
