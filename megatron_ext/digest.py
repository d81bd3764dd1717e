"""The sha256 by which a file is known to be the one it is taken for."""

import hashlib
import os
from pathlib import Path


def sha256_of(path: Path, *, follow_links: bool = True) -> str:
    """The sha256 of a file's content, in hexadecimal.

    Raises:
        OSError: ``path`` cannot be read, or is a link and links are not followed.
    """
    handle = os.open(path, os.O_RDONLY if follow_links else os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
