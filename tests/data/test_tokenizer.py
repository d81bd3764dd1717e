"""Tokenizers: Yi's training rules, the three kinds, and what each gives back."""

import base64
import json

import numpy as np
import pytest

from megatron_ext.data.config import TokenizerConfig
from megatron_ext.data.corpus import shipped
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer

TEXTS = [
    "  def f(x):\n\treturn x  # 12345\n",
    "今天天气很好，一起去爬山。",
    "emoji 😀 and \x00 NUL",
    "é e\u0301",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    texts = [document.text for document in shipped.documents()]
    assert train_tokenizer(texts, path, vocab_size=1500) == 1500
    return path


def test_digits_are_split(model):
    tokenizer = load_tokenizer(model)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("12345")]
    assert pieces == list("12345")


def test_no_blank_is_put_before_the_text_and_runs_of_blanks_stay(model):
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("  a  b ")) == "  a  b "
    assert tokenizer.decode([tokenizer.encode("word")[0]])[0] == "w"


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_byte_for_byte(model, text):
    tokenizer = load_tokenizer(model)
    assert tokenizer.restores(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_mark_of_blanks_is_known_to_be_lost(model):
    tokenizer = load_tokenizer(model)
    assert not tokenizer.restores("a\u2581b")


def test_training_again_gives_the_same_file(model, tmp_path):
    texts = [document.text for document in shipped.documents()]
    train_tokenizer(texts, tmp_path / "t.model", vocab_size=1500)
    assert (tmp_path / "t.model").read_bytes() == model.read_bytes()
    assert load_tokenizer(model).sha256 == load_tokenizer(tmp_path / "t.model").sha256


def test_batches_equal_single_texts(model):
    tokenizer = load_tokenizer(model)
    ids, lengths = tokenizer.encode_batch(TEXTS)
    ends = np.cumsum(lengths)
    parts = [ids[end - length : end].tolist() for end, length in zip(ends, lengths)]
    assert parts == [tokenizer.encode(text) for text in TEXTS]


def test_text_too_small_for_its_vocabulary_gives_what_it_can(tmp_path):
    size = train_tokenizer(["one two three"] * 3, tmp_path / "t.model", vocab_size=5000)
    assert 259 < size < 5000


def _byte_level(path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([d.text for d in shipped.documents()], trainer)
    tokenizer.save(str(path))
    return path


def test_huggingface_json_is_the_librarys_own_encoding(tmp_path):
    import tokenizers

    path = _byte_level(tmp_path / "tokenizer.json")
    tokenizer, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod_id == 0 and tokenizer.vocab_size == 600
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def _ranks(path, count):
    """A rank file of all single bytes and pairs of them, which is enough to be complete."""
    singles = [bytes([i]) for i in range(256)]
    pairs = [a + b for a in singles for b in singles]
    triples = [b"aa" + a + b for a in singles for b in singles]
    lines = [
        base64.b64encode(token) + b" %d" % rank
        for rank, token in enumerate((singles + pairs + triples)[:count])
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")


def test_arcade100k_takes_single_digits_nfc_and_its_special_ids(tmp_path):
    _ranks(tmp_path / "cl100k_base.tiktoken", 100_256)
    tokenizer = load_tokenizer(tmp_path / "cl100k_base.tiktoken")
    assert tokenizer.vocab_size == 100_289
    assert tokenizer.eod_id == 100_257
    assert tokenizer.model.encode("<|im_start|><|im_end|>", allowed_special="all") == [
        100_277,
        100_278,
    ]
    assert len(tokenizer.encode("1234")) == 4
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.restores("é") and not tokenizer.restores("e\u0301")
    assert max(tokenizer.encode("<|endoftext|>")) < 100_256


def test_a_rank_file_of_another_size_is_refused(tmp_path):
    _ranks(tmp_path / "x.tiktoken", 1000)
    with pytest.raises(ValueError, match="1000 ranks"):
        load_tokenizer(tmp_path / "x.tiktoken")


@pytest.mark.parametrize("name", ["x.model", "x.tiktoken", "x.json"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00 not a tokenizer")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path="):
        load_tokenizer(tmp_path / name)


def test_missing_file_and_unknown_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.kind=wordpiece is not known"):
        load_tokenizer(TokenizerConfig(path="x", kind="wordpiece"))


def test_config_and_path_open_the_same(model):
    config = TokenizerConfig(path=str(model), kind="sentencepiece")
    assert load_tokenizer(config).sha256 == load_tokenizer(str(model)).sha256


def test_json_without_an_end_of_document_is_refused(tmp_path):
    path = _byte_level(tmp_path / "tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text())).replace("<|endoftext|>", "<|x|>"))
    with pytest.raises(ValueError, match="to end documents"):
        load_tokenizer(path)
