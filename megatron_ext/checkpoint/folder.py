"""A checkpoint as a folder: sealed when whole, verified before use, kept until outlived.

``meta.json`` lists every file with its size and SHA-256, ``COMPLETE`` holds the hash of
``meta.json`` and is written last: whatever changes afterwards, in any file, is noticed. Nothing
here imports torch, so that a launcher can look for the newest good checkpoint in milliseconds.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megatron_ext.atomic import sync_folder, write_bytes
from megatron_ext.digest import sha256_of

META, COMPLETE = "meta.json", "COMPLETE"
FORMAT_VERSION = 1
LARGEST_META = 1 << 28  # bytes; a longer meta.json is not one of ours

_STEP = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.step_(\d{8,})\.[0-9a-f]+\.old")
_UNFINISHED = re.compile(r"\.step_(\d{8,})\.[0-9a-f]+\.tmp")

logger = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A checkpoint that must not be loaded, and why."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is found once it is whole."""
    return folder / f"step_{step:08d}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """A fresh name under which the checkpoint of ``step`` is written; nobody reads it."""
    return folder / f".step_{step:08d}.{uuid.uuid4().hex[:12]}.tmp"


def seal(unfinished: Path, description: Mapping, files: Mapping[str, tuple[int, str]]) -> None:
    """Declare a folder whole: ``meta.json`` with ``files`` (bytes, SHA-256), then ``COMPLETE``.

    The files themselves must be flushed to disk already.
    """
    listed = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in sorted(files.items())}
    meta = {"format_version": FORMAT_VERSION, **description, "files": listed}
    data = json.dumps(meta, indent=1, ensure_ascii=False).encode()
    write_bytes(unfinished / META, data)
    mark = f"{hashlib.sha256(data).hexdigest()}  {META}\n"
    write_bytes(unfinished / COMPLETE, mark.encode())


def publish(unfinished: Path, final: Path) -> None:
    """Move a sealed folder to its name. An older one of that name stays readable until then."""
    replaced = None
    if os.path.lexists(final):
        replaced = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.old")
        os.rename(final, replaced)
    os.rename(unfinished, final)
    sync_folder(final.parent)
    if replaced is not None:
        remove(replaced)


def describe(path: Path) -> dict:
    """The description a checkpoint carries, after checking that it is the one it was sealed with.

    Raises:
        DamagedCheckpoint: the seal is missing or does not fit.
    """
    if not stat.S_ISDIR(_lstat(path).st_mode):
        raise DamagedCheckpoint(f"{path} is a link or a file, not a folder")
    mark = _read_small(path / COMPLETE, 1 << 12)
    data = _read_small(path / META, LARGEST_META)
    if mark != f"{hashlib.sha256(data).hexdigest()}  {META}\n".encode():
        raise DamagedCheckpoint(f"{path / META} does not match {COMPLETE}")
    meta = json.loads(data)
    if not isinstance(meta, dict) or not {"step", "files"} <= set(meta):
        raise DamagedCheckpoint(f"{path / META} does not describe a checkpoint")
    if meta.get("format_version") != FORMAT_VERSION:
        raise DamagedCheckpoint(
            f"{path} has format version {meta.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return meta


def is_complete(path: Path) -> bool:
    """Whether the seal fits and every file is there at its size. Contents: see ``verify``."""
    try:
        _check_listing(path, describe(path))
    except (DamagedCheckpoint, OSError):
        return False
    return True


def verify(path: Path, *, share: tuple[int, int] = (0, 1)) -> dict:
    """Check every file against the seal and return the description.

    ``share`` = (k, n) hashes only the k-th of n parts of the files, so that n ranks share the
    reading; the seal and the sizes are always checked whole.

    Raises:
        DamagedCheckpoint: naming the file and what is wrong with it.
    """
    meta = describe(path)
    _check_listing(path, meta)
    for number, (name, want) in enumerate(sorted(meta["files"].items())):
        mine = number % share[1] == share[0]
        if mine and sha256_of(path / name, follow_links=False) != want["sha256"]:
            raise DamagedCheckpoint(f"{path / name} has other bytes than were written")
    return meta


def damage(path: Path) -> str | None:
    """Why ``path`` must not be loaded, in words; None when all its bytes are as written."""
    try:
        verify(path)
    except (DamagedCheckpoint, OSError) as why:
        return str(why)
    return None


def candidates(folder: Path) -> Iterator[Path]:
    """Checkpoints in ``folder`` by name, newest first, good or not."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = _STEP.fullmatch(entry.name) or _REPLACED.fullmatch(entry.name)
        if match:
            found.append((int(match[1]), entry.name[0] != ".", entry.name))
    yield from (folder / name for _, _, name in sorted(found, reverse=True))


def newest_good(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every byte is as written, and the newer ones passed over."""
    bad: list[tuple[Path, str]] = []
    for path in candidates(folder):
        why = damage(path)
        if why is None:
            return path, bad
        bad.append((path, why))
    return None, bad


def checkpoint_of(path: Path) -> Path:
    """``path``, or the newest good checkpoint of the run whose folder it is.

    Raises:
        ValueError: a run folder without one.
    """
    if not (path / "checkpoints").is_dir():
        return path
    found, _ = newest_good(path / "checkpoints")
    if found is None:
        raise ValueError(f"{path} is a run folder without a good checkpoint.")
    return found


def retain(folder: Path, keep: int, *, trusted: Collection[Path] = ()) -> list[Path]:
    """Delete checkpoints older than the ``keep`` newest good ones; return what was deleted.

    Those described as ``pinned`` stay. Each one counted is verified first, unless it is in
    ``trusted`` (verified by the caller), so the last good checkpoint is never deleted. Unfinished
    folders of steps up to the newest good one are leftovers of crashes and go too.
    """
    good: list[Path] = []
    deleted: list[Path] = []
    for path in candidates(folder):
        if len(good) >= max(keep, 1) or _outlived(path, good):
            if not _pinned(path):
                deleted.append(path)
        elif path in trusted or damage(path) is None:
            good.append(path)
    if good:
        newest = describe(good[0])["step"]
        for entry in os.scandir(folder):
            match = _UNFINISHED.fullmatch(entry.name)
            if match and int(match[1]) <= newest:
                deleted.append(folder / entry.name)
    for path in deleted:
        remove(path)
    return deleted


def remove(path: Path) -> None:
    """Delete a checkpoint so that, if interrupted, no half of it looks like one."""
    aside = path
    if not _UNFINISHED.fullmatch(path.name):
        stem = path.name.strip(".").split(".")[0]
        aside = path.with_name(f".{stem}.{uuid.uuid4().hex[:12]}.tmp")
        os.rename(path, aside)
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside)
    logger.info("deleted %s", path)


def _outlived(path: Path, good: list[Path]) -> bool:
    """Whether ``path`` is a replaced checkpoint whose replacement is good."""
    match = _REPLACED.fullmatch(path.name)
    return match is not None and step_folder(path.parent, int(match[1])) in good


def _pinned(path: Path) -> bool:
    try:
        return bool(describe(path).get("pinned"))
    except (DamagedCheckpoint, OSError):
        return False


def _lstat(path: Path) -> os.stat_result:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None


def _read_small(path: Path, limit: int) -> bytes:
    found = _lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{path} is a link or a special file")
    if found.st_size > limit:
        raise DamagedCheckpoint(f"{path} has {found.st_size} bytes, more than {limit}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def _check_listing(path: Path, meta: Mapping) -> None:
    """Files on disk are the listed ones, regular, at their sizes, under the step's own name."""
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != meta["step"]:
        raise DamagedCheckpoint(f"{path} holds step {meta['step']}: it was renamed or copied")
    there = {entry.name for entry in os.scandir(path)} - {META, COMPLETE}
    listed = meta["files"]
    for name in sorted(there - set(listed)):
        raise DamagedCheckpoint(f"{path / name} does not belong to this checkpoint")
    for name, want in sorted(listed.items()):
        if "/" in name or name in (".", ".."):
            raise DamagedCheckpoint(f"{path / META} lists {name!r}, which is outside the folder")
        found = _lstat(path / name)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedCheckpoint(f"{path / name} is a link or a special file")
        if found.st_size != want["bytes"]:
            raise DamagedCheckpoint(
                f"{path / name} has {found.st_size} bytes, {want['bytes']} were written"
            )
