"""The one word a run leaves behind: finished, stopped or refused. No word there is a crash."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.atomic import write_text

WORDS = ("finished", "stopped", "refused")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, in the words of the program itself."""

    word: str
    """``finished``: last step taken, its checkpoint verified. ``stopped``: told to, state saved.
    ``refused``: an unchanged retry must fail the same way."""

    cause: str = ""
    """Such as ``time limit``, ``preempted``, ``batch 17 is not finite``; empty when finished."""

    step: int = 0
    """Steps done and saved."""

    attempt: str = ""
    """The attempt that wrote it, so that an older attempt's word is not taken for this one's."""


def _path(run_dir: Path) -> Path:
    return run_dir / "outcome"


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Leave the word. Only rank 0 calls this, after its last checkpoint is verified.

    Raises:
        ValueError: the word is none of ``WORDS``.
    """
    if outcome.word not in WORDS:
        raise ValueError(f"outcome {outcome.word!r} is none of {', '.join(WORDS)}")
    write_text(_path(run_dir), json.dumps(asdict(outcome)) + "\n")


def read_outcome(run_dir: Path, *, attempt: str | None = None) -> Outcome | None:
    """The word that is there; None when there is none, or it is another attempt's or damaged."""
    try:
        with open(_path(run_dir), encoding="utf-8") as file:
            values = json.loads(file.read(65536))
        outcome = Outcome(**values)
    except (OSError, ValueError, TypeError):
        return None
    if outcome.word not in WORDS or (attempt is not None and outcome.attempt != attempt):
        return None
    return outcome


def clear_outcome(run_dir: Path) -> None:
    """Forget the word before a new attempt."""
    _path(run_dir).unlink(missing_ok=True)
