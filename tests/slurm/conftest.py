"""A loopback Slurm for each module that asks for one."""

import os
from collections.abc import Iterator

import pytest

from tools.drills.cluster import Cluster, missing
from tools.drills.lab import Lab

TOKEN = "hf_canary_0123456789"
"""In the environment of whoever submits; nothing may keep it."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Runs on nodes n1 to n3."""
    if why := missing():
        if os.environ.get("CI"):
            pytest.fail(f"Slurm must be there in CI: {why}")
        pytest.skip(why)
    os.environ["HF_TOKEN"] = TOKEN
    cluster = Cluster(3)
    try:
        yield Lab(cluster)
    finally:
        del os.environ["HF_TOKEN"]
        cluster.close()
