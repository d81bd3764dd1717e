"""A checkpoint is whole or refused: every change to any file of it is noticed before use."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.digest import sha256_of


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What a power loss does is not tested here, and flushing is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _write(folder: Path, step: int, *, seed: int = 0, pinned: bool = False) -> Path:
    """A small sealed checkpoint, its files random bytes."""
    aside = folders.unfinished_folder(folder, step)
    aside.mkdir(parents=True)
    noise, files = random.Random(f"{seed} {step}"), {}
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "run.json", "state.json"):
        data = noise.randbytes(noise.randint(40, 400))
        (aside / name).write_bytes(data)
        files[name] = (len(data), hashlib.sha256(data).hexdigest())
    folders.seal(aside, {"step": step, "pinned": pinned}, files)
    final = folders.step_folder(folder, step)
    folders.publish(aside, final)
    return final


def _damage(path: Path, other: Path, noise: random.Random) -> str:
    """Damage one file of ``path`` in one way, and say how."""
    victim = noise.choice(sorted(path.iterdir()))
    how = noise.choice(["truncate", "flip", "delete", "swap", "foreign", "grow", "extra", "link"])
    data = bytearray(victim.read_bytes())
    if how == "truncate":
        victim.write_bytes(data[: noise.randrange(len(data))])
    elif how == "flip":
        data[noise.randrange(len(data))] ^= 1 << noise.randrange(8)
        victim.write_bytes(data)
    elif how == "delete":
        victim.unlink()
    elif how == "swap":
        second = noise.choice([one for one in sorted(path.iterdir()) if one != victim])
        aside = path.with_name("aside")
        victim.rename(aside)
        second.rename(victim)
        aside.rename(second)
    elif how == "foreign":
        shutil.copy(other / victim.name, victim)
    elif how == "grow":
        victim.write_bytes(data + noise.randbytes(1))
    elif how == "extra":
        shutil.copy(other / "__0_0.distcp", path / "__2_0.distcp")
    else:
        victim.unlink()
        victim.symlink_to(other / victim.name)
    return f"{how} {victim.name}"


def test_a_thousand_damages_are_all_noticed(tmp_path):
    good, other = _write(tmp_path / "a", 7), _write(tmp_path / "a", 8)
    noise, missed = random.Random(1), []
    for number in range(1000):
        path = tmp_path / str(number) / good.name
        shutil.copytree(good, path)
        how = _damage(path, other, noise)
        if folders.damage(path) is None:
            missed.append(how)
        shutil.rmtree(path.parent)
    assert not missed
    assert folders.damage(good) is None


def test_the_newest_good_one_is_found_and_the_broken_ones_are_named(tmp_path):
    first, second, third = (_write(tmp_path, step) for step in (1, 2, 3))
    (third / "run.json").write_bytes(b"{}")
    (second / "COMPLETE").unlink()
    path, bad = folders.newest_good(tmp_path)
    assert path == first
    assert [one for one, _ in bad] == [third, second]
    assert "run.json" in bad[0][1]
    assert "COMPLETE" in bad[1][1]


def test_no_checkpoint_is_no_error(tmp_path):
    assert folders.newest_good(tmp_path / "absent") == (None, [])


def test_an_unfinished_folder_is_never_a_candidate(tmp_path):
    good = _write(tmp_path, 5)
    shutil.copytree(good, folders.unfinished_folder(tmp_path, 6))
    assert folders.newest_good(tmp_path) == (good, [])


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    good = _write(tmp_path, 5)
    shutil.copytree(good, folders.step_folder(tmp_path, 6))
    path, bad = folders.newest_good(tmp_path)
    assert path == good
    assert "holds step 5" in bad[0][1]


def test_links_are_not_followed(tmp_path):
    elsewhere = _write(tmp_path / "elsewhere", 9)
    folder = tmp_path / "run"
    good = _write(folder, 5)
    folders.step_folder(folder, 9).symlink_to(elsewhere)
    path, bad = folders.newest_good(folder)
    assert path == good
    assert "is a link" in bad[0][1]
    with pytest.raises(OSError, match=r"(?i)symbolic links"):
        (folder / "link").symlink_to(good / "run.json")
        sha256_of(folder / "link", follow_links=False)


def test_a_listed_name_cannot_leave_the_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    aside = folders.unfinished_folder(tmp_path, 1)
    aside.mkdir()
    files = {"../secret": (1, hashlib.sha256(b"x").hexdigest())}
    folders.seal(aside, {"step": 1}, files)
    folders.publish(aside, folders.step_folder(tmp_path, 1))
    with pytest.raises(folders.DamagedCheckpoint, match="outside the folder"):
        folders.verify(folders.step_folder(tmp_path, 1))


def test_a_newer_format_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "FORMAT_VERSION", 2)
    path = _write(tmp_path, 1)
    monkeypatch.undo()
    assert "format version 2" in folders.damage(path)


def test_ranks_that_share_the_hashing_see_every_file(tmp_path):
    good = _write(tmp_path, 1)
    damaged = good / "state.json"
    data = bytearray(damaged.read_bytes())
    data[0] ^= 1
    damaged.write_bytes(data)
    noticed = 0
    for rank in range(3):
        try:
            folders.verify(good, share=(rank, 3))
        except folders.DamagedCheckpoint as why:
            noticed += "state.json" in str(why)
    assert noticed == 1


def test_retention_keeps_the_newest_good_ones_and_pinned_ones(tmp_path):
    paths = [_write(tmp_path, step, pinned=step == 1) for step in range(1, 6)]
    (paths[4] / "run.json").write_bytes(b"broken")
    deleted = folders.retain(tmp_path, 2)
    assert deleted == [paths[1]]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step_00000001", "step_00000003", "step_00000004", "step_00000005"]


def test_retention_never_deletes_the_only_good_one(tmp_path):
    paths = [_write(tmp_path, step) for step in range(1, 5)]
    for path in paths[1:]:
        (path / "COMPLETE").unlink()
    assert folders.retain(tmp_path, 1) == []
    assert folders.newest_good(tmp_path)[0] == paths[0]


def test_retention_clears_what_crashes_left_behind(tmp_path):
    good = _write(tmp_path, 5)
    old, coming = (folders.unfinished_folder(tmp_path, step) for step in (5, 6))
    old.mkdir()
    coming.mkdir()
    assert folders.retain(tmp_path, 1) == [old]
    assert coming.is_dir()
    assert good.is_dir()


def test_saving_a_step_again_replaces_it(tmp_path):
    old = _write(tmp_path, 5)
    before = folders.describe(old)
    new = _write(tmp_path, 5, seed=1)
    assert new == old
    assert folders.describe(new)["files"] != before["files"]
    assert folders.damage(new) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]


def test_the_description_is_plain_json(tmp_path):
    path = _write(tmp_path, 3, pinned=True)
    meta = folders.describe(path)
    assert meta == json.loads(json.dumps(meta))
    assert (meta["step"], meta["pinned"]) == (3, True)
