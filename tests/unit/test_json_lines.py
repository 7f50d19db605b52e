from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fundamentallm.files.json_lines import JsonLines


@pytest.fixture
def log(tmp_path: Path) -> JsonLines:
    return JsonLines(tmp_path / "log.jsonl", lambda record: "val" in record)


def records(log: JsonLines) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def test_records_come_back_in_order_with_any_text(log: JsonLines) -> None:
    written = [{"step": 1, "text": "a\nb \u2028 \u00e9"}, {"step": 2, "text": "\x1b[31m"}]
    for record in written:
        log.append(record)
    lines = log.path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == written


def test_later_steps_are_cut_off_and_earlier_ones_stay(log: JsonLines) -> None:
    for step in range(1, 6):
        log.append({"step": step, "text": "\u2028"})
    log.cut_back(3, evaluation_pending=False)
    assert [json.loads(x)["step"] for x in log.path.read_text("utf-8").split("\n")[:-1]] == [
        1,
        2,
        3,
    ]


def test_an_evaluation_that_is_to_run_again_loses_its_record_alone(log: JsonLines) -> None:
    log.append({"step": 2, "train": 1.0})
    log.append({"step": 2, "val": 1.0})
    log.cut_back(2, evaluation_pending=False)
    assert records(log) == [{"step": 2, "train": 1.0}, {"step": 2, "val": 1.0}]
    log.cut_back(2, evaluation_pending=True)
    assert records(log) == [{"step": 2, "train": 1.0}]


@pytest.mark.parametrize("torn", ['{"step": 2, "tra', '{"step": 2, "train": 1.0}', '{"step"', "[]"])
def test_a_torn_last_line_is_dropped_before_the_next_is_added(log: JsonLines, torn: str) -> None:
    log.append({"step": 1, "train": 1.0})
    with log.path.open("a") as file:
        file.write(torn)
    log.cut_back(5, evaluation_pending=False)
    log.append({"step": 3, "train": 2.0})
    assert records(log) == [{"step": 1, "train": 1.0}, {"step": 3, "train": 2.0}]


def test_bytes_that_are_no_text_are_dropped(log: JsonLines) -> None:
    log.path.write_bytes(b'{"step": 1}\n\xff\xfe\x00garbage\n')
    log.cut_back(1, evaluation_pending=False)
    assert records(log) == [{"step": 1}]


def test_no_file_is_no_fault(log: JsonLines) -> None:
    log.cut_back(1, evaluation_pending=False)
    assert not log.path.exists()


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    log = JsonLines(tmp_path / "file" / "log.jsonl", lambda record: False)
    with caplog.at_level(logging.WARNING):
        log.append({"step": 1})
        log.append({"step": 2})
        log.cut_back(1, evaluation_pending=False)
    assert [
        record.message for record in caplog.records if "cannot be written" in record.message
    ] == [caplog.records[0].message]


def test_numbers_that_json_lacks_are_refused(log: JsonLines) -> None:
    with pytest.raises(ValueError, match="JSON"):
        log.append({"step": 1, "loss": float("nan")})
