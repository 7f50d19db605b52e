"""What a launcher tells a process of its place among others: torchrun, or srun of Slurm.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, inside a Slurm job too.
Where it has not, the variables of Slurm describe a task of `srun`; they are listed in
https://slurm.schedmd.com/srun.html ("Output environment variables").
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fundamentallm.errors import MachineError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Below the ports that Linux gives to connections by itself (32768 and more).
_PORTS = range(15000, 32000)


def launched_as(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables of this process; nothing where it is the only one.

    Args:
        environ: the environment of the process.

    Raises:
        MachineError: the environment describes a group only in part, or one that cannot be.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = {name: environ[name] for name in VARIABLES if name in environ}
        names, fix = VARIABLES[:2], "start with torchrun, or unset RANK and WORLD_SIZE"
    elif _is_slurm_task(environ):
        found = _from_slurm(environ)
        names, fix = ("SLURM_PROCID", "SLURM_NTASKS"), "start with srun, or unset SLURM_PROCID"
    else:
        return {}
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        raise MachineError(
            "the environment describes a group of processes only in part",
            got="without " + ", ".join(missing),
            fix=fix,
        )
    rank, world_size, local_rank = (found[name] for name in VARIABLES[:3])
    # isdecimal also takes digits of other scripts, and so does int.
    if not (
        rank.isdecimal()
        and world_size.isdecimal()
        and local_rank.isdecimal()
        and int(rank) < int(world_size)
    ):
        raise MachineError(
            "the environment describes a group of processes that cannot be",
            got=f"{names[0]}={rank}, {names[1]}={world_size}, local rank {local_rank}",
            expected=f"whole numbers, {names[0]} below {names[1]}",
            fix=fix,
        )
    return found if int(world_size) > 1 else {}


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: `gpu[003-006,9],login1` has gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Tell a task of `srun` from a batch script, which has SLURM_PROCID=0 too and no siblings."""
    in_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    return "SLURM_PROCID" in environ and not in_batch_script


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    def first_of(*names: str) -> str:
        return next((environ[name] for name in names if environ.get(name)), "")

    tasks = first_of("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or "1"
    nodes = first_of("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    hosts = first_of("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    job, step = (
        int(value) if value.isdecimal() else 0
        for value in (first_of("SLURM_JOB_ID", "SLURM_JOBID"), first_of("SLURM_STEP_ID"))
    )
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if nodes == "1" else first_host(hosts))
    # Every task must find the same port, and two steps at once on a node must not share it.
    port = environ.get("MASTER_PORT") or str(_PORTS[(31 * job + step) % len(_PORTS)])
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", ""),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: value for name, value in found.items() if value}
