"""What a site is, and what one run asks of its scheduler, as plain data."""

import re
from dataclasses import dataclass, field

from megatron_ext.legal import unknown_choice
from megatron_ext.resilience.config import RestartConfig

LAUNCHERS = ("srun", "torchrun")
RATES = ("min_product_gflops", "min_device_tflops", "min_link_gbytes", "min_allreduce_gbytes")
RUNTIMES = ("pyxis", "apptainer")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL")

# Options that this program sets itself: a second value in cluster.options would win silently.
OURS = {
    "job-name",
    "nodes",
    "time",
    "partition",
    "account",
    "qos",
    "constraint",
    "gpus-per-node",
    "ntasks-per-node",
    "cpus-per-task",
    "mem",
    "exclusive",
    "signal",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "export",
    "array",
    "dependency",
    "exclude",
    "wrap",
    "uid",
    "gid",
    "chdir",
    "kill-on-invalid-dep",
}


@dataclass(kw_only=True)
class ClusterConfig:
    """One site. A new site is a file in conf/cluster/ and nothing else."""

    hardware: str = "cpu"
    """The planner's word for one node's accelerators, such as ``h100`` or ``a800``; ``cpu``."""

    network: str = ""
    """The planner's word for what joins the nodes (conf/network/); empty is the usual one of the
    hardware."""

    nodes: int = 0
    """Nodes there are: what is planned for until ``slurm.nodes`` is given."""

    price_per_gpu_hour: float = 0.0
    """Money for one GPU for an hour, in any currency; 0 leaves cost out of plans."""

    failures_per_gpu_hour: float = 1.97e-5
    """Interruptions that plans expect. Llama 3: 419 in 54 days of 16,384 GPUs."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Passed to sbatch as they are; empty leaves the site's default."""

    gpus_per_node: int = 0
    """GPUs to ask for on each node; 0 trains on CPU (gloo)."""

    tasks_per_node: int = 0
    """Ranks on each node; 0 is one per GPU, or one where there is none."""

    cpus_per_task: int = 0
    """Cores for each rank; 0 leaves it to the site."""

    memory: str = ""
    """Host memory of each node in sbatch's words (``0`` is all of it); empty is the default."""

    exclusive: bool = False
    """Take whole nodes."""

    time: str = ""
    """Longest wall time of one job here; ``slurm.time`` may be shorter. ``D-HH:MM:SS``."""

    signal_seconds: int = 300
    """Warning before the time limit. Must cover one step and one save."""

    launcher: str = "srun"
    """``srun`` starts one task a rank; ``torchrun`` starts one agent a node."""

    modules: list[str] = field(default_factory=list)
    """Environment modules, loaded in this order before Python is used."""

    venv: str = ""
    """Virtual environment to activate; empty takes the Python that submitted."""

    container: str = ""
    """Image that the ranks run in; empty runs on the node itself."""

    container_runtime: str = "pyxis"
    """``pyxis`` (srun --container-image) or ``apptainer`` (apptainer exec --nv)."""

    container_mounts: list[str] = field(default_factory=list)
    """``SOURCE:TARGET`` pairs. The working copy and the run folder must be among them."""

    network_interface: str = ""
    """Interface of NCCL's and gloo's sockets, such as ``ib0``; empty lets them choose."""

    env: dict[str, str] = field(default_factory=dict)
    """Variables of every rank, such as NCCL's. Never secrets: they are kept with the run."""

    export: list[str] = field(default_factory=list)
    """Further variables to hand over from the submitting shell. Slurm keeps them on disk."""

    options: dict[str, str] = field(default_factory=dict)
    """Further sbatch options, long names without dashes: ``{reservation: week40}``."""

    health_check: bool = True
    """Test every node before the first step of an attempt."""

    health_command: list[str] = field(default_factory=list)
    """The site's own check, run on each node after ours; non-zero sets the node aside."""

    health_interval_seconds: int = 300
    """Seconds between checks while a run is under way; 0 checks before it only."""

    min_product_gflops: float = 0.2
    """GFLOP/s that a matrix product must reach on a node's CPU. Below the default a core is broken
    or swapped out, not slow."""

    min_device_tflops: float = 0.0
    """TFLOP/s that a bf16 matrix product must reach on each rank's device; 0 asks for no rate."""

    min_link_gbytes: float = 0.0
    """GB/s that each rank must receive from the one before it; 0 asks for no rate."""

    min_allreduce_gbytes: float = 0.0
    """GB/s of an all-reduce over all ranks (bus bandwidth, as nccl-tests count); 0: no rate."""

    kernel_log: str = ""
    """File to look for Xid and ECC lines in; empty asks dmesg."""

    notify: list[str] = field(default_factory=list)
    """Command run at the end of each attempt; run folder, class, action and line are appended."""

    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def check(self) -> None:
        """Refuse what a scheduler or a shell would misread.

        Raises:
            ValueError: naming the dotted key, the value and the rule.
        """
        counts = ("gpus_per_node", "tasks_per_node", "nodes")
        for key in (*counts, "price_per_gpu_hour", "failures_per_gpu_hour"):
            if getattr(self, key) < 0:
                raise ValueError(f"cluster.{key}={getattr(self, key)} must not be negative.")
        if self.launcher not in LAUNCHERS:
            raise unknown_choice("cluster.launcher", self.launcher, LAUNCHERS)
        if self.container_runtime not in RUNTIMES:
            raise unknown_choice("cluster.container_runtime", self.container_runtime, RUNTIMES)
        for key in ("partition", "account", "qos", "network_interface"):
            check_name(f"cluster.{key}", getattr(self, key), pattern=NAME)
        for key in (*RATES, "health_interval_seconds"):
            if getattr(self, key) < 0:
                raise ValueError(f"cluster.{key}={getattr(self, key)} is below 0: 0 turns it off.")
        check_time("cluster.time", self.time)
        for name in [*self.env, *self.export]:
            check_name("cluster.env", name, pattern=VARIABLE)
        for name in self.env:
            if SECRET.search(name.upper()):
                raise ValueError(
                    f"cluster.env.{name} looks like a secret, and cluster.env is written into the "
                    f"run folder: name it in cluster.export instead, or leave it in a file."
                )
        for name, value in self.options.items():
            check_name("cluster.options", name, pattern=OPTION)
            if name in OURS:
                raise ValueError(
                    f"cluster.options.{name}={value} would override what launch.submit sets: use "
                    f"the field of that meaning in cluster or slurm."
                )
            check_printable(f"cluster.options.{name}", value)
        for key in ("constraint", "memory", "venv", "container"):
            check_printable(f"cluster.{key}", getattr(self, key))
        for value in [*self.modules, *self.container_mounts, *self.env.values()]:
            check_printable("cluster.modules, container_mounts or env", value)


@dataclass(kw_only=True)
class SlurmConfig:
    """What this run asks of the scheduler."""

    nodes: int = 0
    """Nodes. The batch file refuses to start on another number. 0 is not given: plans take all of
    the cluster's, a submission asks where the cluster file names more than one."""

    time: str = ""
    """Wall time of one attempt; empty takes ``cluster.time``."""

    exclude: list[str] = field(default_factory=list)
    """Nodes never to use."""

    dependency: str = ""
    """``afterok:123`` and the like, as sbatch takes it."""

    array_limit: int = 4
    """Runs of a --multirun that may be in progress at once."""

    first_heartbeat_seconds: int = 600
    """Longest time from starting the ranks to the first heartbeat of each."""

    requeue: bool = True
    """Let the restart policy queue the job again; false ends after one attempt."""

    restart: RestartConfig = field(default_factory=RestartConfig)

    def check(self) -> None:
        """Refuse what sbatch would misread.

        Raises:
            ValueError: naming the dotted key, the value and the rule.
        """
        self.restart.check()
        if self.nodes < 0:
            raise ValueError(f"slurm.nodes={self.nodes} is below 0: ask for at least one node.")
        if not 1 <= self.array_limit <= 1000:
            raise ValueError(f"slurm.array_limit={self.array_limit} is not from 1 to 1000.")
        check_time("slurm.time", self.time)
        for node in self.exclude:
            check_name("slurm.exclude", node, pattern=NAME)
        check_name("slurm.dependency", self.dependency, pattern=re.compile(r"[a-z]+[a-z0-9:,?+]*"))


def check_name(key: str, value: str, *, pattern: re.Pattern[str]) -> None:
    """Refuse a value that is neither empty nor wholly of the pattern."""
    if value and not pattern.fullmatch(value):
        raise ValueError(f"{key}={value!r} is not of the form {pattern.pattern}.")


def check_time(key: str, value: str) -> None:
    """Refuse what sbatch would. It takes ``7:99``, as 7 minutes and 99 seconds."""
    if value and not TIME.fullmatch(value):
        raise ValueError(
            f"{key}={value!r} is no time limit of Slurm's: write M (minutes), M:S, H:M:S, D-H, "
            f"D-H:M, D-H:M:S or UNLIMITED."
        )


def check_printable(key: str, value: str) -> None:
    """Refuse control characters and a leading dash: they end words or start options."""
    if not value.isprintable() or value.startswith("-"):
        raise ValueError(f"{key}={value!r} holds control characters or begins with a dash.")
