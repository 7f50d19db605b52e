"""The captured state is the whole state: spoil everything, restore, and go on bitwise."""

from __future__ import annotations

import copy
import logging
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import CheckpointError
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.finite import bit_sum
from fundamentallm.training.handlers import (
    AdaptiveClip,
    Checkpointing,
    EarlyStopping,
    Evaluation,
    LossEMA,
    NaNRollback,
    Perplexity,
    Schedule,
    Spikes,
    WeightEMA,
)
from fundamentallm.training.limits import Limits
from fundamentallm.training.schedulers import LinearWarmup
from fundamentallm.training.trainer import Trainer


def make_trainer(**options: Any) -> Trainer:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    train, val = tiny_loaders()
    trainer = Trainer(
        tiny_model(dropout=0.2, **options),
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=5, eval_steps=2, learning_rate=1e-2),
        handlers=[
            LossEMA(0.8),
            Perplexity(),
            WeightEMA(0.9),
            Evaluation(),
            EarlyStopping(patience=50),
            NaNRollback(),
        ],
    )
    trainer.interventions.skip({3, 8})
    Schedule(LinearWarmup(trainer.optimizer, warmup_steps=20)).attach(trainer)
    trainer.run()
    return trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """A state that later steps cannot reach: a checkpoint packs it at once."""
    return copy.deepcopy(snapshot.capture(trainer))


def go_on(trainer: Trainer, to: int) -> dict[str, Any]:
    """Train on; return everything that the steps have brought about."""
    trainer.budget.limits = Limits(to)
    trainer.history.cut_back(0)
    trainer.budget.clock = lambda: 0.0
    trainer.run()
    return {
        "state": capture(trainer),
        "losses": trainer.history.train_loss,
        "validations": trainer.history.validations,
        "python": random.random(),
        "numpy": float(np.random.rand()),
    }


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other), path
    else:
        assert one == other, path


def spoil(trainer: Trainer) -> None:
    """NaN into every tensor, nonsense into every number and generator."""
    with torch.no_grad():
        for tensor in trainer.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    for state in trainer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.fill_(math.nan)
    for group in trainer.optimizer.param_groups:
        group["lr"] = math.nan
        group["weight_decay"] = 77.0
    for handler in trainer.attached.values():
        for name, value in vars(handler).items():
            if isinstance(value, (int, float)) and name in handler.state_dict():
                setattr(handler, name, 0 if isinstance(value, int) else math.nan)
    for average in trainer.attached["weight_ema"].averages.values():
        average.fill_(math.nan)
    trainer.state.iteration = 0
    trainer.state.tokens_seen = trainer.state.optimizer_steps = trainer.state.evaluations = 0
    trainer.state.epoch_nll, trainer.state.epoch_tokens = math.nan, 0
    trainer.interventions.skip({1})
    trainer.run_id = "another"
    trainer.model.eval()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_restores_a_spoilt_trainer_to_the_same_next_steps():
    reference = make_trainer()
    run_id = reference.run_id
    expected = go_on(reference, to=12)

    trainer = make_trainer()
    trainer.run_id = run_id
    trainer.budget.clock = lambda: 0.0
    state = capture(trainer)
    spoil(trainer)
    snapshot.restore(trainer, state)
    assert_same(capture(trainer), state)
    actual = go_on(trainer, to=12)
    assert len(actual["losses"]) == 7
    assert math.isnan(actual["losses"][2])  # step 8 is in the ledger
    for tree in (expected, actual):
        tree["state"]["trainer"].pop("elapsed_before")  # of real seconds
    assert_same(actual, expected)


def test_restores_into_a_fresh_trainer():
    trainer = make_trainer()
    state = capture(trainer)
    fresh = make_trainer()
    spoil(fresh)
    snapshot.restore(fresh, state)
    assert fresh.run_id == trainer.run_id
    assert fresh.interventions.skipped == {3, 8}
    for (name, a), b in zip(
        fresh.model.named_parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_holds_what_its_drawing_says():
    trainer = make_trainer()
    state = capture(trainer)
    assert {"trainer", "model", "optimizer", "precision", "random", "handlers"} <= state.keys()
    assert "foreign" not in state  # no handler of Ignite is attached
    assert state["handlers"].keys() == {
        "schedule",
        "loss_ema",
        "perplexity",
        "weight_ema",
        "early_stopping",
        "nan_rollback",
    }
    assert state["trainer"]["iteration"] == 5
    assert state["trainer"]["ledger"] == {"skipped": [3, 8], "cuts": []}


def test_a_state_of_another_model_changes_nothing():
    state = capture(make_trainer(d_model=32))
    trainer = make_trainer()
    trainer.budget.clock = lambda: 0.0
    before = capture(trainer)
    with pytest.raises(CheckpointError):
        snapshot.restore(trainer, state)
    assert_same(capture(trainer), before)


def set_loss_scale(state: dict[str, Any]) -> None:
    state["precision"] = {"scale": 1024.0}  # of fp16


def set_nan(state: dict[str, Any]) -> None:
    state["model"]["token_embedding.weight"][0] = math.nan


def widen(state: dict[str, Any]) -> None:
    name = "token_embedding.weight"
    state["model"][name] = state["model"][name].double()


def cut_a_moment(state: dict[str, Any]) -> None:
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"][:1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_loss_scale, "another precision"),
        (set_nan, "not finite"),
        (widen, "another model"),
        (cut_a_moment, "'exp_avg' of another shape"),
        (lambda state: state["handlers"].update(loss_ema=None), "everything is as it was"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, says):
    trainer = make_trainer()
    trainer.budget.clock = lambda: 0.0
    before = capture(trainer)
    state = capture(trainer)
    state["model"]["token_embedding.weight"][1] = 9.0  # it fits, and may be loaded first
    change(state)
    with pytest.raises(CheckpointError) as caught:
        snapshot.restore(trainer, state)
    assert says in caught.value.what
    assert_same(capture(trainer), before)


def test_a_refused_state_leaves_the_seconds_of_earlier_processes():
    state = capture(make_trainer(d_model=32))
    trainer = make_trainer()
    trainer.state.elapsed_before = 40.0
    trainer.budget.clock = lambda: 7.0
    with pytest.raises(CheckpointError):
        snapshot.restore(trainer, state)
    # 47 would count the 7 seconds of this process twice.
    assert trainer.state.elapsed_before == 40.0
    assert trainer.budget.elapsed_seconds() == 47.0


def test_handlers_that_one_side_does_not_know_are_named(caplog):
    trainer = make_trainer()
    state = capture(trainer)
    state["handlers"]["mystery"] = {"x": 1}
    del state["handlers"]["loss_ema"]
    trainer.attached["loss_ema"].count = 99
    with caplog.at_level(logging.WARNING, "fundamentallm"):
        snapshot.restore(trainer, state)
    assert "no state of the handler 'loss_ema'" in caplog.text
    assert "handler 'mystery' is not attached" in caplog.text
    assert trainer.attached["loss_ema"].count == 99


def drawn(rank: int, world_size: int, state: dict) -> torch.Tensor:
    """What a rank draws after a state was loaded, whatever it was in before."""
    torch.manual_seed(123 + rank)
    snapshot.RandomState(Ranks(rank, world_size)).load_state_dict(state)
    return torch.rand(8)


def test_the_random_numbers_of_another_number_of_ranks_are_told(caplog):
    state = snapshot.RandomState(Ranks()).state_dict()
    with caplog.at_level(logging.INFO, "fundamentallm"):
        drawn(0, 1, state)
        drawn(1, 2, state)
        assert caplog.text == ""
        drawn(0, 2, state)
    assert "the random numbers were those of 1 rank and are now of 2: dropout" in caplog.text


def test_a_new_rank_draws_what_follows_from_the_state_and_its_number():
    torch.manual_seed(7)
    state = snapshot.RandomState(Ranks()).state_dict()
    goes_on = torch.rand(8)
    assert torch.equal(drawn(0, 3, state), goes_on)
    torch.manual_seed(99)
    new = [drawn(rank, 3, state) for rank in (1, 2)]
    assert torch.equal(new[0], drawn(1, 3, state))  # a rollback, or another resume
    assert not torch.equal(new[0], new[1])
    assert not torch.equal(new[0], goes_on)
    later = snapshot.RandomState(Ranks()).state_dict()  # a later checkpoint of one rank
    assert not torch.equal(drawn(1, 3, later), new[0])


def test_a_rank_that_was_there_goes_on_with_its_own_numbers():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    state = snapshot.RandomState(Ranks()).state_dict()
    state["rank 0"]["torch"], state["rank 1"] = states[0], {"torch": states[1]}
    for rank, seed in ((0, 1), (1, 2)):
        torch.manual_seed(seed)
        expected = torch.rand(8)
        assert torch.equal(drawn(rank, 2, state), expected)
        assert torch.equal(drawn(rank, 4, state), expected)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of the values in nested dicts and lists, lists included."""
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key], (*path, key))]
    if isinstance(tree, list):
        return [path, *(leaf for at in range(len(tree)) for leaf in leaves(tree[at], (*path, at)))]
    return [] if isinstance(tree, Tensor) else [path]


def test_no_value_of_another_kind_is_taken_from_a_handlers_state(tmp_path):
    """It is refused when it is loaded, not when the handler first computes with it."""
    train, val = tiny_loaders()
    handlers = [
        LossEMA(0.8), Perplexity(), WeightEMA(0.9), Evaluation(), EarlyStopping(patience=50),
        NaNRollback(), Spikes(window=4, needed=2), AdaptiveClip(warmup=2), Checkpointing(tmp_path),
    ]  # fmt: skip
    config = TrainingConfig(total_steps=5, eval_steps=2, max_seconds=1e6)
    trainer = Trainer(tiny_model(), train, val, device="cpu", config=config, handlers=handlers)
    Schedule(LinearWarmup(trainer.optimizer, warmup_steps=20)).attach(trainer)
    trainer.run()
    sound = snapshot.copied(snapshot.capture(trainer))
    snapshot.restore(trainer, sound)
    paths = leaves(sound["handlers"])
    assert {path[0] for path in paths} >= {
        "loss_ema", "perplexity", "early_stopping", "nan_rollback", "spikes", "adaptive_clip",
        "checkpointing", "schedule", "weight_ema",
    }  # fmt: skip
    taken = []
    for path in paths:
        for other in ("x", True, {"a": 1}, [[None]]):
            spoiled = {**sound, "handlers": copy.deepcopy(sound["handlers"])}
            place = spoiled["handlers"]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = other
            try:
                snapshot.restore(trainer, spoiled)
            except CheckpointError:
                continue
            taken.append((path, other))
    assert taken == []


class Rank(Ranks):
    """One rank of several; the others say `said`, one answer for each question."""

    def __init__(self, rank: int, world_size: int, *said: Any) -> None:
        super().__init__(rank, world_size)
        self.said = iter(said)

    def gather_bytes(self, tensor: Tensor) -> list[Tensor]:
        others = next(self.said, None)
        parts = [tensor + rank for rank in range(self.world_size)] if others is None else others
        return [*parts[: self.rank], tensor, *parts[self.rank + 1 :]]

    def sum_counts(self, counts: Any) -> list[int]:
        return [own + more for own, more in zip(counts, next(self.said), strict=True)]


def test_the_generators_of_every_rank_are_collected():
    state = snapshot.RandomState(Rank(0, 3)).state_dict()
    own = torch.get_rng_state()
    assert state.keys() == {"rank 0", "rank 1", "rank 2"}
    assert [state[f"rank {rank}"]["torch"].tolist() for rank in range(3)] == [
        (own + rank).tolist() for rank in range(3)
    ]
    assert {"python", "numpy"} <= state["rank 0"].keys()
    assert "python" not in state["rank 2"]  # of Python's generators only the writer's is kept


def test_a_rank_takes_its_own_state_on_whichever_gpu_it_computes(monkeypatch):
    put: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: put.append(index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real())
    state = snapshot.RandomState(Rank(0, 3), torch.device("cuda", 0)).state_dict()
    assert state["rank 2"].keys() == {"torch", "cuda:0"}  # by the name of the rank that writes
    for rank, index in ((0, 5), (2, 1)):
        own = torch.get_rng_state()
        state[f"rank {rank}"]["torch"] = own
        state[f"rank {rank}"]["cuda:0"] = own
        snapshot.RandomState(Ranks(rank, 3), torch.device("cuda", index)).load_state_dict(state)
    assert put == [5, 1]


def test_the_seed_of_a_new_rank_stays_what_it_is():
    torch.manual_seed(7)
    state = snapshot.RandomState(Ranks()).state_dict()
    seeds = []
    for rank in (1, 2, 4):
        drawn(rank, 5, state)
        seeds.append(torch.initial_seed())
    # The key of rank 4 is 2^63 larger: a seed has 63 bits.
    assert seeds == [9102697305752276099, 6835109888746758923, 4241146640798332297]


def test_damage_on_any_rank_is_told_on_all():
    trainer = make_trainer()
    healthy = capture(trainer)
    assert snapshot.damage_on_any_rank(trainer, healthy) is None  # alone: checked where it writes

    def found(rank: int, state: dict, *said: Any) -> Any:
        trainer.ranks = Rank(rank, 2, *said)
        return snapshot.damage_on_any_rank(trainer, state)

    # The others' answers: how many of them are damaged, then the sums of their weights.
    own = bit_sum(trainer.model.parameters())
    same = torch.tensor(list(own.to_bytes(8, "little")), dtype=torch.uint8)
    assert found(1, healthy, [0], [same, same]) is None
    assert "no longer have the same weights" in str(found(1, healthy, [0], [same ^ 1, same]))
    assert "another rank" in str(found(1, healthy, [1]))
    damaged = copy.deepcopy(healthy)
    next(iter(damaged["model"].values())).view(-1)[0] = math.nan
    assert f"step {trainer.state.iteration}, rank 1" in str(found(1, damaged, [0]))


def test_states_are_equal_except_in_what_differs_between_saves_of_one_state():
    state = capture(make_trainer())
    other = copy.deepcopy(state)
    assert snapshot.are_equal(state, other) is True
    for mark in ("checkpoints", "elapsed_before", "finished", "end_of_epoch"):
        other["trainer"][mark] = "another"
    assert snapshot.are_equal(state, other) is True
    other["trainer"]["tokens_seen"] = -1
    assert snapshot.are_equal(state, other) is False
    other = copy.deepcopy(state)
    next(iter(other["model"].values())).view(-1)[0] += 1
    assert snapshot.are_equal(state, other) is False
