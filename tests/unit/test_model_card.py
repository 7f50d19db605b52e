"""Texts of a model card are data, and secrets are not in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.markdown import Shown
from tests.unit.test_gguf import trained

from fundamentallm.config import RunConfig
from fundamentallm.config.data import DataConfig
from fundamentallm.data.tokenizer import ByteTokenizer
from fundamentallm.errors import DataError
from fundamentallm.inference.model_card import model_card
from fundamentallm.inference.origin import Origin


def test_secrets_of_addresses_and_settings_are_left_out(tmp_path: Path) -> None:
    run = RunConfig.model_validate(
        {
            "data": {
                "sources": [
                    {
                        "url": "https://me:geheim@example.org/a.txt?token=geheim&x=1",
                        "sha256": "0" * 64,
                    }
                ]
            },
            "handlers": {"wandb": {"api_key": "geheim"}},
        }
    )
    one = trained({}, ByteTokenizer(), tmp_path)
    run = run.model_copy(update={"model": one.config.model})
    object.__setattr__(one, "config", run)
    for format_name in ("hf", "gguf"):
        card = model_card(one, format_name)
        assert "geheim" not in card
        assert "example" in card
        assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["fundamentallm", format_name]


HOSTILE = "a|b `c` <img src=x> # *d* [e](f)"


def test_a_reader_sees_each_name_as_it_is(tmp_path: Path) -> None:
    one = trained({}, ByteTokenizer(), tmp_path)
    data = DataConfig(source=[f"## {HOSTILE}\n| x | y |", "``` \\| ~~~"])
    run = one.config.model_copy(update={"name": f"# {HOSTILE}", "data": data})
    object.__setattr__(one, "config", run)
    one.manifest.metadata.update(versions={HOSTILE: "\n# 1"}, data=[1], finished=f"--- {HOSTILE}")
    for format_name in ("hf", "gguf"):
        _, head, body = model_card(one, format_name).split("---\n", 2)
        assert set(yaml.safe_load(head)) <= {"library_name", "pipeline_tag", "tags"}
        shown = Shown(body)
        assert shown.texts["h1"] == [f"# {HOSTILE}"]
        assert shown.texts["h2"] == ["Losses", "Data", "How it was made", "Settings"]
        rows = dict(shown.rows())
        assert rows["source"] == f"## {HOSTILE}\\n| x | y |, ``` \\| ~~~"
        assert rows["versions"] == f"{HOSTILE} \\n# 1"
        assert rows["end"] == f"--- {HOSTILE}"
        assert not shown.tags & {"img", "a", "em", "hr"}
        settings = yaml.safe_load(shown.texts["code"][-1])
        assert settings["data"]["source"] == data.source


def test_a_damaged_metrics_file_costs_no_card(tmp_path: Path) -> None:
    one = trained({}, ByteTokenizer(), tmp_path / "checkpoints" / "step-00000000")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tokens": 7}\n[1]\n{"step": "x"}\n{\n')
    assert "not measured at this step" in model_card(one, "hf")


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        {"special": [1], "names": 3, "generation": "x", "chat_template": 5},
        {"special": {"bos_token_id": -1, "eos_token_id": [], "pad_token_id": True}},
        {"names": {"bos_token": {"a": 1}}, "generation": {"eos_token_id": 4}},
    ],
)
def test_what_a_checkpoint_keeps_of_a_folder_is_read_as_far_as_it_has_the_form(
    stored: object,
) -> None:
    assert Origin.of(stored) == Origin()


def test_a_number_that_no_checkpoint_can_hold_is_told_with_its_file(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 1e999}')
    with pytest.raises(DataError, match=r"generation_config\.json: .*\n.*1e999") as raised:
        Origin.read(tmp_path)
    assert raised.value.where == str(tmp_path / "generation_config.json")
