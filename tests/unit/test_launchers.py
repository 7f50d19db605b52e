"""What the environment says of a process, in each launcher's words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fundamentallm.compute.distributed import Ranks, refuse_shared_gpu
from fundamentallm.compute.launchers import first_host, launched_as
from fundamentallm.errors import MachineError

TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("gpu[9,12]", "gpu9"),
        ("rack[1-2]n[01-16].site.org", "rack1n01.site.org"),
        ("a-b[5]-x,c", "a-b5-x"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_a_task_of_srun_is_a_rank():
    said = launched_as(TASK)
    assert (said["RANK"], said["WORLD_SIZE"], said["LOCAL_RANK"]) == ("3", "4", "1")
    assert said["MASTER_ADDR"] == "gpu07"
    assert 15000 <= int(said["MASTER_PORT"]) < 32000


def test_all_tasks_of_a_step_find_one_port_and_two_steps_two():
    ports = [
        launched_as({**TASK, "SLURM_PROCID": rank, "SLURM_STEP_ID": step})["MASTER_PORT"]
        for step in ("0", "1")
        for rank in ("0", "1", "2", "3")
    ]
    assert len(set(ports[:4])) == len(set(ports[4:])) == 1
    assert ports[0] != ports[4]


def test_one_node_needs_no_name_service():
    assert launched_as({**TASK, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_an_address_that_is_set_is_taken():
    said = launched_as({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})
    assert (said["MASTER_ADDR"], said["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_the_variables_of_torchrun_count_first():
    torchrun = dict.fromkeys(("RANK", "LOCAL_RANK"), "1") | {"WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert launched_as({**TASK, **torchrun}) == torchrun


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"},  # the shell of salloc
        {**TASK, "ENVIRONMENT": "BATCH"},  # a batch script
        {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # an interactive step
    ],
)
def test_one_process(environ):
    assert launched_as(environ) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SLURM_LOCALID": ""}, "without LOCAL_RANK"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4, SLURM_NTASKS=4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x"),
        ({"SLURM_NTASKS": "-2"}, "SLURM_NTASKS=-2"),
        ({"SLURM_JOB_NODELIST": ""}, "without MASTER_ADDR"),
    ],
)
def test_a_task_that_makes_no_sense(changes, says):
    with pytest.raises(MachineError, match="srun") as refusal:
        launched_as({**TASK, **changes})
    assert says in str(refusal.value)


@pytest.mark.parametrize(("visible", "gpu"), [(1, 0), (4, 3)])
def test_the_only_gpu_that_a_rank_sees_is_its_own(monkeypatch, visible, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert Ranks(rank=7, world_size=8, local_rank=3).own_gpu() == gpu


@pytest.mark.parametrize("others", ["a", "b"])
def test_a_gpu_is_of_one_rank(monkeypatch, others):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of a machine, or of a task of srun
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="a")
    )
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"gpu/{rank}", others if rank == 0 else "c")
    ranks = Ranks(rank=1, world_size=3, local_rank=1)
    if others == "b":
        refuse_shared_gpu(ranks, store)
        return
    with pytest.raises(MachineError, match="several ranks would compute on one GPU") as caught:
        refuse_shared_gpu(ranks, store)
    assert caught.value.got == "ranks 0, 1 on GPU a"


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match="at most 2 ranks"):
        Ranks(rank=3, world_size=4, local_rank=3).own_gpu()
