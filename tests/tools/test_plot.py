"""Several runs are drawn side by side and named by the settings in which they differ."""

import json

import pytest

from launch.compose import compose, save
from tools import curves, plot

WORDS = ["name=x", "model=llama_tiny", "phases=[{tokens:4096}]", "data.synthetic=true"]


def run(folder, *words):
    folder.mkdir()
    save(compose([*WORDS, *words, f"run_dir={folder}"]), folder / "config.yaml")
    steps = [
        {"step": i, "tokens": i * 64, "loss": 6.0 - i / 9, "grad_norm": 1.0, "lr": 1e-3}
        for i in range(1, 9)
    ]
    scored = {"step": 8, "tokens": 512, "validation": {"zh": 3.0, "en": 5.0}}
    lines = "".join(json.dumps(record) + "\n" for record in [*steps, scored])
    (folder / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture
def runs(tmp_path):
    variants = {"a": "true", "b": "false", "c": "false"}
    found = [run(tmp_path / n, f"model.norm_head={v}") for n, v in variants.items()]
    return [*found, run(tmp_path / "d", "model.norm_head=true", "optimizer.lr=0.5")]


def test_labels_tell_all_differences_and_nothing_else(runs):
    on, off, same, fast = curves.labels(runs)
    assert on == "model.norm_head=True, optimizer.lr=0.0003"
    assert off == same == "model.norm_head=False, optimizer.lr=0.0003"
    assert fast == "model.norm_head=True, optimizer.lr=0.5"


def test_several_runs_become_one_picture(runs, capsys):
    assert plot.main([str(folder) for folder in runs]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "side_by_side.png")
    assert (runs[0] / "side_by_side.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_metrics_is_named(runs):
    (runs[1] / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"/b holds no metrics.jsonl"):
        plot.main([str(folder) for folder in runs])


def test_the_mean_is_over_the_domains_asked_for():
    records = [{"tokens": 8, "loss": 1.0}, {"tokens": 8, "validation": {"zh": 3.0, "en": 5.0}}]
    assert curves.validation(records) == [(8, 4.0)]
    assert curves.validation(records, {"zh"}) == [(8, 3.0)]
