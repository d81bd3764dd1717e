"""How long a section of a run may take before it counts as hung, learnt from the run itself."""

from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.heartbeat import SECTIONS, Beat

ENOUGH = 10  # steps of one regime before its percentile is trusted


class Deadlines:
    """Watches one rank's beats. Steps are regular; saves and all else get far more room."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._p99: dict[int, float] = {}

    def observe(self, beat: Beat) -> None:
        """Learn. What one generation of the rank has taught holds for the next."""
        if beat.regime_steps >= ENOUGH:
            self._p99[beat.regime] = beat.p99_seconds

    def seconds(self, beat: Beat) -> float:
        """How long the section that ``beat`` began may last."""
        config = self._config
        if beat.section == "step":
            if beat.regime not in self._p99:
                return config.hang_unlearnt_seconds
            return 3.0 * self._p99[beat.regime] + config.hang_floor_seconds
        longest = beat.longest[SECTIONS.index(beat.section)]
        if longest > 0 and beat.section != "start":
            return max(60.0, 10.0 * longest)
        return config.hang_unlearnt_seconds

    def overdue(self, beat: Beat, now: float) -> float:
        """Seconds that the rank has been in this section, if that is too long; else 0."""
        waited = now - beat.at
        return waited if beat.count and waited > self.seconds(beat) else 0.0
