"""Models that are called as those of `transformers` are, without it; the real ones are in
`tests/integration/test_transformers_models.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config import TrainingConfig
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.models.calling import (
    check_model,
    context_of,
    inputs_for,
    logits_of,
    recompute_activations,
)
from fundamentallm.models.generation.batch import generate_tokens
from fundamentallm.models.generation.sampling import SamplingRules
from fundamentallm.testing import tiny_model
from fundamentallm.training import evaluator, step
from fundamentallm.training.losses import ChunkedCrossEntropy
from fundamentallm.training.trainer import Trainer

V = 11


class Foreign(nn.Module):
    """A causal model with the manners of `transformers`: keywords, `.logits`, its own loss."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.inner = tiny_model(V, 8)
        known = {"is_encoder_decoder": False, "max_position_embeddings": 8}
        self.config = SimpleNamespace(**{**known, **config})
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> SimpleNamespace:
        self.calls.append({"attention_mask": attention_mask, "use_cache": use_cache, **kwargs})
        logits = self.inner(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def rows(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Return rows of some lengths, padded at the right, as a collator of causal models does."""
    ids = torch.randint(1, V, (len(lengths), 8), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_a_step_has_the_models_own_loss_and_gradient() -> None:
    batch = rows([8, 5, 3])
    model = Foreign()
    loss = model(**batch).loss
    loss.backward()
    own = loss.item()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = Trainer(
        model,
        [batch],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        device="cpu",
        config=TrainingConfig(max_grad_norm=None, total_steps=1, warmup_steps=0),
    )
    trainer.run()
    assert trainer.state.output.loss == pytest.approx(own, rel=1e-6)
    assert trainer.state.output.num_tokens == 7 + 4 + 2
    assert trainer.tokens_computed == 24
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.5 * gradient)
    assert torch.equal(model.calls[-1]["attention_mask"], batch["attention_mask"])
    assert model.calls[-1]["use_cache"] is False


def test_a_window_weights_its_batches_by_their_tokens() -> None:
    batches = [rows([8, 8, 8]), rows([3, 2, 2], seed=1)]
    model = Foreign()
    with torch.no_grad():
        first, second = (float(model(**batch).loss) for batch in batches)
    config = TrainingConfig(accumulation_steps=2, total_steps=1, warmup_steps=0)
    trainer = Trainer(model, batches, batches, device="cpu", config=config)
    measured = trainer.validate()["val/loss"]
    trainer.run()
    expected = (21 * first + 4 * second) / 25
    assert trainer.state.output.loss == pytest.approx(expected, rel=1e-6)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_a_model_without_a_mask_takes_padding_at_the_right_alone() -> None:
    model = tiny_model(V, 8)
    batch = rows([8, 5])
    assert inputs_for(model, batch) == {}
    flipped = batch["attention_mask"].flip(1)
    for mask in (flipped, flipped.bool()):
        with pytest.raises(DataError, match=r"(?s)attention_mask.*padding_side = 'right'"):
            inputs_for(model, {"attention_mask": mask})
    inputs_for(model, {"attention_mask": batch["attention_mask"].bool()})


def test_packed_positions_need_a_model_that_takes_them() -> None:
    model = tiny_model(V, 8)
    assert inputs_for(model, {"position_ids": torch.arange(4)[None]}) == {}
    packed = {"position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(DataError, match="position_ids"):
        inputs_for(model, packed)
    assert inputs_for(Foreign(), packed)["position_ids"] is packed["position_ids"]


def test_a_model_of_our_own_is_called_with_the_ids_alone() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert inputs_for(tiny_model(V, 8), {"input_ids": ids, "target_ids": ids}) == {}


@pytest.mark.parametrize("output", [(torch.zeros(1), None), SimpleNamespace(last_hidden_state=1)])
def test_an_output_without_logits_is_refused(output: Any) -> None:
    with pytest.raises(ConfigError, match="no logits"):
        logits_of(output)


@pytest.mark.parametrize(
    ("attributes", "config", "told"),
    [
        ({"loss_type": "ForMaskedLM"}, {}, "next token"),
        ({}, {"is_encoder_decoder": True}, "two texts"),
        ({}, {"output_router_logits": True}, "output_router_logits = False"),
    ],
)
def test_a_model_with_another_task_is_refused(
    attributes: dict[str, Any], config: dict[str, Any], told: str
) -> None:
    model = Foreign(**config)
    for name, value in attributes.items():
        setattr(model, name, value)
    with pytest.raises(ConfigError, match=told):
        Trainer(model, [rows([8])], device="cpu")


def test_a_loss_of_hidden_states_needs_a_head() -> None:
    with pytest.raises(ConfigError, match="logits_from_hidden"):
        Trainer(Foreign(), [rows([8])], loss_fn=ChunkedCrossEntropy(), device="cpu")
    check_model(tiny_model(V, 8), hidden_states=True)


def test_it_generates_what_its_logits_say() -> None:
    model = Foreign().eval()
    assert context_of(model) == 8
    rules = SamplingRules(temperature=0)
    theirs = list(generate_tokens(model, [[1, 2, 3]], 12, rules))
    ours = list(generate_tokens(model.inner, [[1, 2, 3]], 12, rules, use_cache=False))
    assert torch.equal(torch.stack(theirs), torch.stack(ours))
    assert model.calls[-1]["use_cache"] is False


def test_activations_are_recomputed_the_models_own_way() -> None:
    class Theirs(nn.Module):
        def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
            self.options = options

    theirs = Theirs()
    recompute_activations(theirs)
    assert theirs.options == {"use_reentrant": False}
    ours = tiny_model(V, 8)
    recompute_activations(ours)
    assert ours.gradient_checkpointing is True
    with pytest.raises(ConfigError, match="recompute"):
        recompute_activations(nn.Linear(1, 1))


def test_a_mask_without_use_is_read_before_the_batch_goes_to_a_device(monkeypatch, tmp_path):
    sent = []

    def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        sent.append(set(batch))
        return batch

    def trainer(model: nn.Module, batch: dict[str, Tensor]) -> Trainer:
        place = str(tmp_path / str(len(sent)))
        config = TrainingConfig(total_steps=1, warmup_steps=0, checkpoint_dir=place)
        return Trainer(model, [batch], [batch], device="cpu", config=config)

    monkeypatch.setattr(step, "to_device", to_device)
    monkeypatch.setattr(evaluator, "to_device", to_device)
    batch = rows([8, 5])
    trainer(tiny_model(V, 8), batch).train()  # a step and an evaluation
    trainer(Foreign(), batch).train()
    plain = {"input_ids", "target_ids"}
    taken = plain | {"attention_mask"}
    assert sent == [plain, plain, taken, taken]
    flipped = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    refusing = trainer(tiny_model(V, 8), flipped)
    with pytest.raises(DataError, match="padding_side"):
        refusing.train()
