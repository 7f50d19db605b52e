"""torch.compile of one block, whose code serves all blocks.

Compiling a whole model unrolls its blocks and compiles each of them: minutes
instead of seconds for one block, and no faster afterwards. Compiled code is for one shape; the
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
    """Calls blocks through one compiled function if the input has the shape of a whole batch.

    The shape must not depend on the first input in this process: a resumed run would
    otherwise use other code, with other last bits, than the uninterrupted run.
    Evaluation goes through the same code: without gradients it would have to be compiled again.
    The tensors saved for a backward pass are freed at once.

    Args:
        plain: `plain(block, x, positions, embedded)`, which is compiled. If the compiler fails,
            it warns and uses this function.
        rows, time: the shape (B, T) of a whole batch; if unset, taken from the first training call.
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
        """Return `plain(block, x, positions, embedded)`, with compiled code if there is any."""
        if self.compiled is None or not self._serves(block, x):
            return self.plain(block, x, positions, embedded)
        if embedded is x:  # as for the first block: the same tensor twice would compile again
            embedded = x.view_as(x)
        try:
            if torch.is_grad_enabled():
                return self.compiled(block, x, positions, embedded)
            x, embedded = (tensor.detach().requires_grad_() for tensor in (x, embedded))
            with torch.enable_grad():
                return self.compiled(block, x, positions, embedded).detach()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("torch.compile failed, training continues without it: %s", reason)
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
    """Return a separate function for each shape, shared by all models.

    The compiler counts its attempts by code object, and gives up after 8; but code compiled
    for one model also serves the next of the same kind.
    """

    def call(block: nn.Module, x: Tensor, positions: nn.Module, embedded: Tensor) -> Tensor:
        return plain(block, x, positions, embedded)

    call.__code__ = call.__code__.replace()
    return call


def uncompile(model: nn.Module) -> None:
    """Undo `compile_model`, and nothing else."""
    runner = getattr(model, "run_block", None)
    while isinstance(runner, CompiledBlocks | NativeBlocks):
        runner = model.run_block = runner.plain  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.kernel is native_rms_norm:
            module.kernel = rms_norm


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model's blocks uncompiled in a block: hooks are not called inside compiled code."""
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
    """Choose whether to compile: "auto" compiles if a compiler is found, and warns otherwise.

    Raises:
        MachineError: compilation is required, but there is no compiler.
    """
    if not choice or find_compiler() is not None:
        return choice if choice == "native" else bool(choice)
    if choice == "auto":
        logger.warning("compile: auto: no C++ compiler was found, so nothing is compiled")
        return False
    raise MachineError(
        f"compile: {str(choice).lower()} needs a C++ compiler, but none was found",
        got=f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "no g++ in PATH",
        fix="install g++, name another in CXX, or set training.compile to auto or false",
    )


def compile_model(
    model: nn.Module,
    rows: int | None = None,
    time: int | None = None,
    native: bool = False,
    precision: str = "bf16",
) -> nn.Module:
    """Compile a model; return the module to call in its place.

    A model with `run_block` is compiled a block at a time, in place, and returned itself; another
    as a whole. The compiler runs at the first call.

    Args:
        model: the model, not yet compiled.
        rows, time: as for `CompiledBlocks`.
        native: with the code of this package instead of torch's compiler.
        precision: of native code, "bf16" or "fp32".

    Raises:
        ConfigError: native code does not support the model.
        MachineError: native code cannot be compiled or loaded.
    """
    plain = getattr(model, "run_block", None)
    if native:
        config = getattr(model, "config", None)
        if plain is None or not isinstance(config, TransformerConfig):
            raise ConfigError(
                "compile: native is for this package's Transformer", got=type(model).__name__
            )
        require_native(config, next(model.parameters()).device)
        model.run_block = NativeBlocks(plain, precision)  # type: ignore[assignment]
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.kernel = native_rms_norm
        return model
    if plain is None:
        return torch.compile(model)  # type: ignore[return-value]
    model.run_block = CompiledBlocks(plain, rows, time)  # type: ignore[assignment]
    return model
