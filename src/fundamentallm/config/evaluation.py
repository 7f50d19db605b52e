"""What an evaluation measures."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from fundamentallm.config.base import BaseConfig
from fundamentallm.config.component import Component
from fundamentallm.config.yaml.problems import problem

ALWAYS_MEASURED = ("loss", "perplexity")
TAKEN_NAMES = (*ALWAYS_MEASURED, "bits_per_byte")
"""Names that no metric of one's own may have."""


class EvaluationConfig(BaseConfig):
    """The validation pass; `training.eval_steps` says when it runs."""

    metrics: dict[str, Component] = Field(default_factory=dict)
    """Metrics besides loss and perplexity, in the same pass, each a line `name: {option: ...}`:
    accuracy, entropy, top_k. Under another name: `top_10: {name: top_k, k: 10}`."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _named_by_their_keys(cls, metrics: Any) -> Any:
        if not isinstance(metrics, dict):
            raise problem(
                "",
                "metrics are chosen by name",
                got=metrics,
                expected="a mapping, for example {accuracy: {}, top_k: {k: 5}}",
            )
        chosen = {}
        for name, value in metrics.items():
            if name in TAKEN_NAMES:
                raise problem(
                    str(name),
                    f"{name} is always measured",
                    fix="remove it, or give your metric another name",
                )
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
                raise problem(
                    "" if not isinstance(name, str) else name,
                    "the name of a metric stands in the logs as val/NAME",
                    got=name,
                    expected="letters, digits, _ and -",
                )
            if value is None or value is True:
                value = {}
            if isinstance(value, dict) and "name" not in value:
                value = {"name": name, **value}
            if value is not False:
                chosen[name] = value
        return chosen
