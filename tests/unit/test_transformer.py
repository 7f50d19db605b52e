"""The whole model against NumPy in float64, its laws, and the weights that it starts with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor, nn

from fundamentallm.config import TransformerConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.components import check_components
from fundamentallm.models.layers.feedforward import FEEDFORWARDS
from fundamentallm.models.layers.normalization import NORMALIZATIONS
from fundamentallm.models.layers.positions import POSITIONS
from fundamentallm.models.transformer import Transformer

V, T = 13, 9

CHOICES = [
    {"normalization": norm, "positions": positions, "feedforward": feedforward}
    for norm, positions, feedforward in itertools.product(
        NORMALIZATIONS.names(), POSITIONS.names(), FEEDFORWARDS.names()
    )
]
# All flags off, and each pair of values for each pair of flags (Plackett and Burman 1946).
FLAGS = [
    {
        **{"bias": a, "qk_norm": b, "tie_embeddings": c, "num_kv_heads": d, "logit_softcap": e},
        **{"residual_mix": f, "embedding_norm": g, "token_shift": h},
    }
    for a, b, c, d, e, f, g, h in [
        (False, False, False, None, None, False, False, False),
        (True, True, False, 2, 5.0, True, False, False),
        (False, True, True, None, 5.0, True, True, False),
        (True, False, True, 2, None, True, True, True),
        (False, True, False, 2, 5.0, False, True, True),
        (False, False, True, None, 5.0, True, False, True),
        (False, False, False, 2, None, True, True, False),
        (True, False, False, None, 5.0, False, True, True),
        (True, True, False, None, None, True, False, True),
        (True, True, True, None, None, False, True, False),
        (False, True, True, 2, None, False, False, True),
        (True, False, True, 2, 5.0, False, False, False),
    ]
]
IDS = ["-".join(choice.values()) for choice in CHOICES]


def config(**fields: Any) -> TransformerConfig:
    small = {"vocab_size": V, "sequence_length": T, "d_model": 16, "num_layers": 2, "num_heads": 4}
    return TransformerConfig(**{**small, **fields})


def model(seed: int = 0, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config(**fields))


def tokens(batch: int = 2, time: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class NaiveTransformer:
    """The model written again, one sequence and one position at a time, over named arrays."""

    def __init__(self, config: TransformerConfig, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.weights = weights

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = np.array([row @ x for row in self.weights[f"{name}.weight"]])
        return y + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.config.normalization.name == "rmsnorm":
            return self.rms_norm(name, x)
        y = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return y * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0.0)

    def rms_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-5) * self.weights[f"{name}.weight"]

    def embed(self, t: int, token: int) -> np.ndarray:
        x = self.weights["token_embedding.weight"][token].copy()
        kind, width = self.config.positions.name, self.config.d_model
        if kind == "learned":
            x += self.weights["positions.table.weight"][t]
        elif kind == "sinusoidal":
            for i in range(0, width, 2):
                angle = t / 10_000 ** (i / width)
                x[i : i + 2] += 0.02 * np.array([np.sin(angle), np.cos(angle)])
        return x

    def head_vectors(self, name: str, norm: str | None, t: int, x: np.ndarray) -> list[np.ndarray]:
        width = self.config.d_model // self.config.num_heads
        heads = np.split(self.linear(name, x), len(self.weights[f"{name}.weight"]) // width)
        if norm is None:
            return heads
        if self.config.qk_norm:
            heads = [self.rms_norm(norm, head) for head in heads]
        if self.config.positions.name == "rotary":
            half = width // 2
            turns = np.exp(1j * t * 10_000.0 ** (-2 * np.arange(half) / width))
            turned = [(head[:half] + 1j * head[half:]) * turns for head in heads]
            heads = [np.concatenate((pairs.real, pairs.imag)) for pairs in turned]
        return heads

    def attention(self, name: str, rows: list[np.ndarray]) -> list[np.ndarray]:
        queries, keys = (
            [self.head_vectors(f"{name}.{q}", f"{name}.{q}_norm", t, x) for t, x in enumerate(rows)]
            for q in ("query", "key")
        )
        values = [self.head_vectors(f"{name}.value", None, t, x) for t, x in enumerate(rows)]
        num_heads, num_keys = self.config.num_heads, len(keys[0])
        out = []
        for t in range(len(rows)):
            mixed = []
            for h in range(num_heads):
                g = h * num_keys // num_heads
                query = queries[t][h]
                scores = [query @ keys[s][g] / math.sqrt(len(query)) for s in range(t + 1)]
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(weights[s] * values[s][g] for s in range(t + 1)))
            out.append(self.linear(f"{name}.output", np.concatenate(mixed)))
        return out

    def feedforward(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = self.linear(f"{name}.input", x)
        if self.config.feedforward.name == "gelu":
            hidden = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in hidden])
        elif self.config.feedforward.name == "relu_squared":
            hidden = np.maximum(hidden, 0) ** 2
        else:
            gate = self.linear(f"{name}.gate", x)
            hidden = gate / (1 + np.exp(-gate)) * hidden
        return self.linear(f"{name}.output", hidden)

    def logits(self, sequence: list[int]) -> np.ndarray:
        rows = [self.embed(t, token) for t, token in enumerate(sequence)]
        if self.config.embedding_norm:
            rows = [self.norm("embedding_norm", x) for x in rows]
        if self.config.token_shift:
            share = self.weights["token_shift.weight"]
            rows = [x + share * y for x, y in zip(rows, [0 * rows[0], *rows[:-1]], strict=True)]
        embedded = rows
        for layer in range(self.config.num_layers):
            block = f"blocks.{layer}"
            if self.config.residual_mix:
                a, b = self.weights[f"{block}.residual_mix.weights"]
                rows = [a * x + b * x0 for x, x0 in zip(rows, embedded, strict=True)]
            normed = [self.norm(f"{block}.attention_norm", x) for x in rows]
            branch = self.attention(f"{block}.attention", normed)
            rows = [x + y for x, y in zip(rows, branch, strict=True)]
            normed = [self.norm(f"{block}.feedforward_norm", x) for x in rows]
            branch = [self.feedforward(f"{block}.feedforward", x) for x in normed]
            rows = [x + y for x, y in zip(rows, branch, strict=True)]
        out = np.array([self.linear("head", self.norm("norm", x)) for x in rows])
        cap = self.config.logit_softcap
        return out if cap is None else cap * np.tanh(out / cap)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_the_model_equals_the_naive_one(choice: dict[str, str], flags: dict[str, Any]) -> None:
    transformer = model(**choice, **flags)
    with torch.no_grad():
        for parameter in transformer.parameters():  # gains and biases that show, logits that bend
            parameter += 0.3 * torch.randn_like(parameter)
    weights = {name: value.numpy() for name, value in transformer.state_dict().items()}
    naive = NaiveTransformer(transformer.config, weights)
    ids = tokens(batch=2, time=6)
    expected = np.stack([naive.logits(sequence) for sequence in ids.tolist()])
    actual = transformer(ids).detach().numpy()
    assert actual.shape == (2, 6, V)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
@given(changed=st.integers(0, T - 1), new=st.integers(0, V - 1), seed=st.integers(0, 50))
@settings(max_examples=examples(10))
def test_changing_a_token_leaves_the_logits_before_it_unchanged(
    choice: dict[str, str], changed: int, new: int, seed: int
) -> None:
    transformer = model(**choice).eval()
    ids = tokens(seed=seed)
    other = ids.clone()
    other[:, changed] = new
    before, after = transformer(ids), transformer(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    rows_differ = ids[:, changed] != new
    assert not torch.equal(before[rows_differ][:, changed], after[rows_differ][:, changed]) or (
        not rows_differ.any()
    )


@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[3], FLAGS[7]])
@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_every_parameter_gets_a_gradient(choice: dict[str, str], flags: dict[str, Any]) -> None:
    transformer = model(**choice, **flags)
    transformer(tokens()).square().sum().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None, name
        # Softmax does not see what all keys share.
        if not name.endswith("attention.key.bias") or choice["positions"] == "rotary":
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_the_first_loss_is_that_of_knowing_nothing(choice: dict[str, str], tied: bool) -> None:
    vocab_size = 65
    transformer = model(
        **choice,
        vocab_size=vocab_size,
        d_model=128,
        num_layers=4,
        sequence_length=64,
        tie_embeddings=tied,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (16, 65), generator=generator)
    with torch.no_grad():
        logits = transformer(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(vocab_size), rel=0.02)


def test_a_tiny_vocabulary_starts_near_its_logarithm_too() -> None:
    # With 0.02 for all weights the default model starts 10 % above.
    transformer = model(vocab_size=10, d_model=128, num_layers=4, sequence_length=64)
    ids = torch.randint(10, (16, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = transformer(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(10), rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_with_the_documented_spread(tied: bool) -> None:
    transformer = model(
        d_model=192,
        num_layers=8,
        vocab_size=500,
        sequence_length=100,
        positions="learned",
        tie_embeddings=tied,
        bias=True,
        normalization="layernorm",
    )
    linear = 0.02 * math.sqrt(768 / 192)
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "norm" in name:
            assert torch.all(parameter == 1), name
        else:
            residual = name.endswith("output.weight")
            table = name.startswith(("token_embedding", "positions", "head"))
            expected = 0.02 if table else linear / math.sqrt(16) if residual else linear
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < expected * 0.05, name


@pytest.mark.parametrize("tied", [True, False])
def test_zero_init_begins_with_blocks_that_add_nothing(tied: bool) -> None:
    plain, zeros = model(tie_embeddings=tied), model(tie_embeddings=tied, zero_init=True)
    for name, value in zeros.state_dict().items():
        if name.endswith("output.weight") or (name == "head.weight" and not tied):
            assert torch.all(value == 0), name
        else:  # the other draws are those of the same seed
            assert torch.equal(value, plain.state_dict()[name]), name
    x = torch.randn(2, T, 16)
    assert torch.equal(zeros.blocks[0](x, zeros.positions, x), x)
    if not tied:
        assert torch.all(zeros(tokens()) == 0)


def test_a_residual_mix_begins_as_the_stream_alone() -> None:
    plain, mixed = model(), model(residual_mix=True)
    assert torch.equal(plain(tokens()), mixed(tokens()))
    assert mixed.num_parameters() - plain.num_parameters() == 2 * 2


def test_the_seed_decides_the_weights() -> None:
    first, again, other = model(seed=1), model(seed=1), model(seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_tying_shares_one_parameter_between_embedding_and_head() -> None:
    tied, untied = model(tie_embeddings=True), model(tie_embeddings=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == V * 16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", POSITIONS.names())
def test_parameters_are_counted_once_and_tables_left_out(positions: str, tied: bool) -> None:
    transformer = model(positions=positions, tie_embeddings=tied)
    total = sum(value.numel() for value in dict(transformer.named_parameters()).values())
    tables = V * 16 + (T * 16 if positions == "learned" else 0)
    assert transformer.num_parameters() == total
    assert transformer.num_parameters(non_embedding=True) == total - tables


def test_hidden_states_and_head_make_the_logits() -> None:
    transformer, ids = model(logit_softcap=0.05), tokens()
    hidden = transformer(ids, return_hidden=True)
    assert hidden.shape == (2, T, 16)
    assert torch.equal(transformer.logits_from_hidden(hidden), transformer(ids))


def test_the_softcap_bounds_the_logits_and_keeps_small_ones() -> None:
    capped, free = model(logit_softcap=2.0), model()
    with torch.no_grad():
        small = 1e-3 * torch.randn(5, 16)
        torch.testing.assert_close(
            capped.logits_from_hidden(small), free.logits_from_hidden(small), rtol=1e-4, atol=1e-9
        )
        assert free.logits_from_hidden(small * 1e7).abs().max() > 2
        assert capped.logits_from_hidden(small * 1e7).abs().max() <= 2


def gradients(transformer: Transformer, ids: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    torch.manual_seed(3)  # dropout
    F.cross_entropy(transformer(ids).flatten(0, 1), ids.flatten()).backward()
    return {
        name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("choice", CHOICES[::5], ids=IDS[::5])
def test_gradient_checkpointing_changes_no_gradient(
    choice: dict[str, str], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, ids = model(dropout=dropout, residual_mix=True, **choice), tokens()
    calls = 0
    attention_forward = type(transformer.blocks[0]).forward

    def counted(self: nn.Module, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return attention_forward(self, *args)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(transformer.blocks[0]), "forward", counted)
    expected = gradients(transformer, ids)
    assert calls == 2
    transformer.gradient_checkpointing = True
    actual = gradients(transformer, ids)
    assert calls == 2 + 4  # each block once more in the backward pass
    assert actual.keys() == expected.keys() == dict(transformer.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_gradient_checkpointing_without_gradients_is_a_plain_forward() -> None:
    transformer, ids = model().eval(), tokens()
    with torch.no_grad():
        expected = transformer(ids)
        transformer.gradient_checkpointing = True
        assert torch.equal(transformer(ids), expected)


@pytest.mark.parametrize("choice", CHOICES[::4], ids=IDS[::4])
def test_dropout_acts_in_training_only(choice: dict[str, str]) -> None:
    transformer, ids = model(dropout=0.3, **choice), tokens()
    assert not torch.equal(transformer(ids), transformer(ids))
    transformer.eval()
    assert torch.equal(transformer(ids), transformer(ids))
    plain = model(**choice).eval()
    plain.load_state_dict(transformer.state_dict())
    assert torch.equal(transformer(ids), plain(ids))


def test_each_place_of_dropout_drops() -> None:
    transformer, ids = model(dropout=0.3), tokens()
    first, second = transformer.blocks
    awake = {
        "embeddings": transformer.dropout,
        "attention weights": first.attention,
        "what attention adds": first.dropout,
        "what the feed-forward adds": second.dropout,
    }
    with torch.no_grad():
        # Each of these blocks has one branch left.
        first.feedforward.output.weight.zero_()
        second.attention.output.weight.zero_()
        for place, module in awake.items():
            transformer.eval()
            assert torch.equal(transformer(ids), transformer(ids))
            module.train()
            assert not torch.equal(transformer(ids), transformer(ids)), place


@pytest.mark.parametrize("positions", POSITIONS.names())
@pytest.mark.parametrize("time", [1, T])
def test_one_token_and_a_full_context_are_read(positions: str, time: int) -> None:
    assert model(positions=positions)(tokens(time=time)).shape == (2, time, V)


@pytest.mark.parametrize("positions", POSITIONS.names())
def test_an_input_longer_than_the_context_is_refused(positions: str) -> None:
    with pytest.raises(ValueError, match=f"{T + 1} tokens, the context length is {T}"):
        model(positions=positions)(tokens(time=T + 1))


def test_an_input_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, time\), got \(9,\)"):
        model()(tokens()[0])


@pytest.mark.parametrize("field", ["vocab_size", "sequence_length"])
def test_a_size_that_is_not_known_yet_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"the model needs a {field}") as caught:
        Transformer(config(**{field: None}))
    assert caught.value.key == field


@pytest.mark.parametrize(
    ("fields", "key", "message"),
    [
        ({"normalization": "rmsnrom"}, "normalization", "did you mean 'rmsnorm'"),
        ({"positions": "rotery"}, "positions", "did you mean 'rotary'"),
        ({"feedforward": "swiglue"}, "feedforward", "did you mean 'swiglu'"),
        ({"normalization": {"name": "rmsnorm", "esp": 1}}, "normalization.esp", "no option 'esp'"),
        ({"positions": {"name": "rotary", "base": 0.5}}, "positions.base", "above 1"),
        ({"positions": {"name": "rotary", "width": 5}}, "positions.width", "no option 'width'"),
        ({"feedforward": {"name": "gelu", "approximate": 1}}, "feedforward.approximate", "gelu"),
    ],
)
def test_a_wrong_component_names_its_key(fields: dict[str, Any], key: str, message: str) -> None:
    for build in (Transformer, check_components):
        with pytest.raises(ConfigError, match=message) as caught:
            build(config(**fields))
        assert caught.value.key == key


def test_components_are_checked_before_the_data_is_known() -> None:
    before = torch.get_rng_state()
    check_components(config(vocab_size=None, sequence_length=None, d_model=2**20))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="too large for any machine") as caught:
        check_components(config(d_model=2**40))
    assert caught.value.key == "d_model"


@pytest.mark.parametrize("choice", CHOICES[::3], ids=IDS[::3])
def test_bfloat16_autocast_stays_near_float32(choice: dict[str, str]) -> None:
    transformer, ids = model(qk_norm=True, **choice), tokens()
    with torch.no_grad():
        expected = transformer(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = transformer(ids)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.02)


def test_a_model_learns_to_copy_the_token_before() -> None:
    transformer = model(d_model=32)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    for step in range(80):
        ids = tokens(batch=16, seed=step)
        loss = F.cross_entropy(transformer(ids)[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
