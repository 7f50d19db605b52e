"""torch.compile, kept short: one block is compiled, and serves them all.

A whole model unrolls into as many copies of a block as it has, and each is compiled again: minutes
for what one block takes in seconds, and no faster after. Compiled code holds for one shape; the
last, smaller batch of an epoch and the growing text of a sample go through the plain block rather
than through the compiler.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from fundamentallm.config.model import TransformerConfig
from fundamentallm.errors import ConfigError, MachineError
from fundamentallm.models.layers.normalization import RMSNorm, rms_norm
from fundamentallm.models.native.block import NativeBlocks, require_native
from fundamentallm.models.native.library import find_compiler
from fundamentallm.models.native.normalization import native_rms_norm

logger = logging.getLogger(__name__)

BlockRunner = Callable[..., Tensor]


class CompiledBlocks:
    """Calls blocks through one compiled function where the input has the shape of a whole batch.

    Which inputs those are must not hang on which came first in this process: a resumed run would
    otherwise go on with other code, and other last bits, than the one that was not interrupted.
    Evaluation goes through the same code: without gradients it would have to be compiled again.
    What the code keeps for a backward pass is dropped at once.

    Args:
        plain: `plain(block, x, positions, embedded)`, which is compiled. Where the compiler fails,
            there is a warning, and all goes on with this.
        rows, time: the shape (B, T) of a whole batch; what is unset, the first training call tells.
        backend: a backend of `torch.compile`.
    """

    def __init__(
        self,
        plain: BlockRunner,
        rows: int | None = None,
        time: int | None = None,
        backend: str = "inductor",
    ) -> None:
        self.plain = plain
        self.rows, self.time = rows, time
        self.backend = backend
        self.compiled: BlockRunner | None = plain
        self._drops: bool | None = None
        if rows is not None and time is not None:
            self._expect(rows, time)

    def __call__(
        self, block: nn.Module, x: Tensor, positions: nn.Module, embedded: Tensor
    ) -> Tensor:
        """Return `plain(block, x, positions, embedded)`, from compiled code where there is some."""
        if self.compiled is None or not self._serves(block, x):
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

    def _expect(self, rows: int, time: int) -> None:
        self.rows, self.time = rows, time
        one = _one_of_its_shape(self.plain, rows, time)
        self.compiled = torch.compile(one, backend=self.backend, dynamic=False)

    def _serves(self, block: nn.Module, x: Tensor) -> bool:
        """Return whether this is the shape that the code is for."""
        rows, time = x.shape[:2]
        if self.rows is None or self.time is None:
            trains = block.training and torch.is_grad_enabled()
            if not trains or rows != (self.rows or rows) or time != (self.time or time):
                return False
            self._expect(rows, time)
        if (rows, time) != (self.rows, self.time):
            return False
        if self._drops is None:
            self._drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
        return block.training or not self._drops


@cache
def _one_of_its_shape(plain: BlockRunner, rows: int, time: int) -> BlockRunner:
    """Return a function of its own for each shape, the same for each model.

    The compiler counts its attempts by code object, and gives up after 8; but what it has compiled
    for one model serves the next of the same kind.
    """

    def call(block: nn.Module, x: Tensor, positions: nn.Module, embedded: Tensor) -> Tensor:
        return plain(block, x, positions, embedded)

    call.__code__ = call.__code__.replace()
    return call


def uncompile(model: nn.Module) -> None:
    """Have a model computed as it was before `compiled`, whatever that did; nothing else."""
    runner = getattr(model, "run_block", None)
    while isinstance(runner, CompiledBlocks | NativeBlocks):
        runner = model.run_block = runner.plain  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.kernel is native_rms_norm:
            module.kernel = rms_norm


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Have a model's blocks called as they are: hooks inside compiled code are not called."""
    runner = getattr(model, "run_block", None)
    if not isinstance(runner, CompiledBlocks | NativeBlocks):
        yield
        return
    model.run_block = runner.plain  # type: ignore[assignment]
    try:
        yield
    finally:
        model.run_block = runner  # type: ignore[assignment]


Choice = bool | Literal["auto", "native"]


def resolve_compile(choice: Choice) -> bool | Literal["native"]:
    """Choose whether to compile: "auto" does where a compiler is found, and warns where none is.

    Raises:
        MachineError: compiled code is asked for, and there is no compiler.
    """
    if not choice or find_compiler() is not None:
        return choice if choice == "native" else bool(choice)
    if choice == "auto":
        logger.warning("compile: auto: no C++ compiler was found, so nothing is compiled")
        return False
    raise MachineError(
        f"compile: {str(choice).lower()} needs a C++ compiler, and there is none",
        got=f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "no g++ in PATH",
        fix="install g++, name another in CXX, or set training.compile to auto or false",
    )


def compiled(
    model: nn.Module, rows: int | None = None, time: int | None = None, native: bool = False
) -> nn.Module:
    """Return what to call in place of the model.

    A model with `run_block` is compiled a block at a time, in place, and returned itself; another
    as a whole. The compiler runs at the first call.

    Args:
        model: as it is.
        rows, time: as for `CompiledBlocks`.
        native: by the code of this package, in place of torch's compiler.

    Raises:
        ConfigError: native code does not know the model.
        MachineError: native code cannot be had.
    """
    plain = getattr(model, "run_block", None)
    if native:
        config = getattr(model, "config", None)
        if plain is None or not isinstance(config, TransformerConfig):
            raise ConfigError(
                "compile: native is for this package's Transformer", got=type(model).__name__
            )
        require_native(config, next(model.parameters()).device)
        model.run_block = NativeBlocks(plain)  # type: ignore[assignment]
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.kernel = native_rms_norm
        return model
    if plain is None:
        return torch.compile(model)  # type: ignore[return-value]
    model.run_block = CompiledBlocks(plain, rows, time)  # type: ignore[assignment]
    return model
