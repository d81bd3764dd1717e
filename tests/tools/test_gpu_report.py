"""The GPU report is a page made from what the tests recorded."""

import json
from pathlib import Path

import pytest

from tools import gpu_report

REPORT = {
    "date": "2026-11-22",
    "seconds": 512.3,
    "exit_code": 0,
    "rehearsal": False,
    "commit": "abc1234",
    "machine": {
        "gpus": ["NVIDIA H100 80GB HBM3"],
        "driver": "580.65",
        "torch": "2.14.1",
        "torch_cuda": "13.0",
        "libraries": {"transformer_engine": "2.20.2", "apex": ""},
    },
    "records": {
        "fp8": [{"precision": "fp8_current", "loss": 1.23456, "apart": 0.001, "test": "t"}],
        "opening": [{"lines": "layers: a | attention: b", "test": "t"}],
    },
}


def test_each_section_becomes_a_table_with_the_machine_above() -> None:
    page = gpu_report.markdown(REPORT)
    assert "## 2026-11-22: NVIDIA H100 80GB HBM3" in page
    assert "transformer_engine 2.20.2" in page and "apex" not in page
    assert "| precision | loss | apart |" in page and "| fp8_current | 1.235 | 0.001 |" in page
    assert "layers: a ; attention: b" in page


def test_a_run_that_skipped_everything_says_so() -> None:
    nothing = {**REPORT, "records": {}, "machine": {**REPORT["machine"], "gpus": []}}  # type: ignore[dict-item]
    assert "no GPU" in gpu_report.markdown(nothing)
    assert "every test was skipped" in gpu_report.markdown(nothing)


def test_a_stored_report_is_rendered_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert gpu_report.main(["--from", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.strip() == gpu_report.markdown(REPORT).strip()
