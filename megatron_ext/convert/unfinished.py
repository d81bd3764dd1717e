"""A folder that appears whole or not at all; what a killed program left is swept and redone."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.atomic import replace_folder


@contextmanager
def whole_or_absent(final: Path) -> Iterator[Path]:
    """A hidden folder to write into; renamed to ``final`` at the end, removed on failure.

    Raises:
        FileExistsError: ``final`` exists, or another program is writing it now.
    """
    if os.path.lexists(final):
        raise FileExistsError(f"{final} exists already: name a new folder, or remove that one.")
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.unfinished")
    aside.mkdir(exist_ok=True)
    handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another program is writing {final} now ({aside}).") from None
        try:
            _empty(aside)
            yield aside
            replace_folder(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
