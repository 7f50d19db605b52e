"""What a loss and an optimizer hold in memory, seen by running them on fake tensors.

Fake tensors have shapes and no memory. So the answer holds for whatever is registered, from a
plugin too, and no list of names says it.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fundamentallm.config.model import ModelConfig
from fundamentallm.config.training import TrainingConfig
from fundamentallm.models.build import build_model
from fundamentallm.models.calling import logits_of
from fundamentallm.training.losses import LOSSES, takes_hidden_states
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.step import summed_objective

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A loss in chunks has a step for each, so that the tokens of a large batch would take seconds.
_FEW_TOKENS = 4096


def loss_bytes(model: ModelConfig, training: TrainingConfig, num_tokens: int) -> int | None:
    """Return the most bytes that the head and the loss hold at once, forward and backward.

    The head's own gradient is left out. Beyond 8,192 tokens the bytes are a straight line through
    those of 4,096 and 8,192.

    Args:
        model: with `vocab_size` and `sequence_length` set.
        training: names the loss and the precision.
        num_tokens: B T, the tokens of a micro-batch.

    Returns:
        None where the model or the loss cannot be run on fake tensors.
    """
    if num_tokens <= 2 * _FEW_TOKENS:
        return _known(lambda: _loss_bytes(model, training, num_tokens), "loss")
    few = _known(lambda: _loss_bytes(model, training, _FEW_TOKENS), "loss")
    more = _known(lambda: _loss_bytes(model, training, 2 * _FEW_TOKENS), "loss")
    if few is None or more is None:
        return None
    return few + (more - few) * (num_tokens - _FEW_TOKENS) // _FEW_TOKENS


def optimizer_bytes(model: ModelConfig, training: TrainingConfig) -> tuple[int, int] | None:
    """Return the bytes of the optimizer's state, and the most that an update adds to it for a time.

    Both grow by the same for each block, so one and two blocks tell them for any number.

    Returns:
        None where the model or the optimizer cannot be run on fake tensors.
    """
    blocks = getattr(model, "num_layers", 1)
    if blocks <= 2:
        return _known(lambda: _optimizer_bytes(model, training), "optimizer")
    shorter, short = (model.model_copy(update={"num_layers": number}) for number in (1, 2))
    one = _known(lambda: _optimizer_bytes(shorter, training), "optimizer")
    two = _known(lambda: _optimizer_bytes(short, training), "optimizer")
    if one is None or two is None:
        return None
    return one[0] + (two[0] - one[0]) * (blocks - 1), one[1] + (two[1] - one[1]) * (blocks - 1)


def _loss_bytes(config: ModelConfig, training: TrainingConfig, num_tokens: int) -> int:
    if getattr(config, "num_layers", 1) > 1:
        config = config.model_copy(update={"num_layers": 1})
    narrow = training.precision in ("bf16", "fp16")
    with FakeTensorMode():
        model = build_model(config)
        loss_fn = LOSSES.build(training.loss.name, training.loss.options)
        head = getattr(model, "logits_from_hidden", None)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            given = logits_of(model(ids)) if head is None else model(ids, return_hidden=True)
        inputs = torch.empty(1, num_tokens, given.shape[-1], requires_grad=True)
        targets = torch.zeros(1, num_tokens, dtype=torch.int64)
        # The logits of a model without a head of its own are as large as a copy.
        to_logits = head or torch.clone
        peak = _Peak()
        with peak:
            with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
                states = inputs if takes_hidden_states(loss_fn) else to_logits(inputs)
                objective = summed_objective(states, model, targets, loss_fn)
            del states
            objective.backward()  # type: ignore[no-untyped-call]
        return peak.most - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def _optimizer_bytes(config: ModelConfig, training: TrainingConfig) -> tuple[int, int]:
    with FakeTensorMode():
        model = build_model(config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer = OptimizerBuilder.from_config(training, model)
        with _Peak() as peak:
            optimizer.step()
        kept = {
            value.untyped_storage()._cdata: value.untyped_storage().nbytes()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
    state = sum(kept.values())
    return state, max(0, peak.most - state)


def _known(count: Callable[[], T], what: str) -> T | None:
    try:
        return count()
    except Exception as error:  # a plugin may read values, which fake tensors lack
        logger.debug("the memory of the %s is not known: %s", what, error)
        return None


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make; each counts until it is freed.

    Attributes:
        most: bytes that were there at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        out = func(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self._note(made.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._freed, address)

    def _freed(self, address: int) -> None:
        self._now -= self._alive.pop(address)
