"""The corpus: archives that cannot harm, documents cleaned, distinct and split by their text."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from megatron_ext.data.corpus import fetch as fetch_module
from megatron_ext.data.corpus import shipped
from megatron_ext.data.corpus.archives import members
from megatron_ext.data.corpus.document import Document, clean, distinct, split
from megatron_ext.data.corpus.fetch import fetch
from megatron_ext.data.corpus.packages import PACKAGES, Package
from megatron_ext.digest import sha256_of


def _source_archive(path, members_):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members_.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_are_read_by_pattern_without_the_leading_folder(tmp_path):
    path = _source_archive(tmp_path / "a-1.tar.gz", {"a-1/x/b.txt": b"B", "a-1/x/c.py": b"C"})
    assert list(members(path, "x/*.txt")) == [("x/b.txt", b"B")]


@pytest.mark.parametrize("name", ["a-1/../../evil.txt", "a-1//abs/evil.txt"])
def test_member_that_leaves_the_archive_is_refused(tmp_path, name):
    path = _source_archive(tmp_path / "a-1.tar.gz", {name: b"x"})
    with pytest.raises(ValueError, match="outside the archive"):
        list(members(path, "*.txt"))


def test_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a-1.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("a-1/link.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
    assert list(members(tmp_path / "a-1.tar.gz", "*")) == []


def test_oversized_member_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ext.data.corpus.archives.LARGEST_MEMBER", 10)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("b.txt", "x" * 11)
    with pytest.raises(ValueError, match="11 bytes"):
        list(members(tmp_path / "a.whl", "*.txt"))


SETUP = b"""
from pathlib import Path
Path({witness!r}).write_text("run")
from setuptools import setup
setup(name="harmful", version="1.0")
"""


def test_a_source_archive_is_fetched_without_running_any_of_it(tmp_path, monkeypatch):
    """By the real pip, from a folder in the place of an index."""
    index, cache, witness = tmp_path / "index", tmp_path / "cache", tmp_path / "witness"
    index.mkdir()
    path = _source_archive(
        index / "harmful-1.0.tar.gz",
        {
            "harmful-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: harmful\nVersion: 1.0\n",
            "harmful-1.0/setup.py": SETUP.replace(b"{witness!r}", repr(str(witness)).encode()),
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = Package("harmful", "1.0", path.name, sha256_of(path), 0.1, "none")
    assert fetch([package], cache) == {}
    assert (cache / path.name).read_bytes() == path.read_bytes()
    assert not witness.exists()
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_a_file_of_another_hash_is_not_kept(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    info = b"Metadata-Version: 2.1\nName: harmful\nVersion: 1.0\n"
    path = _source_archive(index / "harmful-1.0.tar.gz", {"harmful-1.0/PKG-INFO": info})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = Package("harmful", "1.0", path.name, "0" * 64, 0.1, "none")
    assert "harmful" in fetch([package], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_cache_is_fetched_again_and_a_whole_one_is_not(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fetch_module, "_download", lambda package, cache: asked.append(1) or "no")
    (tmp_path / "x.whl").write_bytes(b"whole")
    package = Package("x", "1", "x.whl", sha256_of(tmp_path / "x.whl"), 0.1, "none")
    assert fetch([package], tmp_path) == {} and not asked
    (tmp_path / "x.whl").write_bytes(b"half")
    assert fetch([package], tmp_path) == {"x": "no"} and asked


def test_every_package_names_a_full_hash_and_a_licence():
    assert all(len(package.sha256) == 64 and package.licence for package in PACKAGES)


def test_cleaning_keeps_text_and_drops_terminal_colours():
    assert clean("\ufeff\x1b[31mred\x1b[0m  \r\n\r\n\r\n\r\n  x\x00\n") == "red\n\n  x"


def test_equal_texts_are_kept_once_whatever_their_blanks():
    texts = ["one two", "one  two\n", "three", "", "  "]
    assert [d.text for _, d in distinct(Document(t, "d", "s") for t in texts)] == texts[::2][:2]


def test_split_depends_on_the_text_alone_and_reaches_every_domain():
    documents = [Document(f"text {i}", f"d{i % 3}", "s") for i in range(300)]
    train, validation = split(distinct(documents), validation_share=0.02)
    again, held_out = split(distinct(reversed(documents)), validation_share=0.02)
    assert set(validation) == set(held_out) and set(train) == set(again)
    assert {d.domain for d in validation} == {"d0", "d1", "d2"}
    assert len(validation) < 20 and not set(train) & set(validation)


def test_shipped_corpus_has_both_languages_code_and_eight_domains():
    documents = list(shipped.documents())
    assert len(documents) >= 150
    domains = {d.domain for d in documents}
    assert len(domains) >= 8 and "code" in domains
    assert any(d.startswith("zh-") for d in domains) and any(d.startswith("en-") for d in domains)
    assert len(list(distinct(documents))) == len(documents)


def test_without_a_network_the_command_says_so_and_goes_on(tmp_path):
    out = tmp_path / "corpus"
    command = [sys.executable, "-m", "tools.corpus", str(out), "--cache", str(tmp_path / "cache")]
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    for _ in range(2):  # a second run replaces the first
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "going on with the small corpus" in done.stderr
    summary = json.loads((out / "corpus.json").read_text())
    assert set(summary["licences"]) == {"shipped"}
    for domain in summary["domains"]:
        for part in ("train", "validation"):
            lines = (out / part / f"{domain}.jsonl").read_text().splitlines()
            assert lines and all(json.loads(line)["domain"] == domain for line in lines)
