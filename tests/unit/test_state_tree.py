from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.tree import copied, equal, flatten, unflatten


class Shard(torch.Tensor):
    """Stands for a DTensor: a subclass whose memory is not the whole value."""


def through_json(tree: Any) -> Any:
    skeleton, tensors = flatten(tree)
    return unflatten(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tolist() == right.tolist()
    elif isinstance(left, dict):
        assert [(type(key), key) for key in left] == [(type(key), key) for key in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right)
    else:
        assert repr(left) == repr(right)  # tells -0.0 from 0.0


tensors = st.lists(st.integers(-9, 9), max_size=3).map(lambda values: torch.tensor(values))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | tensors
keys = st.integers() | st.text(max_size=4) | st.sampled_from(["$tensor", "__metadata__", "0", ""])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=examples(300))
def test_any_tree_survives(tree: Any) -> None:
    assert_same(through_json(tree), tree)


def test_int_and_text_keys_stay_apart_and_in_order() -> None:
    tree = {1: "int", "1": "text", 0: torch.tensor(0), "0": torch.tensor(1)}

    assert_same(through_json({"state": tree}), {"state": tree})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2])
def test_floats_are_exact(value: float) -> None:
    assert_same(through_json([value]), [value])


def test_a_dict_that_looks_like_a_marker_stays_a_dict() -> None:
    for tree in ({"$tensor": "x"}, {"$tuple": [1]}, {"$float": "nan"}, {"$dict": []}, {"$new": 1}):
        assert_same(through_json(tree), tree)


def test_tensors_are_named_by_their_path_and_not_copied() -> None:
    weight = torch.ones(2, requires_grad=True)

    _, tensors = flatten({"optimizer": {"state": {0: {"exp_avg": weight}}}, "model": [weight + 1]})

    assert set(tensors) == {"optimizer.state.0.exp_avg", "model.0"}
    kept = tensors["optimizer.state.0.exp_avg"]
    assert kept.data_ptr() == weight.data_ptr()
    assert not kept.requires_grad


def test_tied_tensors_are_one_tensor_before_and_after() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    tree = {"embedding": weight, "head": weight.data, "twin": torch.ones(2, 3), "row": weight[0]}

    skeleton, tensors = flatten(tree)
    back = unflatten(skeleton, tensors)

    assert set(tensors) == {"embedding", "twin", "row"}
    assert back["embedding"] is back["head"]
    assert back["embedding"] is not back["twin"]


def test_transposed_and_retyped_views_of_one_memory_are_not_tied() -> None:
    square = torch.arange(4).reshape(2, 2)
    tree = {"a": square, "b": square.t(), "c": square.view(torch.float64)}

    assert_same(through_json(tree), tree)


def test_empty_tensors_are_not_tied() -> None:
    back = through_json({"a": torch.empty(0), "b": torch.empty(0)})

    assert back["a"] is not back["b"]


def test_subclasses_become_the_plain_type() -> None:
    tree = OrderedDict(loss=np.float64(1.5), size=torch.Size([2, 3]))

    assert_same(through_json(tree), {"loss": 1.5, "size": (2, 3)})


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"a": [{1}]}, "state.a.0"),
        ({"handlers": {"mine": {"f": print}}}, "state.handlers.mine.f"),
        ({"a": np.zeros(2)}, "state.a"),
        ({"a": np.int64(2)}, "state.a"),
        ({"a": b"bytes"}, "state.a"),
        ({"a": 1j}, "state.a"),
        ({"a": {True: 1}}, "state.a.True"),
        ({"a": {1.5: 1}}, "state.a.1.5"),
        ({"a": {None: 1}}, "state.a.None"),
        ({"a": torch.zeros(2, device="meta")}, "state.a"),
        ({"a": torch.eye(2).to_sparse()}, "state.a"),
        ({"a": torch.ones(1).as_subclass(Shard)}, "state.a"),
    ],
)
def test_what_cannot_be_held_is_named(tree: Any, where: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        flatten(tree)

    assert caught.value.where.endswith(where)


def test_a_tree_that_contains_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["self"] = (tree,)

    with pytest.raises(CheckpointError, match="contain itself"):
        flatten(tree)


def nested(depth: int) -> list[Any]:
    """An empty list in lists: the innermost is this deep."""
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


def test_a_tree_may_be_64_levels_deep() -> None:
    assert flatten(nested(64))[0] == unflatten(nested(64), {}) == nested(64)
    with pytest.raises(CheckpointError, match="deeper than 64"):
        flatten(nested(65))
    with pytest.raises(CheckpointError, match="malformed"):
        unflatten(nested(65), {})


def test_tensors_of_one_dotted_path_are_numbered() -> None:
    keys = {0: torch.zeros(1), "0": torch.ones(1), "~": torch.ones(2)}
    assert list(flatten(keys)[1]) == ["0", "0~2", "~"]
    both = {"a": {"b": torch.zeros(1), "b~2": torch.ones(1)}, "a.b": torch.ones(2)}
    assert list(flatten(both)[1]) == ["a.b", "a.b~2", "a.b~3"]
    assert list(flatten({"__metadata__": torch.zeros(1)})[1]) == ["__metadata__~2"]


def test_trees_are_equal_where_values_and_dtypes_are() -> None:
    tree = {"a": [1, torch.ones(2)], "b": torch.zeros(1)}
    assert equal(tree, {"a": [1, torch.ones(2)], "b": torch.zeros(1)}) is True
    assert equal(tree, {**tree, "a": [2, torch.ones(2)]}) is False
    assert equal(tree, {**tree, "b": torch.ones(1)}) is False
    assert equal(tree, {**tree, "b": torch.zeros(1, dtype=torch.float64)}) is False
    assert equal(tree, {"a": tree["a"]}) is False
    assert equal({"a": 1}, {"a": 1}) is True


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$tensor": "missing"},
        {"$tensor": "t", "more": 1},
        {"$tensor": 3},
        {"$tuple": 3},
        {"$float": "1.5"},
        {"$float": 1.5},
        {"$dict": {"a": 1}},
        {"$dict": [["a"]]},
        {"$dict": [[None, 1]]},
        {"$dict": [[True, 1]]},
        {"$object": "os.system"},
    ],
    ids=str,
)
def test_a_malformed_skeleton_is_refused(skeleton: Any) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        unflatten([{"$tensor": "t"}, skeleton], {"t": torch.zeros(1)})


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        unflatten({}, {"t": torch.zeros(1)})


def test_a_skeleton_without_end_is_refused() -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        unflatten(json.loads("[" * 900 + "]" * 900), {})


def test_a_copy_uses_the_memory_of_an_earlier_one_where_it_fits():
    buffers: dict[str, torch.Tensor] = {}
    first = copied({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2)}, buffers)
    memory = {name: tensor.data_ptr() for name, tensor in first.items()}
    tree = {
        "a": torch.tensor([1.0, 2.0, 3.0]),
        "b": torch.tensor([[4.0, 5.0], [6.0, 7.0]]),
        "c": torch.tensor([8, 9]),
        "d": torch.tensor(10),
    }
    second = copied(tree, buffers)
    assert_same(second, tree)
    assert second["a"].data_ptr() == memory["a"]
    assert second["b"].data_ptr() != memory["b"]  # of another shape
    assert second["c"].data_ptr() != memory["c"]  # of another dtype
    assert buffers.keys() == tree.keys()
    assert all(buffers[name].data_ptr() == second[name].data_ptr() for name in tree)
    assert all(second[name].data_ptr() != tensor.data_ptr() for name, tensor in tree.items())
    assert copied({"a": torch.ones(3)}, buffers)["a"].data_ptr() == memory["a"]
    assert buffers.keys() == {"a"}
