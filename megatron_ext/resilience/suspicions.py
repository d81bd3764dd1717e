"""RUN_DIR/suspicions.jsonl: steps that one node alone got wrong, and what others made of them."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext import jsonl

# Exit codes of ranks, those of Megatron's rerun machine.
SUSPECT_EXIT = 16  # go on elsewhere, to tell hardware from the data
UNSOUND_EXIT = 17  # a result is not sound wherever it is computed
VERDICTS = {
    "hardware": "sound on other nodes: the suspect stays set aside",
    "workload": "as bad elsewhere: the samples are to blame, and the suspect comes back",
    "gone": "sound, but the suspect took part: nothing is proved",
}
Place = tuple[int, str, int]  # as train.state.TrainState.place


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """One step. It is taken on other nodes once, and never a second time."""

    phase: int
    first: int
    """The phase's sample that the step begins with."""

    step: int
    rank: int
    node: str
    attempt: str
    """In which it was bad, in the place and again in place."""

    fault: str
    numbering: str = ""
    """What the phase's samples are counted over (``TrainState.numbering``)."""

    verdict: str = ""
    """A word of ``VERDICTS``, or empty as long as nobody has taken the step elsewhere."""

    @property
    def place(self) -> Place:
        """Of the step, whatever its number is."""
        return self.phase, self.numbering, self.first


def _path(run_dir: Path) -> Path:
    return run_dir / "suspicions.jsonl"


def record(run_dir: Path, found: Suspicion) -> None:
    """Append it; the last line of a place is what counts."""
    jsonl.append(_path(run_dir), found)


def known(run_dir: Path) -> dict[Place, Suspicion]:
    """By place. A torn line was never acted on."""
    return {one.place: one for one in jsonl.read(_path(run_dir), Suspicion)}
