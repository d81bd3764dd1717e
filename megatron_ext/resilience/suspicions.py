"""RUN_DIR/suspicions.jsonl: steps that one node alone got wrong, and what others made of them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

# Exit codes of ranks, those of Megatron's rerun machine.
SUSPECT_EXIT = 16  # go on elsewhere, to tell hardware from the data
UNSOUND_EXIT = 17  # a result is not sound wherever it is computed
VERDICTS = {
    "hardware": "sound on other nodes: the suspect stays set aside",
    "workload": "as bad elsewhere: the samples are to blame, and the suspect comes back",
    "gone": "sound, but the suspect took part: nothing is proved",
}


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
    verdict: str = ""
    """A word of ``VERDICTS``, or empty as long as nobody has taken the step again."""


def record(run_dir: Path, found: Suspicion) -> None:
    """Append it; the last line of a place is what counts."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    handle = os.open(run_dir / "suspicions.jsonl", flags, 0o600)
    with open(handle, "w") as file:
        file.write(json.dumps(asdict(found)) + "\n")
        file.flush()
        os.fsync(handle)


def known(run_dir: Path) -> dict[tuple[int, int], Suspicion]:
    """By place. A torn line was never acted on."""
    try:
        lines = (run_dir / "suspicions.jsonl").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            one = Suspicion(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[one.phase, one.first] = one
    return found
