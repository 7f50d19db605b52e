from __future__ import annotations

import pytest

from fundamentallm import errors
from fundamentallm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FundamentaLLMError,
    InterruptedRunError,
    MachineError,
    NumericalError,
    StalledRankError,
    did_you_mean,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FundamentaLLMError("x"), 1),
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (CheckpointError("x"), 4),
        (MachineError("x"), 5),
        (NumericalError("x"), 20),
        (StalledRankError("x"), 21),
        (InterruptedRunError("x", signal_number=2), 130),
        (InterruptedRunError("x", signal_number=15), 143),
    ],
)
def test_exit_codes(error, code):
    assert error.exit_code == code
    assert isinstance(error, FundamentaLLMError)


def test_every_class_is_in_the_drawing():
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, FundamentaLLMError)
    ]
    assert len(classes) == 8
    for name in classes:
        assert name in (errors.__doc__ or "")


def test_a_whole_message():
    error = DataError("too short", where="a.txt", got="3", expected="4", fix="add text")
    assert str(error) == ("a.txt: too short\n  got:      3\n  expected: 4\n  fix:      add text")


def test_only_what_is_known_is_said():
    assert str(DataError("too short")) == "too short"
    assert str(DataError("too short", fix="add text")) == "too short\n  fix:      add text"


def test_the_key_stands_for_a_place_that_is_not_known():
    assert str(ConfigError("bad", key="a.b")) == "a.b: bad"
    assert str(ConfigError("bad", key="a.b", where="f.yaml:1: a.b")) == "f.yaml:1: a.b: bad"


def test_a_place_may_be_filled_in_later():
    error = ConfigError("bad", key="b")
    error.where = "f.yaml:1: a.b"
    assert str(error) == "f.yaml:1: a.b: bad"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adamw", "did you mean 'adamw'?"),
        ("adam_w", "did you mean 'adamw'?"),
        ("sdg", "did you mean 'sgd'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_did_you_mean(name, hint):
    assert did_you_mean(name, (known for known in ["adamw", "sgd"])) == hint
