"""Kinds of models, and changes to a built one: the two registries that every command builds from.

A family is one decorated class:

```python
@MODELS.register("gru")
class GRULanguageModel(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int = 256) -> None: ...
    def forward(self, input_ids: Tensor) -> Tensor: ...  # (B, T) int64 -> logits (B, T, V)
```

and `model: {family: gru, hidden_size: 512}` works. Logits at position t depend only on tokens
0 to t, and rows do not depend on each other. `vocab_size` and `sequence_length` are supplied to a
constructor that has parameters of these names; all others are options. A model must also be
buildable on the meta device: that is how shapes are checked without memory.
A causal language model of `transformers` is a model too: `calling.py`.

Optional members of a model, and what happens without them:

| member | means | without it |
|---|---|---|
| `sequence_length` | the longest input in tokens | a text is never cut |
| `new_cache`, `forward(cache=)` | a token is computed from kept state | the text is recomputed |
| `logits_from_hidden`, `forward(return_hidden=)` | the head on its own | no chunked loss |
| `forward(document_ids=)` | rows of several documents | no `packing: document` |
| `gradient_checkpointing` | set to True (or `gradient_checkpointing_enable`) | refused |
| `run_block` | how its blocks are called | it is compiled as a whole |
| `follows_weight_type()` | whether bfloat16 weights are enough | autocast |
| `flops_per_token` | of one forward and backward pass | 6 a parameter |

Optional members of the class, used with a configuration before anything is built:

| member | means | without it |
|---|---|---|
| `check(config)` | raises ConfigError if it cannot be built | it is built on the meta device |
| `estimate(config, ...)` | the costs, as `models.estimate.estimate` | parameters are counted |
| `can_follow_weight_type(config)` | as `follows_weight_type` | autocast |
| `uses_attention` | True: its modules are `models.attention.Attention` | one kernel to tune |
"""

from __future__ import annotations

from torch import nn

from fundamentallm.registry import Registry

MODELS: Registry[nn.Module] = Registry(
    "model family", supplied={"config", "vocab_size", "sequence_length"}
)
"""By the name in `model.family`."""

ADAPTERS: Registry[nn.Module] = Registry("adapter", supplied={"model"})
"""By the name in `model.adapter`. Each takes the built `model`, with the weights that it starts
from, and returns it changed; parameters that it freezes (`requires_grad = False`) stay."""
