"""Time lost to failures, and the checkpoint interval that loses least (Young, Daly)."""

import math
from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class Losses:
    """What failures and checkpoints cost at the best interval."""

    mean_between_failures: float
    """Seconds."""

    interval: float
    """Seconds between checkpoints that lose least: sqrt(2 x blocking x mtbf), Daly's correction."""

    share: float
    """Share of wall time lost to saving, to repeated work and to restarts."""


def best_interval(blocking: float, mean_between_failures: float) -> float:
    """Daly's interval (2006), which is Young's sqrt(2 d M) with two terms more.

    ``sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d``, and M itself when saving takes 2 M or
    longer; d is what one save keeps training from doing.
    """
    if blocking >= 2 * mean_between_failures:
        return mean_between_failures
    half = blocking / (2 * mean_between_failures)
    young = math.sqrt(2 * blocking * mean_between_failures)
    return young * (1 + math.sqrt(half) / 3 + half / 9) - blocking


def losses(
    *, gpus: int, failures_per_gpu_hour: float, blocking: float, restart: float
) -> Losses | None:
    """Losses of a job on ``gpus``; None when nothing ever fails.

    To first order: blocking / interval + (interval / 2 + restart) / mtbf.
    """
    if failures_per_gpu_hour <= 0:
        return None
    between = 3600 / (failures_per_gpu_hour * gpus)
    interval = best_interval(blocking, between)
    share = blocking / (interval + blocking) + (interval / 2 + restart) / between
    return Losses(mean_between_failures=between, interval=interval, share=min(share, 1.0))
