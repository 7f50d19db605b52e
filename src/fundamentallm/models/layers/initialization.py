"""The weights that a model starts with: GPT-2's (Radford et al. 2019), carried to any width.

- Token and position embeddings, and the head: normal, standard deviation 0.02, which keeps the
  first logits near 0.
- Linear weights: normal, 0.02 at GPT-2's width of 768 and 0.02 sqrt(768 / D) at width D, so that
  a layer's outputs have one scale at all widths. With 0.02 everywhere, the blocks of a narrow model
  add next to nothing: the residual stream is the embedding of the token just read, and a tied
  head finds it likely to come again. At width 128 and 10 tokens the loss starts 10 % above log(V).
- Linear layers that write into the residual stream, those called `output`, are smaller by
  1 / sqrt(2 L): 2 L branches add up in L blocks, and the sum should keep its scale.
- With `zero_outputs` those, and a head that is not tied, start at 0 instead (Zhang, Dauphin and Ma
  2019, "Fixup", section 3; Yang et al. 2022, appendix D.2): each block begins as the identity and
  the loss at log(V). In the first steps only the zeros learn: all that feeds them has no gradient.
- Biases are 0; gains of normalizations are 1, as their modules make them.
"""

from __future__ import annotations

import math

from torch import nn

EMBEDDING_STD = 0.02
_GPT2_WIDTH = 768


def initialize(
    model: nn.Module, width: int, num_layers: int, *, zero_outputs: bool = False
) -> None:
    """Draw the weights of every `nn.Linear` and `nn.Embedding` in place; zero the biases.

    Other modules keep what their constructors gave them. The draws come from torch's global
    generator, in the order of `model.named_modules()`.

    Args:
        model: the whole model; its head is called `head`.
        width: D, >= 1.
        num_layers: L, >= 1.
        zero_outputs: whether layers called `output`, and an untied head, start at 0.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear_std = EMBEDDING_STD * math.sqrt(_GPT2_WIDTH / width)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) or name == "head":
            std = EMBEDDING_STD
        elif name == "output":
            std = linear_std / math.sqrt(2 * num_layers)
        else:
            std = linear_std
        if zero_outputs and name in ("output", "head") and id(module.weight) not in tables:
            std = 0.0
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
