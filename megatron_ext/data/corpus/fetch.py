"""Fetches the pinned packages with pip, whatever index pip is configured for, into a cache.

pip itself checks the sha256 and so does this file, every time a cached file is used. Nothing is
installed, built or executed: wheels are only stored, and source archives meet inert_backend.py
where their build backend would run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ext.data.corpus import inert_backend
from megatron_ext.data.corpus.packages import Package
from megatron_ext.digest import sha256_of

BACKENDS = ("setuptools/build_meta.py", "hatchling/build.py")
"""Where the backends of our source archives would be imported from."""

PIP_SECONDS = 300


def cached(package: Package, cache: Path) -> bool:
    """Whether the package's file is in ``cache`` and is the pinned one."""
    path = cache / package.file
    return path.is_file() and sha256_of(path) == package.sha256


def fetch(
    packages: Sequence[Package],
    cache: Path,
    *,
    progress: Callable[[Package, bool], None] = lambda package, fetched: None,
) -> dict[str, str]:
    """Bring every package into ``cache``; return why, by name, for those that could not be had.

    After the first failure to reach the index nothing more is asked of it.
    """
    cache = cache.resolve()  # pip builds in a folder of its own, where a relative path is lost
    cache.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for package in packages:
        fetched = not cached(package, cache)
        if fetched and failures:
            failures[package.name] = "not tried after the failure before it"
        elif fetched and (why := _download(package, cache)):
            failures[package.name] = why
        else:
            progress(package, fetched)
    return failures


def _download(package: Package, cache: Path) -> str:
    """Run pip for one file; return what went wrong, or nothing."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        aside = Path(folder)
        wanted = aside / "wanted.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "--dest", str(aside)]
        environment = dict(os.environ)
        if package.is_source:
            command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
            environment["PYTHONPATH"] = str(_inert_backends(aside / "backends"))
        else:
            command += ["--only-binary", ":all:"]
        command += ["--retries", "1", "--timeout", "20", "-r", str(wanted)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PIP_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"pip took longer than {PIP_SECONDS} s"
        file = aside / package.file
        if done.returncode or not file.is_file():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or ["pip left no file of the pinned name"])[0].removeprefix("ERROR: ")
        if (found := sha256_of(file)) != package.sha256:
            return f"its sha256 is {found} and {package.sha256} is pinned"
        os.replace(file, cache / package.file)
    return ""


def _inert_backends(folder: Path) -> Path:
    for name in BACKENDS:
        path = folder / name
        path.parent.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
        shutil.copyfile(str(inert_backend.__file__), path)
    return folder
