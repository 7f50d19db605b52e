"""The ranks of a run: votes, sums, and who writes. Alone, everything here is a no-op.

Start ranks with `torchrun --nproc_per_node=N -m fundamentallm.engine run ...`; the environment
variables that torchrun sets are all that is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist

from fundamentallm.errors import MachineError


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: the rank on this machine, which chooses its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Ranks:
        """Describe the process group that exists now; alone without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and speaks on the terminal."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.world_size == 1

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
        """Return the first rank on which the flag is set, None if it is on none."""
        counts = [int(flag and rank == self.rank) for rank in range(self.world_size)]
        return next((rank for rank, is_set in enumerate(self.sum_counts(counts)) if is_set), None)

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Give every rank the text of one."""
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
        """Return on every rank what the first one decides, a value of plain JSON.

        Raises:
            SystemExit: on the other ranks, where the first one failed; that one raises its error.
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
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


def join_ranks(device: str) -> Ranks:
    """Join the process group that torchrun announces, if it does.

    Args:
        device: "cuda" chooses nccl, anything else gloo.

    Raises:
        MachineError: the environment names a group only in part, or the group cannot be joined.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return Ranks()
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise MachineError(
            "the environment describes a group of processes only in part",
            got="without " + ", ".join(missing),
            fix="start with torchrun, or unset RANK and WORLD_SIZE",
        )
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    # isdecimal also takes digits of other scripts, and so does int.
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise MachineError(
            "the environment describes a group of processes that cannot be",
            got=f"RANK={rank}, WORLD_SIZE={world_size}",
            expected="whole numbers, RANK below WORLD_SIZE",
            fix="start with torchrun, or unset RANK and WORLD_SIZE",
        )
    if int(world_size) == 1:
        return Ranks()
    if not dist.is_initialized():
        try:
            # Through Ignite, so that its own first call is no surprise collective.
            idist.initialize("nccl" if device == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise MachineError(
                f"the ranks could not find each other: {error}",
                got=f"MASTER_ADDR={os.environ['MASTER_ADDR']}"
                f" MASTER_PORT={os.environ['MASTER_PORT']}",
                fix="check the address and that the port is free",
            ) from error
    return Ranks.current()


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        idist.finalize()
