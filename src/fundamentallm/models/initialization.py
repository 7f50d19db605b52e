"""The weights that a model starts with (Radford et al. 2019, section 2.3).

- Linear and embedding weights are normal with standard deviation 0.02; biases are 0; gains of
  normalizations are 1, as their modules make them.
- Linear layers that write into the residual stream, those called `output`, are smaller by
  1 / sqrt(2 * num_layers): 2 * num_layers branches add up, and the sum should keep its scale.
"""

from __future__ import annotations

import math

from torch import nn

WEIGHT_STD = 0.02


def initialize(model: nn.Module, num_layers: int) -> None:
    """Draw the weights of every `nn.Linear` and `nn.Embedding` in place; zero the biases.

    Other modules keep what their constructors gave them. The draws come from torch's global
    generator, in the order of `model.named_modules()`.

    Args:
        model: the whole model.
        num_layers: its number of blocks, >= 1.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        writes_residual = name.rpartition(".")[2] == "output"
        std = WEIGHT_STD / math.sqrt(2 * num_layers) if writes_residual else WEIGHT_STD
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
