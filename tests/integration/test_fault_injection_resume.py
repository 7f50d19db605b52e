"""A sample of `fault_injection.resume`, which stops everywhere; the whole of it is `long`."""

from __future__ import annotations

import json

import pytest
from fault_injection.resume import (
    FAULTY_STEP,
    ITEMS,
    Forgetting,
    Outcome,
    Stop,
    main,
    run,
)


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return run("fp16")


@pytest.fixture(scope="module")
def forgetting(reference, tmp_path_factory) -> Forgetting:
    return Forgetting("fp16", reference, tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize(
    "stops",
    [
        [
            Stop(20),  # the end of an epoch, where a validation is due as well
            Stop(FAULTY_STEP - 1),  # the rollback must pass the stop's own checkpoint over
            *(Stop(30, "step"), Stop(30, "validation")),  # a validation that is made up for is cut
            Stop(40, "crash"),
            Stop(60),
        ],
        [
            Stop(20, "evaluation"),  # the rollback goes to a state that owes a sample
            *(Stop(30, "evaluation"), Stop(30, "start")),  # a sample that is made up for is cut
        ],
        [Stop(step) for step in (4, 24, 25, FAULTY_STEP, 36, 38, 59)],
    ],
    ids=lambda stops: " ".join(f"{stop.instant}-{stop.step}" for stop in stops),
)
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(reference, stops):
    assert reference.differences(run("fp16", stops)) == []


def test_the_run_has_something_of_everything(reference):
    lines = [json.loads(line) for line in reference.lines["metrics.jsonl"]]
    assert sum("val/loss" in line for line in lines) == 12
    assert sum(line.get("train/loss") == "NaN" for line in lines) == 3  # the skipped windows
    assert sum(line.get("train/grad_norm") == "Infinity" for line in lines) > 1  # overflows
    assert len(reference.lines["samples.jsonl"]) == 6
    assert len(reference.leaves) > 300


# By default every third item, one of each handler and of each kind of state.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.long)
        for number, name in enumerate(ITEMS)
    ],
)
def test_forgetting_an_item_of_the_state_is_noticed(forgetting, name):
    assert bool(forgetting.forget(name)) != bool(ITEMS[name].unnoticed_because)


@pytest.mark.long
def test_half_of_the_campaign_in_one_precision(capsys):
    """All of it, in both, takes eight minutes: `python -m fault_injection.resume`."""
    assert main(["--precisions", "fp16", "--share", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] is True
    assert report["fp16"]["trials"]["step"] >= 25
    kinds = {"step", "evaluation", "save", "crash", "chain", "start", "validation"}
    assert kinds <= report["fp16"]["trials"].keys()


@pytest.mark.long
def test_a_chain_of_stops_in_the_other_precision():
    stops = [Stop(step) for step in (4, 20, 24, FAULTY_STEP - 1, FAULTY_STEP, 41, 59)]
    assert run("fp32").differences(run("fp32", stops)) == []
