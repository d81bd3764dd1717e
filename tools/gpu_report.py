"""Run the GPU tests on this machine and write a report to paste into docs/gpu_results.md.

python -m tools.gpu_report                    tests/gpu, then REPORT/report.json and report.md
python -m tools.gpu_report --rehearse         what does not need CUDA, on the CPU
python -m tools.gpu_report --from report.json only the Markdown again
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.cli import refusing
from megatron_ext.atomic import write_text
from megatron_ext.devices.machine import inspect_machine
from megatron_ext.devices.probe import LIBRARIES, version_of

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "device": "Device",
    "opening": "Paths taken",
    "agreement": "Same weights, same numbers (largest difference over largest CPU fp32 value)",
    "norm_head": "Norm-Head: largest share of a row's gradient along the row",
    "isolation": "Packed documents against the same ones alone",
    "training": "Training on real text",
    "fp8": "FP8 against bf16: mean loss of the last 20 steps",
    "resume": "Resumed against uninterrupted",
    "checkpoint": "Seconds that a save holds training up",
    "speed": "Index-1.9B block shapes, 4096 tokens a sequence",
    "layouts": "Several GPUs against one",
}


def main(argv: list[str] | None = None) -> int:
    """Run, collect, render; the exit code is that of the tests."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_report")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, local layers only")
    parser.add_argument("--from", dest="source", type=Path, help="a report.json to render again")
    parser.add_argument("tests", nargs="*", help="passed to pytest, such as -k speed")
    args, rest = parser.parse_known_args(argv)
    if args.source:
        print(markdown(json.loads(args.source.read_text())))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    report = run(args.out, rehearse=args.rehearse, arguments=[*args.tests, *rest])
    write_text(args.out / "report.json", json.dumps(report, indent=1))
    write_text(args.out / "report.md", markdown(report))
    print(f"{args.out}/report.json and report.md: paste the second into docs/gpu_results.md")
    return int(report["exit_code"])


def run(out: Path, *, rehearse: bool, arguments: list[str]) -> dict[str, Any]:
    """Run tests/gpu in a process of its own and gather what it measured."""
    records = out / "records.json"
    records.unlink(missing_ok=True)
    environ = {**os.environ, "GPU_RECORDS": str(records)}
    if rehearse:
        environ["GPU_REHEARSAL"] = "1"
    started = time.time()
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu", *arguments]
    code = subprocess.run(command, cwd=ROOT, env=environ).returncode
    machine = inspect_machine()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "exit_code": code,
        "rehearsal": rehearse,
        "commit": _commit(),
        "machine": {
            "gpus": [gpu.name for gpu in machine.gpus],
            "driver": machine.gpus[0].driver if machine.gpus else "",
            "torch": machine.torch,
            "torch_cuda": machine.torch_cuda,
            "libraries": {lib.name: version_of(lib.distribution) for lib in LIBRARIES},
        },
        "records": json.loads(records.read_text()) if records.exists() else {},
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()


def markdown(report: dict[str, Any]) -> str:
    """One page: the machine, then a table for each section that has rows."""
    machine = report["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = [f"{name} {v}" for name, v in machine["libraries"].items() if v]
    lines = [
        f"## {report['date']}: {gpus}",
        "",
        f"Commit {report['commit'] or 'unknown'}, torch {machine['torch']} for CUDA "
        f"{machine['torch_cuda'] or 'none'}, driver {machine['driver'] or 'none'}, "
        f"{', '.join(versions) or 'no GPU library'}; {report['seconds']:.0f} s, pytest exit code "
        f"{report['exit_code']}" + (" (rehearsal on a CPU)." if report["rehearsal"] else "."),
    ]
    for section, title in TITLES.items():
        rows = report["records"].get(section, [])
        if rows:
            lines += ["", f"### {title}", "", *_table(rows)]
    if not report["records"]:
        lines += ["", "Nothing ran: every test was skipped."]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "test"))
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return head + ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return str(value).replace("|", ";")


if __name__ == "__main__":
    sys.exit(refusing(main))
