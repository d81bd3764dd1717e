"""Ranks of a test meet, fail loudly, and are not waited for for ever."""

import os
import time

import pytest

from megatron_ext.parallel import groups
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import RankFailure, env, meeting, run_on_ranks


def _sum_of_ranks():
    import torch

    started = groups.start(
        ParallelConfig(tensor_model_parallel_size=2), env(), seed=1, init_method=meeting()
    )
    total = torch.tensor(float(env().rank))
    torch.distributed.all_reduce(total, group=started.tp)
    assert total == 1 and started.dp.size() == 1


def test_ranks_meet_and_form_groups():
    run_on_ranks(_sum_of_ranks, world_size=2)


def _second_rank_fails_while_the_first_waits():
    import torch

    groups.start(ParallelConfig(), env(), seed=1, init_method=meeting())
    if env().rank == 1:
        raise KeyError("the cause")
    torch.distributed.barrier()


def test_the_first_failure_is_raised_with_its_traceback():
    with pytest.raises(RankFailure, match=r"rank 1 of 2:(.|\n)*KeyError: 'the cause'"):
        run_on_ranks(_second_rank_fails_while_the_first_waits, world_size=2)


def _hang():
    time.sleep(60)


def test_ranks_that_hang_are_ended_and_their_stacks_shown():
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"\[0, 1\] were still running(.|\n)*in _hang"):
        run_on_ranks(_hang, world_size=2, timeout=1.0)
    assert time.monotonic() - started < 20


def _die():
    os._exit(7)


def test_a_rank_that_dies_without_a_word_is_reported():
    with pytest.raises(RankFailure, match=r"exit codes by rank: \{0: 7\}"):
        run_on_ranks(_die, world_size=1)


def test_an_impossible_world_size_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"world size 1 is not a multiple of tp\*pp\*cp = 2\*1\*1"):
        groups.start(ParallelConfig(tensor_model_parallel_size=2), env(), seed=1)
