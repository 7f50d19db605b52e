"""The keys of other tools lead to ours, and ours exist."""

from __future__ import annotations

import pytest

from fundamentallm.config import RunConfig
from fundamentallm.config.yaml.other_names import OTHER_NAMES
from fundamentallm.config.yaml.problems import class_at
from fundamentallm.errors import ConfigError


def test_what_is_advised_is_a_key() -> None:
    for ours in set(OTHER_NAMES.values()):
        *section, key = ours.split(".")
        found = class_at(tuple(section), RunConfig)
        assert found is not None, ours
        assert key in found.model_fields


def test_no_name_of_another_tool_hides_a_key_of_ours() -> None:
    sections = [class_at((name,), RunConfig) for name in ("data", "model", "training")]
    own = {key for section in (RunConfig, *sections) if section for key in section.model_fields}
    assert not own & set(OTHER_NAMES)


@pytest.mark.parametrize("section", ["", "data", "model", "training"])
def test_a_habit_leads_to_our_key(section: str) -> None:
    for other, ours in OTHER_NAMES.items():
        text = f"{section}: {{{other}: 1}}" if section else f"{other}: 1"
        with pytest.raises(ConfigError) as raised:
            RunConfig.from_yaml(text)
        assert raised.value.fix == f"did you mean {ours}?", text
