"""Device, compute type and loss scale.

Weights, gradients and optimizer state stay in float32; "bf16" and "fp16" mean that matrix
multiplications run in that type, in one of two ways:

- autocast: each operation chooses its type, and converts what it reads.
- bfloat16 copies of the weights: lent to the model for one micro-batch, so that all activations
  are bfloat16. On CPUs autocast's conversions can cost more than the narrow products gain.

Normalizations, softmax and losses reduce in float32 in both. Only fp16 needs a loss scale: its
smallest normal number is 6e-5, and many gradients lie below that (Micikevicius et al. 2018,
section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.errors import CheckpointError, ConfigError, MachineError, did_you_mean

PRECISIONS = ("fp32", "bf16", "fp16", "auto")

_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda", "mps")


class Precision:
    """Autocast and, for fp16, a loss scale that adapts itself.

    A step calls `scale(loss).backward()`, `unscale_` once the step batch's gradients are complete,
    `step` only if they are finite, and `update` in either case: it closes the step, and halves
    the scale if `unscale_` met an infinity. Without a scaler these calls do what their names say
    to an optimizer that needs no scaling.

    Args:
        name: "fp32", "bf16" or "fp16".
        device: where the model is.
        bf16_weights: for "bf16", whether copies of the weights take the place of autocast.

    Attributes:
        name: as given.
        device: as given.
        bf16_weights: as given.
        scaler: the loss scale; None unless fp16.

    Raises:
        ValueError: another name, or copies in bfloat16 for another type.
    """

    def __init__(self, name: str, device: torch.device, bf16_weights: bool = False) -> None:
        if name != "fp32" and name not in _AUTOCAST_TYPES:
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {name!r}")
        if bf16_weights and name != "bf16":
            raise ValueError(f"bf16_weights are for precision bf16, not {name}")
        self.name = name
        self.device = device
        self.bf16_weights = bf16_weights
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    @property
    def dtype(self) -> torch.dtype:
        """The type that matrix products run in."""
        return _AUTOCAST_TYPES.get(self.name, torch.float32)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for forward passes, in training and in validation alike."""
        if self.name == "fp32" or self.bf16_weights:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST_TYPES[self.name])

    def weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context for a micro-batch, its backward pass included; see `narrowed`."""
        return narrowed(model, torch.bfloat16) if self.bf16_weights else nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the loss scale."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the loss scale in place; once before each `update`."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Update the weights; with a scaler, only if every gradient is finite."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)

    def update(self, adapt: bool = True) -> None:
        """Close the step that `unscale_` began; a no-op without a scaler.

        Args:
            adapt: let the loss scale follow what `unscale_` saw; False keeps it, as if the step
                had never been tried.
        """
        if self.scaler is not None:
            self.scaler.update(None if adapt else self.scaler.get_scale())

    @property
    def may_overflow(self) -> bool:
        """Whether an infinite gradient is normal: there is a loss scale of 1 or more."""
        return self.scaler is not None and self.scaler.get_scale() >= 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale and its growth counter as numbers; {} without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the loss scale.

        Raises:
            CheckpointError: only one of the state and this precision has a loss scale.
        """
        if bool(state_dict) != (self.scaler is not None):
            raise CheckpointError(
                "the checkpoint was written in another precision",
                got="a loss scale" if state_dict else "no loss scale",
                expected=f"{'no' if self.scaler is None else 'a'} loss scale for {self.name}",
                fix="set training.precision to the run's original value",
            )
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state_dict))


@contextmanager
def narrowed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lend a model narrow copies of its floating-point parameters, one copy for a shared parameter.

    Embedding tables are not lent: the vectors read from them are narrowed instead. Their backward
    pass adds up a row for each token, and in bfloat16 a frequent token's sum stops growing.

    The copies are linked to the parameters: a backward pass adds to the parameters' gradients,
    in their type. It must run inside the context, since checkpointed activations are
    recomputed from the model's weights at that time.

    Args:
        model: its parameters; buffers stay as they are.
        dtype: type of the copies.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]
    with torch.enable_grad():  # also in evaluation, where compiled code expects what it knows
        copies = {id(parameter): parameter.to(dtype) for _, _, parameter in places}
    hooks = [
        module.register_forward_hook(partial(_narrow_output, dtype))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        for parameters, name, parameter in places:
            # Assigned as an attribute, a tensor that is not an nn.Parameter would be refused.
            parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter
        for hook in hooks:
            hook.remove()


def _narrow_output(dtype: torch.dtype, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def resolve_bf16_weights(
    choice: bool | Literal["auto"],
    precision: str,
    device: torch.device,
    follows: Callable[[], bool] | None,
) -> bool:
    """Choose between copies of the weights and autocast.

    Args:
        choice: "auto" for copies on a CPU, where the model can compute with them.
        precision: the resolved name.
        device: where the model is.
        follows: tells whether it can, as `Transformer.follows_weight_type`; None: unknown.
    """
    if precision != "bf16" or choice != "auto":
        return precision == "bf16" and choice is True
    return device.type == "cpu" and follows is not None and follows()


def resolve_precision(
    config_precision: str | None, mixed_precision: bool, device: torch.device
) -> str:
    """Choose the precision that a configuration means on a device.

    `auto` is the fastest safe type: on CUDA bf16, or fp16 where the GPU has no bf16; fp32
    elsewhere. `mixed_precision` requests a narrow type everywhere: bf16 on CPUs too.

    Args:
        config_precision: "fp32", "bf16", "fp16", "auto" or None for unset.
        mixed_precision: with an unset precision, "fp32" or "auto": the narrow type of the device.
        device: where the model will be.

    Returns:
        "fp32", "bf16" or "fp16".

    Raises:
        ConfigError: an unknown precision, or one that the device lacks.
    """
    name = config_precision or "fp32"
    if name not in PRECISIONS:
        raise ConfigError(
            f"unknown precision '{name}'",
            key="precision",
            expected="one of " + ", ".join(PRECISIONS),
            fix=did_you_mean(name, PRECISIONS),
        )
    if name == "auto" or (mixed_precision and name == "fp32"):
        if device.type == "cuda":
            return "bf16" if has_bf16(device) else "fp16"
        return "bf16" if mixed_precision else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"precision fp16 needs a CUDA GPU, but the device is {device.type}",
            key="precision",
            got="fp16",
            expected="fp32 or bf16",
            fix="use precision: bf16, or device: cuda on a machine with a GPU",
        )
    if name == "bf16" and not has_bf16(device):
        raise ConfigError(
            f"precision bf16 needs a GPU with bfloat16, but {device} does not support it",
            key="precision",
            got="bf16",
            expected="fp32 or fp16",
            fix="use precision: auto",
        )
    return name


def resolve_device(name: str) -> torch.device:
    """Return the device of this machine for a name.

    Args:
        name: "cpu", "cuda" (the current GPU), "cuda:N", "mps", or "auto": the first of cuda, mps
            and cpu that exists.

    Returns:
        The device; a CUDA device always with its index.

    Raises:
        ConfigError: the kind of device is unknown.
        MachineError: this machine has no such device.
    """
    kind = name.partition(":")[0]
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", name):
        raise ConfigError(
            f"unknown device '{name}'",
            expected="auto, cpu, cuda, cuda:N (N is the GPU's number) or mps",
            fix=did_you_mean(kind, _DEVICES) or "use device: auto",
        )
    if kind == "auto":
        kind = _best_device()
    if kind == "cuda":
        _require_cuda(name)
        _, _, index = name.partition(":")
        return torch.device("cuda", int(index) if index else torch.cuda.current_device())
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MachineError(
            "this machine has no Metal GPU that torch can use",
            got=name,
            fix="use device: auto or cpu",
        )
    return torch.device(kind)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _require_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        raise MachineError(
            "torch finds no CUDA GPU" if built else "this build of torch is for CPUs only",
            got=name,
            fix=(
                "use device: auto or cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
                if built
                else "use device: auto or cpu, or install the CUDA build of torch"
            ),
        )
    count = torch.cuda.device_count()
    _, _, index = name.partition(":")
    if index and int(index) >= count:
        raise MachineError(
            f"there is no GPU number {int(index)}",
            got=name,
            expected="cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}",
            fix="use device: cuda, or check CUDA_VISIBLE_DEVICES",
        )


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware; emulation is slower than fp32."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
