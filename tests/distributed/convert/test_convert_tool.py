"""tools.convert and tools.depth_upscale as commands: what they print, leave, and exit with."""

import json
import shutil

from launch.cli import refusing
from megatron_ext.checkpoint.folder import META, seal
from megatron_ext.checkpoint.resumable import RUN
from megatron_ext.convert.described import model_of
from megatron_ext.convert.to_megatron import to_megatron
from megatron_ext.digest import sha256_of
from megatron_ext.evaluate import parity
from megatron_ext.testing import run_on_ranks
from tests.convert.models import make
from tools import convert, depth_upscale


def tool(main, *words):
    return refusing(lambda: main([str(word) for word in words]))


def there_and_back(folder):
    source = make("index", folder / "hf")
    assert tool(convert.main, "hf-to-megatron", source, folder / "ckpt") == 0
    report = json.loads((folder / "ckpt.report.json").read_text())
    assert report["head"] == "norm-head, raw rows" and report["rotary_base"] == 320000.0
    assert report["verification"]["zh"]["agrees"] and len(report["entries"]) == 4 * 6 + 3
    fold = ("megatron-to-hf", folder / "ckpt", folder / "folded", "--fold-norm-head")
    assert tool(convert.main, *fold) == 0
    assert tool(convert.main, "verify", folder / "folded", folder / "ckpt") == 0
    assert tool(convert.main, "inspect", folder / "ckpt", "--json") == 0
    assert tool(convert.main, "diff", folder / "ckpt", folder / "ckpt") == 0
    deeper = ("--insert-identity", "every=2", "--tokens", 32)
    assert tool(depth_upscale.main, folder / "ckpt", folder / "deep", *deeper) == 0
    losses = json.loads((folder / "deep.report.json").read_text())
    for name, before in losses["loss_before"].items():
        assert abs(losses["loss_after"][name] - before) < 1e-4
    assert tool(convert.main, "diff", folder / "ckpt", folder / "deep") == 1
    auto = ("--auto", 2, "--no-loss", "--tokens", 32)
    assert tool(depth_upscale.main, folder / "ckpt", folder / "auto", *auto) == 0
    assert (folder / "auto.cosine.png").stat().st_size > 1000
    assert model_of(folder / "auto")[0].num_layers == 6


def test_both_tools_do_their_work_and_say_so(tmp_path):
    run_on_ranks(there_and_back, tmp_path, world_size=1)


def differing(folder):
    parity.TOLERANCE = -1.0  # nothing agrees
    source = make("tied", folder / "hf")
    assert tool(convert.main, "hf-to-megatron", source, folder / "ckpt") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["hf"]


def test_an_output_whose_logits_differ_is_taken_back(tmp_path):
    run_on_ranks(differing, tmp_path, world_size=1)


def test_what_is_refused_exits_with_2_and_one_sentence(tmp_path, capsys):
    source = make("tied", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHead"]}))
    assert tool(convert.main, "hf-to-megatron", source, tmp_path / "ckpt") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GPT2LMHead is not known: choose one of" in said
    assert tool(convert.main, "inspect", tmp_path / "absent") == 2
    assert tool(depth_upscale.main, tmp_path / "no", tmp_path / "out", "--copy", "1:2") == 2


def reseal(folder):
    """As a checkpoint is written: the listing, then its seal."""
    meta = json.loads((folder / META).read_text())
    files = {
        name: ((folder / name).stat().st_size, sha256_of(folder / name)) for name in meta["files"]
    }
    about = {key: value for key, value in meta.items() if key not in ("files", "format_version")}
    seal(folder, about, files)


def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path, capsys):
    to_megatron(make("tied", tmp_path / "hf"), tmp_path / "good")

    def refused(sentence, *commands):
        for command in commands:
            assert tool(convert.main, *command) == 2
            said = capsys.readouterr().err
            assert said.startswith("refused: ") and said.count("\n") == 1 and sentence in said

    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    run = (bad / RUN).read_text()
    capsys.readouterr()
    inspect, diff = ("inspect", bad), ("diff", tmp_path / "good", bad)
    (bad / RUN).write_text("[]")
    refused(f"{bad / RUN} has", inspect, diff, ("megatron-to-hf", bad, tmp_path / "out"))
    reseal(bad)
    refused(f"{bad / RUN} does not describe a model", inspect)
    (bad / RUN).write_text(run)
    reseal(bad)
    assert tool(convert.main, *inspect) == tool(convert.main, *diff) == 0
    shard = max(bad.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(f"{shard} has other bytes than were written", diff)
