"""Megatron's pipeline schedules, operation by operation: order, time and what is held in memory.

Nothing here is a formula: each stage's forwards and backwards are listed in the order that
Megatron runs them, and played against each other. The closed forms used elsewhere in the planner
are checked against this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One forward or backward of one chunk of layers on one micro-batch."""

    forward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Placed:
    """An operation and when it ran."""

    operation: Operation
    start: float
    end: float


def _order(stages: int, chunks: int, micro_batches: int, forward: bool) -> list[Operation]:
    """One stage's forwards (or backwards): groups of ``stages`` micro-batches, chunk by chunk."""
    if chunks == 1:
        return [Operation(forward, m, 0) for m in range(micro_batches)]
    operations = []
    for first in range(0, micro_batches, stages):
        group = range(first, min(first + stages, micro_batches))
        order = range(chunks) if forward else range(chunks - 1, -1, -1)
        operations += [Operation(forward, m, chunk) for chunk in order for m in group]
    return operations


def warm_up(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Forwards that a stage runs before it alternates."""
    if chunks == 1:
        return min(stages - stage - 1, micro_batches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages, micro_batches * chunks)


def operations(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Operation]:
    """Everything one stage does in a step: warm-up, one forward one backward, and the rest.

    Raises:
        ValueError: interleaving with micro-batches that are not a multiple of the stages.
    """
    if chunks > 1 and micro_batches % stages:
        raise ValueError(
            f"micro-batches={micro_batches} are not a multiple of "
            f"parallel.pipeline_model_parallel_size={stages}, which interleaving needs."
        )
    forwards = _order(stages, chunks, micro_batches, True)
    backwards = _order(stages, chunks, micro_batches, False)
    ahead = warm_up(stage, stages, chunks, micro_batches)
    listed = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        listed += [forward, backward]
    return listed + backwards[len(forwards) - ahead :]


def held(listed: Sequence[Operation]) -> int:
    """Most forwards whose activations a stage holds at once."""
    now = most = 0
    for operation in listed:
        now += 1 if operation.forward else -1
        most = max(most, now)
    return most


def held_in_closed_form(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """The same without listing: the warm-up and the forward that follows it."""
    ahead = warm_up(stage, stages, chunks, micro_batches)
    return min(ahead + 1, micro_batches * chunks)


def play(
    stages: int,
    chunks: int,
    micro_batches: int,
    seconds: Callable[[int, Operation], float],
) -> list[list[Placed]]:
    """When every operation of every stage runs, transfers taking no time.

    ``seconds(stage, operation)`` is how long one takes. A stage runs its list in order, each
    operation as soon as what it consumes is there.
    """
    lists = [operations(stage, stages, chunks, micro_batches) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    placed: list[list[Placed]] = [[] for _ in range(stages)]
    waiting = sum(len(listed) for listed in lists)
    last = stages * chunks - 1
    while waiting:
        before = waiting
        for stage, listed in enumerate(lists):
            while len(placed[stage]) < len(listed):
                operation = listed[len(placed[stage])]
                depth = operation.chunk * stages + stage
                ready = _ready(done, operation, depth, last)
                if ready is None:
                    break
                free = placed[stage][-1].end if placed[stage] else 0.0
                start = max(ready, free)
                end = start + seconds(stage, operation)
                placed[stage].append(Placed(operation, start, end))
                done[operation.forward, operation.micro_batch, depth] = end
                waiting -= 1
        if waiting == before:
            raise RuntimeError("the schedule waits for itself")
    return placed


def _ready(
    done: dict[tuple[bool, int, int], float], operation: Operation, depth: int, last: int
) -> float | None:
    """When the input of ``operation`` is there; None if nothing has produced it yet."""
    m = operation.micro_batch
    if operation.forward:
        return done.get((True, m, depth - 1)) if depth else 0.0
    if depth == last:
        return done.get((True, m, depth))
    return done.get((False, m, depth + 1))


def bubble(placed: Sequence[Sequence[Placed]]) -> float:
    """Idle share of the first stage's step over its busy time."""
    end = max(stage[-1].end for stage in placed)
    busy = sum(item.end - item.start for item in placed[0])
    return (end - busy) / busy
