"""Samples of `fault_injection.heal` and `.false_alarms`, and mutants that they must notice."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from fault_injection import false_alarms, heal
from fault_injection.heal import Tally

from fundamentallm.models.transformer import Transformer
from fundamentallm.training import loop
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.handlers import NaNRollback
from fundamentallm.training.recovery.diagnosis import StepReplayer
from fundamentallm.training.step import TrainStep


def wrong(report: dict) -> list[str]:
    return report["wrong"]


def test_faults_at_some_sites_are_caught_before_the_update_and_named():
    report = heal.detection(seed=1, share=0.02)
    assert wrong(report) == []
    assert report["caught"] == report["sites"] > 10


def test_some_damages_to_the_moments_are_never_committed():
    report = heal.state_damage(seed=1, share=0.015)
    assert wrong(report) == []
    assert report["damages"] > 5


def test_some_verdicts_are_right_and_the_healed_runs_exact():
    report = heal.verdicts(5, seed=1)
    assert wrong(report) == []
    assert report["healed runs compared"] == report["right"] == 5
    assert set(report["cause as verdict"]) == {f"{cause} as {cause}" for cause in heal.VERDICTS}


def test_some_lasting_faults_end_within_bounds():
    report = heal.bounds(2, seed=1)
    assert wrong(report) == []
    assert report["exit 20"] == report["plans"] == 2


def test_some_bundles_are_reproduced():
    report = heal.bundles(1, seed=1)
    assert wrong(report) == []
    assert report["reproduced"] == 1


def test_a_few_clean_steps_are_left_alone(capsys):
    assert false_alarms.main(["--seeds", "1", "--steps", "120"]) == 0
    assert json.loads(capsys.readouterr().out)["alarms"] == []


# ---------------------------------------------------------------------- guards taken out


def test_a_guard_that_does_not_judge_is_noticed(monkeypatch):
    monkeypatch.setattr(TrainStep, "_judge", lambda self: "")
    assert wrong(heal.detection(seed=1, share=0.005))


@pytest.mark.long
def test_a_refusal_that_touches_an_average_is_noticed(monkeypatch):
    refuse = TrainStep._refused

    def careless(self, output):
        for group in self.optimizer.state.values():
            group["exp_avg"].mul_(0.5)
        return refuse(self, output)

    monkeypatch.setattr(TrainStep, "_refused", careless)
    assert wrong(heal.detection(seed=1, share=0.02))


@pytest.mark.long
def test_hooks_that_name_the_last_bad_module_are_noticed(monkeypatch):
    def last_bad(self, *kinds):
        found = [r for r in self.statistics if r.is_bad and r.kind in kinds]
        return found[-1] if found else None

    monkeypatch.setattr("fundamentallm.training.recovery.diagnosis.Replay.first_bad", last_bad)
    assert wrong(heal.detection(seed=1, share=0.02))


@pytest.mark.long
def test_a_store_that_takes_damaged_states_is_noticed(monkeypatch):
    monkeypatch.setattr(snapshot, "check_usable", lambda *arguments: None)
    assert wrong(heal.state_damage(seed=1, share=0.02))


@pytest.mark.long
def test_replays_that_see_nothing_are_noticed(monkeypatch):
    monkeypatch.setattr(StepReplayer, "_any_bad", lambda self, replay: False)
    assert wrong(heal.verdicts(5, seed=1))


@pytest.mark.long
def test_random_numbers_drawn_by_a_refused_step_are_noticed(monkeypatch):
    monkeypatch.setattr(loop, "restore_generators", lambda state, device: None)
    assert wrong(heal.verdicts(5, seed=1))


def test_a_loss_scale_that_follows_a_refused_step_is_noticed(monkeypatch):
    plain = heal.Precision.update
    monkeypatch.setattr(heal.Precision, "update", lambda self, adapt=True: plain(self))
    tally = Tally()
    heal.judge("precision", 10_001, tally, Counter())
    assert tally.wrong


@pytest.mark.long
def test_limits_that_are_not_kept_are_noticed(monkeypatch):
    monkeypatch.setattr(NaNRollback, "_give_up", lambda *arguments: None)
    monkeypatch.setattr(heal, "MAX_STEPS_OF_A_PLAN", 100)
    assert wrong(heal.bounds(1, seed=1))


@pytest.mark.long
def test_a_replay_that_forgets_the_weights_is_noticed(monkeypatch):
    monkeypatch.setattr(Transformer, "load_state_dict", lambda self, state: None)
    assert wrong(heal.bundles(1, seed=1))


class Wary(false_alarms.Nearest):
    """Calls every second step a spike."""


def test_a_threshold_that_is_too_low_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(false_alarms, "Nearest", lambda: Wary(threshold=0.5))
    assert false_alarms.main(["--seeds", "1", "--steps", "120"]) == 1
    assert json.loads(capsys.readouterr().out)["alarms"]


@pytest.mark.long
def test_a_campaign_of_each_kind(capsys):
    """A quarter of the whole one, which takes ten minutes: `python -m fault_injection.heal`."""
    words = ["--share", "0.25", "--verdicts", "50", "--plans", "25", "--bundles", "5"]
    assert heal.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["detection"]["sites"] >= 100
    assert report["verdicts"]["faults"] == 50
    assert report["bounds"]["plans"] == 25
    assert report["bundles"]["reproduced"] == 5


@pytest.mark.long
def test_twenty_seeds_are_left_alone(capsys):
    assert false_alarms.main([]) == 0
