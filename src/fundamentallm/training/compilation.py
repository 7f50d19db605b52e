"""torch.compile, kept short: one block is compiled, and serves them all.

A whole model unrolls into as many copies of a block as it has, and each is compiled again: minutes
for what one block takes in seconds, and no faster after. Compiled code holds for one shape; the
last, smaller batch of an epoch and the growing text of a sample go through the plain block rather
than through the compiler.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fundamentallm.errors import MachineError

logger = logging.getLogger(__name__)

BlockRunner = Callable[..., Tensor]


class CompiledBlocks:
    """Calls blocks through one compiled function, if the shape is that of the first training call.

    Evaluation goes through the same code: without gradients it would have to be compiled again.
    What the code keeps for a backward pass is dropped at once.

    Args:
        plain: `plain(block, x, positions, embedded)`, which is compiled. Where the compiler fails,
            there is a warning, and all goes on with this.
        backend: a backend of `torch.compile`.
    """

    def __init__(self, plain: BlockRunner, backend: str = "inductor") -> None:
        self.plain = plain
        self.compiled: BlockRunner | None = torch.compile(plain, backend=backend, dynamic=False)
        self.key: tuple[Any, ...] | None = None
        self.drops = False

    def __call__(
        self, block: nn.Module, x: Tensor, positions: nn.Module, embedded: Tensor
    ) -> Tensor:
        """Return `plain(block, x, positions, embedded)`, from compiled code where there is some."""
        key = (x.shape, x.dtype, x.device)
        if self.key is None and block.training and torch.is_grad_enabled():
            self.key = key
            self.drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
        if self.compiled is None or key != self.key or (self.drops and not block.training):
            return self.plain(block, x, positions, embedded)
        if embedded is x:  # as for the first block: one tensor twice would be a case of its own
            embedded = x.view_as(x)
        try:
            if torch.is_grad_enabled():
                return self.compiled(block, x, positions, embedded)
            x, embedded = (tensor.detach().requires_grad_() for tensor in (x, embedded))
            with torch.enable_grad():
                return self.compiled(block, x, positions, embedded).detach()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("torch.compile failed, going on without it: %s", reason)
            self.compiled = None
            return self.plain(block, x, positions, embedded)


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile would call; None without one."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def resolve_compile(choice: bool | Literal["auto"]) -> bool:
    """Choose whether to compile: "auto" does where a compiler is found, and warns where none is.

    Raises:
        MachineError: True, and there is no compiler.
    """
    if not choice or find_compiler() is not None:
        return bool(choice)
    if choice == "auto":
        logger.warning("compile: auto: no C++ compiler was found, so nothing is compiled")
        return False
    raise MachineError(
        "torch.compile needs a C++ compiler, and there is none",
        got=f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "no g++ in PATH",
        fix="install g++, name another in CXX, or set training.compile to auto or false",
    )


def compiled(model: nn.Module) -> nn.Module:
    """Return what to call in place of the model.

    A model with `run_block` is compiled a block at a time, in place, and returned itself; another
    as a whole. The compiler runs at the first call.
    """
    plain = getattr(model, "run_block", None)
    if plain is None:
        return torch.compile(model)  # type: ignore[return-value]
    model.run_block = CompiledBlocks(plain)  # type: ignore[assignment]
    return model
