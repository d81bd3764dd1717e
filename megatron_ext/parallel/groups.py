"""Process groups of the parallel axes, and the seeds that go with a rank's place in them."""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_ext.devices import device
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.parallel.env import Env

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def start(
    parallel: ParallelConfig,
    env: Env,
    *,
    seed: int,
    init_method: str | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> "ProcessGroupCollection":
    """Join the other ranks and cut the world into TP, PP, CP and DP groups.

    ``init_method`` overrides where ranks meet: a file of one machine needs no port.

    Raises:
        ValueError: the world size is not a multiple of TP x PP x CP.
    """
    parallel.data_parallel_size(env.world_size)
    here = device.start()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if here.name == "cuda":
        torch.cuda.set_device(env.local_rank)
    if not dist.is_initialized():
        _meet(env, here.backend, init_method or env.init_method, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        order=parallel.order,
        use_sharp=parallel.use_sharp,
        nccl_communicator_config_path=parallel.nccl_communicator_config_path or None,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    seed_everything(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _meet(env: Env, backend: str, init_method: str, timeout: timedelta) -> None:
    import torch.distributed as dist

    if backend == "gloo" and env.local_world_size == env.world_size:
        # One machine: the loopback works where the host name does not resolve.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if env.world_size == 1 and not init_method:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(
        backend, init_method, rank=env.rank, world_size=env.world_size, timeout=timeout
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on all ranks, and Megatron's per-TP-rank streams.

    Pipeline stages are offset, as in Megatron-LM, so that their weights differ.
    """
    import random

    import numpy as np
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def stop() -> None:
    """Leave all groups. Safe without any."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
