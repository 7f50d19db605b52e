"""Finite outliers: what is seen, what each policy does, and what a checkpoint remembers."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from ignite.engine import Events

from fundamentallm.config.training import TrainingConfig
from fundamentallm.errors import ConfigError, NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import RecordingHandler, tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import Checkpointing, NaNRollback, Spikes, WeightEMA
from fundamentallm.training.losses import compute_loss
from fundamentallm.training.recovery.diagnosis import Incident
from fundamentallm.training.trainer import Trainer

OPTIONS: dict[str, Any] = {"window": 16, "needed": 8, "threshold": 8.0, "patience": 3}


class Spiking:
    """Multiplies the loss of chosen steps; the gradient's norm grows with it."""

    is_nll = True
    trainer: Trainer

    def __init__(self, *steps: int, factor: float = 50.0) -> None:
        self.steps = steps
        self.factor = factor

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "sum") -> Any:
        loss = compute_loss(logits, targets, reduction)
        return loss * self.factor if self.trainer.state.iteration in self.steps else loss


def make_trainer(loss_fn: Spiking, *handlers: Any, total_steps: int = 24) -> Trainer:
    torch.manual_seed(3)
    trainer = Trainer(
        tiny_model(dropout=0.1),
        *tiny_loaders(),
        loss_fn=loss_fn,
        device="cpu",
        config=TrainingConfig(
            total_steps=total_steps, eval_steps=4, learning_rate=1e-3, warmup_steps=0
        ),
        handlers=handlers,
    )
    loss_fn.trainer = trainer
    return trainer


def run(trainer: Trainer) -> list[Incident]:
    incidents: list[Incident] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_INCIDENT_DETECTED, lambda: incidents.append(trainer.state.incident)
    )
    trainer.run()
    return incidents


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_a_calm_run_has_no_spikes():
    assert run(make_trainer(Spiking(), Spikes(**OPTIONS))) == []


def test_a_reported_spike_changes_nothing_and_never_enters_the_window():
    spikes = Spikes(**OPTIONS)
    trainer = make_trainer(Spiking(12), spikes)
    (incident,) = run(trainer)
    assert (incident.step, incident.verdict, incident.decision) == (12, "spike", "reported")
    assert "loss" in incident.fault
    assert "gradient norm" in incident.fault
    assert trainer.state.skipped_steps == 0
    assert max(spikes.losses.state_dict()["values"]) < 10.0
    bare = make_trainer(Spiking(12))
    bare.run()
    assert all(map(torch.equal, weights(trainer), weights(bare)))


def test_a_lasting_change_is_said_twice_and_then_is_the_level():
    spikes = Spikes(**OPTIONS)
    incidents = run(make_trainer(Spiking(*range(12, 25)), spikes))
    assert [(i.step, i.decision) for i in incidents] == [
        (12, "reported"),
        (14, "reported, and taken for the level from now on"),
    ]
    assert min(spikes.losses.state_dict()["values"]) > 50.0


class Rising(Spiking):
    """A loss that grows a little with every step, from a step on."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "sum") -> Any:
        steps = self.trainer.state.iteration - self.steps[0]
        return compute_loss(logits, targets, reduction) * (1.0 + max(0, steps) * self.factor)


def test_a_slow_rise_is_seen_though_no_step_stands_out():
    spikes = Spikes(**{**OPTIONS, "threshold": 50.0})
    trainer = make_trainer(Rising(12, factor=0.03), spikes, total_steps=60)
    first, *_ = incidents = run(trainer)
    assert all("has risen from" in i.fault and "stands" not in i.fault for i in incidents)
    assert 12 < first.step < 30
    assert run(make_trainer(Rising(12, factor=0.0), Spikes(**OPTIONS), total_steps=60)) == []
    deaf = Spikes(**{**OPTIONS, "threshold": 50.0}, rise=None)
    assert run(make_trainer(Rising(12, factor=0.03), deaf, total_steps=60)) == []


def test_a_loss_twice_that_of_guessing_is_a_spike_from_the_second_step_on():
    (incident,) = run(make_trainer(Spiking(2, factor=2.5), Spikes(**OPTIONS)))
    assert incident.step == 2
    assert run(make_trainer(Spiking(1, factor=2.5), Spikes(**OPTIONS))) == []
    assert run(make_trainer(Spiking(2, factor=1.5), Spikes(**OPTIONS))) == []


def test_a_rise_leads_back(tmp_path):
    trainer = make_trainer(
        Rising(12, factor=0.03),
        Spikes("reject", **{**OPTIONS, "threshold": 50.0}),
        NaNRollback(healthy_after=2, max_per_region=2),
        Checkpointing(tmp_path),
        total_steps=60,
    )
    with pytest.raises(NumericalError, match="after 2 rollbacks in this region"):
        run(trainer)
    assert trainer.state.rollbacks == 2


def test_a_rejected_spike_leaves_weights_moments_and_averages_alone(tmp_path):
    ema = WeightEMA()
    trainer = make_trainer(Spiking(12), Spikes("reject", **OPTIONS), NaNRollback(), ema)
    before: list[Any] = []

    def note() -> None:
        if trainer.state.iteration == 12:
            moments = trainer.optimizer.state[next(iter(trainer.model.parameters()))]
            before.append(
                [
                    *weights(trainer),
                    *(average.clone() for average in ema.averages.values()),
                    moments["exp_avg"].clone(),
                    moments["exp_avg_sq"].clone(),
                ]
            )

    trainer.add_event_handler(TrainingEvents.FLLM_GRADIENTS_READY, note)
    trainer.add_event_handler(TrainingEvents.FLLM_STEP_REJECTED, note)
    (incident,) = run(trainer)
    assert incident.verdict == "spike"
    assert all(map(torch.equal, *before))
    assert trainer.interventions.skipped == {12}
    told = make_trainer(Spiking(12), Spikes("reject", **OPTIONS), NaNRollback(), WeightEMA())
    told.interventions.skip([12])
    assert run(told) == []
    assert all(map(torch.equal, weights(trainer), weights(told)))


def test_the_evidence_of_a_refused_spike_names_its_worst_sequences(tmp_path):
    rollback = NaNRollback(run_dir=tmp_path)
    trainer = make_trainer(Spiking(12), Spikes("reject", **OPTIONS), rollback)
    expected: list[float] = []

    def measure() -> None:
        if trainer.state.iteration == 12:
            trainer.model.eval()
            (batch,) = trainer.window.micro_batches
            logits = trainer.model(batch["input_ids"])
            rows = zip(logits, batch["target_ids"], strict=True)
            expected.extend(float(torch.nn.functional.cross_entropy(*row).detach()) for row in rows)
            trainer.model.train()

    trainer.add_event_handler(TrainingEvents.FLLM_STEP_REJECTED, measure)
    run(trainer)
    (directory,) = (tmp_path / "incidents").iterdir()
    (evidence,) = (directory / "evidence").iterdir()
    state = CheckpointStore(evidence.parent).read(evidence)
    assert state["model"] == {}
    window = trainer.train_loader.window_at(*divmod(11, len(trainer.train_loader)))
    assert torch.equal(state["window"][0]["input_ids"], window.micro_batches[0]["input_ids"])
    assert state["generators"].keys() == {"torch"}
    report = json.loads((directory / "report.json").read_text())
    rows = [entry["row"] for entry in report["bad_sequences"]]
    assert rows == sorted(range(len(expected)), key=lambda row: -expected[row])[:3]
    offsets = [entry["corpus_offset"] for entry in report["bad_sequences"]]
    steps = len(trainer.train_loader)
    assert offsets == [trainer.train_loader.rows_at(*divmod(11, steps))[row] for row in rows]


def test_what_stands_out_is_said_in_the_log_line_and_in_the_report(tmp_path, caplog):
    rollback = NaNRollback(run_dir=tmp_path)
    trainer = make_trainer(Spiking(12), Spikes("reject", **OPTIONS), rollback)
    (incident,) = run(trainer)
    report = json.loads(next((tmp_path / "incidents").glob("*/report.json")).read_text())
    for text in (str(incident), report["fault"], caplog.text):
        assert "deviations above those of the last" in text
        assert "gradient norm" in text


@pytest.mark.parametrize("cause", ["policy", "patience", "rise"])
def test_a_divergence_by_spikes_has_its_modules_and_sequences(tmp_path, cause):
    losses: dict[str, Spiking] = {
        "policy": Spiking(13),
        "patience": Spiking(*range(13, 17)),
        "rise": Rising(12, factor=0.03),
    }
    options = {**OPTIONS, **({"threshold": 50.0} if cause == "rise" else {})}
    trainer = make_trainer(
        losses[cause],
        Spikes("rollback" if cause == "policy" else "reject", **options),
        NaNRollback(healthy_after=2, neighbours=0, max_rollbacks=1, run_dir=tmp_path),
        Checkpointing(tmp_path / "checkpoints"),
        total_steps=60 if cause == "rise" else 24,
    )
    with contextlib.suppress(NumericalError):
        run(trainer)
    directory = next((tmp_path / "incidents").glob("*-divergence"))
    report = json.loads((directory / "report.json").read_text())
    assert len(report["bad_sequences"]) == 3
    assert all(entry["token_ids"] for entry in report["bad_sequences"])
    assert {"output", "gradient"} <= {reading["kind"] for reading in report["modules"]}
    assert report["first_bad"] == {"forward": None, "backward": None}
    assert ("has risen" if cause == "rise" else "deviations above") in report["fault"]
    (evidence,) = (directory / "evidence").iterdir()
    assert CheckpointStore(evidence.parent).read(evidence)["model"].keys() == (
        trainer.model.state_dict().keys()
    )


def test_rejections_in_a_row_lead_back(tmp_path):
    rollback = NaNRollback(healthy_after=2, neighbours=0)
    trainer = make_trainer(
        Spiking(*range(13, 17)), Spikes("reject", **OPTIONS), rollback, Checkpointing(tmp_path)
    )
    incidents = run(trainer)
    assert [i.verdict for i in incidents] == ["spike"] * 3 + ["divergence"]
    assert trainer.state.rollbacks == 1
    assert trainer.finished
    assert trainer.interventions.skipped == {13, 14, 15, 16}


def test_the_policy_rollback_goes_back_at_once_and_ends_within_its_bounds(tmp_path):
    rollback = NaNRollback(healthy_after=2, neighbours=0)
    trainer = make_trainer(
        Spiking(13), Spikes("rollback", **OPTIONS), rollback, Checkpointing(tmp_path / "once")
    )
    (incident,) = run(trainer)
    assert incident.verdict == "divergence"
    assert "going back to step 10" in incident.decision
    told = make_trainer(
        Spiking(13), Spikes("rollback", **OPTIONS), NaNRollback(), Checkpointing(tmp_path / "told")
    )
    told.interventions.load_state_dict(trainer.interventions.state_dict())
    assert run(told) == []
    assert all(map(torch.equal, weights(trainer), weights(told)))

    lasting = make_trainer(
        Spiking(*range(13, 25)),
        Spikes("rollback", **OPTIONS),
        NaNRollback(healthy_after=2, neighbours=0),
        Checkpointing(tmp_path / "lasting"),
    )
    with pytest.raises(NumericalError):
        run(lasting)
    assert lasting.state.rollbacks == 3


def test_a_run_whose_data_spike_for_ever_is_given_up():
    trainer = make_trainer(
        Spiking(*range(10, 400, 3)),
        Spikes("reject", **OPTIONS),
        NaNRollback(max_spikes=4),
        total_steps=400,
    )
    with pytest.raises(NumericalError, match="after 4 spikes"):
        run(trainer)
    assert trainer.interventions.skipped == {10, 13, 16, 19}


def test_a_resumed_run_remembers_what_was_usual(tmp_path):
    reference = make_trainer(Spiking(14), Spikes(**OPTIONS), Checkpointing(tmp_path / "one"))
    (expected,) = run(reference)
    stopped = make_trainer(
        Spiking(14), Spikes(**OPTIONS), Checkpointing(tmp_path / "two"), total_steps=24
    )
    stopped.add_event_handler(
        Events.ITERATION_STARTED,
        lambda: stopped.interrupt_run(15) if stopped.state.iteration == 13 else None,
    )
    assert run(stopped) == []
    resumed = make_trainer(Spiking(14), Spikes(**OPTIONS), Checkpointing(tmp_path / "two"))
    resumed.resume(tmp_path / "two" / "step-00000013")
    (incident,) = run(resumed)
    assert incident.fault == expected.fault
    assert resumed.attached["spikes"].state_dict() == reference.attached["spikes"].state_dict()


def test_what_is_not_finite_is_left_to_the_guard():
    recording = RecordingHandler()
    spikes = Spikes("reject", **OPTIONS)
    trainer = make_trainer(Spiking(12, factor=float("nan")), spikes, NaNRollback(), recording)
    incidents = run(trainer)
    assert [i.verdict for i in incidents] == ["divergence"]
    assert spikes.in_a_row == 0


def test_a_policy_that_nobody_carries_out_is_refused():
    with pytest.raises(ConfigError, match="nan_rollback"):
        make_trainer(Spiking(), Spikes("reject")).run()


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"patience": 0}, {"needed": 1}])
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Spikes(**options)
