"""Documents packed apart: each is computed as if it stood alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.config import TransformerConfig
from fundamentallm.data.batch import Batch, Window, add_documents, as_batch
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.errors import ConfigError
from fundamentallm.models.layers.attention import own_document, places_in_documents
from fundamentallm.models.layers.positions import POSITIONS, Positions
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.evaluator import evaluate_batch
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss
from fundamentallm.training.recovery.diagnosis import StepReplayer

END = 0


def model(positions: str, **options: object) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=7,
        sequence_length=16,
        d_model=16,
        num_layers=2,
        num_heads=4,
        positions=positions,
        **options,
    )
    return Transformer(config).double().eval()


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@settings(max_examples=examples(20))
@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=16))
def test_a_packed_row_equals_its_documents_one_by_one(
    positions: str, num_kv_heads: int, ids: list[int]
) -> None:
    transformer = model(positions, num_kv_heads=num_kv_heads, token_shift=num_kv_heads == 2)
    if transformer.token_shift is not None:
        torch.nn.init.normal_(transformer.token_shift.weight)
    batch = add_documents({"input_ids": torch.tensor([ids, ids[::-1]])}, END)
    packed = transformer(batch["input_ids"], document_ids=batch["document_ids"])
    for row in range(2):
        tokens = batch["input_ids"][row].tolist()
        starts = [0] + [i for i, token in enumerate(tokens) if token == END and i]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            alone = transformer(torch.tensor([tokens[start:stop]]))[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-10, atol=1e-12)


def test_one_document_is_the_plain_forward_bit_for_bit_or_nearly() -> None:
    transformer = model("rotary")
    ids = torch.randint(1, 7, (3, 16))
    packed = transformer(ids, document_ids=torch.zeros_like(ids))
    torch.testing.assert_close(packed, transformer(ids), rtol=1e-12, atol=1e-12)


def test_gradients_and_checkpointing_agree() -> None:
    ids = torch.tensor([[1, 2, END, 3, 4, END, 5, 6]])
    documents = (ids == END).cumsum(dim=1)
    gradients = []
    for checkpointing in (False, True):
        transformer = model("learned").train()
        transformer.gradient_checkpointing = checkpointing
        transformer(ids, document_ids=documents).square().sum().backward()
        gradients.append([p.grad.clone() for p in transformer.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_drops_attention_weights_in_training_alone() -> None:
    transformer = model("rotary", dropout=0.5)
    ids = torch.tensor([[1, 2, END, 3]])
    documents = (ids == END).cumsum(dim=1)
    assert torch.equal(
        transformer(ids, document_ids=documents), transformer(ids, document_ids=documents)
    )
    transformer.train()
    assert not torch.equal(
        transformer(ids, document_ids=documents), transformer(ids, document_ids=documents)
    )


def test_the_mask_and_the_places() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
    assert places_in_documents(documents).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert own_document(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_positions_that_cannot_begin_anew_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POSITIONS, "_factories", dict(POSITIONS._factories))
    POSITIONS.register("none")(type("NoPositions", (Positions,), {}))
    transformer = model("none")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ConfigError, match=r"data\.packing"):
        transformer(ids, document_ids=torch.zeros_like(ids))


def test_loaders_number_the_documents_and_count_every_target() -> None:
    tokens = np.array([1, 2, END, 3, 4, 5, END, 6, END, 1, 2, 3, 4])
    (batch,) = ValidationLoader(tokens, Batching(6, 2), end_id=END)
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2]]
    assert (batch["target_ids"] >= 0).all()
    window = TokenWindowLoader(tokens, Batching(6, 2), end_id=END).window_at(0, 0)
    for micro in window.micro_batches:
        numbers = (micro["input_ids"] == END).cumsum(dim=1)
        # Where a row goes on at the beginning of the text, another document begins.
        joint = (micro["target_ids"][:, :-1] != micro["input_ids"][:, 1:]).cumsum(dim=1)
        numbers[:, 1:] += joint
        assert torch.equal(micro["document_ids"], numbers)
    assert window.num_tokens == window.micro_batches[0]["target_ids"].numel()
    assert (
        "document_ids"
        not in TokenWindowLoader(tokens, Batching(6, 2)).window_at(0, 0).micro_batches[0]
    )
    assert as_batch(batch)["document_ids"] is batch["document_ids"]


def test_a_step_tells_the_model_of_the_documents() -> None:
    transformer = model("rotary")
    ids = torch.tensor([[1, 2, END, 3, 4, 5]])
    batch = add_documents({"input_ids": ids[:, :-1], "target_ids": ids[:, 1:]}, END)
    nll, count, _ = evaluate_batch(transformer, batch, Precision("fp32", torch.device("cpu")))
    alone = [transformer(torch.tensor([part]))[0] for part in ([1, 2], [END, 3, 4])]
    expected = LanguageModelingLoss()(torch.cat(alone)[None], ids[:, 1:], reduction="sum")
    assert count == 5
    assert float(nll) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("loss_fn", [LanguageModelingLoss(), ChunkedCrossEntropy()])
def test_a_replay_keeps_documents_apart_as_the_step_does(loss_fn: LanguageModelingLoss) -> None:
    transformer = model("rotary", dropout=0.0)
    generator = np.random.default_rng(1)
    loader = TokenWindowLoader(generator.integers(0, 7, 200), Batching(16, 4), end_id=END)
    window = loader.window_at(0, 0)
    precision = Precision("fp32", torch.device("cpu"))
    replayer = StepReplayer(transformer, loss_fn, precision, Ranks())
    nll = evaluate_batch(transformer, window.micro_batches[0], precision)[0]
    replay = replayer.replay(window)
    assert replay.loss == pytest.approx(float(nll) / window.num_tokens, rel=1e-12)
    by_itself = max(
        (float(evaluate_batch(transformer, _row(window, row), precision)[0]), row)
        for row in range(4)
    )
    assert replayer.worst_rows(window, 1)[0].row == by_itself[1]
    for batch in window.micro_batches:
        del batch["document_ids"]
    assert replayer.replay(window).loss != pytest.approx(replay.loss, rel=1e-3)


def _row(window: Window, row: int) -> Batch:
    return {key: value[row : row + 1] for key, value in window.micro_batches[0].items()}
