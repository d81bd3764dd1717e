"""How long a section of a run may take before it counts as hung, learnt from the run itself."""

from megatron_ext.resilience.config import WatchConfig
from megatron_ext.resilience.council import STACK_SECONDS
from megatron_ext.resilience.heartbeat import SECTIONS, Beat

ENOUGH = 10  # steps of one regime before its percentile is trusted
# From a late rank's report to its name: the stacks of all ranks, and the way of the messages.
NAMING_SECONDS = STACK_SECONDS + 0.5


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
        """How long the section that ``beat`` began may last before stacks are asked for.

        A step that goes on meanwhile is forgiven; one that does not is named by its deadline.
        """
        config = self._config
        if beat.section == "step":
            if beat.regime not in self._p99:
                return config.hang_unlearnt_seconds
            floor = max(0.0, config.hang_floor_seconds - NAMING_SECONDS)
            return 3.0 * self._p99[beat.regime] + floor
        longest = beat.longest[SECTIONS.index(beat.section)]
        if longest > 0 and beat.section != "start":
            return max(60.0, 10.0 * longest)
        return config.hang_unlearnt_seconds
