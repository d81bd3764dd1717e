"""Checkpoints are Megatron's format, failures reach every rank, foreign state is refused."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time

import pytest
import torch

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import index
from megatron_ext.checkpoint.load import load
from megatron_ext.checkpoint.reader import TensorReader
from megatron_ext.checkpoint.resumable import stored_run
from megatron_ext.checkpoint.save import Staging, begin, save
from megatron_ext.checkpoint.shard import write_shard
from megatron_ext.checkpoint.shelf import Shelf
from megatron_ext.digest import sha256_of
from megatron_ext.testing import env, run_on_ranks
from tests.distributed.checkpoint.small_run import Training, small_run

TP = {"tensor_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
STEP_1 = "step_00000001"


def _train_and_save(folder, run, steps=1):
    training = Training(run)
    training.train(steps)
    save(folder, **training.what())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one step at TP 2. Copied by those who change it."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(_train_and_save, folder, small_run(**TP), world_size=2)
    return folder / STEP_1


def _megatron_reads_it(path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import unwrap_model

    training = Training(small_run())
    (model,) = unwrap_model(training.chunks)
    wanted = {"model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))}
    found = dist_checkpointing.load(
        wanted,
        str(path),
        strict=StrictHandling.LOG_ALL,  # of _extra_state, which we do not store
    )["model"]
    training.load(path)
    for name, param in model.named_parameters():
        assert torch.equal(found[name][:100], param.detach()[:100]), name


def test_megatrons_own_loader_reads_our_checkpoints(saved):
    run_on_ranks(_megatron_reads_it, saved, world_size=1)


def test_a_checkpoint_describes_itself(saved):
    meta = folders.verify(saved)
    told = ("step", "tokens", "vocab_size", "padded_vocab", "norm_head", "rotary_base", "dtype")
    assert [meta[name] for name in told] == [1, 64, 100, 128, True, 10000.0, "fp32"]
    assert meta["layout"]["tensor_model_parallel_size"] == meta["layout"]["world_size"] == 2
    assert meta["versions"]["megatron-core"]
    assert stored_run(saved)["model"]["hidden_size"] == 32


def _save_quickly(folder):
    training = Training(small_run())
    training.train(1)
    start = time.perf_counter()
    save(folder, **training.what())
    assert time.perf_counter() - start < 3.0  # spawned writers took 9 to 13


def test_a_small_model_is_saved_without_spawning_anything(tmp_path):
    run_on_ranks(_save_quickly, tmp_path, world_size=1)


def _both_optimizer_ranks_write(folder):
    training = Training(small_run())
    training.train(1)
    path = save(folder, **training.what())
    sizes = [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
    assert len(sizes) == 2
    assert min(sizes) > 0.6 * max(sizes)


def test_data_parallel_ranks_share_the_writing(tmp_path):
    run_on_ranks(_both_optimizer_ranks_write, tmp_path, world_size=2)


def _save_in_background(folder):
    training = Training(small_run(**DISTRIBUTED, dtype="bf16"))
    training.train(1)
    save(folder / "plain", **training.what())
    changed, staging = threading.Event(), Staging()

    def late(path, slots):
        assert changed.wait(20.0)
        return write_shard(path, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ext.checkpoint.save.write_shard", late)
        for _ in range(2):  # the second time into the same host memory
            changed.clear()
            pending = begin(folder / "background", **training.what(), staging=staging)
            training.train(1)  # goes on before anything is written
            assert pending.poll() is None
            changed.set()
            while (path := pending.poll()) is None:
                time.sleep(0.01)
            assert path == folder / "background" / STEP_1
            training.load(folder / "plain" / STEP_1)


def test_a_save_in_the_background_holds_the_state_it_was_begun_with(tmp_path):
    run_on_ranks(_save_in_background, tmp_path, world_size=2)
    one, two = (TensorReader(tmp_path / name / STEP_1) for name in ("plain", "background"))
    assert set(one.tensors) == set(two.tensors)
    for key in one.tensors:
        if not key.startswith("rng."):
            assert torch.equal(one.read(key), two.read(key)), key
    assert folders.damage(tmp_path / "background" / STEP_1) is None


def _disk_full_on_one_rank(folder, background):
    training = Training(small_run())
    training.train(1)
    good = save(folder, **training.what())
    training.train(1)
    if env().rank == 1:  # from here on no file of this rank may grow past 10 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    start = time.perf_counter()
    with pytest.raises(OSError, match="rank 1 cannot save") as failure:
        pending = begin(folder, **training.what(), staging=Staging() if background else None)
        pending.finish()
    assert failure.value.errno == errno.EFBIG
    assert time.perf_counter() - start < 30.0  # nobody waits for a collective to time out
    if env().rank == 0:
        assert os.listdir(folder) == [STEP_1]
    assert folders.damage(good) is None
    training.train(1)  # goes on


@pytest.mark.parametrize("background", [False, True])
def test_a_writer_that_fails_is_told_to_every_rank(tmp_path, background):
    run_on_ranks(_disk_full_on_one_rank, tmp_path, background, world_size=2, timeout=30.0)


def _refused(path, run, message):
    training = Training(run)
    before = [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]
    with pytest.raises(ValueError, match=message):
        training.load(path)
    after = [param for chunk in training.chunks for param in chunk.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64}, r"word_embeddings.weight is \[128, 32\] there and \[112, 64\] here"),
        ({"ffn_hidden_size": 64}, r"linear_fc1.weight is \[4, 96, 32\] there and \[4, 128, 32\]"),
        ({"num_layers": 6}, r"is \[4, .* there and \[6, .* here"),
        ({"vocab_size": 90}, r"model.vocab_size=90 is not what .*\(model.vocab_size=100\)"),
        ({"norm_head": False}, r"model.norm_head=False is not what"),
        ({"add_qkv_bias": True}, r"holds no decoder.layers.self_attention.linear_qkv.bias"),
    ],
)
def test_another_models_checkpoint_is_refused_whole(saved, model, message):
    run_on_ranks(_refused, saved, small_run(model=model), message, world_size=1)


def _another_tokenizer(path):
    training = Training(small_run())
    with pytest.raises(ValueError, match="tokenizer_sha256=bbb"):
        training.load(path, about={"tokenizer_sha256": "bbb"})


def _save_about(folder):
    training = Training(small_run())
    training.train(1)
    save(folder, **training.what(), about={"tokenizer_sha256": "aaa"})


def test_another_tokenizers_checkpoint_is_refused(tmp_path):
    run_on_ranks(_save_about, tmp_path, world_size=1)
    run_on_ranks(_another_tokenizer, tmp_path / STEP_1, world_size=1)


def _weights_alone(path):
    training = Training(small_run())
    training.load(path, load_optimizer=False)
    assert training.optimizer.optimizer.state == {}
    weight = training.chunks[0].module.output_layer.weight
    assert torch.equal(weight[:100], TensorReader(path).read("output_layer.weight")[:100])


def test_weights_can_be_taken_without_the_optimizer(saved):
    run_on_ranks(_weights_alone, saved, world_size=1)


def _unsaved_parameter(folder):
    training = Training(small_run())
    mlp = training.chunks[0].module.decoder.layers[0].mlp
    mlp.gain = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"mlp\.gain would not be saved"):
        save(folder, **training.what())


def test_a_parameter_that_would_not_be_saved_is_refused(tmp_path):
    run_on_ranks(_unsaved_parameter, tmp_path, world_size=1)


def _skip_the_broken(folder):
    training = Training(small_run(**TP))
    shelf = Shelf(folder, keep=2)
    path, bad = shelf.newest_good()
    assert path == folder / "step_00000002"
    assert [(one.name, "__1_0.distcp" in why) for one, why in bad] == [("step_00000003", True)]
    assert training.load(path, verified=True)["step"] == 2
    training.train(2)
    new = save(folder, **training.what())
    assert [one.name for one in shelf.added(new)] == [STEP_1]


def test_all_ranks_skip_a_broken_checkpoint_and_keep_enough_good_ones(tmp_path, saved):
    run_on_ranks(_save_three, tmp_path, world_size=2)
    shard = tmp_path / "step_00000003" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run_on_ranks(_skip_the_broken, tmp_path, world_size=2)


def _save_three(folder):
    training = Training(small_run(**TP))
    for _ in range(3):
        training.train(1)
        save(folder, **training.what())


def _hash_each_file_once(folder):
    Training(small_run(**TP))  # for its process groups
    hashed = []

    def counting(path, **how):
        hashed.append(path)
        return sha256_of(path, **how)

    shelf = Shelf(folder, keep=2)
    newest = folder / "step_00000003"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "sha256_of", counting)
        shelf.added(newest)
        shelf.added(newest, read_back=True)
    mine = [path.relative_to(folder) for path in hashed]
    assert len(mine) == len(set(mine))
    assert 0 < len(mine) < len(list(newest.iterdir())) * 2


def test_ranks_share_the_hashing_and_do_it_once(tmp_path):
    run_on_ranks(_save_three, tmp_path, world_size=2)
    run_on_ranks(_hash_each_file_once, tmp_path, world_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


class _Canary:
    """Unpickled by anything less than careful, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def _reseal(path):
    """What somebody who prepares a hostile checkpoint would do: make every hash fit."""
    meta = json.loads((path / folders.META).read_bytes())
    files = {}
    for name in meta.pop("files"):
        data = (path / name).read_bytes()
        files[name] = (len(data), hashlib.sha256(data).hexdigest())
    folders.seal(path, meta, files)


@pytest.mark.parametrize("kind", ["metadata", "hidden in metadata", "shard", "rng", "common"])
def test_nothing_in_a_hostile_checkpoint_is_executed(tmp_path, saved, kind):
    path, canary = tmp_path / saved.name, tmp_path / "canary"
    shutil.copytree(saved, path)
    evil = pickle.dumps(_Canary(canary))
    if kind == "metadata":
        (path / index.INDEX).write_bytes(evil)
    elif kind == "hidden in metadata":
        whole = pickle.loads((path / index.INDEX).read_bytes())
        whole.planner_data = {"x": _Canary(canary)}
        (path / index.INDEX).write_bytes(pickle.dumps(whole))
    elif kind == "common":
        (path / "common.pt").write_bytes(evil)
    else:
        _replace_piece(path, "rng.rank_0" if kind == "rng" else "output_layer.weight", canary)
    _reseal(path)
    assert folders.damage(path) is None
    run_on_ranks(_load_hostile, path, kind == "common", world_size=2)
    assert not canary.exists()


def _replace_piece(path, key, canary):
    piece = TensorReader(path).tensors[key].pieces[0]
    bomb = io.BytesIO()
    torch.save(_Canary(canary), bomb)
    data = bytearray((path / piece.file).read_bytes())
    data[piece.offset : piece.offset + piece.length] = bomb.getvalue().ljust(piece.length, b"\0")
    whole = pickle.loads((path / index.INDEX).read_bytes())
    for at, info in whole.storage_data.items():
        if at.fqn == key and info.offset == piece.offset:
            info.length = len(bomb.getvalue())
    (path / piece.file).write_bytes(data)
    (path / index.INDEX).write_bytes(pickle.dumps(whole))


def _load_hostile(path, harmless):
    training = Training(small_run(**TP))
    try:
        training.load(path)
    except (ValueError, pickle.UnpicklingError, RuntimeError):
        assert not harmless
    else:
        assert harmless  # common.pt is Megatron's; we never open it


def test_load_needs_no_model_to_be_refused(tmp_path):
    with pytest.raises(folders.DamagedCheckpoint, match="is missing"):
        load(tmp_path / STEP_1, run=small_run(), chunks=[], optimizer=None, groups=None)
