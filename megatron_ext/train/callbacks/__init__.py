"""Behaviours around steps, one a file; the table of those a run uses stands here."""

from megatron_ext.config import RunConfig
from megatron_ext.train.callback import Callback
from megatron_ext.train.callbacks.drill import Drill
from megatron_ext.train.callbacks.evaluation import Evaluation
from megatron_ext.train.callbacks.garbage import GarbageTogether
from megatron_ext.train.callbacks.gradient_share import GradientShare
from megatron_ext.train.callbacks.metrics_file import MetricsFile
from megatron_ext.train.callbacks.progress import Progress
from megatron_ext.train.callbacks.replicas import Replicas
from megatron_ext.train.callbacks.stragglers import Stragglers
from megatron_ext.train.callbacks.tensorboard import TensorBoard
from megatron_ext.train.callbacks.throughput import Throughput


def callbacks(run: RunConfig) -> list[Callback]:
    """What surrounds the steps of ``run``: what measures first, then what reports."""
    measuring: list[Callback] = []
    if run.watch.straggler_interval_steps:
        measuring.append(Stragglers(run.watch))
    measuring.append(Throughput(run))
    if run.logging.gradient_share_interval:
        measuring.append(GradientShare(interval=run.logging.gradient_share_interval))
    reporting: list[Callback] = [MetricsFile(run), Progress(run)]
    if run.logging.tensorboard:
        reporting.append(TensorBoard(run))
    if run.parallel.manual_gc_interval:
        measuring.append(GarbageTogether(interval=run.parallel.manual_gc_interval))
    if run.watch.replica_interval_steps:
        measuring.append(Replicas(run.watch))
    if run.watch.drill:
        measuring.append(Drill(run))
    # Evaluation comes last: its own hook runs the reporters' after_evaluation.
    return [*measuring, *reporting, Evaluation(run)]
