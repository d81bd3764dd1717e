"""How every command of ours ends: 0 done, 2 refused in one sentence, 1 failed."""

import os
import sys
from collections.abc import Callable


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
