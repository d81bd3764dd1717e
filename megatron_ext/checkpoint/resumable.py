"""Whether a run can go on from what its folder holds, told before anything starts. No torch."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.diff import Difference, refuse, resume_diff
from megatron_ext.checkpoint.folder import candidates, describe, is_complete
from megatron_ext.digest import sha256_of

if TYPE_CHECKING:
    from megatron_ext.config import RunConfig

RUN = "run.json"
"""The file of a checkpoint that holds the configuration it was trained with."""


def stored_run(path: Path) -> dict[str, Any]:
    """The configuration a checkpoint was trained with."""
    stored: dict[str, Any] = json.loads((path / RUN).read_bytes())
    return stored


def as_plain(run: "RunConfig") -> dict[str, Any]:
    """``run`` as JSON would bring it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def differences(path: Path, run: "RunConfig", *, resuming: bool = True) -> list[Difference]:
    """Every field in which ``run`` is not what the checkpoint was trained with.

    A run that starts from another one's weights (``resuming=False``) has phases of its own.
    """
    phase = describe(path)["phase"] if resuming else 0
    return resume_diff(stored_run(path), as_plain(run), phase=phase)


def check_resumable(run: "RunConfig") -> None:
    """Refuse a configuration that the newest whole checkpoint of its run folder cannot take.

    Of the files only this configuration is read: loading verifies every byte, and decides again.

    Raises:
        ValueError: naming the field, both values and the reason.
    """
    for path in candidates(Path(run.folder()) / "checkpoints"):
        if is_complete(path) and sha256_of(path / RUN) == describe(path)["files"][RUN]["sha256"]:
            refuse(differences(path, run))
            return
