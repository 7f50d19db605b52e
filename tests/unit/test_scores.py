"""The file of scores: appended to durably, read after any crash, and kept small."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict
from itertools import count

import pytest
from fault_injection.faults import Crash, FaultyFilesystem

from fundamentallm.errors import CheckpointError
from fundamentallm.files.run_layout import SCORES
from fundamentallm.training.checkpoint import scores as module
from fundamentallm.training.checkpoint.manifest import Manifest
from fundamentallm.training.checkpoint.scores import (
    AWAITS_EVALUATION,
    MAX_SCORES_BYTES,
    PRUNE_BYTES,
    Score,
    Scores,
    finite,
)

SCORE = Score(3, "abc", True, 1.5, 4.5)


def test_a_score_replaces_that_of_its_step_and_later_ones_are_cut_back(tmp_path):
    scores = Scores(tmp_path)
    assert scores.all() == []
    scores.cut_back(0)
    assert not scores.path.exists()
    later = Score(6, "def", True, None, None, "ended")
    scores.put(SCORE)
    scores.put(later)
    scores.put(Score(3, "new", True, 2.5, 9.5))
    assert [score.manifest for score in scores.all()] == ["def", "new"]
    file = scores.path.stat().st_ino
    scores.cut_back(6)  # nothing is later, so nothing is written
    assert scores.path.stat().st_ino == file
    scores.cut_back(3)
    assert [score.manifest for score in scores.all()] == ["new"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{",
        "nul",
        '{"step": 3}',
        json.dumps({"step": "3", "manifest": "a", "measured": True}),
        json.dumps({"step": 3, "manifest": "a", "measured": True, "val_loss": "low"}),
        json.dumps({"step": 3, "manifest": "a", "measured": True, "more": 1}),
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_line_that_is_no_score_says_nothing(tmp_path, line):
    scores = Scores(tmp_path)
    scores.put(SCORE)
    with scores.path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    assert scores.all() == [SCORE]


@pytest.mark.parametrize("kind", ["link", "pipe", "large"])
def test_what_is_no_plain_file_of_scores_is_refused(tmp_path, kind):
    scores = Scores(tmp_path)
    if kind == "link":
        (tmp_path / "other").write_text("{}")
        scores.path.symlink_to(tmp_path / "other")
    elif kind == "pipe":
        os.mkfifo(scores.path)
    else:
        scores.path.touch()
        os.truncate(scores.path, MAX_SCORES_BYTES + 1)
    with pytest.raises(CheckpointError, match="not a file of scores"):
        scores.all()


def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path):
    scores = Scores(tmp_path)
    scores.put(SCORE)
    whole = scores.path.read_bytes()
    for torn in (whole[:-1], whole[:7], b"{"):
        scores.path.write_bytes(whole + torn)
        assert scores.all() == [SCORE]
        later = Score(6, "def", True)
        scores.put(later)
        assert scores.all() == [SCORE, later]
        assert scores.path.read_bytes().startswith(whole + b'{"step": 6')
        scores.path.write_bytes(whole)


def test_a_crash_at_any_operation_keeps_the_scores_before(tmp_path):
    later = Score(6, "def", True)
    for fail_at in count():
        place = tmp_path / str(fail_at)
        place.mkdir()
        Scores(place).put(SCORE)
        with (place / SCORES).open("ab") as file:
            file.write(b'{"step"')
        disk = FaultyFilesystem(fail_at, Crash)
        try:
            Scores(place, disk).put(later)
        except Crash:
            found = Scores(place).all()
            assert found in ([SCORE], [SCORE, later])
            Scores(place).put(later)
            assert Scores(place).all() == [SCORE, later]
        else:
            assert disk.log == ["truncate", "write", "sync"]
            return


@pytest.mark.parametrize("operation", ["truncate", "write", "sync"])
def test_a_disk_that_fails_once_leaves_whole_lines(tmp_path, operation):
    scores = Scores(tmp_path)
    scores.put(SCORE)
    whole = scores.path.read_bytes()
    with scores.path.open("ab") as file:
        file.write(b'{"step"')
    at = ["truncate", "write", "sync"].index(operation)
    disk = FaultyFilesystem(at, lambda: OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="the disk is full"):
        Scores(tmp_path, disk).put(Score(6, "def", True))
    assert scores.path.read_bytes().startswith(whole)
    assert scores.all() == [SCORE]


def test_a_score_is_appended_and_the_file_stays_small(tmp_path):
    scores = Scores(tmp_path)
    scores.put(SCORE)
    file = scores.path.stat().st_ino
    scores.put(Score(6, "def", True))
    assert scores.path.stat().st_ino == file
    (tmp_path / "step-00000006").mkdir()
    filler = json.dumps(asdict(Score(9, "x" * 900, True))).encode() + b"\n"
    with scores.path.open("ab") as out:
        out.write(filler * (PRUNE_BYTES // len(filler) + 1))
    newest = Score(12, "abc", True)
    scores.put(newest)
    assert scores.all() == [Score(6, "def", True), newest]  # of what has no checkpoint, none
    assert scores.path.stat().st_size < 1000


def test_sizes_count_to_the_byte(tmp_path, monkeypatch):
    assert (MAX_SCORES_BYTES, PRUNE_BYTES) == (67_108_864, 262_144)
    scores = Scores(tmp_path)
    scores.put(SCORE)
    size = scores.path.stat().st_size
    monkeypatch.setattr(module, "MAX_SCORES_BYTES", size)
    assert scores.all() == [SCORE]
    monkeypatch.setattr(module, "MAX_SCORES_BYTES", size - 1)
    with pytest.raises(CheckpointError, match="not a file of scores"):
        scores.all()
    monkeypatch.undo()
    file = scores.path.stat().st_ino
    monkeypatch.setattr(module, "PRUNE_BYTES", size + 1)
    scores.put(SCORE)
    assert (scores.path.stat().st_ino, scores.path.stat().st_size) == (file, 2 * size)
    monkeypatch.setattr(module, "PRUNE_BYTES", 2 * size)
    scores.put(SCORE)
    assert scores.path.stat().st_ino != file
    assert scores.path.stat().st_size == size


def test_a_loss_that_is_not_finite_is_never_written(tmp_path):
    assert [finite(value) for value in (1.5, math.nan, math.inf)] == [1.5, None, None]
    scores = Scores(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        scores.put(Score(3, "abc", True, math.nan))
    assert not scores.path.exists()


def test_lines_of_an_earlier_release_keep_their_form(tmp_path):
    line = (
        '{"step": 3, "manifest": "abc", "measured": true, "val_loss": 1.5,'
        ' "perplexity": 4.5, "finished": ""}\n'
    )
    (tmp_path / SCORES).write_text(line)
    assert Scores(tmp_path).all() == [SCORE]
    Scores(tmp_path / "new").path.parent.mkdir()
    Scores(tmp_path / "new").put(SCORE)
    assert (tmp_path / "new" / SCORES).read_text() == line


@pytest.mark.parametrize(
    ("metadata", "score", "expected"),
    [
        # of a checkpoint: end_of, end_due_at, has_ended_at, val_loss
        ({}, None, ("", "", False, None)),
        ({"finished": "steps", "val_loss": 2.0}, None, ("steps", "", True, 2.0)),
        ({"finished": "steps", AWAITS_EVALUATION: True}, None, ("", "steps", False, None)),
        ({"val_loss": 2.0, AWAITS_EVALUATION: True}, None, ("", "", False, None)),
        ({}, {"finished": "steps", "val_loss": 1.5}, ("steps", "", True, 1.5)),
        ({"val_loss": 2.0}, {"measured": False, "val_loss": 1.5}, ("", "", False, 2.0)),
        ({}, {"due": "limit"}, ("", "limit", False, None)),
        ({}, {"went_on": True}, ("", "", True, None)),
    ],
)
def test_ends_are_those_of_the_score_or_else_of_the_manifest(tmp_path, metadata, score, expected):
    scores = Scores(tmp_path)
    scores.put(Score(2, "of another", True, 9.0, None, "elsewhere"))
    if score is not None:
        scores.put(Score(3, "abc", **{"measured": True, **score}))
    manifest = Manifest("step-00000003", 3, {}, metadata, "abc")
    assert (
        scores.end_of(manifest),
        scores.end_due_at(manifest),
        scores.has_ended_at(manifest),
        scores.val_loss(manifest),
    ) == expected
