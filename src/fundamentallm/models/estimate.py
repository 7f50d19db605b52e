"""The cost of a model, computed before it is built.

One block is built and run on fake tensors, which have shapes and no memory; everything is counted
there and multiplied by the number of blocks. So the counts hold for any registered component, and
a model too large for this machine, or for any, is answered at once.

Shapes: B batch, T time, D model width, V vocabulary, L number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fundamentallm.config.model import TransformerConfig
from fundamentallm.models.layers.components import (
    addressable,
    build_block,
    build_normalization,
    build_positions,
    required,
)

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """The cost of training a model.

    Attributes:
        parameters: their exact number, shared ones once.
        non_embedding_parameters: `Transformer.num_parameters(non_embedding=True)`.
        flops_per_token: floating-point operations of one forward and backward pass over one
            token: 6 for each parameter that multiplies, 12 L D T for attention, over the whole
            square of scores (Chowdhery et al. 2022, appendix B). Recomputation is not counted.
        weight_bytes: float32 weights.
        gradient_bytes: float32 gradients.
        optimizer_bytes: the optimizer's float32 state.
        activation_bytes: what one micro-batch keeps from the forward pass for the backward, with
            three float32 tensors (B, T, V): logits, log-probabilities and their gradient.
        update_bytes: what the optimizer adds for the time of an update, when the activations are
            gone.
        early_gradient_bytes: gradients that are there while all activations still are: without
            accumulation those of the head, for the others appear while activations go; None for
            all.
        late_activation_bytes: what is there besides all gradients at the end of the backward pass:
            the first block's activations, and narrow copies of the weights.
    """

    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    update_bytes: int = 0
    early_gradient_bytes: int | None = None
    late_activation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The peak of memory, without the program itself and its buffers."""
        early = self.gradient_bytes
        if self.early_gradient_bytes is not None:
            early = min(early, self.early_gradient_bytes)
        return (
            self.weight_bytes
            + self.optimizer_bytes
            + max(
                early + self.activation_bytes,
                self.gradient_bytes + max(self.late_activation_bytes, self.update_bytes),
            )
        )


def estimate(
    config: TransformerConfig,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    gradient_checkpointing: bool = False,
    bytes_per_activation: int = FLOAT32_BYTES,
    optimizer_states: int = 2,
) -> Estimate:
    """Estimate the cost of training a model; build none, draw no random number.

    Args:
        config: the model; `vocab_size` and `sequence_length` must be set.
        batch_size: B, sequences in a micro-batch.
        sequence_length: T, tokens in a sequence, at most the context length, which None means.
        gradient_checkpointing: whether blocks keep only their inputs.
        bytes_per_activation: 4, or 2 under bf16 and fp16 autocast.
        optimizer_states: float32 numbers that the optimizer keeps for a parameter: 2 for Adam, 1
            for momentum, 0 for plain SGD.

    Raises:
        ConfigError: as from `Transformer`, or a tensor would be larger than any machine's
            addresses.
        ValueError: a sequence longer than the context.
    """
    vocab_size = required(config, "vocab_size")
    context = required(config, "sequence_length")
    time = context if sequence_length is None else sequence_length
    if time > context:
        raise ValueError(f"a sequence of {time} tokens exceeds the context length of {context}")
    narrow = bytes_per_activation < FLOAT32_BYTES
    with FakeTensorMode(), addressable(config):
        block, positions = build_block(config), build_positions(config)
        block_parameters = _count(block)
        position_parameters = _count(positions)
        norm_parameters = _count(build_normalization(config))
        stream = torch.empty(batch_size, time, config.d_model, requires_grad=True)
        stream_bytes = stream.nbytes
        # Autocast keeps norms and the stream in float32, and narrow copies of the weights.
        with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
            block_bytes = _kept_bytes(lambda: block(stream, positions, stream), (block, positions))

    table = vocab_size * config.d_model
    body = config.num_layers * block_parameters + norm_parameters
    tables = table if config.tie_embeddings else 2 * table
    if config.embedding_norm:
        body += norm_parameters
    if config.token_shift:
        body += config.d_model
    parameters = body + position_parameters + tables
    if gradient_checkpointing:
        blocks_bytes = config.num_layers * stream_bytes + block_bytes
    else:
        blocks_bytes = config.num_layers * block_bytes
    # After the blocks: the last normalization keeps its input, the head its own.
    head_bytes = stream_bytes + stream_bytes * bytes_per_activation // FLOAT32_BYTES
    return Estimate(
        parameters=parameters,
        non_embedding_parameters=parameters - table - position_parameters,
        # The head multiplies, tied or not; looking up a token or a position does not.
        flops_per_token=6 * (body + table) + 12 * config.num_layers * config.d_model * time,
        weight_bytes=parameters * FLOAT32_BYTES,
        gradient_bytes=parameters * FLOAT32_BYTES,
        optimizer_bytes=parameters * FLOAT32_BYTES * optimizer_states,
        activation_bytes=blocks_bytes + head_bytes + logits_bytes(batch_size * time, vocab_size),
        late_activation_bytes=block_bytes + (bytes_per_activation * parameters if narrow else 0),
    )


def logits_bytes(num_tokens: int, vocab_size: int) -> int:
    """Return the bytes of logits, log-probabilities and their gradient, in float32."""
    return 3 * FLOAT32_BYTES * num_tokens * vocab_size


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept_bytes(forward: Callable[[], Tensor], modules: tuple[nn.Module, ...]) -> int:
    """Return the bytes that autograd keeps from a forward pass, the modules' tensors left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        # Views share a storage, and holding it keeps its address from being used again.
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())
