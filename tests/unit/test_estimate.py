"""The estimate against the model that it speaks of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fundamentallm.config import TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.estimate import estimate
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.models.transformer import Transformer

V, T = 50, 32


def config(**fields: Any) -> TransformerConfig:
    small = {"vocab_size": V, "sequence_length": T, "d_model": 64, "num_layers": 3, "num_heads": 4}
    return TransformerConfig(**{**small, **fields})


@pytest.mark.parametrize(
    ("normalization", "positions", "feedforward"),
    list(itertools.product(NORMALIZATIONS.names(), POSITIONS.names(), FEEDFORWARDS.names())),
)
def test_parameters_are_exact(normalization: str, positions: str, feedforward: str) -> None:
    tied = len(normalization + positions + feedforward) % 2 == 0  # each value, for each choice
    choice = config(
        normalization=normalization,
        positions=positions,
        feedforward=feedforward,
        tie_embeddings=tied,
        bias=tied,
        qk_norm=not tied,
        num_kv_heads=2,
        residual_mix=tied,
        embedding_norm=not tied,
        token_shift=not tied,
    )
    model, costs = Transformer(choice), estimate(choice)
    assert costs.parameters == model.num_parameters()
    assert costs.non_embedding_parameters == model.num_parameters(non_embedding=True)


def test_gpt2_has_its_published_size() -> None:
    gpt2 = TransformerConfig(
        vocab_size=50_257,
        sequence_length=1024,
        d_model=768,
        num_layers=12,
        num_heads=12,
        normalization="layernorm",
        positions="learned",
        feedforward="gelu",
        bias=True,
    )
    costs = estimate(gpt2, batch_size=8)
    assert costs.parameters == 124_439_808
    # 6 N + 12 L D T with N = 123.65 M (without positions).
    assert costs.flops_per_token == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", POSITIONS.names())
def test_flops_are_6_for_each_parameter_that_multiplies_and_attention(
    positions: str, tied: bool
) -> None:
    choice = config(positions=positions, tie_embeddings=tied)
    model = Transformer(choice)
    looked_up = sum(parameter.numel() for parameter in model.positions.parameters())
    if not tied:
        looked_up += model.token_embedding.weight.numel()
    multiplies = model.num_parameters() - looked_up
    for time in (T, 8):
        costs = estimate(choice, sequence_length=time)
        assert costs.flops_per_token == 6 * multiplies + 12 * 3 * 64 * time


def matrix_product_flops(model: Transformer, batch: int) -> int:
    """Count what the matrix products of a real forward and backward pass cost."""
    ids = torch.zeros(batch, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    return int(counter.get_total_flops())


def test_flops_agree_with_torchs_own_counter() -> None:
    choice = config(d_model=256, num_heads=2, vocab_size=500)
    counted = matrix_product_flops(Transformer(choice), batch=2) / (2 * T)
    # Torch counts 2 + 4 for a weight, and attention by its kernel.
    assert estimate(choice).flops_per_token == pytest.approx(counted, rel=0.05)


def kept_for_backward(model: Transformer, batch: int) -> int:
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(batch, T, dtype=torch.int64)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize(
    ("normalization", "feedforward"),
    [("layernorm", "gelu"), ("rmsnorm", "swiglu"), ("rmsnorm", "relu_squared")],
)
def test_activations_agree_with_what_autograd_keeps(
    normalization: str, feedforward: str, gradient_checkpointing: bool, dropout: float
) -> None:
    choice = config(
        normalization=normalization, feedforward=feedforward, dropout=dropout, num_layers=6
    )
    batch = 4
    model = Transformer(choice)
    model.gradient_checkpointing = gradient_checkpointing
    logits_bytes = batch * T * V * 4
    # The loss keeps the log-probabilities; the logits and their gradient live beside them.
    measured = kept_for_backward(model, batch) + 2 * logits_bytes
    if gradient_checkpointing:  # one block is computed again at a time
        model.gradient_checkpointing = False
        whole = kept_for_backward(model, batch)
        measured += (whole - logits_bytes) // 6
    costs = estimate(choice, batch_size=batch, gradient_checkpointing=gradient_checkpointing)
    assert costs.activation_bytes == pytest.approx(measured, rel=0.1)


def test_bytes_follow_the_parameters_and_the_precision() -> None:
    choice = config()
    costs = estimate(choice, batch_size=2)
    assert costs.weight_bytes == costs.gradient_bytes == 4 * costs.parameters
    assert costs.optimizer_bytes == 8 * costs.parameters
    assert estimate(choice, optimizer_states=0).optimizer_bytes == 0
    assert costs.total_bytes == 16 * costs.parameters + costs.activation_bytes
    # Narrow activations, not narrow weights: how many bytes is measured in test_fit.py.
    narrow = estimate(choice, batch_size=2, bytes_per_activation=2)
    assert narrow.weight_bytes == costs.weight_bytes
    assert narrow.activation_bytes < costs.activation_bytes


def test_a_model_that_no_machine_holds_is_answered_without_memory_or_random_numbers() -> None:
    before = torch.get_rng_state()
    assert estimate(config(num_layers=10**9)).parameters > 10**13
    assert estimate(config(vocab_size=10**15)).weight_bytes > 10**17
    assert estimate(config(sequence_length=10**12)).activation_bytes > 10**15
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("d_model", [2**33, 10**15])
def test_a_tensor_beyond_all_addresses_is_a_config_error(d_model: int) -> None:
    with pytest.raises(ConfigError, match="too large for any machine"):
        estimate(config(d_model=d_model, num_heads=1))


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens exceeds the context length of 32"):
        estimate(config(), sequence_length=33)


@pytest.mark.parametrize("field", ["vocab_size", "sequence_length"])
def test_a_size_that_is_not_known_yet_is_refused(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(config(**{field: None}))
    assert caught.value.key == field
