"""The tier of Transformer Engine's real layers, built on a CPU: ``make test-te``.

It needs the metapackage alone (``pip install --no-deps transformer-engine``), whose compiled part
fake_extension.py stands in for, and so an environment of its own. Elsewhere it is skipped.
"""

import pytest

from megatron_ext.devices import probe
from megatron_ext.devices.probe import ABSENT, LIBRARIES, USABLE, Probe, version_of

ENGINE = version_of("transformer-engine")
LAYOUT_ONLY = bool(ENGINE) and probe.probe_all(cuda=False)["transformer_engine"].state == "broken"
REASON = "needs the environment of `make test-te`, Transformer Engine's metapackage alone"


def _found(*, cuda: bool) -> dict[str, Probe]:
    """What a machine with a GPU and a whole Transformer Engine would find."""
    found = {library.name: Probe(library.name, ABSENT) for library in LIBRARIES}
    return {**found, "transformer_engine": Probe("transformer_engine", USABLE, ENGINE)}


if LAYOUT_ONLY:
    from tests.te import fake_extension

    fake_extension.install()
    probe.guard = _found  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them where the layers cannot be built."""
    for item in items:
        if "tests/te/" in item.nodeid or item.path.parent.name == "te":
            item.add_marker(pytest.mark.te)
            if not LAYOUT_ONLY:
                item.add_marker(pytest.mark.skip(reason=REASON))
