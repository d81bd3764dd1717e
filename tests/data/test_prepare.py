"""tools.prepare: what Megatron reads back, what is left out, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data import prepare as prepare_module
from megatron_ext.data.corpus import shipped
from megatron_ext.data.documents import Reading, chunks_of, read_documents
from megatron_ext.data.indexed import IndexedCorpus
from megatron_ext.data.prepare import Preparation, is_up_to_date, prepare_corpus
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer([d.text for d in shipped.documents()], path, vocab_size=1500)
    return load_tokenizer(path)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": d.text}, ensure_ascii=i % 2) for i, d in enumerate(DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n")
    return path


DOCUMENTS = list(shipped.documents())


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_comes_back_in_order(tmp_path, jsonl, tokenizer, workers, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 700)
    how = Preparation(tokenizer=tokenizer, reading=Reading(), workers=workers, check=True)
    facts = prepare_corpus([jsonl], tmp_path / "c", how, domain="mixed")
    corpus = IndexedCorpus(tmp_path / "c")
    texts = [tokenizer.decode(corpus.document(i)[:-1]) for i in range(corpus.num_documents)]
    assert texts == [d.text for d in DOCUMENTS]
    assert all(corpus.document(i)[-1] == tokenizer.eod_id for i in range(corpus.num_documents))
    assert facts["documents"] == len(DOCUMENTS) and facts["documents_not_restored"] == 0
    corpus.check(tokenizer_sha256=tokenizer.sha256)
    assert corpus.description["domain"] == "mixed"


@pytest.mark.filterwarnings("ignore")
def test_megatrons_dataset_reads_it(tmp_path, jsonl, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare_corpus([jsonl], tmp_path / "c", Preparation(tokenizer=tokenizer, reading=Reading()))
    theirs, ours = IndexedDataset(str(tmp_path / "c")), IndexedCorpus(tmp_path / "c")
    assert len(theirs) == ours.num_documents
    assert all((theirs[i] == ours.document(i)).all() for i in range(len(theirs)))


BAD = [
    (b'{"text": "good"}', None),
    (b'{"text": ', "bad JSON"),
    (b"[1, 2]", "no key 'text'"),
    (b'{"txt": "x"}', "no key 'text'"),
    (b'{"text": ""}', "empty document"),
    (b'{"text": 5}', "'text' is not text"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not UTF-8"),
    (b"", None),
    (b'{"text": "also good"}', None),
]


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD) + b"\n")
    return path


def test_bad_lines_are_counted_and_named_by_file_and_line(tmp_path, bad, tokenizer):
    how = Preparation(tokenizer=tokenizer, reading=Reading())
    facts = prepare_corpus([bad], tmp_path / "c", how)
    assert facts["documents"] == 2
    assert sum(facts["left_out"].values()) == 7 and facts["left_out"]["not UTF-8"] == 2
    for words, number in zip(how.reading.named, range(2, 9)):
        assert words.startswith(f"{bad}:{number}: {BAD[number - 1][1]}")


def test_policy_stop_refuses_at_the_first_and_leaves_nothing(tmp_path, bad, tokenizer):
    how = Preparation(tokenizer=tokenizer, reading=Reading(on_bad="stop"), workers=2)
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: bad JSON.*--on-bad=skip"):
        prepare_corpus([bad], tmp_path / "c", how)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_line_numbers_hold_across_chunks(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(1, 400)))
    for size in (10, 100, 1000, 10**6):
        found = []
        for chunk in chunks_of([path], chunk_bytes=size):
            found += read_documents(
                path, Reading(), start=chunk.start, stop=chunk.stop, first_line=chunk.first_line
            )
        assert found == [(i, f"line {i}") for i in range(1, 400)]


def test_text_files_are_one_document_each(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("first\n\nfile\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    how = Preparation(tokenizer=tokenizer, reading=Reading(), check=True)
    facts = prepare_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "c", how)
    assert facts["documents"] == 1 and facts["left_out"] == {"not UTF-8": 1}


def test_nothing_but_bad_lines_is_refused(tmp_path, tokenizer):
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no document to index.*'empty document': 1"):
        prepare_corpus(
            [tmp_path / "in.jsonl"],
            tmp_path / "c",
            Preparation(tokenizer=tokenizer, reading=Reading()),
        )
    assert not list(tmp_path.glob("*c*bin"))


def test_a_document_that_does_not_come_back_is_found(tmp_path, jsonl, tokenizer, monkeypatch):
    """With a decoder that is wrong about one letter."""
    how = Preparation(tokenizer=tokenizer, reading=Reading(), check=True)
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decode(ids).replace("otter", "otters"))
    with pytest.raises(ValueError, match="do not decode to their text"):
        prepare_corpus([jsonl], tmp_path / "c", how)
    assert not (tmp_path / "c.bin").exists() and not (tmp_path / "c.idx").exists()


def test_up_to_date_notices_text_tokenizer_and_settings(tmp_path, jsonl, tokenizer):
    how = Preparation(tokenizer=tokenizer, reading=Reading())
    assert not is_up_to_date(tmp_path / "c", [jsonl], how)
    prepare_corpus([jsonl], tmp_path / "c", how)
    assert is_up_to_date(tmp_path / "c", [jsonl], how)
    no_eod = Preparation(tokenizer=tokenizer, reading=Reading(), append_eod=False)
    assert not is_up_to_date(tmp_path / "c", [jsonl], no_eod)
    jsonl.write_text(jsonl.read_text().replace("otter", "beaver"))
    assert not is_up_to_date(tmp_path / "c", [jsonl], how)


def test_the_command_writes_reports_and_refuses(tmp_path, bad, tokenizer):
    command = [sys.executable, "-m", "tools.prepare", str(bad), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", str(tokenizer.path), "--workers", "1"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True)

    done = run("--check")
    assert done.returncode == 0, done.stderr
    assert "left out 2: not UTF-8" in done.stderr and f"{bad}:2: bad JSON" in done.stderr
    assert IndexedCorpus(tmp_path / "out" / "bad").num_documents == 2
    assert "up to date" in run().stdout + run().stderr
    other = run("--no-eod")
    assert other.returncode == 2 and "--overwrite" in other.stderr
    assert "Traceback" not in other.stderr
    assert run("--no-eod", "--overwrite").returncode == 0
    assert Path(tmp_path / "out" / "bad.json").is_file()


def test_long_and_short_documents_can_be_corpora_of_their_own(tmp_path, jsonl, tokenizer):
    parts = []
    for name, bounds in (("long", {"min_tokens": 150}), ("short", {"max_tokens": 149})):
        how = Preparation(tokenizer=tokenizer, reading=Reading(), check=True, **bounds)
        prepare_corpus([jsonl], tmp_path / name, how)
        parts.append(IndexedCorpus(tmp_path / name))
    long, short = parts
    assert long.lengths.min() > 150 >= short.lengths.max()  # with the end of each
    assert long.num_documents + short.num_documents == len(DOCUMENTS)
