"""What Slurm is asked and told: argument lists in, plain values out, never a shell."""

import re
import shutil
import signal
import subprocess
import time

UNUSABLE = re.compile(r"down|drain|fail|unk|no_respond|not_responding|maint|power|\*", re.I)
BARE_SECONDS = 20.0


def present() -> bool:
    """Slurm's client commands are installed."""
    return shutil.which("scontrol") is not None


def ask(*words: str, tries: int = 1, wait: float = 1.0) -> str | None:
    """Standard output of a command; None when it failed ``tries`` times."""
    for k in range(tries):
        if k:
            time.sleep(wait)
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=BARE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return done.stdout
    return None


def answers() -> bool:
    """The controller is there, so that what it does not know does not exist."""
    return ask("squeue", "--noheader", "--states=RUNNING", tries=3) is not None


def job(job_id: str, *, tries: int = 1) -> dict[str, str]:
    """Fields of ``scontrol show job``; empty when the controller does not answer or know it.

    ``JobId`` is as asked for: of one run of an array, ``ARRAY_TASK``. Slurm's own number is that
    of the whole array for a task that waits, and for one of those that run.
    """
    text = ask("scontrol", "-o", "show", "job", job_id, tries=tries) if job_id else None
    if not text:
        return {}
    fields = re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s[A-Z][\w:/]*=|\s*$)", text)
    return dict(fields) | {"JobId": job_id}


def fate(facts: dict[str, str], restart_count: int) -> str:
    """What Slurm has decided on a job, behind the word COMPLETING that hides it.

    ``REQUEUED`` is Slurm's own doing (preemption, a lost node); ``CANCELLED`` is a person's. A
    cancelled job must not be queued again, which Slurm would do on request.
    """
    state = facts.get("JobState", "")
    if state != "COMPLETING":
        return state
    if int(facts.get("Restarts", "0") or 0) > restart_count:
        return "REQUEUED"
    limit, taken = seconds(facts.get("TimeLimit", "")), seconds(facts.get("RunTime", ""))
    return "TIMEOUT" if limit and taken >= limit else "CANCELLED"


def seconds(span: str) -> int:
    """``D-HH:MM:SS`` or a shorter form; 0 for what is no span, such as UNLIMITED."""
    days, _, clock = span.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or not (days or "0").isdigit():
        return 0
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return total + int(days or 0) * 86400


def longest_array() -> int | None:
    """Tasks that a job array may have, counted from 0; None where nobody says."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config") or "", re.M)
    return int(found[1]) if found else None


def hostnames(node_list: str) -> list[str]:
    """``n[1-3]`` as single names."""
    return (ask("scontrol", "show", "hostnames", node_list) or "").split() if node_list else []


def unusable(nodes: list[str]) -> dict[str, str]:
    """Those of ``nodes`` that cannot run a step now, each with Slurm's word for its state."""
    if not nodes:
        return {}
    text = ask("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T", tries=3) or ""
    states = dict(line.split(None, 1) for line in text.splitlines() if " " in line)
    return {node: state for node, state in states.items() if UNUSABLE.search(state)}


def pool(partition: str = "") -> set[str]:
    """Nodes that a job could be given, whatever they do now; none when nobody answers."""
    words = ["sinfo", "-h", "-N", "-o", "%N"] + ([f"--partition={partition}"] if partition else [])
    return set((ask(*words) or "").split())


def requeue(job_id: str, *, exclude: list[str], tries: int = 6) -> bool:
    """Queue the running job ``job_id`` again, off ``exclude``. The caller is killed soon after.

    False when the controller refused or did not answer ``tries`` times.
    """
    # Slurm ends the batch shell at once, and changes the node list of a pending job only: what
    # is left of KillWait (30 s by default) is enough for that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ask("scontrol", "requeue", job_id, tries=tries, wait=2.0) is None:
        return False
    if exclude:
        nodes = f"ExcNodeList={','.join(exclude)}"
        ask("scontrol", "update", f"JobId={job_id}", nodes, tries=40, wait=0.5)
    return True


def cancel(job_id: str, *, signal: str = "") -> bool:
    """Cancel a job, or send it a signal."""
    words = [f"--signal={signal}", "--batch"] if signal else []
    return ask("scancel", *words, job_id, tries=3) is not None
