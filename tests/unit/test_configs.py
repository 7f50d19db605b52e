"""Every YAML in configs/ is one that `run` takes, and is what it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fundamentallm.config import load_config
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.models.estimate import estimate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_is_valid_and_named_like_its_file(path):
    config = load_config(path)
    check_names(config)
    assert config.name == path.stem


def test_gpt2_124m_has_its_parameters_and_half_a_million_tokens_a_step():
    config = load_config(CONFIGS / "gpt2_124m.yaml")
    model = config.model.model_copy(update={"sequence_length": config.data.sequence_length})
    assert estimate(model).parameters == pytest.approx(124.4e6, rel=2e-3)
    assert config.training.device == "cuda"
    rows = config.data.batch_size * config.training.accumulation_steps
    assert rows * config.data.sequence_length == 2**19
