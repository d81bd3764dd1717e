"""Files that are whole or absent: written aside, flushed to disk, renamed into place."""

import os
import uuid
from pathlib import Path


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``; a reader sees the old content or all of the new."""
    aside = _aside(path)
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for UTF-8 text."""
    write_bytes(path, text.encode())


def replace_folder(aside: Path, final: Path) -> None:
    """Move a finished folder into place, all its files flushed first.

    Raises:
        FileExistsError: ``final`` is there already.
    """
    for file in sorted(aside.rglob("*")):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(aside)
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    os.rename(aside, final)
    sync_folder(final.parent)
