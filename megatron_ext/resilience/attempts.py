"""RUN_DIR/attempts.jsonl: every attempt at a run, when it began and how it ended."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import jsonl


@dataclass(kw_only=True)
class Attempt:
    """One try: one step of one job on one set of nodes."""

    number: int
    """0, 1, 2, ... over the life of the run."""

    attempt: str
    """Name that no other attempt ever has. Job ids are reused after a controller crash."""

    job_id: str = ""
    restart_count: int = 0
    nodes: list[str] = field(default_factory=list)
    started: float = 0.0
    """Seconds since 1970."""

    step_before: int = 0
    """Steps in the newest good checkpoint at the start."""

    ended: float | None = None
    """None while it runs, or when nothing could be written at its end."""

    failure: str = ""
    """Class of the ending (classify.CLASSES)."""

    root: str = ""
    """What names the cause well enough to recognise it the next time."""

    headline: str = ""
    """The line a person should read first."""

    step_after: int = 0
    action: str = ""
    """policy.ACTIONS."""

    reason: str = ""
    counted: bool = False
    """Spends the restart budget."""

    suspects: list[str] = field(default_factory=list)
    """Nodes that get a strike."""

    excluded: list[str] = field(default_factory=list)
    """Nodes set aside because of this attempt."""

    in_job_restarts: int = 0

    @property
    def progressed(self) -> bool:
        """A newer checkpoint is there than at the start."""
        return self.step_after > self.step_before

    def line(self) -> str:
        """The attempt in one line for a person."""
        where = f"job {self.job_id}.{self.restart_count}" if self.job_id else "local"
        nodes = f" on {','.join(self.nodes)}" if self.nodes else ""
        if self.ended is None:
            return f"attempt {self.number} ({where}){nodes}: running from step {self.step_before}"
        text = (
            f"attempt {self.number} ({where}){nodes}: {self.failure} after "
            f"{self.ended - self.started:.0f} s, step {self.step_before} -> {self.step_after}; "
            f"{self.action}: {self.reason}"
        )
        if self.excluded:
            text += f"; set aside {','.join(self.excluded)}"
        return text + (f" [{self.headline}]" if self.headline else "")


def _path(run_dir: Path) -> Path:
    return run_dir / "attempts.jsonl"


def append(run_dir: Path, attempt: Attempt) -> None:
    """Write the attempt's present state; the last line of an attempt is what counts."""
    jsonl.append(_path(run_dir), attempt)


def history(run_dir: Path) -> list[Attempt]:
    """Every attempt, oldest first. Torn or foreign lines are passed over."""
    newest = {attempt.attempt: attempt for attempt in jsonl.read(_path(run_dir), Attempt)}
    return sorted(newest.values(), key=lambda a: a.number)
