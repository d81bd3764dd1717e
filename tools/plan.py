"""What a run needs and how long it takes, before it is queued; and which layout is fastest.

    python -m tools.plan recipe=skywork_13b/stage1 cluster=a800_512
    python -m tools.plan search recipe=index_1p9b/pretrain cluster=h100_64
    python -m tools.plan recipe=... cluster=mine slurm.nodes=8 --json plan.json --picture plan.png

Torch is not needed. Figures behind it: conf/hardware, conf/network; errors: docs/planning.md.
"""

import argparse
import json
import sys
from pathlib import Path

from launch.cli import check_picture, refusing


def arguments() -> argparse.Namespace:
    """The command line."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = lines[2].strip()
    parser.add_argument("overrides", nargs="+", help="[search] and Hydra overrides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="memory and pipeline (png, svg, pdf)"
    )
    parser.add_argument("--top", type=int, default=12, help="layouts to list (search)")
    parser.add_argument("--micro-batch", type=int, help="only this micro-batch (search)")
    return parser.parse_args()


def main() -> None:
    """Plan, or search."""
    chosen = arguments()
    if chosen.picture:
        check_picture(chosen.picture, key="--picture")
    searching = chosen.overrides[0] == "search"
    from launch.compose import compose
    from launch.site import site
    from megatron_ext.check import check_run
    from megatron_ext.plan import picture, report
    from megatron_ext.plan.layout import Shape
    from megatron_ext.plan.search import search
    from megatron_ext.plan.verdict import judge_run, whole

    job = compose(chosen.overrides[searching:])
    where = site(job)
    if searching:
        from megatron_ext.plan.verdict import base_layout

        base = base_layout(job, where)
        found = search(job.model, base, where.machine(), only_micro_batch=chosen.micro_batch)
        if not found.considered:
            raise ValueError(f"no legal layout on {where.gpus} GPUs: {found.refused}")
        print(report.table(found, chosen.top))
        best = (found.ranked or found.out_of_memory)[0]
        data = report.search_data(job, found, where, max(chosen.top, 1000))
    else:
        job.slurm.check()
        check_run(job, world_size=where.gpus)
        best = judge_run(job, where)
        run = whole(job, best, where)
        print(report.text(job, best, run, where))
        data = report.plan_data(job, best, run, where)
    if chosen.json:
        from megatron_ext.atomic import write_text

        write_text(chosen.json, json.dumps(data, indent=1) + "\n")
    if chosen.picture:
        shape = Shape.of(job.model, best.layout.tp)
        picture.draw(chosen.picture, best, shape, where.machine())


if __name__ == "__main__":
    sys.exit(refusing(main))
