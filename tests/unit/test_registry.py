from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

import pytest

from fundamentallm.errors import ConfigError
from fundamentallm.registry import Registry, registered_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from somewhere import OfTheProgram


class Opaque:
    """A class that no configuration can write."""


def seams(
    stream: TextIO | None = None,
    clock: Callable[[], float] | None = None,
    parts: Mapping[str, Opaque] | None = None,
    many: list[Opaque] | None = None,
    known_to_a_type_checker: OfTheProgram | None = None,
    several: tuple[OfTheProgram[int], ...] = (),
    *args: int,
    # These a configuration may write:
    either: Callable[[], float] | int | None = None,
    checked_by_name: Sequence[float] = (),
    unknown=None,
    plain: Mapping[str, Any] | None = None,
    **options: int,
) -> dict[str, Any]:
    return dict(locals())


@pytest.fixture
def registry() -> Registry[Any]:
    table: Registry[Any] = Registry("gadget", supplied=("width", "lr"))

    @table.register("full")
    def full(
        width: int,
        lr: float,
        *,
        count: int = 1,
        rate: float = 0.5,
        pair: tuple[float, float] = (0.0, 0.0),
        flag: bool = False,
        limit: int | None = None,
        mode: Literal["a", "b"] = "a",
        names: list[str] | None = None,
        part: Opaque | None = None,
    ) -> dict[str, Any]:
        return dict(locals())

    @table.register("plain")
    class Plain:
        pass

    @table.register("needy")
    class Needy:
        def __init__(self, size: int, width: int = 0) -> None:
            self.size, self.width = size, width

    table.register("seams")(seams)

    @table.register("data")
    @dataclass
    class Data:
        decay: float = 0.9

    return table


def fault(registry: Registry[Any], name: str, options: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        registry.check(name, options)
    return caught.value


def test_names_are_sorted_and_found(registry):
    assert registry.names() == ["data", "full", "needy", "plain", "seams"]
    assert "full" in registry
    assert "fool" not in registry
    assert registry.get("full").__name__ == "full"
    assert registered_name(registry.get("full")) == "full"
    assert registered_name(print) is None


def test_an_unknown_name_lists_the_known_and_the_nearest(registry):
    with pytest.raises(ConfigError) as caught:
        registry.get("ful")
    assert str(caught.value) == (
        "unknown gadget 'ful'\n"
        "  expected: one of data, full, needy, plain, seams\n"
        "  fix:      did you mean 'full'?"
    )
    with pytest.raises(ConfigError) as caught:
        registry.get("zzz")
    assert "plugin" in caught.value.fix


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="the gadget name 'full' is taken by"):

        @registry.register("full")
        def other() -> None: ...


def test_a_module_that_is_imported_again_may_register_again():
    table: Registry[Any] = Registry("gadget")

    def load() -> Any:
        @table.register("a")
        def again() -> None: ...

        return again

    load()
    latest = load()
    assert table.get("a") is latest


def test_options_are_the_parameters_that_are_not_supplied(registry):
    assert list(registry.options("needy")) == ["size"]
    assert "lr" not in registry.options("full")
    assert registry.options("plain") == {}
    assert list(registry.options("data")) == ["decay"]


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        ({}, {}),
        ({"rate": 1}, {"rate": 1.0}),
        ({"pair": [0.5, 1]}, {"pair": (0.5, 1.0)}),
        ({"pair": (0.5, 1)}, {"pair": (0.5, 1.0)}),
        ({"limit": None}, {"limit": None}),
        ({"limit": 3}, {"limit": 3}),
        ({"flag": True}, {"flag": True}),
        ({"mode": "b"}, {"mode": "b"}),
        ({"names": ["x"]}, {"names": ["x"]}),
    ],
)
def test_options_that_fit(registry, options, checked):
    result = registry.check("full", options)
    assert result == checked
    assert [type(value) for value in result.values()] == [type(value) for value in checked.values()]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "3"),
        ("count", 3.0),
        ("count", True),
        ("rate", "0.5"),
        ("rate", True),
        ("rate", math.nan),
        ("rate", math.inf),
        ("pair", [0.5]),
        ("pair", [0.5, 0.5, 0.5]),
        ("pair", 0.5),
        ("flag", 1),
        ("flag", "true"),
        ("limit", 0.5),
        ("mode", "c"),
        ("names", "x"),
    ],
)
def test_options_that_do_not_fit(registry, key, value):
    error = fault(registry, "full", {key: value})
    assert error.key == key
    assert f"option '{key}' of gadget 'full'" in error.what
    is_finite = not isinstance(value, float) or math.isfinite(value)
    assert error.got == (json.dumps(value) if is_finite else repr(value))
    assert error.expected


def test_what_no_yaml_value_can_be_is_no_option(registry):
    assert list(registry.options("seams")) == ["either", "checked_by_name", "unknown", "plain"]
    assert "part" not in registry.options("full")
    for name, key in (("full", "part"), ("seams", "stream"), ("seams", "args")):
        assert "has no option" in fault(registry, name, {key: None}).what
    part = Opaque()
    assert registry.build("full", {}, width=1, lr=0.1, part=part)["part"] is part


def test_of_a_union_the_plain_members_are_checked(registry):
    assert registry.check("seams", {"either": 3, "unknown": [{"a": None}]}) == {
        "either": 3,
        "unknown": [{"a": None}],
    }
    assert fault(registry, "seams", {"either": "abc"}).key == "either"
    assert fault(registry, "seams", {"checked_by_name": ["abc"]}).key == "checked_by_name"
    assert fault(registry, "seams", {"plain": [1]}).key == "plain"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("count", "an integer"),
        ("rate", "a number"),
        ("pair", "a list of 2 values, each a number"),
        ("flag", "true or false"),
        ("limit", "an integer or null"),
        ("mode", "one of a, b"),
        ("names", "a list of text or null"),
    ],
)
def test_what_was_expected_is_said_in_words(registry, key, expected):
    assert fault(registry, "full", {key: {}}).expected == expected


def test_an_object_from_a_caller_in_python_is_refused_in_words(registry):
    error = fault(registry, "full", {"count": Opaque()})
    assert (error.key, error.expected) == ("count", "an integer")
    assert "a configuration cannot hold this value" in error.what


def test_an_unknown_option(registry):
    error = fault(registry, "full", {"ratee": 1})
    assert error.key == "ratee"
    assert error.what == "gadget 'full' has no option 'ratee'"
    assert error.expected.startswith("one of count, flag, limit")
    assert error.fix == "did you mean 'rate'?"
    error = fault(registry, "plain", {"x": 1})
    assert (error.expected, error.fix) == ("no options at all", "remove it")


def test_what_the_program_supplies_cannot_be_written(registry):
    assert "has no option 'lr'" in fault(registry, "full", {"lr": 1.0}).what


def test_a_missing_option(registry):
    error = fault(registry, "needy", {})
    assert error.key == "size"
    assert error.fix == "add size: ..."


def test_build_passes_what_the_factory_has_a_parameter_for(registry):
    built = registry.build("full", {"rate": 1}, width=3, lr=0.1, unheard_of=5)
    assert (built["width"], built["lr"], built["rate"]) == (3, 0.1, 1.0)
    assert registry.build("needy", {"size": 2}, width=7).width == 7
    assert registry.build("data").decay == 0.9
    assert registry.build("needy", {"size": 2}, lr=1.0).width == 0


def test_build_takes_positional_arguments(registry):
    assert registry.build("full", None, 3, 0.1)["width"] == 3


def test_an_option_wins_over_a_value_of_the_program(registry):
    assert registry.build("data", {"decay": 0.5}, decay=0.1).decay == 0.5
    assert registry.build("data", {}, decay=0.1).decay == 0.1


def test_build_checks_first(registry):
    with pytest.raises(ConfigError, match="has no option"):
        registry.build("full", {"x": 1}, width=1, lr=0.1)
