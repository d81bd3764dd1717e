"""Reads members of wheels and source archives in memory; nothing is unpacked to disk."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

LARGEST_MEMBER = 64 * 2**20
"""Bytes. The largest text we read has 8 MB; more is a mistake or a bomb."""


def members(path: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular member whose name matches one of ``patterns``, sorted.

    A source archive's leading ``name-version/`` is left out of the name.

    Raises:
        ValueError: a member has a path that leaves the archive, or is too large.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if _wanted(name, patterns):
                    _check(path.name, name, archive.getinfo(name).file_size)
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as tar:
        yield from tar_members(tar, *patterns, label=path.name, strip=1)


def tar_members(
    tar: tarfile.TarFile, *patterns: str, label: str, strip: int = 0
) -> Iterator[tuple[str, bytes]]:
    """``members`` of an open tar; links, devices and folders are passed over."""
    found = []
    for member in tar:
        name = "/".join(member.name.removeprefix("./").split("/")[strip:])
        if member.isreg() and _wanted(name, patterns):
            _check(label, name, member.size)
            file = tar.extractfile(member)
            assert file is not None
            found.append((name, file.read()))
    yield from sorted(found)


def inner_tar(content: bytes, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """``members`` of a tar that is itself a member."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        yield from tar_members(tar, *patterns, label="inner archive")


def _wanted(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(archive: str, name: str, size: int) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{archive}: member {name} points outside the archive.")
    if size > LARGEST_MEMBER:
        raise ValueError(f"{archive}: member {name} has {size} bytes, over {LARGEST_MEMBER}.")
