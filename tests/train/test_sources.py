"""Text that cannot feed a run is refused before it starts, by the command that would start it."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch import train
from launch.compose import compose
from launch.preflight import check_data
from megatron_ext.data.indexed import fingerprint
from megatron_ext.data.writer import CorpusWriter
from megatron_ext.train.phases import Plan
from megatron_ext.train.sources import open_sources, open_validation

RUN = ["model=index_tiny", "name=bad", "precision=fp32", "parallel=single",
       "batch={seq_length: 64, global_batch_size: 4, micro_batch_size: 2}"]  # fmt: skip


@pytest.fixture
def prefix(tmp_path) -> Path:
    """A sound corpus of 2000 tokens that says of itself what tools.prepare does."""
    with CorpusWriter(tmp_path / "web", dtype=np.uint16) as writer:
        for _ in range(20):
            writer.add_document(np.arange(100))
    told = {"fingerprint": fingerprint(tmp_path / "web"), "tokenizer_sha256": "ab" * 32}
    (tmp_path / "web.json").write_text(json.dumps(told))
    return tmp_path / "web"


def _start(prefix: Path, *words: str) -> None:
    phases = "phases=[{tokens: 2560, mixture: {web: 1.0}}]"
    source = f"data.sources={{web: {{path: {prefix}}}}}"
    train.main([*RUN, phases, source, f"run_dir={prefix.parent / 'run'}", *words])


def _missing(prefix):
    prefix.with_suffix(".bin").unlink()


def _empty(prefix):
    prefix.with_suffix(".idx").write_bytes(b"")


def _truncated(prefix):
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(whole[:-7])


def _changed(prefix):
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(whole[:-1] + b"\x07")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_missing, r"data.sources.web.path=\S+: web.bin is missing"),
        (_empty, r"data.sources.web.path=\S+: web.idx is empty \(0 bytes\)"),
        (_truncated, r"has 3993 bytes and its index asks for 2000 tokens \* 2 bytes = 4000"),
        (_changed, r"changed since it was indexed: fingerprint \w+ now, \w+ in web.json"),
    ],
)
def test_a_source_that_is_not_as_it_was_written_is_refused(prefix, spoil, sentence):
    spoil(prefix)
    with pytest.raises(ValueError, match=sentence):
        _start(prefix)
    assert not (prefix.parent / "run").exists()


def test_another_tokenizer_and_one_that_is_not_there_are_refused(prefix, tmp_path):
    (tmp_path / "other.model").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"with tokenizer abababababab, and data.tokenizer.path"):
        _start(prefix, f"data.tokenizer.path={tmp_path / 'other.model'}")
    with pytest.raises(ValueError, match=r"data.tokenizer.path=\S+none.model: there is no such"):
        _start(prefix, f"data.tokenizer.path={tmp_path / 'none.model'}")


@pytest.mark.parametrize("key", ["sources", "validation"])
def test_text_of_more_ids_than_the_model_has_rows_is_refused(prefix, key):
    told = json.loads((prefix.parent / "web.json").read_text()) | {"vocab_size": 1001}
    (prefix.parent / "web.json").write_text(json.dumps(told))
    more = [f"data.validation={{web: {{path: {prefix}}}}}"] if key == "validation" else []
    job = compose([*RUN, "phases=[{tokens: 2560}]", "model.vocab_size=1000", *more,
                   f"data.sources={{web: {{path: {prefix}}}}}"])  # fmt: skip
    opens = open_validation if key == "validation" else open_sources
    with pytest.raises(ValueError) as refusal:
        opens(job, Plan.of(job))
    assert str(refusal.value).startswith(
        f"model.vocab_size=1000 is less than the 1001 ids of the tokenizer that "
        f"data.{key}.web.path={prefix} was indexed with: set model.vocab_size=1001, or"
    )
    job.model.vocab_size = 1001
    assert opens(job, Plan.of(job))


def test_more_than_five_epochs_over_all_phases_are_refused_unless_allowed(prefix):
    two = (
        "phases=[{tokens: 6400, mixture: {web: 1.0}},"
        " {tokens: 6400, mixture: {web: 0.4, more: 0.6}, mixture_end: {web: 1.0}}]"
    )
    words = (two, f"data.sources.more.path={prefix}")
    # 6400 + 6400 * (0.4 + 1.0) / 2 = 10,880 tokens of 2000
    with pytest.raises(ValueError, match=r"10,880 tokens of data.sources.web, .* 2,000: 5.44 epoc"):
        _start(prefix, *words)
    job = compose([*RUN, f"data.sources.web={{path: {prefix}, max_epochs: 6}}", *words])
    assert check_data(job).startswith("2 corpora, 4,000 tokens")


def test_a_phase_without_any_source_is_refused(prefix):
    with pytest.raises(ValueError, match="data.sources is empty: name a corpus"):
        train.main([*RUN, "phases=[{tokens: 2560}]", f"run_dir={prefix.parent / 'run'}"])


def test_a_refusal_is_one_sentence_and_no_traceback(prefix, capsys):
    from launch.cli import refusing

    _truncated(prefix)
    assert refusing(lambda: _start(prefix)) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: data.sources.web.path=") and said.count("\n") == 1
