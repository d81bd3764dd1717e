"""Curves of several runs in one picture: training and validation loss, gradient norm, head's share.

Used by tools.plot when it is given several runs, and by tools.ablation.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.checkpoint.diff import Difference

Records = list[dict[str, Any]]
NAMES = ("name", "run_dir", "composed_from")
"""Fields in which any two runs differ."""


def differences(first: "JobConfig", other: "JobConfig") -> "list[Difference]":
    """Settings in which two runs differ, their names apart."""
    from megatron_ext.checkpoint.diff import resume_diff

    found = resume_diff(asdict(first), asdict(other))
    return [one for one in found if one.key.split(".")[0] not in NAMES]


def labels(run_dirs: Sequence[Path]) -> list[str]:
    """For each run the settings in which they differ, from the config.yaml that each left."""
    from launch.compose import load

    first, *others = (load(run_dir / "config.yaml") for run_dir in run_dirs)
    found = [{one.key: one for one in differences(first, other)} for other in others]
    shared = {key: one.stored for row in found for key, one in row.items()}
    rows = [{k: row[k].asked if k in row else v for k, v in shared.items()} for row in [{}, *found]]
    return [
        ", ".join(f"{key}={value}" for key, value in row.items()) or str(run_dir)
        for row, run_dir in zip(rows, run_dirs, strict=True)
    ]


def validation(records: Records, domains: Collection[str] = ()) -> list[tuple[int, float]]:
    """(tokens, unweighted mean over ``domains`` of the validation loss); over all without any."""
    points = []
    for record in records:
        losses = record.get("validation", {})
        chosen = [loss for domain, loss in losses.items() if not domains or domain in domains]
        if chosen:
            points.append((record["tokens"], sum(chosen) / len(chosen)))
    return points


def running(values: list[float], span: int = 10) -> list[float]:
    """Mean of the last ``span`` values at each place."""
    windows = [values[max(i - span + 1, 0) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(
    runs: Mapping[str, Sequence[Records]],
    out: Path,
    *,
    title: str,
    domains: Collection[str] = (),
) -> None:
    """Write ``out``, a PNG. ``runs``: label -> the metrics of each run that bears it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        4, 1, figsize=(9.5, 11), sharex=True, height_ratios=[3, 3, 2, 2], layout="constrained"
    )
    for label, colour in zip(runs, matplotlib.colormaps["tab10"].colors):
        for number, records in enumerate(runs[label]):
            style = {"color": colour, "linewidth": 1.2, "linestyle": "-" if number == 0 else "--"}
            _draw_one(panels, records, domains, label if number == 0 else None, style)
    names = (
        "training loss (nats per token)",
        f"validation loss, mean of {len(domains) or 'all'} domains",
        "gradient norm",
        "head's share of its square",
    )
    for panel, name in zip(panels, names):
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[0].legend()
    panels[0].set_title(title, fontsize=10)
    panels[2].set_yscale("log")
    panels[3].set_ylim(0, 1)
    panels[-1].set_xlabel("tokens")
    figure.savefig(out, dpi=62, pil_kwargs={"optimize": True})
    plt.close(figure)


def _draw_one(
    panels: Any, records: Records, domains: Collection[str], label: str | None, style: Any
) -> None:
    steps = [r for r in records if "loss" in r]
    tokens = [r["tokens"] for r in steps]
    panels[0].plot(tokens, running([r["loss"] for r in steps]), label=label, **style)
    if points := validation(records, domains):
        panels[1].plot(*zip(*points), marker=".", **style)
    panels[2].plot(tokens, running([r["grad_norm"] for r in steps]), **style)
    shares = [(r["tokens"], r["gradient_share"]["head"]) for r in steps if "gradient_share" in r]
    if shares:
        panels[3].plot(*zip(*shares), marker=".", **style)
