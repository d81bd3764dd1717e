"""A process knows its rank from torchrun, from srun, or by being alone."""

import pytest

from megatron_ext.parallel.env import Env, first_host

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_alone_without_a_launcher():
    assert Env.read({}) == Env(rank=0, world_size=1, init_method="")


def test_torchrun_is_read_and_its_own_store_is_used():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environ |= {"MASTER_ADDR": "node7", "MASTER_PORT": "29501"}
    env = Env.read(environ)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert env.init_method == "tcp://node7:29501"
    assert Env.read(environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).init_method == "env://"


def test_srun_is_read_with_uneven_tasks_per_node():
    env = Env.read(SRUN)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (9, 11, 1, 3)
    assert env.master_addr == "gpu003"
    assert env.init_method == f"tcp://gpu003:{env.master_port}"


def test_ranks_of_a_step_agree_on_the_port_and_steps_of_a_job_differ():
    assert Env.read(SRUN).master_port == Env.read(SRUN | {"SLURM_PROCID": "0"}).master_port
    assert Env.read(SRUN).master_port != Env.read(SRUN | {"SLURM_STEP_ID": "1"}).master_port


def test_a_batch_script_outside_srun_is_one_process():
    assert Env.read({"SLURM_JOB_ID": "41", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == Env()


def test_a_missing_or_broken_variable_is_named():
    with pytest.raises(ValueError, match="WORLD_SIZE is missing"):
        Env.read({"RANK": "0"})
    with pytest.raises(ValueError, match="RANK='zero' is not a number"):
        Env.read({"RANK": "zero", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("nodes", "want"),
    [
        ("login1", "login1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("a-b[1,3]-x,c", "a-b1-x"),
        ("node1,node2", "node1"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, want):
    assert first_host(nodes) == want
