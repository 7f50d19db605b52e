from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint import CheckpointManager
from fundamentallm.training.checkpoint.manager import (
    check_model_state,
    check_optimizer_state,
    save_weights,
)
from fundamentallm.training.checkpoint.store import CheckpointStore, step_name

LOCATIONS = ["out/start", "start.pt"]


class Tied(nn.Module):
    """A model with what real ones have: tied weights, a buffer, a scalar, several dtypes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(6, dtype=torch.int32).reshape(2, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.embedding(ids)))
        return logits


class Counter:
    """A scheduler: a count, and as in torch's the state is the live dict."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return self.__dict__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        if self.count < 0:
            raise RuntimeError("a negative count")


def parts(seed: int = 0, kind: str = "adamw") -> tuple[Tied, torch.optim.Optimizer, Counter]:
    torch.manual_seed(seed)
    model = Tied()
    groups = [
        {"params": [model.embedding.weight], "name": "decay"},
        {"params": list(model.norm.parameters()), "name": "none", "weight_decay": 0.0},
    ]
    make: dict[str, Any] = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), fused=True),
        "amsgrad": lambda: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=0.1, centered=True),
    }
    return model, make[kind](), Counter()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Counter, step: int
) -> float:
    ids = torch.arange(step, step + 5) % 7
    loss = nn.functional.cross_entropy(model(ids), (ids * 3) % 7)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.count += 1
    optimizer.param_groups[0]["lr"] *= 0.9
    return loss.item()


def everything(*objects: Any) -> Any:
    return copy.deepcopy([item.state_dict() for item in objects])


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd", "rmsprop"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, location: str, kind: str) -> None:
    path = tmp_path / location
    model, optimizer, scheduler = parts(kind=kind)
    for step in range(4):
        train(model, optimizer, scheduler, step)
    CheckpointManager.save(path, model, optimizer, scheduler, {"val_loss": 1.5}, epoch=2, step=4)
    losses = [train(model, optimizer, scheduler, step) for step in range(4, 9)]

    fresh = parts(seed=1, kind=kind)
    for tensor in fresh[0].state_dict().values():  # what is not read stays visible
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    loaded = CheckpointManager.load(path, *fresh)

    assert loaded[:3] == fresh
    assert loaded[3:] == ({"val_loss": 1.5}, 2, 4)
    assert [train(*fresh, step) for step in range(4, 9)] == losses
    assert_equal(everything(*fresh), everything(model, optimizer, scheduler))
    assert fresh[0].head.weight is fresh[0].embedding.weight


@pytest.mark.parametrize("location", LOCATIONS)
def test_without_objects_it_gives_their_states(tmp_path: Path, location: str) -> None:
    model, optimizer, scheduler = parts()
    train(model, optimizer, scheduler, 0)
    path = CheckpointManager.save(tmp_path / location, model, optimizer, scheduler)

    states = CheckpointManager.load(str(path))
    assert_equal(list(states[:3]), everything(model, optimizer, scheduler))
    assert states[3:] == ({}, 0, 0)

    CheckpointManager.save(path, model)
    assert CheckpointManager.load(path)[1:] == (None, None, {}, 0, 0)


def test_an_instance_works_like_the_class(tmp_path: Path) -> None:
    manager = CheckpointManager(keep_last=2)
    model = parts()[0]
    manager.save(tmp_path / "a", model, step=1)
    for step in range(1, 5):
        assert manager.save_last(tmp_path / "last", model, {}).name == step_name(step)

    assert manager.load(tmp_path / "a", model)[5] == 1
    assert len(CheckpointStore(tmp_path / "last").list()) == 2
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointManager(keep_last=1)


def test_saving_and_loading_draw_no_random_numbers(tmp_path: Path) -> None:
    model = parts()[0]
    before = torch.get_rng_state()
    CheckpointManager.save(tmp_path / "x", model)
    CheckpointManager.load(tmp_path / "x", model)

    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_of_any_plain_kind_are_kept(tmp_path: Path) -> None:
    metrics = {"val/loss": torch.tensor(2.5), "best": math.nan, "history": [1, (2.0, None)]}
    CheckpointManager.save(tmp_path / "x", parts()[0], metrics=metrics)

    loaded = CheckpointManager.load(tmp_path / "x")[3]
    assert loaded["val/loss"].item() == 2.5
    assert math.isnan(loaded["best"])
    assert loaded["history"] == [1, (2.0, None)]


def test_a_diverged_model_can_be_kept_for_a_look(tmp_path: Path) -> None:
    model = parts()[0]
    nn.init.constant_(model.norm.weight, math.nan)
    CheckpointManager.save(tmp_path / "x", model, metrics={"val_loss": math.nan})

    assert math.isnan(CheckpointManager.load(tmp_path / "x")[3]["val_loss"])
    assert CheckpointManager.save_best(tmp_path / "x", parts()[0], {"val_loss": 5.0})


# Loading is all or nothing


class Untouched:
    """Asserts at the end that nothing about the objects changed."""

    def __init__(self, *objects: Any) -> None:
        self.objects = objects

    def __enter__(self) -> None:
        self.before = everything(*self.objects)

    def __exit__(self, *_: Any) -> None:
        assert_equal(everything(*self.objects), self.before)


def saved_by(tmp_path: Path, *objects: Any) -> Path:
    train(*objects, 0)
    return CheckpointManager.save(tmp_path / "x", *objects)


def trained(seed: int = 3, kind: str = "adamw") -> tuple[Tied, torch.optim.Optimizer, Counter]:
    objects = parts(seed, kind)
    train(*objects, 5)
    return objects


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_changes_nothing(tmp_path: Path, file: str) -> None:
    path = saved_by(tmp_path, *parts())
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 4
    (path / file).write_bytes(data)
    objects = trained()

    with Untouched(*objects), pytest.raises(CheckpointError, match=file):
        CheckpointManager.load(path, *objects)


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    path = saved_by(tmp_path, *parts())
    model = Tied(width=6)
    model.extra = nn.Linear(2, 2)

    with Untouched(model), pytest.raises(CheckpointError) as caught:
        CheckpointManager.load(path, model)
    message = str(caught.value)
    assert (
        "'embedding.weight' is (7, 4) torch.float32, in the model (7, 6) torch.float32" in message
    )
    assert "'extra.weight' is not in the checkpoint" in message
    assert str(path) in message


def test_model_differences_are_all_seen() -> None:
    state = dict(Tied().state_dict())
    check_model_state(Tied(), state)
    for change in (
        {"embedding.weight": state["embedding.weight"].double()},
        {"more": torch.zeros(1)},
        {"table": None},
        {"table": torch.zeros(2, 3)},
        {"norm.num_batches_tracked": torch.zeros(1, dtype=torch.int64)},
    ):
        with pytest.raises(CheckpointError, match="another model"):
            check_model_state(Tied(), {**state, **change})
    del state["norm.bias"]
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        check_model_state(Tied(), state)
    with pytest.raises(CheckpointError, match="no model"):
        check_model_state(Tied(), None)


def test_many_differences_are_counted() -> None:
    with pytest.raises(CheckpointError, match="2 more"):
        check_model_state(Tied(), {})


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_another_optimizer_is_refused(tmp_path: Path, kind: str) -> None:
    path = saved_by(tmp_path, *parts())
    objects = trained(kind=kind)

    with Untouched(*objects), pytest.raises(CheckpointError, match="another optimizer"):
        CheckpointManager.load(path, *objects)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    path = saved_by(tmp_path, *parts())
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())

    with Untouched(model, optimizer), pytest.raises(CheckpointError, match=r"\[1, 2\]"):
        CheckpointManager.load(path, model, optimizer)
    for state in (None, {}, {"state": {}}):
        with pytest.raises(CheckpointError, match="no optimizer"):
            check_optimizer_state(optimizer, state)


def test_what_was_not_saved_cannot_be_loaded(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained()
    path = CheckpointManager.save(tmp_path / "x", model)

    with Untouched(model, optimizer), pytest.raises(CheckpointError, match="no optimizer"):
        CheckpointManager.load(path, model, optimizer)
    with Untouched(model, scheduler), pytest.raises(CheckpointError, match="no scheduler"):
        CheckpointManager.load(path, model, scheduler=scheduler)


def test_a_refusal_while_loading_takes_everything_back(tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    path = CheckpointManager.save(tmp_path / "x", model, optimizer, Counter(-5))
    objects = trained(seed=8)

    with Untouched(*objects), pytest.raises(CheckpointError, match="a negative count"):
        CheckpointManager.load(path, *objects)


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_missing_checkpoint_is_named(tmp_path: Path, location: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager.load(tmp_path / location)
    assert str(tmp_path / location) in str(caught.value)


def test_a_file_of_other_contents_is_refused(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "weights.pt")
    torch.save({"model": 3}, tmp_path / "number.pt")
    (tmp_path / "text").write_text("hello")

    torch.save({"model": {}, "metrics": 3}, tmp_path / "metrics.pt")
    for name in ("weights.pt", "number.pt", "metrics.pt", "text"):
        with pytest.raises(CheckpointError, match=name):
            CheckpointManager.load(tmp_path / name)


def test_pointers_and_links_are_followed(tmp_path: Path) -> None:
    model = parts()[0]
    path = CheckpointManager.save_last(tmp_path / "run", model, {}, step=7)
    (tmp_path / "mine").symlink_to(path)

    assert CheckpointManager.load(tmp_path / "run" / "last")[5] == 7
    assert CheckpointManager.load(tmp_path / "mine")[5] == 7


def test_a_runs_checkpoint_with_more_in_it_is_read(tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "handlers": {"loss_ema": {"value": 1.0}},
    }
    path = CheckpointStore(tmp_path).write(step_name(3), tree, step=3)

    objects = parts(seed=9)[:2]
    loaded = CheckpointManager.load(path, *objects)
    assert loaded == (*objects, None, {}, 0, 3)
    assert_equal(everything(*objects), everything(model, optimizer))


# Best and last


@pytest.mark.parametrize("key", ["val_loss", "val/loss"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_the_lowest_finite_loss_stays(tmp_path: Path, location: str, key: str) -> None:
    path = tmp_path / location
    model = parts()[0]
    losses = [math.nan, math.inf, 3.0, 2.0, math.nan, 2.5, -math.inf, 2.0, torch.tensor(1.0), 1.5]

    written = [
        CheckpointManager.save_best(path, model, {key: loss}, step=step)
        for step, loss in enumerate(losses)
    ]

    assert written == [loss in (3.0, 2.0, 1.0) and step != 7 for step, loss in enumerate(losses)]
    assert CheckpointManager.load(path)[5] == 8


def test_an_empty_directory_may_become_the_best(tmp_path: Path) -> None:
    model = parts()[0]
    (tmp_path / "best").mkdir()

    assert CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 2.0}, step=3)
    assert CheckpointManager.load(tmp_path / "best", model)[5] == 3


def test_a_position_that_is_not_given_is_the_start(tmp_path: Path) -> None:
    model = parts()[0]
    CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 2.0})
    assert CheckpointManager.load(tmp_path / "best")[4:] == (0, 0)
    CheckpointManager.save_last(tmp_path / "run", model, {}, step=7)
    assert CheckpointManager.load(tmp_path / "run" / "last")[4:] == (0, 7)


def test_weights_and_facts_are_one_file_for_torch(tmp_path: Path) -> None:
    model = parts()[0]
    save_weights(tmp_path / "deep" / "w.pt", model.state_dict(), step=3)
    saved = torch.load(tmp_path / "deep" / "w.pt", weights_only=True)
    assert saved["step"] == 3
    assert_equal(saved["model"], dict(model.state_dict()))


@pytest.mark.parametrize("loss", ["low", None, [1.0]])
def test_a_loss_that_is_no_number_is_refused(tmp_path: Path, loss: Any) -> None:
    with pytest.raises(CheckpointError, match="'val_loss' is not a number"):
        CheckpointManager.save_best(tmp_path / "best", parts()[0], {"val_loss": loss})


def test_best_needs_a_loss_and_an_honest_predecessor(tmp_path: Path) -> None:
    model = parts()[0]
    with pytest.raises(ValueError, match="train_loss"):
        CheckpointManager.save_best(tmp_path / "best", model, {"train_loss": 1.0})
    CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 2.0})
    os.truncate(tmp_path / "best" / "MANIFEST.json", 10)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 1.0})


def test_the_best_set_aside_by_a_killed_save_is_still_the_best(tmp_path: Path) -> None:
    model = parts()[0]
    CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 2.0}, step=3)
    (tmp_path / "best").rename(tmp_path / ".best.old-0123456789ab")

    assert not CheckpointManager.save_best(tmp_path / "best", model, {"val_loss": 2.5}, step=4)
    assert CheckpointManager.load(tmp_path / "best")[5] == 3


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    model, optimizer, scheduler = parts()
    run = tmp_path / "run"
    for step in (10, 20, 30, 40):
        CheckpointManager.save_last(
            run, model, {"val_loss": 1.0}, optimizer=optimizer, scheduler=scheduler, step=step
        )
    CheckpointManager.save_last(run, model, {"step": 50})
    path = CheckpointManager.save_last(run, model, {})

    assert path == run / "step-00000051"
    assert sorted(entry.name for entry in run.iterdir()) == [
        "last",
        "step-00000040",
        "step-00000050",
        "step-00000051",
    ]
    assert CheckpointManager.load(run / "last")[5] == 51
    for bad in ({"path": tmp_path / "x.pt"}, {"path": run, "keep_last": 1}):
        with pytest.raises(ValueError, match="keep_last >= 2"):
            CheckpointManager.save_last(model=model, metrics={}, **bad)


def test_a_step_that_is_taken_back_is_not_pruned_by_later_ones(tmp_path: Path) -> None:
    model = parts()[0]
    for step in (10, 20, 30):
        CheckpointManager.save_last(tmp_path, model, {}, step=step)
    CheckpointManager.save_last(tmp_path, model, {}, step=15)

    assert CheckpointManager.load(tmp_path / "last")[5] == 15


def test_three_checkpoints_are_kept_where_nothing_is_said(tmp_path: Path) -> None:
    manager = CheckpointManager()
    for step in range(1, 6):
        manager.save_last(tmp_path, nn.Linear(2, 2), {"step": step})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        step_name(step) for step in (3, 4, 5)
    ]


def _stepped() -> torch.optim.Optimizer:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda it: it.update(state=[]), "no table of states"),
        (lambda it: it.update(state={0: 5}), "no table of states"),
        (lambda it: it.update(param_groups={}), "no list of parameter groups"),
        (lambda it: it.update(param_groups=[{"params": 5}]), "no list of parameter groups"),
        (lambda it: it["state"][0].update(exp_avg=torch.zeros(3)), "'exp_avg' of another shape"),
        (lambda it: it["state"][0].update(exp_avg_sq=torch.zeros(0)), "'exp_avg_sq' of another"),
        (lambda it: it["state"][0].update(exp_avg=0.5), "'exp_avg' of another shape"),
        (lambda it: it["state"][0].update(step=torch.ones(2)), "'step' of another shape"),
        (lambda it: it["state"][0].update(step=True), "'step' of another shape"),
        (lambda it: it["param_groups"][0].update(eps="x"), "an option 'eps' of another kind"),
        (lambda it: it["param_groups"][0].update(betas=(0.9,)), "'betas' of another kind"),
        (lambda it: it["param_groups"][0].update(maximize=1), "'maximize' of another kind"),
    ],
)
def test_no_kernel_gets_what_it_would_not_look_at(change: Any, says: str) -> None:
    optimizer = _stepped()
    state = copy.deepcopy(optimizer.state_dict())
    check_optimizer_state(optimizer, state)
    change(state)
    with pytest.raises(CheckpointError, match=says):
        check_optimizer_state(optimizer, state)


@pytest.mark.parametrize(
    ("kept", "fits"),
    [
        (torch.zeros(4, 4), True),
        (torch.zeros(4, 2), False),
        (torch.zeros(1, 2), False),
        (torch.zeros(1, 1), True),
        (torch.zeros(4, 1), True),
        (torch.zeros(1, 4), True),
        (torch.zeros(7), True),
        (0.5, True),
    ],
    ids=str,
)
def test_what_an_optimizer_keeps_in_a_form_of_its_own_is_its_own(kept: Any, fits: bool) -> None:
    optimizer = _stepped()  # of one parameter of 4 x 4
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["own"] = kept
    if fits:
        check_optimizer_state(optimizer, state)
        return
    with pytest.raises(CheckpointError, match="'own' of another shape"):
        check_optimizer_state(optimizer, state)


ONE, TWO = torch.ones(1), torch.ones(2)
KINDS: list[tuple[Any, list[Any], list[Any]]] = [
    # an option of the optimizer, saved ones that may replace it, and saved ones that may not
    (None, [None, True, 1, "x", [1]], []),
    (True, [False, None], [1, 0.5, "x", ONE]),
    (0.5, [0.25, 3, ONE], [True, None, "x", TWO, [0.5]]),
    (ONE, [0.25, 3, ONE], [True, None, "x", TWO]),
    (TWO, [TWO, ONE], [0.5, None]),
    ((0.5, True), [[0.25, False], (1, None)], [(0.5,), (0.5, 1), (True, True), 0.5, "ab"]),
    ("x", ["y"], [None, 1]),
]


@pytest.mark.parametrize(("own", "same", "others"), KINDS, ids=str)
def test_an_option_is_replaced_by_one_of_its_kind(own: Any, same: Any, others: Any) -> None:
    optimizer = _stepped()
    optimizer.param_groups[0]["option"] = own
    state = copy.deepcopy(optimizer.state_dict())
    for saved in same:
        state["param_groups"][0]["option"] = saved
        check_optimizer_state(optimizer, state)
    for saved in others:
        state["param_groups"][0]["option"] = saved
        with pytest.raises(CheckpointError, match="option 'option' of another kind"):
            check_optimizer_state(optimizer, state)


def test_options_of_the_same_kind_may_differ(tmp_path: Path) -> None:
    optimizer = _stepped()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(lr=torch.tensor(0.5), eps=1, betas=[0.5, 0.9], maximize=None)
    state["state"][0]["step"] = 7
    check_optimizer_state(optimizer, state)
