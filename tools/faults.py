"""The fault matrix on a loopback Slurm: python -m tools.faults [--rows 1,17] [--seeds 1]

Prints one line a row: what was injected, how often the run came through with checks A to F true,
how long it took, and how the run named the cause. Needs root and Slurm; see docs/reliability.md.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

from launch.cli import refusing


def _one(lab: object, row: object, name: str) -> tuple[list[str], float, str]:
    from tools.drills.lab import Lab
    from tools.drills.rows import Row

    assert isinstance(lab, Lab)
    assert isinstance(row, Row)
    start = time.monotonic()
    try:
        wrong = row.inject(lab, name)
    except Exception:  # one row must not end the others; what it says is printed
        wrong = [traceback.format_exc()]
    lab.cluster.slurm("scancel", "--name", name)  # what a row that broke off left running
    folder = lab.folder / name
    classes = sorted(
        {e["class"] for e in lab.run(name).events()}
        | {a["failure"] for a in lab.run(name).attempts()} - {"finished", ""}
        if folder.exists()
        else set()
    )
    return wrong, time.monotonic() - start, ", ".join(classes)


def main() -> int:
    """Run the rows and print the table; exit code 1 when a row did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="numbers of the fault table; empty is all")
    parser.add_argument("--seeds", type=int, default=1, help="seeds that each row is run with")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, help="file to keep the table in")
    args = parser.parse_args()
    from tools.drills.cluster import Cluster, missing
    from tools.drills.lab import Lab
    from tools.drills.rows import ROWS

    if why := missing():
        raise ValueError(why)
    wanted = {n.strip() for n in args.rows.split(",") if n.strip()}
    rows = [row for row in ROWS if not wanted or row.numbers in wanted]
    lines = ["| row | fault | seeds | recovered | seconds | class |", "|---|---|---|---|---|---|"]
    failed = 0
    print("\n".join(lines), flush=True)
    for net in (False, True):
        chosen = [row for row in rows if row.net == net]
        if not chosen:
            continue
        cluster = Cluster(3, net=net)
        try:
            lab = Lab(cluster)
            for k, row in enumerate(chosen):
                good, spent, named = 0, 0.0, ""
                for lab.seed in range(args.first, args.first + args.seeds):
                    wrong, seconds, named = _one(lab, row, f"row{row.numbers}-{k}-{lab.seed}")
                    good, spent = good + (not wrong), spent + seconds
                    for line in wrong:
                        print(f"  {row.what}: {line}", file=sys.stderr, flush=True)
                failed += good < args.seeds
                lines.append(
                    f"| {row.numbers} | {row.what} | {args.seeds} | {good} of {args.seeds} | "
                    f"{spent / args.seeds:.0f} | {named} |"
                )
                print(lines[-1], flush=True)
                if args.out:
                    args.out.write_text("\n".join(lines) + "\n")
        finally:
            cluster.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(refusing(main))
