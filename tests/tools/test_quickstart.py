"""The whole job from end to end, without a network, small enough for the suite."""

import json

from tools import quickstart

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=88",
    "batch.seq_length=64",
    "batch.global_batch_size=8",
    "phases.0.tokens=15360",  # 30 steps
    "phases.0.schedule.warmup_tokens=2560",
    "phases.1.tokens=5120",  # 10 steps
    "evaluation.interval_steps=10",
    "evaluation.tokens_per_domain=512",
    "checkpoint.interval_steps=5",
]


def test_text_becomes_a_model_that_resumes_exactly_and_writes(tmp_path, capfd):
    run, data = tmp_path / "run", tmp_path / "data"
    where = ["--offline", "--folder", str(data), "--run", str(run), "--vocab-size", "2000"]
    assert quickstart.main([*where, *SMALL]) == 0
    said = capfd.readouterr().out
    assert "equal to the last bit" in said and "<- the signal came here" in said
    assert "根据中华人民共和国法律" in said and "In the beginning" in said
    result = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert result["validation_loss"] < result["unigram_entropy"]
    assert (run / "curves.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "outcome").read_text())["word"] == "finished"

    assert quickstart.main([*where, *SMALL]) == 0  # again: nothing is taken twice
    assert "is finished already" in capfd.readouterr().out
