"""Files of records, one JSON object a line: a line that a power loss tore costs only itself."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from megatron_ext.atomic import sync_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
MAX_BYTES = 64 << 20  # a file longer than this is none of ours; the oldest part is left unread


def append(path: Path, record: "DataclassInstance") -> None:
    """Add ``record``, flushed to disk; the file is private to the user.

    Raises:
        OSError: ``path`` is a symbolic link, or cannot be written.
    """
    data = (json.dumps(asdict(record)) + "\n").encode()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as file:
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data  # the line before was torn
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if not size:
        sync_folder(path.parent)


def read(path: Path, kind: type[T]) -> list[T]:
    """The records of dataclass ``kind``, oldest first; none where there is no file.

    Torn and foreign lines, and such with a value of another type than the field's, are passed over.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_BYTES))
            lines = file.read(MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    hints = get_type_hints(kind)
    found = (_record(line, kind, hints) for line in lines)
    return [record for record in found if record is not None]


def _record(line: bytes, kind: type[T], hints: dict[str, Any]) -> T | None:
    try:
        values = json.loads(line)
        fits = all(_fits(value, hints[name]) for name, value in values.items())
        return kind(**values) if fits else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _fits(value: object, hint: Any) -> bool:
    """Whether JSON's ``value`` is of the type; a whole number will do for a float."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is list:
        return type(value) is list and all(_fits(one, *get_args(hint)) for one in value)
    return type(value) is hint or (hint is float and type(value) is int)
