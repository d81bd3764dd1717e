"""How long a section of a run may take before it counts as hung, learnt from the run itself."""

from collections import deque

from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.heartbeat import SECTIONS, Beat

MEMORY = 256  # steps that the 99th percentile is taken over
ENOUGH = 10  # steps of one regime before its percentile is trusted


class Deadlines:
    """Watches one rank's beats. Steps are regular; saves and all else get far more room."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._steps: dict[int, deque[float]] = {}
        self._seen = 0

    def observe(self, beat: Beat) -> None:
        """Learn from the last step, once for each."""
        if beat.step != self._seen and beat.step_seconds > 0:
            steps = self._steps.setdefault(beat.regime, deque(maxlen=MEMORY))
            steps.append(beat.step_seconds)
        self._seen = beat.step

    def seconds(self, beat: Beat) -> float:
        """How long the section that ``beat`` began may last."""
        config = self._config
        if beat.section == "step":
            steps = self._steps.get(beat.regime, ())
            if len(steps) < ENOUGH:
                return config.hang_unlearnt_seconds
            p99 = sorted(steps)[max(0, -(-99 * len(steps) // 100) - 1)]
            return 3.0 * p99 + config.hang_floor_seconds
        longest = beat.longest[SECTIONS.index(beat.section)]
        if longest > 0 and beat.section != "start":
            return max(60.0, 10.0 * longest)
        return config.hang_unlearnt_seconds

    def overdue(self, beat: Beat, now: float) -> float:
        """Seconds that the rank has been in this section, if that is too long; else 0."""
        waited = now - beat.at
        return waited if beat.count and waited > self.seconds(beat) else 0.0
