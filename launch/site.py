"""How large a job's cluster is, and what the planner reads of it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.config import JobConfig
    from megatron_ext.plan.verdict import Site


def nodes(job: "JobConfig") -> int:
    """``slurm.nodes``, or all of the cluster's where that is not given."""
    return job.slurm.nodes or job.cluster.nodes or 1


def asked_nodes(job: "JobConfig") -> int:
    """The nodes to queue a job for.

    Raises:
        ValueError: nobody said how many, and the cluster has more than one.
    """
    if not job.slurm.nodes and job.cluster.nodes > 1:
        cluster = job.composed_from.get("cluster", job.cluster.hardware)
        raise ValueError(
            f"slurm.nodes is not given, and cluster={cluster} has {job.cluster.nodes}, for all of "
            f"which plans are made: say slurm.nodes={job.cluster.nodes}, or fewer."
        )
    return nodes(job)


def world_size(job: "JobConfig") -> int:
    """Ranks of the job."""
    return nodes(job) * job.cluster.ranks_per_node()


def site(job: "JobConfig") -> "Site":
    """The cluster as the planner sees it.

    Raises:
        ValueError: a cluster without accelerators.
    """
    from megatron_ext.plan.verdict import Site

    cluster = job.cluster
    if cluster.hardware == "cpu" or not cluster.gpus_per_node:
        raise ValueError(
            f"cluster.hardware={cluster.hardware} with cluster.gpus_per_node="
            f"{cluster.gpus_per_node} has nothing to plan for: choose cluster=a800_512 or h100_64, "
            f"or set cluster.hardware (see conf/hardware) and cluster.gpus_per_node."
        )
    return Site(
        hardware=cluster.hardware,
        network=cluster.network,
        gpus_per_node=cluster.gpus_per_node,
        nodes=nodes(job),
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        failures_per_gpu_hour=cluster.failures_per_gpu_hour,
    )
