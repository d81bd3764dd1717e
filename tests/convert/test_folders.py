"""Whole folders there and back: bit-exact, or refused with nothing left behind."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.folder import describe, seal, verify
from megatron_ext.convert.huggingface import open_folder
from megatron_ext.convert.sharded_reader import open_sharded
from megatron_ext.convert.to_huggingface import to_huggingface
from megatron_ext.convert.to_megatron import to_megatron
from tests.convert.models import FAMILIES, make


def weights(folder):
    return {name: stored.read() for name, stored in open_folder(folder).tensors.items()}


def assert_same_bits(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def rewrite(folder, change):
    """Apply ``change`` to the folder's tensors and store them as one file."""
    tensors = weights(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(family, dtype, tmp_path):
    source = make(family, tmp_path / "hf", dtype=dtype)
    to_megatron(source, tmp_path / "ckpt")
    verify(tmp_path / "ckpt")
    report = to_huggingface(tmp_path / "ckpt", tmp_path / "back", shard_bytes=50_000)
    assert_same_bits(source, tmp_path / "back")
    assert report.huggingface_tensors == len(weights(source))
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3


def test_the_vocabulary_is_padded_with_zeros_inside_and_cut_outside(tmp_path):
    source = make("skywork", tmp_path / "hf")
    report = to_megatron(source, tmp_path / "ckpt")
    rows = open_sharded(tmp_path / "ckpt").tensors["output_layer.weight"].read()
    assert rows.shape[0] == report.padded_vocab == 384
    assert not rows[301:].any()
    assert [e.padding_rows for e in report.entries if e.padding_rows] == [83, 83]


def test_the_first_yi_names_are_read(tmp_path):
    source = make("llama", tmp_path / "hf")
    plain = make("llama", tmp_path / "plain")

    def rename(tensors):
        for name in list(tensors):
            old = name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2")
            tensors[old] = tensors.pop(name)

    rewrite(source, rename)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["YiForCausalLM"]}))
    to_megatron(source, tmp_path / "ckpt")
    to_huggingface(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(plain, tmp_path / "back")


def test_bin_shards_are_read_as_weights_only(tmp_path):
    source, plain = make("tied", tmp_path / "hf"), make("tied", tmp_path / "plain")
    tensors = weights(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save({n: tensors[n] for n in names[:9]}, source / "pytorch_model-00001-of-00002.bin")
    rest = {n: tensors[n] for n in [*names[9:], "lm_head.weight"]}
    torch.save(rest, source / "pytorch_model-00002-of-00002.bin")
    report = to_megatron(source, tmp_path / "ckpt")
    assert "lm_head.weight" in report.left_out
    to_huggingface(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(plain, tmp_path / "back")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_bin_file_cannot_run_anything(tmp_path):
    source = make("tied", tmp_path / "hf")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": Malicious(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a file of plain tensors"):
        to_megatron(source, tmp_path / "ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cannot_run_anything(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(ValueError, match="not allowed"):
        open_sharded(tmp_path)
    assert not (tmp_path / "ran").exists()


def _extra(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def _missing(tensors):
    del tensors["model.layers.3.mlp.up_proj.weight"]


def _resized(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:300].clone()


def _integer(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()


def _mixed(tensors):
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (_extra, "q_norm.weight is read by no rule of the llama table"),
        (_missing, "model.layers.3.mlp.up_proj.weight is missing"),
        (_resized, r"lm_head.weight is \[300, 112\], and config.json makes it \[301, 112\]"),
        (_integer, "model.norm.weight is torch.int64"),
        (_mixed, "have different dtypes"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused_and_leaves_nothing(change, sentence, tmp_path):
    source = make("llama", tmp_path / "hf")
    rewrite(source, change)
    with pytest.raises(ValueError, match=sentence):
        to_megatron(source, tmp_path / "out" / "ckpt")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_truncated_shard_is_refused(tmp_path):
    source = make("llama", tmp_path / "hf")
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="it is truncated"):
        to_megatron(source, tmp_path / "ckpt")


def test_a_missing_shard_is_named(tmp_path):
    source = make("llama", tmp_path / "hf")
    sorted(source.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match="is missing, and model"):
        to_megatron(source, tmp_path / "ckpt")


def test_an_existing_target_is_never_touched(tmp_path):
    source = make("tied", tmp_path / "hf")
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(FileExistsError, match="name a new folder"):
        to_megatron(source, tmp_path / "ckpt")


def test_what_a_killed_conversion_left_is_swept_by_the_next(tmp_path):
    source = make("tied", tmp_path / "hf")
    (tmp_path / ".ckpt.unfinished").mkdir()
    (tmp_path / ".ckpt.unfinished" / "__0_0.distcp").write_bytes(b"half")
    to_megatron(source, tmp_path / "ckpt")
    verify(tmp_path / "ckpt")
    assert not (tmp_path / ".ckpt.unfinished").exists()


def test_tokenizer_files_travel_and_python_files_do_not(tmp_path):
    source = make("llama", tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "modeling_llama.py").write_text("raise SystemExit")
    (source / "generation_config.json").write_text('{"top_p": 0.8}')
    report = to_megatron(source, tmp_path / "ckpt")
    to_huggingface(tmp_path / "ckpt", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"top_p": 0.8}'
    assert not list((tmp_path / "back").glob("*.py"))
    assert len(report.tokenizer_sha256) == 64


def test_a_fold_leaves_unit_rows_and_says_so(tmp_path):
    source = make("index", tmp_path / "hf")
    to_megatron(source, tmp_path / "ckpt")
    to_huggingface(tmp_path / "ckpt", tmp_path / "folded", fold_norm_head=True)
    head = load_file(tmp_path / "folded" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(301))
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config["megatron_ext"] == {"norm_head_folded": True}
    report = to_megatron(tmp_path / "folded", tmp_path / "again")
    assert "raw lengths are lost" in report.warnings[0]


def test_a_plain_head_is_not_folded(tmp_path):
    to_megatron(make("llama", tmp_path / "hf"), tmp_path / "ckpt")
    with pytest.raises(ValueError, match="nothing to fold"):
        to_huggingface(tmp_path / "ckpt", tmp_path / "folded", fold_norm_head=True)


def test_another_tokenizer_than_the_trained_one_is_refused(tmp_path):
    source = make("tied", tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    to_megatron(source, tmp_path / "ckpt")
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(ValueError, match="token numbers would mean other words"):
        to_huggingface(tmp_path / "ckpt", tmp_path / "a", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match="no tokenizer file is there"):
        to_huggingface(tmp_path / "ckpt", tmp_path / "b", tokenizer=tmp_path / "absent")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_bare_sentencepiece_model_becomes_a_tokenizer_that_encodes_the_same(tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    import megatron_ext.convert.hf_index  # noqa: F401, makes Index known to transformers

    text = tmp_path / "text"
    text.write_text("桥上每天有两千多辆车经过。\nThe tower was rebuilt in 1999, twice.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=301,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    to_megatron(make("index", tmp_path / "hf"), tmp_path / "ckpt")
    to_huggingface(tmp_path / "ckpt", tmp_path / "out", tokenizer=tmp_path / "pieces.model")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in ("The tower 2024,  twice\n", " 桥上，两千 🌉", "def f(x):\n\treturn x"):
        assert theirs.encode(line, add_special_tokens=False) == ours.encode(line)
        assert theirs.decode(theirs.encode(line)) == line
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_the_rope_base_in_force_is_exported_and_not_the_one_the_run_began_with(tmp_path):
    to_megatron(make("llama", tmp_path / "hf"), tmp_path / "ckpt")
    meta = describe(tmp_path / "ckpt")
    files = {name: (one["bytes"], one["sha256"]) for name, one in meta.pop("files").items()}
    meta.pop("format_version")
    seal(tmp_path / "ckpt", meta | {"rotary_base": 1e7}, files)
    to_huggingface(tmp_path / "ckpt", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e7
