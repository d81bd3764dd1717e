"""A bad step that stays on one node alone is taken once more on others, which tells the cause."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.parallel.env import Env, own_host
from megatron_ext.resilience import attempts, suspicions
from megatron_ext.resilience.suspicions import SUSPECT_EXIT, VERDICTS, Suspicion
from megatron_ext.train.state import TrainState

log = logging.getLogger(__name__)


class SuspectNodeError(FloatingPointError):
    """Ends the attempt; the policy sets the node aside and queues the run again."""

    exit_code = SUSPECT_EXIT


class Elsewhere:
    """Every rank takes part. Costs nothing but when a step is run again."""

    def __init__(self, run_dir: Path, env: Env, *, wanted: bool) -> None:
        self._run_dir, self._env, self._wanted = run_dir, env, wanted
        self._known = suspicions.known(run_dir)
        self._mine = False
        self._place = torch.device("cpu")

    @contextmanager
    def locating(self, chunks: list[Any]) -> Iterator[None]:
        """Notes whether this rank's gradients are sound before those of others are mixed in.

        Wraps the begin of Megatron's reduction, which may come in the middle of a backward pass.
        """
        groups = [g for c in chunks for g in [*c.bucket_groups, *c.expert_parallel_bucket_groups]]
        self._mine, self._place = False, next(chunks[0].parameters()).device
        for group in groups:
            group.start_grad_sync = partial(self._look, group.buckets, group.start_grad_sync)
        try:
            yield
        finally:
            for group in groups:
                del group.start_grad_sync

    def _look(self, buckets: list[Any], sync: Any, *args: Any, **named: Any) -> Any:
        sums = torch.stack([b.grad_data.sum(dtype=torch.float32) for b in buckets])
        self._mine = self._mine or not math.isfinite(float(sums.sum()))
        return sync(*args, **named)

    def suspect(self, state: TrainState, fault: str) -> None:
        """Return where the samples are to blame, or nothing can be told.

        Raises:
            SuspectNodeError: on the first rank of the one node whose own gradients were bad; the
                others wait for their watchers to end them.
        """
        if before := self._known.get(state.place):
            if self._moved_from(before):
                self._settle(before, "workload")
            return  # with the suspect among the nodes, that it is as bad again proves nothing
        if not (self._wanted and self._env.spare_node):
            return
        bad = self._bad_ranks()
        if len({rank // self._env.local_world_size for rank in bad}) != 1:
            return  # nobody, or several nodes: no one of them is to blame
        if self._env.rank != bad[0]:
            dist.barrier()
            raise ConnectionError("connection closed by the rank that is suspected")
        found = Suspicion(
            phase=state.phase,
            first=state.phase_samples,
            step=state.step + 1,
            rank=bad[0],
            node=own_host(),
            attempt=self._env.attempt,
            fault=fault,
            numbering=state.numbering,
        )
        suspicions.record(self._run_dir, found)
        raise SuspectNodeError(
            f"{fault} at step {found.step} again, on rank {found.rank} of {found.node} first: the "
            f"step is to be taken on other nodes"
        )

    def _bad_ranks(self) -> list[int]:
        """Ranks whose own gradients were not finite; the same list on all of them."""
        bad = torch.zeros(self._env.world_size, dtype=torch.int32, device=self._place)
        bad[self._env.rank] = int(self._mine)
        if self._env.world_size > 1:
            dist.all_reduce(bad)
        return bad.nonzero().flatten().tolist()

    def sound(self, state: TrainState) -> None:
        """The step at this place is sound: say what that means where it was suspect before."""
        before = self._known.get(state.place) if self._known else None
        if before is not None:
            self._settle(before, "hardware" if self._moved_from(before) else "gone")

    def _moved_from(self, before: Suspicion) -> bool:
        """Whether this attempt is surely on other nodes than the suspected one."""
        own = [a for a in attempts.history(self._run_dir) if a.attempt == self._env.attempt]
        return bool(own) and before.node not in own[0].nodes

    def _settle(self, before: Suspicion, verdict: str) -> None:
        if before.verdict:
            return
        after = replace(before, verdict=verdict)
        self._known[before.place] = after
        if self._env.rank == 0:
            log.warning(
                "step %d of %s, %s: %s", before.step, before.node, verdict, VERDICTS[verdict]
            )
            suspicions.record(self._run_dir, after)
