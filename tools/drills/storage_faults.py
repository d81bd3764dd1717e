"""Faults of disks, of checkpoints and of what a run reads."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_ext.data.writer import CorpusWriter
from tools.drills.cluster import Cluster, Run
from tools.drills.lab import INTERVAL, STEPS, VOCAB, Lab, write_corpus
from tools.drills.rank_faults import drill


def torn_checkpoint(lab: Lab, name: str) -> list[str]:
    """The newest checkpoint loses a byte while the job is down: the one before is used."""
    run = lab.run(name, drill("stop", step=INTERVAL * 2 + 3)).submit()
    run.wait_step(INTERVAL * 2 + 3)
    newest = run.folder / "checkpoints" / f"step_{INTERVAL * 2:08d}"
    shard = sorted(newest.glob("*.distcp"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    wrong = lab.end(run, causes=["hang"])
    if "skipping broken checkpoint" not in run.log():
        wrong.append("E: nothing is said about the torn checkpoint")
    return wrong


def killed_in_save(lab: Lab, name: str) -> list[str]:
    """Each rank in turn dies between the first byte of a save and its seal."""
    planned = [f"{{kind:kill_in_save,rank:{r},step:{INTERVAL * k}}}" for r, k in ((1, 2), (0, 4))]
    run = lab.run(
        name, f"watch.drill=[{','.join(planned)}]", "checkpoint.asynchronous=true"
    ).submit()
    wrong = lab.end(run, causes=["process"])
    ends = [event["headline"] for event in run.events()]
    if ends != ["rank 1 was ended by signal 9", "rank 0 was ended by signal 9"]:
        wrong.append(f"E: {ends}")
    if run.log().count(f"loaded {run.folder}/checkpoints/step_{INTERVAL:08d}") != 1:
        wrong.append("D: the checkpoint before the torn one was not the one that was loaded")
    return wrong


@contextmanager
def _small_disk(folder: Path, mebibytes: float) -> Iterator[None]:
    folder.parent.mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    size = f"size={int(mebibytes * 1024)}k,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "small", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_full(lab: Lab, name: str) -> list[str]:
    """There is room for one checkpoint: the run ends, keeps it, and goes on when there is more."""
    shelf = lab.folder / name / "checkpoints"
    one = lab.checkpoint_bytes() / 2**20
    # Nodes see the disks that were mounted before they were started.
    with _small_disk(shelf, 1.6 * one):
        cluster = Cluster(2)
        try:
            return _full(lab.on(cluster).run(name).submit(), lab, shelf)
        finally:
            cluster.close()


def _full(run: Run, lab: Lab, shelf: Path) -> list[str]:
    run.wait_truth("given up", "finished")
    run.wait_gone()
    last = run.attempts()[-1]
    wrong = [] if last["failure"] == "storage" else [f"E: {last['failure']}: {last['headline']}"]
    if [p.name for p in shelf.iterdir()] != [f"step_{INTERVAL:08d}"]:
        wrong.append(f"D: {sorted(p.name for p in shelf.iterdir())} on the full disk")
    subprocess.run(["mount", "-o", "remount,size=64m", str(shelf)], check=True)
    for node in ("n1", "n2"):  # each has a mount table of its own, and one file system
        pid = run.cluster.do("pids", node).split()[0]
        words = ["nsenter", "-t", pid, "--mount", "mount", "-o", "remount,size=64m", str(shelf)]
        subprocess.run(words, check=False)
    done = run.cluster.python("launch.resume", str(run.folder))
    if done.returncode:
        return [*wrong, f"launch.resume: {done.stderr}"]
    return wrong + lab.end(run)


def poison_record(lab: Lab, name: str) -> list[str]:
    """Documents hold a token that the model does not have: named, and confirmed once at most."""
    folder = lab.folder / f"{name}-text"
    folder.mkdir()
    with CorpusWriter(folder / "zh", dtype=np.uint16) as writer:
        for number in range(400):
            writer.add_document(np.full(100, VOCAB + 9 if number % 3 == 0 else 5))
    run = lab.run(name, f"data.sources.zh={{path:{folder}/zh}}").submit()
    run.wait_truth("given up", "refused", "finished")
    run.wait_gone()
    records = run.attempts()
    wrong = []
    if len(records) > 2 or records[-1]["action"] != "stop":
        wrong.append(f"E: {[(r['failure'], r['action'], r['headline']) for r in records]}")
    if str(VOCAB + 9) not in records[-1]["headline"]:
        wrong.append(f"E: the token is not named: {records[-1]['headline']}")
    return wrong


def changed_file(lab: Lab, name: str) -> list[str]:
    """Text is changed under a run: what starts next refuses it, and goes on once it is back."""
    folder = lab.folder / f"{name}-text"
    folder.mkdir()
    sources = [f"data.sources.{k}={{path:{v}}}" for k, v in write_corpus(folder).items()]
    run = lab.run(name, *sources, drill("kill", step=INTERVAL * 2 + 2)).submit()
    run.wait_step(INTERVAL + 2)
    text = (folder / "en.bin").read_bytes()
    (folder / "en.bin").write_bytes(text[:2000] + bytes(8) + text[2008:])
    run.wait_truth("given up", "refused", "finished")
    run.wait_gone()
    last = run.attempts()[-1]
    wrong = []
    if last["action"] != "stop" or "holds other text" not in last["headline"]:
        wrong.append(f"E: {last['failure']}, {last['action']}: {last['headline']}")
    if len(run.attempts()) != 1:
        wrong.append(f"E: {len(run.attempts())} attempts at what is refused")
    (folder / "en.bin").write_bytes(text)
    done = run.cluster.python("launch.resume", str(run.folder))
    if done.returncode:
        return [*wrong, f"launch.resume: {done.stderr}"]
    return wrong + lab.end(run, steps=STEPS)
