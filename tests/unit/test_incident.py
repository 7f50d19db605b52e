"""The parts of an incident's report, each against what is known beforehand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fundamentallm.compute.distributed import Ranks
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.training.epochs import Epochs
from fundamentallm.training.recovery import incident as module
from fundamentallm.training.recovery.diagnosis import BadRow, Diagnosis, Incident, Replay, read
from fundamentallm.training.recovery.incident import (
    bad_sequences,
    corpus_place,
    environment,
    first_bad,
    plain,
    window_sequences,
)

TIME, ROWS, MICRO_BATCHES = 4, 2, 3


def trainer(rank: int = 0, world_size: int = 1, step: int = 2, **options: Any) -> Any:
    """Return what a report reads of a run whose tokens are their own offsets."""
    batching = Batching(TIME, ROWS, MICRO_BATCHES, seed=5, rank=rank, world_size=world_size)
    loader = TokenWindowLoader(np.arange(117), batching)
    lengths = [len(loader)] * len(options.get("cuts", []))
    epochs = Epochs(len(loader), lengths=lengths, **options)
    return SimpleNamespace(
        train_loader=loader,
        ranks=Ranks(rank, world_size),
        epochs=epochs,
        state=SimpleNamespace(iteration=step),
        window=loader.window_at(*epochs.position(step - 1)),
    )


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return "-".join(map(str, ids))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("step", "cuts"), [(1, []), (3, []), (6, []), (4, [(1, 1)])])
def test_the_place_of_a_sequence_is_that_of_its_first_token(rank, step, cuts):
    run = trainer(rank, 2, step, cuts=cuts)
    seen = 0
    for number, batch in enumerate(run.window.micro_batches):
        for row, ids in enumerate(batch["input_ids"].tolist()):
            if (batch["target_ids"][row] >= 0).any():
                assert corpus_place(run, number, row) == {"corpus_offset": ids[0]}
                seen += 1
    assert seen


def test_a_row_behind_the_end_of_the_epoch_has_no_place():
    run = trainer(step=5)  # 29 sequences, 6 a step: the last step has five
    assert corpus_place(run, 2, 0)["corpus_offset"] is not None
    assert corpus_place(run, 2, 1) == {"corpus_offset": None}


def test_a_loader_that_does_not_tell_has_no_places():
    run = trainer()
    run.train_loader = [run.window]
    assert corpus_place(run, 0, 0) == {"corpus_offset": None}


def test_bad_sequences_are_shown_with_their_tokens_and_text():
    run = trainer()
    ids = run.window.micro_batches[2]["input_ids"][1].tolist()
    found = Diagnosis("data", Replay(), [BadRow(micro_batch=2, row=1, position=3)])
    (shown,) = bad_sequences(Incident(2, "", "data", "", found), run, Decoder())
    assert shown == {
        "first_bad_position": 3,
        "micro_batch": 2,
        "row": 1,
        "corpus_offset": ids[0],
        "token_ids": ids,
        "text": "-".join(map(str, ids)),
    }
    assert bad_sequences(Incident(2, "", "state", ""), run, None) == []


@pytest.mark.parametrize(("most", "shown"), [(TIME * 6, 6), (TIME * 6 - 1, 5), (TIME, 1), (3, 0)])
def test_the_sequences_of_a_step_are_shown_up_to_a_number_of_tokens(monkeypatch, most, shown):
    monkeypatch.setattr(module, "MAX_TOKENS_SHOWN", most)
    run = trainer()
    every = [
        (number, row, ids)
        for number, batch in enumerate(run.window.micro_batches)
        for row, ids in enumerate(batch["input_ids"].tolist())
    ]
    found = window_sequences(run, None)
    assert [(it["micro_batch"], it["row"], it["token_ids"]) for it in found] == every[:shown]
    assert all(it["text"] is None and it["corpus_offset"] == it["token_ids"][0] for it in found)


def test_a_report_shows_a_quarter_of_a_million_tokens():
    assert module.MAX_TOKENS_SHOWN == 262_144


def test_the_place_in_a_mixture_has_its_source():
    run = trainer(step=2)
    run.train_loader = SimpleNamespace(
        batch_size=ROWS, rows_at=lambda epoch, step: np.array([[3, 40], [0, 50], [7, 60]])
    )
    assert corpus_place(run, 0, 1) == {"corpus_offset": 50, "source": 0}
    assert corpus_place(run, 1, 0) == {"corpus_offset": 60, "source": 7}


def test_the_first_bad_modules_are_the_first_of_each_pass():
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    replay = Replay(
        statistics=[
            read("a", "output", one),
            read("b", "output", nan),
            read("c", "output", nan),
            read("c", "gradient", one),
            read("b", "gradient", nan),
        ]
    )
    found = first_bad(Diagnosis("data", replay))
    assert (found["forward"]["module"], found["forward"]["kind"]) == ("b", "output")
    assert (found["backward"]["module"], found["backward"]["kind"]) == ("b", "gradient")
    assert found["forward"]["what"] == str(replay.statistics[1])
    assert first_bad(None) == {"forward": None, "backward": None}
    assert first_bad(Diagnosis("transient", Replay())) == {"forward": None, "backward": None}


def test_values_become_strict_json():
    value = {"a": [math.nan, math.inf, -math.inf, 1.5], 2: ("text", None, True, 3)}
    expected = {"a": ["NaN", "Infinity", "-Infinity", 1.5], "2": ["text", None, True, 3]}
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected


def test_the_environment_holds_no_variable_beyond_its_list(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SECRET", "token")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = environment()
    assert found["variables"]["RANK"] == "3"
    assert not {"SECRET", "WORLD_SIZE"} & found["variables"].keys()
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
