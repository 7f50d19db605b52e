"""Replays of a step: how much they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.compute.rng import capture_generators
from fundamentallm.config import TransformerConfig
from fundamentallm.data.batch import Window
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss
from fundamentallm.training.recovery.diagnosis import StepReplayer

CPU = torch.device("cpu")
ROWS, TIME, VOCABULARY = 4, 16, 500


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        TransformerConfig(
            vocab_size=VOCABULARY, sequence_length=TIME, d_model=8, num_layers=1, num_heads=1
        )
    )


def window() -> Window:
    ids = torch.randint(VOCABULARY, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, 0] = -100
    return Window([{"input_ids": ids[:, :-1], "target_ids": targets}], ROWS * TIME - 1)


def replayer(loss_fn) -> StepReplayer:
    return StepReplayer(transformer(), loss_fn, Precision("fp32", CPU), Ranks())


LOOKS = {
    "worst_rows": lambda replayer: replayer.worst_rows(window()),
    "bad_rows": lambda replayer: replayer._first_bad_position(window().micro_batches[0]),
    "replay": lambda replayer: replayer.replay(window(), watch=True),
    "diagnose": lambda replayer: replayer.diagnose(window(), capture_generators(CPU), None, None),
}


@pytest.mark.parametrize("look", LOOKS)
def test_no_tensor_of_all_logits_is_made_where_the_loss_avoids_them(look):
    def largest(loss_fn) -> int:
        with LargestTensor() as recorder:
            LOOKS[look](replayer(loss_fn))
        return recorder.numel

    # The table of embeddings has 8 times 500 numbers, as a chunk's logits have.
    assert largest(ChunkedCrossEntropy(chunk_tokens=8)) == 8 * VOCABULARY
    assert largest(LanguageModelingLoss()) == ROWS * TIME * VOCABULARY


def test_the_worst_rows_are_those_of_the_plain_likelihood_whatever_the_objective():
    model, batch = transformer(), window().micro_batches[0]
    losses = torch.nn.functional.cross_entropy(
        model(batch["input_ids"]).transpose(1, 2), batch["target_ids"], reduction="none"
    )
    expected = losses.mean(1).argsort(descending=True).tolist()
    for loss_fn in (
        LanguageModelingLoss(label_smoothing=0.3),
        ChunkedCrossEntropy(8, label_smoothing=0.3, z_loss=0.1),
    ):
        rows = replayer(loss_fn).worst_rows(window(), ROWS)
        assert [place.row for place in rows] == expected
        assert [place.position for place in rows] == losses[expected].argmax(1).tolist()
