"""The rates of a kind of processor: measured once, kept, and never in the way."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from fundamentallm.compute import processor
from fundamentallm.compute.processor import Rates, cpu_rates, kind_of_processor, why_not_bf16

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Rates in place of measured ones; the list says what was measured."""
    asked = []

    def measure(device, dtype, shapes, calls, seconds):
        asked.append(dtype)
        return 2e11 if dtype == torch.float32 else 1e9

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(processor, "measured_peak", measure)
    processor._rates.cache_clear()
    yield asked
    processor._rates.cache_clear()


def in_a_new_process():
    processor._rates.cache_clear()
    return cpu_rates()


def test_a_kind_is_measured_once(measured, tmp_path):
    assert cpu_rates() == in_a_new_process() == Rates(2e11, 1e9)
    assert measured == [torch.float32, torch.bfloat16]
    kept = json.loads((tmp_path / "fundamentallm" / "rates.json").read_text())
    (entry,) = kept["entries"].values()
    rows = processor.ROWS * torch.get_num_threads()
    kind = {**kind_of_processor(), "product": f"{rows} x {processor.WIDTH}"}
    assert entry == {"of": kind, "measured": {"float32": 2e11, "bfloat16": 1e9}}


@pytest.mark.parametrize("name", processor.LIMITS)
def test_fewer_instructions_are_another_kind(measured, monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    cpu_rates()
    monkeypatch.setenv(name, "avx2")
    in_a_new_process()
    assert len(measured) == 4


@pytest.mark.parametrize("fact", ["processor", "instructions", "threads", "torch"])
def test_another_machine_is_another_kind(measured, monkeypatch, fact):
    cpu_rates()
    other = {**kind_of_processor(), fact: "another"}
    monkeypatch.setattr(processor, "kind_of_processor", lambda: other)
    in_a_new_process()
    assert len(measured) == 4


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 2, "entries": {}}', "\x00\xff"]
    + [
        json.dumps({"version": 1, "entries": {"a": {"of": {}, "measured": values}}})
        for values in (None, {}, {"float32": 1.0}, {"float32": 0, "bfloat16": 1}, [1, 2])
    ],
)
def test_a_damaged_file_is_measured_again(measured, tmp_path, text):
    path = tmp_path / "fundamentallm" / "rates.json"
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    assert cpu_rates() == in_a_new_process() == Rates(2e11, 1e9)
    assert len(measured) == 2


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes by name")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_read(measured, tmp_path, make):
    (tmp_path / "fundamentallm").mkdir()
    make(tmp_path / "fundamentallm" / "rates.json")
    assert cpu_rates() == Rates(2e11, 1e9)


def test_a_home_that_takes_no_file_is_no_obstacle(measured, monkeypatch, tmp_path, caplog):
    (tmp_path / "here").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    with caplog.at_level(logging.INFO):
        assert cpu_rates() == in_a_new_process() == Rates(2e11, 1e9)
    assert len(measured) == 4
    assert "cannot be stored" not in caplog.text


def test_the_reason_has_the_figures(measured):
    assert why_not_bf16(CPU) == ("matrix products here do 1 GFLOP/s in bfloat16 and 200 in float32")
    assert why_not_bf16(torch.device("cuda", 0)) == ""


def test_this_processor_has_rates(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    processor._rates.cache_clear()
    assert min(cpu_rates()) > 1e8
    processor._rates.cache_clear()
