"""How a run is doing: python -m launch.status RUN_DIR [--watch] [--json]"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from launch.cli import refusing
from launch.truth import State, look


def lines(state: State) -> list[str]:
    """The state for a person. Control characters from logs are shown, not obeyed."""
    head = f"{state.run_dir}: {state.truth}" + (f" ({state.cause})" if state.cause else "")
    total = f" of {state.total_steps}" if state.total_steps else ""
    where = f"  step {state.step}{total}, saved {state.saved_step}"
    if state.loss is not None:
        where += f", loss {state.loss:.4f}"
    if state.tokens_per_second:
        where += f", {state.tokens_per_second:,.0f} tokens/s"
    if state.eta_seconds and state.truth == "running":
        where += f", {_span(state.eta_seconds)} to go"
    if state.last_sign_seconds is not None:
        where += f", last sign {_span(state.last_sign_seconds)} ago"
    text = [head, where]
    if state.job_id:
        text.append(f"  job {state.job_id}: {state.slurm or 'not known to Slurm here'}")
    if state.damaged:
        text.append(f"  damaged: {state.damaged}")
    if state.excluded:
        text.append(f"  set aside: {', '.join(state.excluded)}")
    text += [f"  {line}" for line in state.slow]
    text += _ledger(state)
    text += [f"  {attempt['line']}" for attempt in state.attempts[-20:]]
    return ["".join(c if c.isprintable() else "?" for c in line) for line in text]


def _ledger(state: State) -> list[str]:
    """One line a source: what it had given when the newest checkpoint was written."""
    if not state.ledger:
        return []
    width = max(map(len, state.ledger))
    return [f"  consumed by step {state.saved_step}:"] + [
        f"    {name:{width}s} {line['tokens']:>15,} tokens {line['documents']:>11,} documents "
        f"{line['epochs']:8.3f} epochs {line['skipped_windows']:>6,} windows skipped"
        for name, line in state.ledger.items()
    ]


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def main() -> int:
    """Print once, or again every few seconds until the run has ended."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--watch", action="store_true", help="again every 5 s until the end")
    parser.add_argument("--json", action="store_true", help="everything, for a program")
    args = parser.parse_args()
    while True:
        state = look(args.run_dir)
        print(json.dumps(asdict(state)) if args.json else "\n".join(lines(state)), flush=True)
        if not args.watch or state.truth in ("finished", "stopped", "refused", "given up"):
            return 0
        time.sleep(5)


if __name__ == "__main__":
    sys.exit(refusing(main))
