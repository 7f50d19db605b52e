"""The size of a model that a machine trains well in a time: `model: {size: auto}`, and `new`.

Training takes six floating-point operations for each parameter and token (Kaplan et al. 2020,
section 2.1), so a number of operations C buys N parameters and D = C / 6N tokens. How many tokens a
parameter wants is measured (docs/lab.md): about eight in short runs on a CPU, and 20 from
1e20 operations on (Hoffmann et al. 2022); between them its logarithm rises evenly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fundamentallm.compute.peak import device_peak
from fundamentallm.compute.plan import Machine
from fundamentallm.compute.precision import has_bf16
from fundamentallm.compute.processor import cpu_rates
from fundamentallm.config import RunConfig, TransformerConfig
from fundamentallm.errors import ConfigError

SHORT, LONG = (1e14, 8.0), (1e20, 20.0)  # operations, tokens of a parameter
PARAMETERS_PER_TOKEN = 3  # of the text at most; larger models learn it by heart
# Of a processor's rate in small products, and of a GPU's peak: what a whole run reaches, its start
# and its validation included. Measured in float32 with AVX2 and in bfloat16 with AMX, where the
# products are a smaller part of the time (docs/lab.md); not measured on a GPU.
CPU_UTILIZATION, CPU_UTILIZATION_BF16, GPU_UTILIZATION = 0.5, 0.28, 0.25


class Size(NamedTuple):
    """The shape of a transformer."""

    d_model: int
    num_layers: int
    num_heads: int

    @property
    def parameters(self) -> int:
        """About the number of parameters of the blocks."""
        return 12 * self.num_layers * self.d_model**2


SIZES = (
    Size(64, 2, 2),
    Size(96, 4, 3),
    Size(128, 4, 2),
    Size(160, 5, 5),
    Size(192, 6, 3),
    Size(256, 6, 4),
    Size(320, 6, 5),
    Size(384, 6, 6),
    Size(512, 8, 8),
    Size(640, 10, 10),
    Size(768, 12, 12),
    Size(1024, 16, 16),
)


def choose_size(operations: float, num_tokens: int | None) -> Size:
    """Return the size nearest to what a number of floating-point operations trains well.

    Args:
        operations: of the training steps of a run.
        num_tokens: of the text; None where unknown. It bounds the size.
    """
    span = math.log(LONG[1] / SHORT[1]) / math.log(LONG[0] / SHORT[0])
    above = min(max(operations, SHORT[0]), LONG[0]) / SHORT[0]
    best = math.sqrt(operations / (6 * SHORT[1] * above**span))
    if num_tokens is not None:
        best = min(best, PARAMETERS_PER_TOKEN * num_tokens)
    return min(SIZES, key=lambda size: abs(math.log(size.parameters / max(best, 1.0))))


def sized(
    config: RunConfig, num_tokens: int | None, machine: Machine
) -> tuple[TransformerConfig, str]:
    """Return the model of `size: auto` with its size in numbers, and a note for the user.

    Args:
        config: of a run that begins, with `size: auto`.
        num_tokens: of the text; None where unknown.
        machine: whose first rank decides.

    Raises:
        ConfigError: no time is given.
    """
    model, training = config.model, config.training
    assert isinstance(model, TransformerConfig)
    if training.max_seconds is None:
        with config.locating_errors("model.size"):
            raise ConfigError(
                "size: auto needs to know the time of the run",
                got="no training.max_seconds",
                fix="set training.max_seconds, or d_model, num_layers and num_heads in place of"
                " size",
            )
    rate = machine.ranks.first_decides(
        lambda: training_rate(machine.device, training.precision or "fp32")
    )
    size = choose_size(machine.ranks.world_size * rate * training.max_seconds, num_tokens)
    note = (
        f"model.size: auto: d_model {size.d_model}, num_layers {size.num_layers}, num_heads"
        f" {size.num_heads}, for {rate / 1e9:,.0f} GFLOP/s in {training.max_seconds:g} s"
    )
    return model.model_copy(update={"size": None, **size._asdict()}), note


def training_rate(device: torch.device, precision: str) -> float:
    """Return about how many FLOP/s a training run reaches on a device.

    Args:
        device: of a rank.
        precision: as configured.
    """
    narrow = precision in ("bf16", "auto")
    if device.type == "cpu":
        rates = cpu_rates()
        wide = CPU_UTILIZATION * rates.float32
        return max(wide, CPU_UTILIZATION_BF16 * rates.bfloat16) if narrow else wide
    dtype = torch.float32
    if precision != "fp32":
        dtype = torch.bfloat16 if narrow and has_bf16(device) else torch.float16
    return GPU_UTILIZATION * device_peak(device, dtype)
