from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fundamentallm.engine.wiring.exactness import RULES, refuse_other_rules
from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.manifest import Manifest


def manifest(**metadata: Any) -> Manifest:
    fields = {field.name: None for field in dataclasses.fields(Manifest)}
    return Manifest(**{**fields, "name": "step-00000150", "metadata": metadata})  # type: ignore[arg-type]


def test_a_run_of_these_rules_goes_on() -> None:
    refuse_other_rules(manifest(rules=RULES))


def test_a_run_of_before_there_was_a_number_names_its_revision() -> None:
    with pytest.raises(CheckpointError, match="other rules") as caught:
        refuse_other_rules(manifest())
    assert caught.value.where == "step-00000150"
    assert "e09519b" in caught.value.fix
    assert "--resume never" in caught.value.fix
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("rules", [RULES + 1, 0, "1", [1], None])
def test_rules_that_are_not_known_are_refused(rules: Any) -> None:
    with pytest.raises(CheckpointError):
        refuse_other_rules(manifest(rules=rules))
