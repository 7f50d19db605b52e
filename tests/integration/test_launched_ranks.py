"""Ranks start under each launcher: torchrun, torchrun inside a job of Slurm, and srun.

Real processes over gloo; a launcher that is not installed is imitated by the environment that its
documentation describes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from tests import forked

# What a rank does: join, let Ignite ask too, add up, leave.
JOIN = """
import json, os, sys
import torch

if "GPUS" in os.environ:  # a machine with so many GPUs, and a run on the CPU
    count = int(os.environ["GPUS"])
    def set_device(index):
        if int(index) >= count:
            raise RuntimeError("CUDA error: invalid device ordinal")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: count
    torch.cuda.set_device = set_device

import ignite.distributed as idist
from fundamentallm.compute.distributed import leave_ranks
from fundamentallm.compute.plan import Machine

ranks = Machine.open("cpu", join=True).ranks
said = [ranks.rank, ranks.world_size, ranks.local_rank]
ignite = [idist.get_rank(), idist.get_world_size(), idist.get_local_rank()]
job = os.environ.get("SLURM_JOB_ID")
total = ranks.sum_counts([10 ** ranks.rank])[0]
sys.stdout.write(json.dumps({"ranks": said, "ignite": ignite, "sum": total, "job": job}) + "\\n")
leave_ranks()
"""
BATCH = {  # a batch script of `sbatch --nodes=2 --ntasks-per-node=1`
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SLURM_OR_RANK = re.compile("SLURM_|RANK$|WORLD_SIZE$|MASTER_|ENVIRONMENT$")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in filter(SLURM_OR_RANK.search, list(os.environ)):
        monkeypatch.delenv(name)
    path = tmp_path / "join.py"
    path.write_text(JOIN)
    return str(path)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def started(*commands: tuple[list[str], dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, variables in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def answers(*commands: tuple[list[str], dict[str, str]]) -> list[dict[str, object]]:
    """Run the commands at once; return what their ranks said, in the order of ranks."""
    ended = []
    with started(*commands) as processes:
        for process in processes:
            texts = process.communicate(timeout=forked.SECONDS)
            ended.append(subprocess.CompletedProcess([], process.returncode, *texts))
    return said(ended)


def said(processes: list[subprocess.CompletedProcess[str]]) -> list[dict[str, object]]:
    """Return what the ranks said that these processes were or started, in the order of ranks."""
    assert not any(process.returncode for process in processes), [
        process.stderr[-3000:] for process in processes
    ]
    lines = [line for process in processes for line in process.stdout.splitlines()]
    return sorted(map(json.loads, lines), key=lambda answer: answer["ranks"])


def expected(local_ranks: list[int], job: str | None) -> list[dict[str, object]]:
    count = len(local_ranks)
    places = [[rank, count, local] for rank, local in enumerate(local_ranks)]
    total = int("1" * count)
    return [{"ranks": place, "ignite": place, "sum": total, "job": job} for place in places]


def test_torchrun_inside_a_job_of_slurm(script, tmp_path):
    torchrun = ["--standalone", "--nproc_per_node=2", script]
    started_by = forked.run(torchrun, tmp_path, "torch.distributed.run", **BATCH)
    assert said([started_by]) == expected([0, 1], "4711")


@pytest.mark.long
def test_torchrun_on_two_nodes_of_a_job_of_slurm(script):
    """`srun torchrun`: one task of Slurm on each node, which starts two ranks."""
    port = free_port()
    nodes = []
    for node in range(2):
        place = [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=2", *place, script]
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(node)}
        nodes.append((command, {**BATCH, **step}))
    assert answers(*nodes) == expected([0, 1, 0, 1], "4711")


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_srun(nodes, script, tmp_path):
    """Every task is a rank, on one node or on one each; nobody sets torchrun's variables."""
    local_ranks = [0, 1] if nodes == 1 else [0, 0]
    step = {"SLURM_STEP_ID": str(os.getpid()), "SLURM_STEP_NUM_NODES": str(nodes)}
    if nodes == 2:  # no host of the list exists here
        step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    tasks = [
        ([], {**BATCH, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank)})
        for rank, local_rank in enumerate(local_ranks)
    ]
    assert said(forked.run_all(tasks, tmp_path, script)) == expected(local_ranks, "4711")


def test_ranks_meet_again_at_a_store_that_an_earlier_start_has_used(script, tmp_path):
    """torchrun keeps one store through its restarts, and each node counts its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for counts in (("0", "0"), ("1", "0")):
        places = zip(forked.rank_environments(2), counts, strict=True)
        tasks = [
            ([], {**place, **kept, "TORCHELASTIC_RESTART_COUNT": count}) for place, count in places
        ]
        assert said(forked.run_all(tasks, tmp_path, script)) == expected([0, 1], None)


def test_two_ranks_of_the_cpu_on_a_machine_with_one_gpu(script, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUS", "1")
    assert said(forked.run_ranks([], tmp_path, script)) == expected([0, 1], None)


@pytest.mark.long
def test_a_batch_script_without_srun_is_one_process(script):
    """Slurm gives it SLURM_PROCID=0 and the job's number of tasks, and starts it once."""
    (rank,) = answers(([sys.executable, script], BATCH))
    assert rank["ranks"] == [0, 1, 0]
