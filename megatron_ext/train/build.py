"""From a run's config to a Trainer: one build function per room, in one order."""

import logging
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.config import RunConfig
from megatron_ext.devices.device import current
from megatron_ext.models.gpt import build_model
from megatron_ext.models.isolation import prove_isolation
from megatron_ext.optim.build import build_optimizer
from megatron_ext.parallel.env import Env
from megatron_ext.parallel.user_buffers import start_buffers
from megatron_ext.resilience.stop import StopRequest
from megatron_ext.train.callback import Callback
from megatron_ext.train.callbacks import callbacks
from megatron_ext.train.feed import Feed
from megatron_ext.train.loop import Trainer
from megatron_ext.train.phases import Plan
from megatron_ext.train.saving import Checkpoints
from megatron_ext.train.sources import Corpora, describe_tokenizer, open_corpora
from megatron_ext.train.step import connect

log = logging.getLogger(__name__)


def build_trainer(
    run: RunConfig,
    *,
    env: Env,
    groups: ProcessGroupCollection,
    corpora: Corpora | None = None,
    first: tuple[Callback, ...] = (),
) -> Trainer:
    """Everything that ``run`` needs on this rank; every rank must call this.

    Args:
        corpora: the run's text, where it is open already.
        first: callbacks of the launcher, before those that the run asks for.

    Raises:
        ValueError: the run cannot be built, or its data cannot feed it.
    """
    plan = Plan.of(run)
    # Data first: it is refused in milliseconds, and a model can take minutes.
    corpora = corpora or open_corpora(run, plan)
    start_buffers(run)
    model = build_model(run, groups)
    if any(phase.config.packing == "document" for phase in plan.phases):
        log.info("packed documents apart by %.1e at most", prove_isolation(model))
    optimizer = build_optimizer(run, model, groups)
    connect(model, optimizer)
    feed = Feed(
        run,
        corpora.training,
        place=current().torch_device(env.local_rank),
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        context=(groups.cp.rank(), groups.cp.size()),
    )
    return Trainer(
        run,
        plan=plan,
        env=env,
        groups=groups,
        model=model,
        optimizer=optimizer,
        feed=feed,
        validation=corpora.validation,
        checkpoints=Checkpoints(run, about=describe_tokenizer(run)),
        callbacks=[*first, *callbacks(run)],
        stop=StopRequest.install(
            Path(run.folder()) if env.rank == 0 else None, attempt=env.attempt
        ),
    )
