"""How every command of ours ends: 0 done, 2 refused in one sentence, 1 failed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def refusing(main: Callable[[], int | None]) -> int:
    """Run ``main``; a ``ValueError`` or missing file becomes one sentence and exit code 2."""
    try:
        return main() or 0
    except (
        *(ValueError, FileNotFoundError, FileExistsError),
        *(NotADirectoryError, IsADirectoryError, PermissionError),
    ) as refusal:
        if os.environ.get("MEGATRON_EXT_TRACEBACK"):
            raise
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def check_picture(path: Path, *, key: str = "--out") -> None:
    """Make the folder of a picture; refuse what could not be written before anything is computed.

    Raises:
        ValueError: its ending is no format, or its folder cannot be made.
    """
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{key}={path} must end in {', '.join(PICTURES)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{key}={path}: the folder {path.parent} cannot be made ({error.strerror})."
        ) from error
