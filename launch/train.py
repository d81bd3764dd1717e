"""Train: compose a job, refuse what cannot run, start ranks, and leave one word behind.

    python -m launch.train recipe=index_1p9b/pretrain scale=proxy optimizer.lr=3e-4
    python -m launch.train --config runs/NAME/config.yaml            the same run again
    python -m launch.train --multirun recipe=... model.norm_head=true,false
    torchrun --nproc-per-node=8 -m launch.train recipe=...           joins torchrun's ranks
    srun python -m launch.train recipe=...                           joins Slurm's tasks

What can be chosen:
"""

import argparse
import logging
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch import compose
from launch.cli import refusing
from launch.config import JobConfig
from launch.truth import refuse_live
from megatron_ext.check import check_run
from megatron_ext.checkpoint.resumable import check_resumable
from megatron_ext.given import check_given
from megatron_ext.parallel.env import Env
from megatron_ext.plan import rope_reach
from megatron_ext.resilience import lock
from megatron_ext.resilience.outcome import Outcome, clear_outcome, read_outcome, write_outcome
from megatron_ext.resilience.stop import stop_file
from megatron_ext.train.sources import Corpora, open_corpora

if TYPE_CHECKING:
    from megatron_ext.train.callback import Callback
    from megatron_ext.train.loop import Trainer


def main(argv: list[str] | None = None) -> int:
    """Parse, refuse, train. Exit codes: 0 finished or stopped as asked, 2 refused, 1 failed."""
    args = _arguments(argv)
    runs = compose.sweep(args.overrides, most=args.most_runs) if args.multirun else [args.overrides]
    worst, folders = 0, []
    for number, overrides in enumerate(runs):
        job = _job(args, overrides)
        if args.multirun:
            job.name, job.run_dir = f"{job.name}-{number}", f"{job.folder()}-{number}"
            print(f"run {number + 1} of {len(runs)}: {' '.join(overrides)} -> {job.folder()}")
            folders.append(job.folder())
        if args.cfg:
            print(compose.dump(job), end="")
            continue
        worst = max(worst, start(job))
        outcome = read_outcome(Path(job.folder()))
        if outcome is not None and outcome.word == "stopped":
            break  # whoever stopped this run does not want the next one
    if len(folders) > 1 and not args.cfg:
        print(f"side by side: python -m tools.plot {shlex.join(folders)}")
    return worst


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    groups = "\n".join(f"  {g}= {', '.join(compose.choices(g))}" for g in compose.GROUPS)
    parser = argparse.ArgumentParser(
        prog="python -m launch.train",
        description=f"{__doc__}{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="GROUP=CHOICE or dotted.key=VALUE")
    parser.add_argument("--config", type=Path, help="a saved config.yaml to start from")
    parser.add_argument("--cfg", choices=["job"], help="print the composed job and exit")
    parser.add_argument("--multirun", action="store_true", help="a,b values make several runs")
    parser.add_argument(
        "--most-runs",
        type=int,
        default=compose.MOST_RUNS,
        help=f"of a --multirun ({compose.MOST_RUNS})",
    )
    return parser.parse_intermixed_args(argv)


def _job(args: argparse.Namespace, overrides: list[str]) -> JobConfig:
    if args.config is None:
        return compose.compose(overrides)
    return compose.override(compose.load(args.config), overrides)


def start(job: JobConfig) -> int:
    """Check ``job``, then run it on the ranks that a launcher gave or that ``nproc`` asks for."""
    env = Env.read(os.environ)
    launched = env.world_size > 1 or "RANK" in os.environ
    nproc = 1 if launched else job.launch.nproc
    try:
        if nproc < 1:
            raise ValueError(f"launch.nproc={nproc} must be at least 1.")
        if (threads := job.launch.threads_per_rank) is not None and threads < 1:
            raise ValueError(f"launch.threads_per_rank={threads} must be at least 1.")
        if env.rank == 0 and not env.attempt:
            refuse_live(Path(job.folder()))
        plan = check_run(job, world_size=env.world_size if launched else nproc)
        check_given(job)
        check_resumable(job)
        # Ranks of a launcher open the data themselves, before the model.
        corpora = None if launched else open_corpora(job, plan)
    except ValueError as refusal:
        if env.rank == 0 and env.attempt:  # a local folder may hold a run that lives or has ended
            _refuse(job, str(refusal))
        raise
    run_dir = Path(job.folder())
    if env.rank == 0:
        warn(job)
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One rank speaks for all; under Slurm the lease decides, and the watcher starts the ranks.
    with lock.held(run_dir) if env.rank == 0 else nullcontext():
        if env.rank == 0:
            clear_outcome(run_dir)
            if not env.attempt:  # else launch.attempt has, and a request may have come since
                stop_file(run_dir).unlink(missing_ok=True)
            compose.save(job, run_dir / "config.yaml")
        return train(job, corpora=corpora) if nproc == 1 else _several(job, nproc, corpora)


def warn(job: JobConfig) -> None:
    """Say what is likely a mistake and may be meant."""
    for sentence in rope_reach.warnings(job):
        print(f"warning: {sentence}", file=sys.stderr)


def _refuse(job: JobConfig, cause: str) -> None:
    """Leave the word for whoever would otherwise start the run again."""
    run_dir = Path(job.folder())
    if run_dir.is_dir():
        attempt = Env.read(os.environ).attempt
        write_outcome(run_dir, Outcome(word="refused", cause=cause, attempt=attempt))


def _several(job: JobConfig, nproc: int, corpora: Corpora | None) -> int:
    """Ranks of our own on this machine, meeting through a file in the run folder."""
    from launch.ranks import start_ranks
    from megatron_ext.devices import device

    if device.current().name == "cuda":
        raise ValueError(
            f"launch.nproc={nproc} starts ranks on CPUs only: on GPUs use torchrun "
            f"--nproc-per-node={nproc} -m launch.train, or slurm/train.sbatch."
        )
    device.start()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else has to reach these ranks
    meeting = Path(job.folder()).resolve() / f".rendezvous-{os.getpid()}"
    try:
        return start_ranks(
            nproc,
            lambda: refusing(lambda: train(job, init_method=f"file://{meeting}", corpora=corpora)),
        )
    finally:
        meeting.unlink(missing_ok=True)


def train(
    job: JobConfig,
    *,
    init_method: str | None = None,
    corpora: Corpora | None = None,
    first: tuple["Callback", ...] = (),
) -> int:
    """One rank of one run, from process groups to the outcome word. ``first``: extra callbacks."""
    from megatron_ext.devices import device, opening

    opening.set_environment(job)
    device.start()
    from megatron_ext.parallel import groups
    from megatron_ext.train.build import build_trainer

    env = Env.read(os.environ)
    _threads(job, env)
    _log(env, Path(job.folder()))
    opening.announce(job)
    process_groups = groups.start(job.parallel, env, seed=job.seed, init_method=init_method)
    try:
        trainer = build_trainer(job, env=env, groups=process_groups, corpora=corpora, first=first)
        word = trainer.fit()
        _leave(trainer, word)
        return 0
    except ValueError as refusal:
        if env.rank == 0:
            _refuse(job, str(refusal))
        raise
    finally:
        groups.stop()


def _leave(trainer: "Trainer", word: str) -> None:
    if trainer.env.rank == 0:
        outcome = Outcome(
            word=word,
            cause=trainer.stop.cause,
            step=trainer.state.step,
            attempt=trainer.env.attempt,
        )
        write_outcome(trainer.run_dir, outcome)
        logging.getLogger("launch.train").info("%s %s", word, trainer.stop.cause)


def _threads(job: JobConfig, env: Env) -> None:
    import torch

    asked = job.launch.threads_per_rank
    if asked is None and torch.cuda.is_available():
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(asked or max(1, cores // env.local_world_size))


def _log(env: Env, run_dir: Path) -> None:
    """Rank 0 speaks at INFO, the others at WARNING, all to stderr and to a file of their own."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stderr),
        logging.FileHandler(logs / f"rank{env.rank}.log"),
    ]
    logging.basicConfig(
        level=logging.INFO if env.rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank{env.rank} %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(refusing(main))
