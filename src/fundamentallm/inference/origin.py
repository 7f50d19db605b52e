"""What a folder of `transformers` says about use, beside its weights: kept for the way back.

Which token begins a text and which ends one, the chat template, and the settings of generation. A
run stores it in its checkpoints as plain JSON, so the folder may be deleted by then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fundamentallm.data.text_file import read_text
from fundamentallm.errors import DataError
from fundamentallm.training.checkpoint.manifest import FINITE

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMES = ("bos_token", "eos_token", "pad_token")
CHAT_TEMPLATE = "chat_template"
_OF_THE_LIBRARY = {"transformers_version", "_from_model_config", *SPECIAL}


@dataclass(frozen=True)
class Origin:
    """What is kept of a folder, as far as it has the expected form.

    Attributes:
        special: ids by the keys of `SPECIAL`; each a number or a list of numbers.
        names: tokens by the keys of `NAMES`.
        generation: settings of generation_config.json, without ids.
        chat_template: a Jinja template; None without one.
    """

    special: Mapping[str, int | list[int]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Read a folder; what it lacks is absent.

        Raises:
            CheckpointError: a file of it is not JSON.
            DataError: a file of it is not text.
        """
        model, generation, tokenizer = (
            _object(folder / name)
            for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
        template = folder / "chat_template.jinja"
        return cls.of(
            {
                # Where both say something, generation_config.json is what `generate` reads.
                "special": {
                    key: model.get(key) if generation.get(key) is None else generation[key]
                    for key in SPECIAL
                },
                "names": {key: _name(tokenizer.get(key)) for key in NAMES},
                "generation": generation,
                CHAT_TEMPLATE: read_text(template)
                if template.is_file()
                else tokenizer.get(CHAT_TEMPLATE),
            }
        )

    @classmethod
    def of(cls, stored: Any) -> Origin:
        """Make it from `to_dict`, or from anything: what has another form is left out."""
        stored = stored if isinstance(stored, Mapping) else {}
        special, names, generation = (
            part if isinstance(part, Mapping) else {}
            for part in (stored.get(key) for key in ("special", "names", "generation"))
        )
        template = stored.get(CHAT_TEMPLATE)
        return cls(
            {key: special[key] for key in SPECIAL if _is_ids(special.get(key))},
            {key: names[key] for key in NAMES if isinstance(names.get(key), str)},
            {key: value for key, value in generation.items() if key not in _OF_THE_LIBRARY},
            template if isinstance(template, str) and template else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template}
        return {
            "special": dict(self.special),
            "names": dict(self.names),
            "generation": dict(self.generation),
            **template,
        }

    def ids(self, key: str) -> list[int]:
        """Return the ids under one of `SPECIAL`, none if it has none."""
        value = self.special.get(key, [])
        return list(value) if isinstance(value, list) else [value]


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path), **FINITE)
    except (ValueError, RecursionError) as error:
        raise DataError("this is not JSON", where=str(path), got=str(error)) from error
    return value if isinstance(value, dict) else {}


def _name(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _is_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) and value else [value]
    return all(type(one) is int and one >= 0 for one in ids)
