"""Where in the loop each handler acts: the drawing in events.py, proved by effects.

A probe looks at a handler's effect at one event before it acts and at one after.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from tests.losses import NaNAt

from fundamentallm.config.training import TrainingConfig
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import RecordingHandler, SpoiltGradient, tiny_loaders, tiny_model
from fundamentallm.training.handlers import (
    Checkpointing,
    EarlyStopping,
    Evaluation,
    Hooks,
    LossEMA,
    MetricsLog,
    NaNRollback,
    Perplexity,
    Progress,
    Samples,
    Schedule,
    Signals,
    TensorBoard,
    Throughput,
    WeightEMA,
)
from fundamentallm.training.schedulers import LinearWarmup
from fundamentallm.training.trainer import Trainer


def make_trainer(*handlers: Any, loss_fn: Any = None, **options: Any) -> Trainer:
    """Two steps an epoch."""
    torch.manual_seed(0)
    train, val = tiny_loaders(batch_size=20)
    fields = {"total_steps": 3, "eval_steps": 2, "log_steps": 1, "learning_rate": 1e-2}
    return Trainer(
        tiny_model(dropout=0.1),
        train,
        val,
        loss_fn=loss_fn,
        device="cpu",
        config=TrainingConfig(**{**fields, **options}),
        handlers=handlers,
    )


Seen = list[tuple[str, int, Any]]


def probe(trainer: Trainer, look: Callable[[], Any], *events: Any) -> Seen:
    """Note what `look` returns at each of the events; attached first, so before the handlers."""
    seen: Seen = []

    def note(engine: Trainer, name: str) -> None:
        seen.append((name, engine.state.iteration, look()))

    for event in events:
        trainer.add_event_handler(event, note, event.name)
    return seen


# ---------------------------------------------------------------- controllers of a step


def test_schedule_sets_the_rate_before_the_forward_pass():
    trainer = make_trainer()
    schedule = LinearWarmup(trainer.optimizer, warmup_steps=4)
    rates: list[float] = []
    trainer.model.register_forward_pre_hook(
        lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"])
    )
    seen = probe(
        trainer, lambda: trainer.optimizer.param_groups[0]["lr"], Events.GET_BATCH_COMPLETED
    )
    Schedule(schedule).attach(trainer)
    trainer.run()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075])
    # Not before ITERATION_STARTED: the batch is there, the rate is still that of the last step.
    assert [rate for _, _, rate in seen] == pytest.approx([0.01, 0.0025, 0.005])


def test_weight_ema_follows_the_applied_update():
    ema = WeightEMA()
    trainer = make_trainer()
    seen = probe(
        trainer,
        lambda: ema.num_updates,
        TrainingEvents.FLLM_GRADIENTS_READY,
        TrainingEvents.FLLM_OPTIMIZER_STEPPED,
        Events.ITERATION_COMPLETED,
    )
    ema.attach(trainer)
    trainer.run()
    assert [count for _, _, count in seen] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_nan_rollback_acts_between_two_inner_runs(tmp_path):
    recording = RecordingHandler()
    trainer = make_trainer(recording, NaNRollback(), Checkpointing(tmp_path), SpoiltGradient(2))
    trainer.run()
    at = recording.events.index(("FLLM_STEP_REJECTED", 2))
    assert recording.events[at : at + 10] == [
        ("FLLM_STEP_REJECTED", 2),
        ("FLLM_INCIDENT_DETECTED", 2),
        # Transient, as far as a replay can tell: the step is taken once more.
        ("FLLM_MICRO_BATCH_COMPLETED", 2),
        ("FLLM_GRADIENTS_READY", 2),
        ("FLLM_STEP_REJECTED", 2),
        ("FLLM_INCIDENT_DETECTED", 2),
        ("ITERATION_COMPLETED", 2),
        ("TERMINATE", 2),
        ("FLLM_ROLLED_BACK", 0),
        ("STARTED", 0),
    ]


def test_signals_listen_for_the_whole_run_and_no_longer():
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer()
    seen = probe(
        trainer,
        lambda: signal.getsignal(signal.SIGTERM) is before,
        TrainingEvents.FLLM_RUN_STARTED,
        TrainingEvents.FLLM_CHECKPOINT_DUE,
        Events.STARTED,
        Events.COMPLETED,
        TrainingEvents.FLLM_RUN_ENDED,
    )
    Signals().attach(trainer)
    trainer.run()
    names = [name for name, _, _ in seen]
    # The checkpoint of step 0 comes before STARTED and is guarded already.
    assert names.index("FLLM_CHECKPOINT_DUE") < names.index("STARTED")
    untouched = [name for name, _, mine in seen if mine]
    assert untouched == ["FLLM_RUN_STARTED"]
    assert names[-1] == "FLLM_RUN_ENDED"
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- producers of metrics

PRODUCERS = {
    LossEMA: "train/loss_ema",
    Perplexity: "train/perplexity",
    Throughput: "train/tokens_per_second",
}


@pytest.mark.parametrize("kind", PRODUCERS)
def test_producers_write_between_the_step_and_metrics_ready(kind):
    trainer = make_trainer()
    key = PRODUCERS[kind]
    seen = probe(
        trainer,
        lambda: trainer.state.metrics.pop(key, None),
        Events.ITERATION_COMPLETED,
        TrainingEvents.FLLM_METRICS_READY,
    )
    kind().attach(trainer)
    trainer.run()
    assert [name for name, _, value in seen if value is not None] == ["FLLM_METRICS_READY"] * 3


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["ema", "throughput", "logs", "progress"]))
)
def test_consumers_see_all_metrics_of_their_step_in_any_order_of_attachment(
    tmp_path, caplog, order
):
    makers: dict[str, Callable[[], Any]] = {
        "ema": LossEMA,
        "throughput": Throughput,
        "logs": lambda: MetricsLog(tmp_path),
        "progress": lambda: Progress(0.0, io.StringIO()),
    }
    trainer = make_trainer(*(makers[name]() for name in order), total_steps=2)
    Schedule(trainer.scheduler).attach(trainer)
    with caplog.at_level(logging.INFO, "fundamentallm"):
        trainer.run()
    history = trainer.history
    assert len(history.loss_ema) == len(history.throughput_tokens_per_sec) == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/loss_ema"] for r in records] == history.loss_ema
    assert [r["train/tokens_per_second"] for r in records] == history.throughput_tokens_per_sec
    messages = [record.getMessage() for record in caplog.records]
    for step, message in enumerate(messages, 1):
        assert message.startswith(f"step {step}/2: loss {history.train_loss[step - 1]:.4f}")
        assert f"ema {history.loss_ema[step - 1]:.4f}" in message
    assert len(messages) == 2


# ---------------------------------------------------------------- consumers


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_logs_and_progress_read_at_metrics_ready(tmp_path, caplog):
    trainer = make_trainer()
    Schedule(trainer.scheduler).attach(trainer)
    events = (
        Events.ITERATION_COMPLETED,
        TrainingEvents.FLLM_METRICS_READY,
        TrainingEvents.FLLM_EVALUATION_DUE,
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        Events.EPOCH_COMPLETED,
    )
    lines = probe(
        trainer,
        lambda: (
            count_lines(tmp_path / "metrics.jsonl"),
            sum("step" in r.getMessage() and "loss" in r.getMessage() for r in caplog.records),
        ),
        *events,
    )
    for handler in (MetricsLog(tmp_path), Progress(0.0, io.StringIO())):
        handler.attach(trainer)
    Evaluation().attach(trainer)
    # Not Evaluation's own line: only Progress is counted.
    logging.getLogger("fundamentallm.training.handlers.evaluation").addFilter(_nothing)
    try:
        with caplog.at_level(logging.INFO, "fundamentallm"):
            trainer.run()
    finally:
        logging.getLogger("fundamentallm.training.handlers.evaluation").removeFilter(_nothing)
    assert [(name, step, seen) for name, step, seen in lines if step == 2] == [
        ("ITERATION_COMPLETED", 2, (1, 1)),
        ("FLLM_METRICS_READY", 2, (1, 1)),
        ("FLLM_EVALUATION_DUE", 2, (2, 2)),
        ("FLLM_EVALUATION_COMPLETED", 2, (2, 2)),
        ("EPOCH_COMPLETED", 2, (3, 2)),
    ]


def _nothing(record: logging.LogRecord) -> bool:
    return False


def test_tensorboard_writes_at_metrics_ready_and_after_an_evaluation(tmp_path, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    written: list[bytes] = []
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: written.append(data))

    def tags() -> tuple[int, int]:
        return (
            sum(b"train/loss" in data for data in written),
            sum(b"val/loss" in data for data in written),
        )

    trainer = make_trainer()
    seen = probe(
        trainer,
        tags,
        TrainingEvents.FLLM_METRICS_READY,
        TrainingEvents.FLLM_EVALUATION_DUE,
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        Events.EPOCH_COMPLETED,
    )
    TensorBoard(tmp_path).attach(trainer)
    Evaluation().attach(trainer)
    trainer.run()
    assert [(name, value) for name, step, value in seen if step == 2] == [
        ("FLLM_METRICS_READY", (1, 0)),
        ("FLLM_EVALUATION_DUE", (2, 0)),
        ("FLLM_EVALUATION_COMPLETED", (2, 0)),
        ("EPOCH_COMPLETED", (2, 1)),
    ]


def test_evaluation_runs_between_its_two_events():
    trainer = make_trainer()
    inside: list[str] = []
    current: list[str] = []

    def enter(engine: Trainer, name: str) -> None:
        current[:] = [name]

    for event in (
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        TrainingEvents.FLLM_EVALUATION_STARTED,
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
    ):
        trainer.add_event_handler(event, enter, event.name)
    trainer.model.register_forward_pre_hook(
        lambda model, _: inside.append(f"{current[0]} {'train' if model.training else 'eval'}")
    )
    Evaluation().attach(trainer)
    trainer.run()
    assert sorted(set(inside)) == ["FLLM_EVALUATION_STARTED eval", "ITERATION_STARTED train"]


def test_samples_are_written_after_the_evaluation_and_before_the_run_goes_on(tmp_path):
    trainer = make_trainer()
    path = tmp_path / "samples.jsonl"
    seen = probe(
        trainer,
        lambda: count_lines(path),
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        TrainingEvents.FLLM_RUN_ENDED,
    )
    Samples(CharacterTokenizer("\nabcdefghij"), tmp_path, num_tokens=3).attach(trainer)
    Evaluation().attach(trainer)
    trainer.run()
    assert [entry for entry in seen if entry[1] > 0] == [
        ("FLLM_EVALUATION_COMPLETED", 2, 0),
        ("EPOCH_COMPLETED", 2, 1),
        ("FLLM_EVALUATION_COMPLETED", 3, 1),
        ("FLLM_RUN_ENDED", 3, 2),
    ]


def test_early_stopping_judges_behind_the_checkpoint_and_before_the_epoch_ends():
    trainer = make_trainer(total_steps=20)
    seen = probe(
        trainer,
        lambda: bool(trainer.finished),
        TrainingEvents.FLLM_CHECKPOINT_DUE,
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        Events.EPOCH_COMPLETED,
    )
    EarlyStopping(patience=1, min_delta=100.0).attach(trainer)
    Evaluation().attach(trainer)
    trainer.run()
    # The first loss improves on infinity, the second does not by 100 nats.
    assert seen == [
        ("FLLM_CHECKPOINT_DUE", 0, False),
        ("FLLM_CHECKPOINT_DUE", 2, False),
        ("FLLM_EVALUATION_COMPLETED", 2, False),
        ("EPOCH_COMPLETED", 2, False),
        ("FLLM_CHECKPOINT_DUE", 4, False),
        ("FLLM_EVALUATION_COMPLETED", 4, False),
        ("EPOCH_COMPLETED", 4, True),
    ]


def test_checkpointing_saves_between_its_two_events(tmp_path):
    trainer = make_trainer()
    seen = probe(
        trainer,
        lambda: len(list(tmp_path.glob("step-*"))),
        TrainingEvents.FLLM_EVALUATION_COMPLETED,
        TrainingEvents.FLLM_CHECKPOINT_DUE,
        TrainingEvents.FLLM_CHECKPOINT_SAVED,
        Events.EPOCH_COMPLETED,
    )
    Checkpointing(tmp_path).attach(trainer)
    Evaluation().attach(trainer)
    trainer.run()
    assert seen[:6] == [
        ("FLLM_CHECKPOINT_DUE", 0, 0),
        ("FLLM_CHECKPOINT_SAVED", 0, 1),
        ("FLLM_CHECKPOINT_DUE", 2, 1),
        ("FLLM_CHECKPOINT_SAVED", 2, 2),
        ("FLLM_EVALUATION_COMPLETED", 2, 2),
        ("EPOCH_COMPLETED", 2, 2),
    ]


def test_hooks_are_called_in_the_order_of_the_loop(tmp_path):
    calls: list[tuple[str, int]] = []

    def hook(name: str) -> Callable[[Trainer, Any], None]:
        return lambda trainer, _: calls.append((name, trainer.state.iteration))

    hooks = Hooks(hook("epoch"), hook("validation"), hook("checkpoint"))
    make_trainer(hooks, Checkpointing(tmp_path), Evaluation()).run()
    assert calls == [
        ("checkpoint", 0),
        ("checkpoint", 2),
        ("validation", 2),
        ("epoch", 2),
        ("checkpoint", 3),
        ("validation", 3),
    ]


# ---------------------------------------------------------------- the whole


def test_the_relay_is_last_even_behind_a_handler_that_came_in_the_run():
    trainer = make_trainer()

    def late(engine: Trainer) -> None:
        engine.state.metrics["train/late"] = engine.state.iteration

    trainer.add_event_handler(
        Events.STARTED,
        lambda engine: engine.add_event_handler(Events.ITERATION_COMPLETED, late),
    )
    seen = probe(
        trainer,
        lambda: trainer.state.metrics.get("train/late"),
        TrainingEvents.FLLM_METRICS_READY,
    )
    trainer.run()
    assert [value for _, _, value in seen] == [1, 2, 3]


def test_the_relay_is_last_behind_a_filtered_handler():
    trainer = make_trainer()
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=2),
        lambda engine: engine.state.metrics.update({"train/second": engine.state.iteration}),
    )
    seen = probe(
        trainer,
        lambda: trainer.state.metrics.get("train/second"),
        TrainingEvents.FLLM_METRICS_READY,
    )
    trainer.run()
    assert [value for _, _, value in seen] == [None, 2, 2]


def test_a_run_of_all_handlers_is_the_same_in_reverse_order_of_attachment(tmp_path):
    results = []
    for name, reverse in (("forth", False), ("back", True)):
        directory = tmp_path / name
        directory.mkdir()
        handlers = [
            LossEMA(),
            Perplexity(),
            WeightEMA(0.9),
            Evaluation(),
            MetricsLog(directory),
            Samples(CharacterTokenizer("\nabcdefghij"), directory, num_tokens=5),
            EarlyStopping(patience=1),
            NaNRollback(),
            Checkpointing(directory / "checkpoints"),
        ]
        trainer = make_trainer(
            *(reversed(handlers) if reverse else handlers), loss_fn=NaNAt(5), total_steps=9
        )
        trainer.run()
        records = [
            {k: v for k, v in json.loads(line).items() if k != "elapsed_seconds"}
            for line in (directory / "metrics.jsonl").read_text().splitlines()
        ]
        results.append(
            (
                records,
                (directory / "samples.jsonl").read_text(),
                sorted(p.name for p in (directory / "checkpoints").iterdir()),
                [p.detach().clone() for p in trainer.model.parameters()],
            )
        )
    assert results[0][:3] == results[1][:3]
    assert all(torch.equal(a, b) for a, b in zip(results[0][3], results[1][3], strict=True))


# DATALOADER_STOP_ITERATION is Ignite's way of saying that an epoch's data came to an end.
EXPECTED = [
    ("FLLM_RUN_STARTED", 0),
    ("FLLM_CHECKPOINT_DUE", 0),
    ("FLLM_CHECKPOINT_SAVED", 0),
    ("STARTED", 0),
    ("EPOCH_STARTED", 0),
    ("GET_BATCH_STARTED", 0),
    ("GET_BATCH_COMPLETED", 0),
    ("ITERATION_STARTED", 1),
    ("FLLM_MICRO_BATCH_COMPLETED", 1),
    ("FLLM_GRADIENTS_READY", 1),
    ("FLLM_OPTIMIZER_STEPPED", 1),
    ("ITERATION_COMPLETED", 1),
    ("FLLM_METRICS_MEASURED", 1),
    ("FLLM_METRICS_READY", 1),
    ("FLLM_LOG_DUE", 1),
    ("GET_BATCH_STARTED", 1),
    ("GET_BATCH_COMPLETED", 1),
    ("ITERATION_STARTED", 2),
    ("FLLM_MICRO_BATCH_COMPLETED", 2),
    ("FLLM_GRADIENTS_READY", 2),
    ("FLLM_OPTIMIZER_STEPPED", 2),
    ("ITERATION_COMPLETED", 2),
    ("FLLM_METRICS_MEASURED", 2),
    ("FLLM_METRICS_READY", 2),
    ("FLLM_LOG_DUE", 2),
    ("FLLM_CHECKPOINT_DUE", 2),
    ("FLLM_CHECKPOINT_SAVED", 2),
    ("FLLM_EVALUATION_DUE", 2),
    ("FLLM_EVALUATION_STARTED", 2),
    ("FLLM_EVALUATION_COMPLETED", 2),
    ("EPOCH_COMPLETED", 2),
    ("EPOCH_STARTED", 2),
    ("GET_BATCH_STARTED", 2),
    ("DATALOADER_STOP_ITERATION", 2),
    ("GET_BATCH_COMPLETED", 2),
    ("ITERATION_STARTED", 3),
    ("FLLM_MICRO_BATCH_COMPLETED", 3),
    ("FLLM_GRADIENTS_READY", 3),
    ("FLLM_STEP_REJECTED", 3),
    ("FLLM_INCIDENT_DETECTED", 3),
    ("FLLM_MICRO_BATCH_COMPLETED", 3),
    ("FLLM_GRADIENTS_READY", 3),
    ("FLLM_STEP_REJECTED", 3),
    ("FLLM_INCIDENT_DETECTED", 3),
    ("ITERATION_COMPLETED", 3),
    ("TERMINATE", 3),
    ("FLLM_ROLLED_BACK", 2),
    ("FLLM_EVALUATION_DUE", 2),
    ("FLLM_EVALUATION_STARTED", 2),
    ("FLLM_EVALUATION_COMPLETED", 2),
    ("STARTED", 2),
    ("EPOCH_STARTED", 2),
    ("GET_BATCH_STARTED", 2),
    ("GET_BATCH_COMPLETED", 2),
    ("ITERATION_STARTED", 3),
    ("FLLM_STEP_REJECTED", 3),
    ("ITERATION_COMPLETED", 3),
    ("FLLM_METRICS_MEASURED", 3),
    ("FLLM_METRICS_READY", 3),
    ("FLLM_LOG_DUE", 3),
    ("FLLM_CHECKPOINT_DUE", 3),
    ("FLLM_CHECKPOINT_SAVED", 3),
    ("FLLM_EVALUATION_DUE", 3),
    ("FLLM_EVALUATION_STARTED", 3),
    ("FLLM_EVALUATION_COMPLETED", 3),
    ("TERMINATE", 3),
    ("COMPLETED", 3),
    ("FLLM_RUN_ENDED", 3),
]


def test_the_full_sequence_of_a_run_with_an_evaluation_and_a_rollback(tmp_path):
    recording = RecordingHandler()
    make_trainer(
        recording, NaNRollback(), Evaluation(), Checkpointing(tmp_path), SpoiltGradient(3)
    ).run()
    assert recording.events == EXPECTED
