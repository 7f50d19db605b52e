"""The ranks of a run: votes, sums, and who writes. For one process everything here is a no-op.

Start ranks with `torchrun --nproc_per_node=N -m fundamentallm.engine run ...` or with `srun`;
`launchers.py` reads what either says of this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fundamentallm.compute.launchers import launched_as
from fundamentallm.errors import MachineError


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: the rank among those on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Ranks:
        """Describe the present process group; a single rank without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints on the terminal."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.world_size == 1

    def own_gpu(self) -> int:
        """Return the number of this rank's GPU.

        Where the launcher shows each rank one GPU alone, that is number 0.

        Raises:
            MachineError: this machine has several GPUs, and more ranks than those.
        """
        visible = torch.cuda.device_count()
        if visible == 1:
            return 0
        if self.local_rank >= visible:
            raise MachineError(
                "there are more ranks on this machine than GPUs",
                where=f"rank {self.rank}",
                got=f"local rank {self.local_rank}, {visible} GPUs",
                fix=f"start at most {visible} ranks on each machine",
            )
        return self.local_rank

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Sum integers over the ranks, exactly (int64)."""
        if self.alone:
            return list(counts)
        # A count travels as int64: Ignite's broadcast of a plain number goes through float32.
        tensor = torch.tensor(counts, dtype=torch.int64, device=self._host_device())
        dist.all_reduce(tensor)
        return [int(value) for value in tensor.tolist()]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum_counts([int(flag)])[0] > 0

    def all_equal(self, number: int) -> bool:
        """Whether every rank has the same number, modulo 2^64."""
        data = number.to_bytes(8, "little")
        parts = self.gather_bytes(torch.tensor(list(data), dtype=torch.uint8))
        return all(torch.equal(part, parts[0]) for part in parts)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if not self.alone:
            self.sum_counts([0])

    def gather_bytes(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collect a uint8 tensor of the same length from every rank, in rank order."""
        if self.alone:
            return [tensor]
        own = tensor.to(self._host_device())
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return [part.cpu() for part in parts]

    def first(self, flag: bool) -> int | None:
        """Return the first rank on which the flag is set; None if there is none."""
        counts = [int(flag and rank == self.rank) for rank in range(self.world_size)]
        return next((rank for rank, is_set in enumerate(self.sum_counts(counts)) if is_set), None)

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Send one rank's text to every rank."""
        if self.alone:
            return text
        own = self.rank == source
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self._host_device())
        length = self.sum_counts([len(data) if own else 0])[0]
        if not own:
            data = torch.empty(length, dtype=torch.uint8, device=self._host_device())
        dist.broadcast(data, src=source)
        return bytes(data.tolist()).decode()

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """Return on every rank the first rank's decision, a value of plain JSON.

        Raises:
            SystemExit: on the other ranks if the first rank failed; that rank raises its error.
        """
        message, failure = "", None
        if self.is_writer:
            try:
                message = json.dumps(decide())
            except Exception as error:  # the others wait for the message
                failure = error
        message = self.broadcast_text(message)
        if failure is not None:
            raise failure
        if not message:
            raise SystemExit(1)
        return json.loads(message)

    def _host_device(self) -> torch.device:
        # nccl moves only CUDA tensors; gloo takes the host's.
        if dist.get_backend() == "nccl":
            return torch.device("cuda", self.own_gpu())
        return torch.device("cpu")


def join_ranks(device: str) -> Ranks:
    """Join the process group that torchrun or srun announces, if one does.

    Args:
        device: "cuda" chooses nccl, anything else gloo.

    Raises:
        MachineError: as `launched_as` and `refuse_shared_gpu`, or the group cannot be joined.
    """
    launched = launched_as(os.environ)
    if not launched:
        return Ranks()
    if not dist.is_initialized():
        # For env:// of torch, and for whatever asks the environment which rank this is.
        os.environ.update(launched)
        try:
            rank, world_size = int(launched["RANK"]), int(launched["WORLD_SIZE"])
            store = _store_of_this_start()
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
            )
            _tell_ignite()
        except (RuntimeError, ValueError) as error:
            raise MachineError(
                f"the ranks could not connect to each other: {error}",
                where=f"rank {launched['RANK']} of {launched['WORLD_SIZE']}",
                got="MASTER_ADDR={MASTER_ADDR} MASTER_PORT={MASTER_PORT}".format(**launched),
                fix="read the other ranks' messages; if they all wait, they must reach MASTER_ADDR"
                " from their machines, and no other program may hold MASTER_PORT there. Set both to"
                " choose others",
            ) from error
        if device == "cuda":
            refuse_shared_gpu(Ranks.current(), store)
    return Ranks.current()


def refuse_shared_gpu(ranks: Ranks, store: Any) -> None:
    """Refuse to compute on a GPU that another rank has taken; every rank must call it.

    NCCL would refuse it too, at the first sum and without saying what to change.

    Args:
        ranks: this process among the others.
        store: where the ranks have met.

    Raises:
        MachineError: another rank has the same GPU, or as `Ranks.own_gpu`.
    """
    own = str(torch.cuda.get_device_properties(ranks.own_gpu()).uuid)
    keys = [f"gpu/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], own)
    store.wait(keys)
    taken = [gpu.decode() for gpu in store.multi_get(keys)]
    if taken.count(own) > 1:
        sharing = [str(rank) for rank, gpu in enumerate(taken) if gpu == own]
        raise MachineError(
            "several ranks would compute on one GPU",
            where=f"rank {ranks.rank}",
            got=f"ranks {', '.join(sharing)} on GPU {own}",
            expected="a GPU for each rank",
            fix="start as many ranks on a machine as it has GPUs, and let CUDA_VISIBLE_DEVICES name"
            " all of them or another one for each rank",
        )


def _store_of_this_start() -> PrefixStore:
    """Return the store where the ranks meet, without what an earlier start has left there.

    torchrun keeps one store through its restarts; a rank that read the address of a process that is
    gone could not connect. Its count of restarts names no start: each node has a count of its own.
    """
    store, rank, world_size = next(rendezvous("env://"))
    return PrefixStore(_agree_on_start(store, rank, world_size), store)


def _agree_on_start(store: Any, rank: int, world_size: int) -> str:
    """Return a name that only the processes of this start know; every rank must call it.

    Each rank signs in under a new name. The first rank offers a list of the names that it sees, and
    makes it the start's once every rank has confirmed that the list has its own name: a list with
    the name of a process that is gone is confirmed by nobody there, and another one follows.

    Raises:
        RuntimeError: a rank does not come within the store's time-out.
    """
    own, place = uuid.uuid4().hex, f"start-of-{world_size}"
    deadline = time.monotonic() + store.timeout.total_seconds()
    signed_in = [f"{place}/{number}" for number in range(world_size)]
    offer, others = f"{place}/offer", signed_in[1:]
    store.set(signed_in[rank], own)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(others):
            names = b",".join([own.encode(), *store.multi_get(others)])
            store.set(offer, names)
        names = store.get(offer) if store.check([offer]) else b""
        if own.encode() in names.split(b","):
            start = f"start-{hashlib.sha256(names).hexdigest()[:32]}"
            store.set(f"{start}/confirmed/{rank}", "")
            confirmed = [f"{start}/confirmed/{number}" for number in range(world_size)]
            if rank == 0 and store.check(confirmed):
                store.set(f"{start}/begins", "")
            if store.check([f"{start}/begins"]):
                return start
        time.sleep(max(0.02, world_size / 10_000))  # a thousand ranks ask one store
    raise RuntimeError(f"not all {world_size} ranks have come")


def _tell_ignite() -> None:
    """Let Ignite find the group now, so that its own first call is no surprise collective.

    Ignite would join by itself too, but selects a GPU for ranks of the CPU. Where it sees a job of
    Slurm, it takes that job's local rank in place of torchrun's.
    """
    job = os.environ.pop("SLURM_JOB_ID", None)
    try:
        idist.sync()
    finally:
        if job is not None:
            os.environ["SLURM_JOB_ID"] = job


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        idist.finalize()
