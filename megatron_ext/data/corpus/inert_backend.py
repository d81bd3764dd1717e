"""A build backend that runs nothing of an archive: its metadata step copies PKG-INFO.

pip asks the backend of every source archive for metadata, also when it only downloads it, and that
runs the archive's own setup.py. fetch.py puts a copy of this file in the backends' place.
"""

import re
import shutil
import sys
from pathlib import Path

__legacy__ = sys.modules[__name__]  # setuptools' backend for archives without pyproject.toml


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """Nothing is built, so nothing is needed."""
    return []


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: object = None
) -> str:
    """Answer with the name and version that the archive states in PKG-INFO."""
    text = Path("PKG-INFO").read_text(encoding="utf-8")
    facts = dict(re.findall(r"(?m)^(Name|Version): *(\S+)", text))
    folder = f"{re.sub('[-_.]+', '_', facts['Name'])}-{facts['Version']}.dist-info"
    (Path(metadata_directory) / folder).mkdir(parents=True)
    shutil.copyfile("PKG-INFO", Path(metadata_directory) / folder / "METADATA")
    return folder
