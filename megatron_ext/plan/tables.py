"""Published tables of step times and memory peaks, read into shapes and layouts."""

import logging
from functools import cache
from pathlib import Path

import yaml

from megatron_ext.plan.published import Row
from megatron_ext.plan.published_ampere import korthikanti, skywork, vtrain
from megatron_ext.plan.published_nvidia import dgxc, golden, nemo, weak

log = logging.getLogger(__name__)

READERS = {
    "mcore_ci_golden": golden,
    "vtrain_multi": vtrain,
    "korthikanti_table3_5": korthikanti,
    "skywork_table10": skywork,
    "nemo_24_07": nemo,
    "dgxc_h100_gb200": dgxc,
    "mcore_h100_weak": weak,
}


def unread(path: Path) -> list[str]:
    """Tables of ``path`` that print no layout, or nothing that is predicted here."""
    return [table["id"] for table in _load(path)["tables"] if table["id"] not in READERS]


@cache
def _load(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read(path: Path) -> list[Row]:
    """Every row of ``path`` that this module knows how to lay out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    stored = _load(path)
    rows: list[Row] = []
    for table in stored["tables"]:
        reader = READERS.get(table["id"])
        if reader is None:
            continue
        for cells in table["rows"]:
            named = dict(zip(table["columns"], cells, strict=True))
            try:
                read_here = list(reader(named, stored["models"]))
                for row in read_here:
                    row.layout.chunk_layers(row.shape.layers)
                rows += read_here
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                log.warning("%s: %s cannot be laid out: %s", table["id"], cells, error)
    return rows
