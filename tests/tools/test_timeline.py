"""The timeline says of every phase what the trainer will do in it."""

import pytest

from tools import timeline

TWO = [
    "model=index_tiny",
    "name=two",
    "batch.seq_length=64",
    "batch.global_batch_size=4",
    "data.sources.a.path=a",
    "data.sources.b.path=b",
    "phases=[{name: stable, tokens: 25600, schedule: {warmup_tokens: 2560}, mixture: {a: 1.0},"
    " batch_steps: [{after_tokens: 12800, global_batch_size: 8}]},"
    " {name: ramped, tokens: 10240, schedule: {name: linear}, mixture: {a: 0.9, b: 0.1},"
    " mixture_end: {a: 0.6, b: 0.4}, ramp_power: 2.0, seq_length: 128, rotary_base: 320000.0,"
    " packing: document, optimizer_state: reset}]",
]


def test_the_table_names_tokens_steps_batches_rates_and_shares(capsys):
    assert timeline.main([*TWO, "--no-picture"]) == 0
    text = capsys.readouterr().out
    stable, ramped = text.index("stable"), text.index("ramped")
    first, second = text[stable:ramped], text[ramped:]
    for words in ("25.6k", "75", "4>8", "256>512", "constant 0.0003", "warmup 2.56k", "a 100.0%"):
        assert words in first
    for words in ("10.24k", "20", "128", "linear 0.0003 to 0", "320000", "document, moments reset",
                  "a 90.0%>60.0%  b 10.0%>40.0%", "35.84k tokens in 95 steps"):  # fmt: skip
        assert words in second


def test_the_picture_is_a_png(tmp_path, capsys):
    out = tmp_path / "sub" / "two.png"
    timeline.main([*TWO, "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert str(out) in capsys.readouterr().out


def test_an_impossible_schedule_is_refused_before_anything_is_drawn(tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"phases.0.schedule.warmup_tokens"):
        timeline.main([*TWO, "phases.0.schedule.warmup_tokens=99999", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["phases=[]"], "phases is empty"),
        (["phases=[{tokens: -5}]"], r"phases.0.tokens=-5 must be at least 1"),
        (["phases=[]", "scale=tiny"], "phases is empty"),
        (["phases.0.mixture={a: 0.5, b: 0.4}"], r"0.5 \+ 0.4 = 0.9"),
        (["phases.0.batch_steps=[{after_tokens: 10000000000, global_batch_size: 8}]"], "inside"),
        (["--out", "x.nosuch"], r"--out=x.nosuch must end in .png"),
        (["--out", "/proc/nope/x.png"], "the folder /proc/nope cannot be made"),
    ],
)
def test_what_cannot_be_trained_or_drawn_is_refused_in_a_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        timeline.main([*TWO, *words])


def test_shares_ramp_by_the_power_of_the_fraction():
    from launch.compose import compose
    from megatron_ext.train.phases import Plan

    phase = Plan.of(compose(TWO)).phases[1]
    assert timeline.shares(phase, 0.5) == pytest.approx({"a": 0.825, "b": 0.175})


def test_a_base_that_does_not_reach_the_sequences_is_warned_of(capsys):
    words = ["recipe=index_1p9b_32k/long_pt", "--trained", "4096", "--no-picture"]
    timeline.main(words)
    assert capsys.readouterr().err == ""
    timeline.main([*words, "phases.0.rotary_base=10000"])
    assert "warning: phases.0.rotary_base=10000 reaches about 4,712" in capsys.readouterr().err
