"""The whole job in small: real text to a trained model that writes a sentence, on two CPU cores.

    python -m tools.quickstart [--offline] [--folder .cache/quickstart] [--run runs/quickstart]

Every step is one of the project's own commands and is printed before it runs, so each can be
tried alone. A step whose result is there already is not taken again; --fresh takes all again.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import compose
from launch.cli import refusing
from launch.config import JobConfig
from megatron_ext.data.config import SourceConfig
from megatron_ext.resilience.outcome import read_outcome
from megatron_ext.train.phases import Plan
from megatron_ext.train.read_metrics import read

PROMPTS = ("根据中华人民共和国法律，", "In the beginning")
COMPARED = 10
"""Steps after the interruption that are compared with a run that was not interrupted."""


@dataclass(frozen=True)
class Paths:
    """Where everything lies."""

    data: Path
    run: Path

    @property
    def text(self) -> Path:
        return self.data / "text"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer.model"

    @property
    def control(self) -> Path:
        return self.run.with_name(f"{self.run.name}-uninterrupted")

    @property
    def exported(self) -> Path:
        return self.run / "huggingface"


def main(argv: list[str] | None = None) -> int:
    """Take every step, then say where everything is."""
    args = _arguments(argv)
    paths = Paths(data=args.folder, run=args.run)
    if args.fresh:
        for folder in (paths.run, paths.control):
            shutil.rmtree(folder, ignore_errors=True)
    with _step("1-2  text, cleaned and split by a hash of each document"):
        _text(paths, offline=args.offline)
    with _step("3    tokenizer by Yi's rules"):
        _tokenizer(paths, vocab_size=args.vocab_size)
    with _step("4    Megatron .bin/.idx"):
        _index(paths)
    job = _job(paths, overrides=args.overrides)
    with _step("5-6  training, stopped half-way by a signal, and resumed"):
        _train(paths, job)
    with _step("6    the resumed losses against an uninterrupted run's"):
        _compare(paths, job)
    with _step("7    Hugging Face"):
        _export(paths, job)
    with _step("8    pictures"):
        entropy = unigram_entropy(paths)
        _run("tools.plot", str(paths.run), "--level", f"{entropy:.4f}")
    _say(paths, entropy)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="dotted.key=VALUE for the training run")
    parser.add_argument("--offline", action="store_true", help="use the corpus that is shipped")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run")
    parser.add_argument("--folder", type=Path, default=Path(".cache/quickstart"))
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--vocab-size", type=int, default=8192)
    return parser.parse_intermixed_args(argv)


@contextmanager
def _step(title: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"\n== {title}", flush=True)
    yield
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def _command(module: str, *arguments: str) -> list[str]:
    print(f"   python -m {shlex.join([module, *arguments])}", flush=True)
    return [sys.executable, "-m", module, *arguments]


def _run(module: str, *arguments: str) -> None:
    """One of our own commands; its failure is ours.

    Raises:
        ValueError: it did not end with 0.
    """
    done = subprocess.run(_command(module, *arguments))
    if done.returncode:
        raise ValueError(f"python -m {module} ended with {done.returncode}: see above")


def _text(paths: Paths, *, offline: bool) -> None:
    if (summary := paths.text / "corpus.json").exists():
        shipped = "shipped" in json.loads(summary.read_text())["licences"]
        hint = f" (the shipped one: delete {paths.data} to fetch the real one)" if shipped else ""
        print(f"   {paths.text} is there already{hint}")
        return
    _run("tools.corpus", str(paths.text), *(["--offline"] if offline else []))


def _files(paths: Paths, part: str) -> list[str]:
    return sorted(str(p) for p in (paths.text / part).glob("*.jsonl"))


def _tokenizer(paths: Paths, *, vocab_size: int) -> None:
    if paths.tokenizer.exists():
        print(f"   {paths.tokenizer} is there already")
        return
    sizes = ["--vocab-size", str(vocab_size), "--sample-mb", "8"]
    files = _files(paths, "train")
    _run("tools.train_tokenizer", *files, "--out", str(paths.tokenizer), *sizes)


def _index(paths: Paths) -> None:
    tokenizer = ["--tokenizer", str(paths.tokenizer), "--workers", "2"]
    for part in ("train", "validation"):
        _run("tools.prepare", *_files(paths, part), "--out", str(paths.data / part), *tokenizer)


def _job(paths: Paths, *, overrides: list[str]) -> JobConfig:
    """The quickstart recipe on the domains that are there."""
    job = compose.compose(["recipe=quickstart"])
    train = _prefixes(paths.data / "train")
    held_out = _prefixes(paths.data / "validation")
    if set(job.data.sources) <= set(train):
        for name, source in job.data.sources.items():
            source.path = train[name]
    else:
        _use_shipped(job, train)
    wanted = set(job.data.validation) if set(job.data.validation) <= set(held_out) else held_out
    job.data.validation = {name: SourceConfig(path=held_out[name]) for name in sorted(wanted)}
    _fit_vocabulary(job, paths)
    job.name, job.run_dir = paths.run.name, str(paths.run)
    return compose.override(job, overrides)


def _prefixes(folder: Path) -> dict[str, str]:
    return {p.stem: str(p.with_suffix("")) for p in sorted(folder.glob("*.bin"))}


def _use_shipped(job: JobConfig, train: dict[str, str]) -> None:
    """Sources of the shipped corpus, which is read several times over in fewer steps."""
    print("   the shipped corpus is small: fewer steps, and every text is read many times")
    job.data.sources = {n: SourceConfig(path=p, max_epochs=1000) for n, p in train.items()}
    job.checkpoint.interval_steps = 15
    curated = [name for name in train if "instruct" in name or "stories" in name]
    rest = [name for name in train if name not in curated]
    for phase, share, steps in zip(job.phases, (0.2, 0.6), (60, 20), strict=True):
        phase.tokens = steps * job.batch.global_batch_size * job.batch.seq_length
        phase.schedule.warmup_tokens = min(phase.schedule.warmup_tokens, phase.tokens // 4)
        phase.mixture = {name: share / len(curated) for name in curated}
        phase.mixture |= {name: (1 - share) / len(rest) for name in rest}


def _fit_vocabulary(job: JobConfig, paths: Paths) -> None:
    from megatron_ext.data.tokenizer import load_tokenizer

    job.data.tokenizer.path = str(paths.tokenizer)
    job.model.vocab_size = load_tokenizer(paths.tokenizer).vocab_size


def _last_step(run: Path) -> int:
    return max((r["step"] for r in read(run / "metrics.jsonl")), default=0)


def _start(job: JobConfig, run: Path) -> subprocess.Popen[bytes]:
    run.mkdir(parents=True, exist_ok=True)
    config = run / "config.yaml"
    compose.save(job, config)
    return subprocess.Popen(_command("launch.train", "--config", str(config)))


def _until(process: subprocess.Popen[bytes], run: Path, *, step: int) -> None:
    """Wait for ``step``, then ask the run to stop and see that it does.

    Raises:
        ValueError: it ended otherwise.
    """
    while process.poll() is None and _last_step(run) < step:
        time.sleep(0.05)
    if process.poll() is None:
        print(f"   SIGTERM after step {_last_step(run)}", flush=True)
        process.send_signal(signal.SIGTERM)
    _ended(process, run, "stopped")


def _ended(process: subprocess.Popen[bytes], run: Path, word: str) -> None:
    code = process.wait()
    outcome = read_outcome(run)
    if code or outcome is None or outcome.word != word:
        raise ValueError(f"{run} ended with {code} and {outcome}, not {word}: see its log")


def _train(paths: Paths, job: JobConfig) -> None:
    half = Plan.of(job).steps // 2
    outcome = read_outcome(paths.run)
    if outcome is not None and outcome.word == "finished":
        print(f"   {paths.run} is finished already (--fresh trains again)")
        return
    if _last_step(paths.run) < half:
        _until(_start(job, paths.run), paths.run, step=half)
        _keep_for_control(paths)
    _ended(_start(job, paths.run), paths.run, "finished")


def _keep_for_control(paths: Paths) -> None:
    """A checkpoint from before the interruption, for a run that passes it by."""
    newest = sorted((paths.run / "checkpoints").glob("step_*"))[:-1][-1]
    shutil.rmtree(paths.control, ignore_errors=True)
    shutil.copytree(newest, paths.control / "checkpoints" / newest.name)
    (paths.control / "interrupted_at").write_text(str(_last_step(paths.run)))


def _compare(paths: Paths, job: JobConfig) -> None:
    """Take the steps around the interruption again without it, and compare to the last bit.

    Raises:
        ValueError: a loss or gradient norm differs.
    """
    interrupted = int((paths.control / "interrupted_at").read_text())
    last = min(interrupted + COMPARED, Plan.of(job).steps - 1)
    if _last_step(paths.control) < last:
        control = compose.override(
            job, [f"run_dir={paths.control}", "evaluation.interval_steps=0", "name=uninterrupted"]
        )
        _until(_start(control, paths.control), paths.control, step=last)
    mine = {r["step"]: r for r in read(paths.run / "metrics.jsonl") if "loss" in r}
    theirs = {r["step"]: r for r in read(paths.control / "metrics.jsonl") if "loss" in r}
    steps = sorted(set(mine) & set(theirs))
    differ = [s for s in steps if _numbers(mine[s]) != _numbers(theirs[s])]
    for step in range(interrupted - 1, min(interrupted + 3, last) + 1):
        mark = "  <- the signal came here" if step == interrupted else ""
        print(
            f"   step {step}: {mine[step]['loss']!r} and {theirs[step]['loss']!r} "
            f"uninterrupted{mark}"
        )
    if differ:
        raise ValueError(f"losses differ at steps {differ}: resuming is not exact")
    print(f"   {len(steps)} steps from {steps[0]} to {steps[-1]}: equal to the last bit")


def _numbers(record: dict) -> tuple[float, float, float]:
    return record["loss"], record["grad_norm"], record["lr"]


def _export(paths: Paths, job: JobConfig) -> None:
    checkpoint = sorted((paths.run / "checkpoints").glob("step_*"))[-1]
    if paths.exported.exists():
        print(f"   {paths.exported} is there already")
    else:
        tokenizer = ["--tokenizer", str(paths.tokenizer)]
        _run("tools.convert", "megatron-to-hf", str(checkpoint), str(paths.exported), *tokenizer)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    _run("tools.sample", str(paths.exported), *prompts)


def unigram_entropy(paths: Paths) -> float:
    """Nats per token of the best model that ignores context, over all training text."""
    import numpy as np

    from megatron_ext.data.indexed import IndexedCorpus

    counts = np.zeros(2**17)
    for file in sorted((paths.data / "train").glob("*.bin")):
        tokens = IndexedCorpus(file.with_suffix("")).tokens
        counts += np.bincount(tokens, minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _say(paths: Paths, entropy: float) -> None:
    validation = [r["validation"] for r in read(paths.run / "metrics.jsonl") if "validation" in r]
    losses = validation[-1]
    mean = sum(losses.values()) / len(losses)
    print("\n== done")
    print(f"   validation loss {mean:.3f} nats per token, mean of {len(losses)} domains:")
    print("   " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))
    print(f"   unigram entropy of the corpus {entropy:.3f}: context is worth {entropy - mean:.3f}")
    print(json.dumps({"validation_loss": mean, "unigram_entropy": entropy}))
    for what, where in (
        ("picture", paths.run / "curves.png"),
        ("curves", f"tensorboard --logdir {paths.run / 'tensorboard'}"),
        ("metrics", paths.run / "metrics.jsonl"),
        ("checkpoints", paths.run / "checkpoints"),
        ("Hugging Face", paths.exported),
        ("the job", paths.run / "config.yaml"),
    ):
        print(f"   {what:14} {where}")
    print("   next: python -m launch.train recipe=quickstart name=mine optimizer.lr=6e-3")
    print("         python -m launch.train --help, and docs/")
    if mean >= entropy:
        raise ValueError("the model learnt nothing that counting words would not have told")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(refusing(main))
