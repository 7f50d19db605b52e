"""Two real processes over gloo against one: the same gradients, the same decisions, no hang.

Both processes start once, run every scenario in turn and leave their results as JSON; the tests
read those. Floats survive JSON bit for bit. Run as a script this file is one of the two ranks.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.handlers import PiecewiseLinear
from ignite.metrics import Accuracy, Average, Loss, Metric, TopKCategoricalAccuracy
from tests import forked
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundamentallm.compute.distributed import Ranks, join_ranks, leave_ranks
from fundamentallm.config import TrainingConfig
from fundamentallm.data.batch import Window, count_valid
from fundamentallm.data.loaders import Batching, TokenWindowLoader, ValidationLoader
from fundamentallm.data.tokenizer import CharacterTokenizer
from fundamentallm.engine.wiring.bits_per_byte import BitsPerByte
from fundamentallm.errors import DataError
from fundamentallm.events import TrainingEvents
from fundamentallm.files.filesystem import Filesystem
from fundamentallm.inference.evaluate import Document
from fundamentallm.testing import tiny_model, tiny_tokens
from fundamentallm.training.evaluator import Evaluator
from fundamentallm.training.handlers import Checkpointing, EarlyStopping, Evaluation, NaNRollback
from fundamentallm.training.limits import Limits
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss, compute_loss
from fundamentallm.training.trainer import Trainer

VOCABULARY = 11
LENGTH = 8
DTYPES = {"float64": torch.float64, "float32": torch.float32}
GRADIENT_BOUND = {"float64": 1e-12, "float32": 1e-6}
DRIFT = {"float64": 1e-10, "float32": 1e-6}
FAULT_AT = 6  # the step in which one rank meets a fault
# The step whose data cannot be read: the first, within an epoch, the first of an epoch (of 4
# steps); None: the data of the second evaluation, at step 8.
UNREADABLE = (1, 6, 9, None)

# Valid targets a row of each micro-batch, by window, by rank.
LAYOUTS: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "equal": ([[8, 8], [8, 8]], [[8, 8], [8, 8]]),
    "unequal": ([[8, 1], [2, 0]], [[7, 7, 8], [5]]),
    "one target against many": ([[1], [0]], [[8, 8, 8], [8, 8, 8]]),
    "first rank masked": ([[0, 0], [0, 0]], [[8, 3], [1, 4]]),
    "second rank masked": ([[8, 3], [1, 4]], [[0, 0], [0, 0]]),
    "masked in turns": ([[0], [5]], [[6], [0]]),
    "nothing at the end": ([[8, 8], [3]], [[8, 8], [0]]),
}


def layout_windows() -> dict[str, tuple[list[dict], list[dict]]]:
    """Each layout's micro-batches by rank, the same in every process."""
    generator = torch.Generator().manual_seed(5)

    def batch(valid: list[int]) -> dict[str, Tensor]:
        ids = torch.randint(VOCABULARY, (len(valid), LENGTH + 1), generator=generator)
        targets = ids[:, 1:].clone()
        for row, count in enumerate(valid):
            targets[row, count:] = -100
        return {"input_ids": ids[:, :-1].contiguous(), "target_ids": targets}

    return {
        name: tuple([batch(valid) for valid in rank] for rank in ranks)  # type: ignore[misc]
        for name, ranks in LAYOUTS.items()
    }


class FixedWindows:
    """A loader of windows that were laid out by hand."""

    def __init__(self, windows: list[list[dict[str, Tensor]]]) -> None:
        self.windows = windows
        self.position = 0

    def __len__(self) -> int:
        return len(self.windows)

    def set_position(self, epoch: int, step: int) -> None:
        self.position = step

    def __iter__(self) -> Iterator[Window]:
        for batches in self.windows[self.position :]:
            yield Window(batches, sum(count_valid(batch["target_ids"]) for batch in batches))


def make_model(dtype: str = "float64") -> nn.Module:
    torch.manual_seed(0)
    # Drawn in float32, so that both types begin with the same numbers.
    return tiny_model(VOCABULARY, LENGTH, dropout=0.0).to(DTYPES[dtype])


def flat(tensors: Any) -> list[float]:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors]).tolist()


def make_trainer(
    ranks: Ranks,
    dtype: str = "float64",
    accumulation: int = 2,
    steps: int = 12,
    loss_fn: Callable[..., Tensor] | None = None,
    directory: Path | None = None,
    val_loader: Any = None,
    slow: bool = False,
) -> Trainer:
    """A run over 41 sequences an epoch: three steps of 12 and a tail of 5."""
    tokens = tiny_tokens(41 * LENGTH + 3, VOCABULARY)
    model = make_model(dtype)
    loader = TokenWindowLoader(
        tokens,
        Batching(LENGTH, 3, accumulation, seed=1, rank=ranks.rank, world_size=ranks.world_size),
    )
    config = TrainingConfig(
        total_steps=steps,
        learning_rate=0.01,
        optimizer_weight_decay=0.1,
        max_grad_norm=0.5,
        checkpoint_steps=4,
    )
    trainer = Trainer(model, loader, val_loader, device="cpu", config=config, loss_fn=loss_fn)
    if val_loader is not None:
        Evaluation().attach(trainer)
    if directory is not None:
        checkpointing = Checkpointing(directory, asynchronous=slow)
        if slow and ranks.is_writer:
            checkpointing.store.filesystem = SlowFilesystem()
        checkpointing.attach(trainer)
    return trainer


class SlowFilesystem(Filesystem):
    """Takes longer for a save than the run for a few steps."""

    def make_directory(self, path: Path) -> None:
        time.sleep(0.2)
        super().make_directory(path)


def run_and_report(trainer: Trainer) -> dict[str, Any]:
    """What a rank knows of a run after it."""
    steps: list[tuple[int, str, float, float, int]] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        out = trainer.state.output
        steps.append(
            (trainer.state.iteration, out.rejection, out.loss, out.grad_norm, out.num_tokens)
        )

    trainer.run()
    return {
        "steps": steps,
        "iteration": trainer.state.iteration,
        "finished": trainer.finished,
        "rollbacks": trainer.state.rollbacks,
        "skipped": trainer.state.skipped_steps,
        "ledger": sorted(trainer.interventions.skipped),
        "weights": flat(trainer.model.parameters()),
        "saved": trainer.state.checkpoints,
    }


# ---------------------------------------------------------------- what each rank does


def gradients(ranks: Ranks, dtype: str, chunked: bool) -> dict[str, Any]:
    windows = layout_windows()
    model = make_model(dtype)
    trainer = Trainer(
        model,
        FixedWindows([by_rank[ranks.rank] for by_rank in windows.values()]),
        device="cpu",
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        loss_fn=ChunkedCrossEntropy(3) if chunked else LanguageModelingLoss(),
        config=TrainingConfig(total_steps=len(windows), max_grad_norm=None),
    )
    assert isinstance(trainer.step.forward, DistributedDataParallel)
    found = []

    @trainer.on(TrainingEvents.FLLM_GRADIENTS_READY)
    def note() -> None:
        found.append(flat(p.grad for p in model.parameters()))

    report = run_and_report(trainer)
    return {
        name: {"gradient": gradient, "loss": step[2], "norm": step[3], "num_tokens": step[4]}
        for name, gradient, step in zip(windows, found, report["steps"], strict=True)
    }


class Fault:
    """The plain loss, spoilt on one rank for one step's data: its value or only its gradient."""

    is_nll = True

    def __init__(self, afflicted: bool, in_gradient: bool) -> None:
        self.afflicted, self.in_gradient = afflicted, in_gradient
        self.trainer: Trainer | None = None
        self.targets: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        loss = compute_loss(logits, targets, reduction)
        assert self.trainer is not None
        if not self.afflicted or self.trainer.state.iteration != FAULT_AT:
            return loss
        if self.targets is None:
            self.targets = targets
        if not any(torch.equal(row, bad) for row in targets for bad in self.targets):
            return loss  # a replay of the step with other data
        if self.in_gradient:
            loss.register_hook(lambda grad: grad * math.inf)
            return loss
        return loss + math.nan  # of a finite gradient, so the other rank sees no trace of it


def fault(
    ranks: Ranks, directory: Path | None, on_rank: int, in_gradient: bool = False
) -> dict[str, Any]:
    loss_fn = Fault(ranks.rank == on_rank, in_gradient)
    trainer = make_trainer(ranks, loss_fn=loss_fn, directory=directory)
    loss_fn.trainer = trainer
    if directory is not None:
        NaNRollback().attach(trainer)
    return run_and_report(trainer)


def part_of_one_rank(
    ranks: Ranks, directory: Path, part: str, slow: bool = False
) -> dict[str, Any]:
    """On rank 1 alone something goes wrong that the sum of loss and gradient does not show."""
    trainer = make_trainer(ranks, directory=directory, slow=slow)
    NaNRollback().attach(trainer)
    incidents = []
    answers = []

    @trainer.on(Events.ITERATION_STARTED | Events.ITERATION_COMPLETED)
    def ask() -> None:
        answers.append((trainer.state.iteration, trainer.restore_step(), trainer.restore_step(2)))

    @trainer.on(TrainingEvents.FLLM_INCIDENT_DETECTED)
    def note() -> None:
        incidents.append([trainer.state.incident.step, trainer.state.incident.verdict])

    left = {FAULT_AT} if ranks.rank == 1 else set()

    @trainer.on(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED)
    def spoil_rate() -> None:
        if part == "learning rate" and trainer.state.iteration in left:
            left.clear()
            trainer.optimizer.param_groups[0]["lr"] = math.nan

    @trainer.on(TrainingEvents.FLLM_OPTIMIZER_STEPPED)
    def spoil_state() -> None:
        if trainer.state.iteration in left:
            left.clear()
            parameter = next(trainer.model.parameters())
            if part == "moment":
                trainer.optimizer.state[parameter]["exp_avg_sq"].view(-1)[0] = math.inf
            else:
                parameter.data.view(-1)[0] += 1e-9

    return {**run_and_report(trainer), "incidents": incidents, "answers": answers}


def told_to_skip(ranks: Ranks) -> dict[str, Any]:
    trainer = make_trainer(ranks)
    trainer.interventions.skip([FAULT_AT])
    return run_and_report(trainer)


def veto(ranks: Ranks) -> dict[str, Any]:
    trainer = make_trainer(ranks)
    if ranks.rank == 1:

        @trainer.on(TrainingEvents.FLLM_GRADIENTS_READY)
        def refuse() -> None:
            if trainer.state.iteration == FAULT_AT:
                trainer.reject_step("no")

    return run_and_report(trainer)


def stop(ranks: Ranks, directory: Path, event: Events) -> dict[str, Any]:
    """Interrupt rank 1 at its sixth step; then go on from what was saved."""
    trainer = make_trainer(ranks, directory=directory)
    writes = []
    store = trainer.restore_point.store  # type: ignore[union-attr]
    write = store.write
    store.write = lambda name, *args, **options: (
        writes.append(name),
        write(name, *args, **options),
    )
    if ranks.rank == 1:

        @trainer.on(event(once=FAULT_AT))
        def interrupt() -> None:
            trainer.interrupt_run(15)

    report = run_and_report(trainer)
    again = make_trainer(ranks, directory=directory)
    again.resume(directory / f"step-{report['iteration']:08d}")
    return {
        **report,
        "writes": writes,
        "interrupted": trainer.interrupted_by,
        "resumed": run_and_report(again),
    }


class Unreadable:
    """Validation batches whose file one rank cannot read at its second pass."""

    def __init__(self, ranks: Ranks, faulty: int) -> None:
        tokens = tiny_tokens(70, VOCABULARY)
        self.loader = ValidationLoader(
            tokens, Batching(LENGTH, 2, rank=ranks.rank, world_size=ranks.world_size)
        )
        self.passes = 0 if ranks.rank == faulty else -99

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for number, batch in enumerate(self.loader):
            if self.passes == 2 and number == 1:
                raise DataError("gone", where="val.tokens")
            yield batch


def unreadable(
    ranks: Ranks, directory: Path, faulty: int, step: int | None, slow: bool = False
) -> dict[str, Any]:
    """One rank cannot read its data, for a step or (None) for the second evaluation."""
    val_loader = Unreadable(ranks, faulty if step is None else -1)
    trainer = make_trainer(ranks, directory=directory, val_loader=val_loader, slow=slow)
    loader = trainer.train_loader
    window_at = loader.window_at
    if ranks.rank == faulty and step is not None:

        def read(epoch: int, step_of_epoch: int) -> Window:
            if (epoch, step_of_epoch) == divmod(step - 1, len(loader)):
                raise DataError("gone", where="train.tokens", got="1 byte", fix="put it back")
            return window_at(epoch, step_of_epoch)

        loader.window_at = read
    said = ""
    try:
        trainer.run()
    except DataError as error:
        said = str(error)
    ranks.barrier()  # the writer has ended its save
    again = make_trainer(ranks, directory=directory, val_loader=Unreadable(ranks, -1))
    again.resume(directory / f"step-{trainer.state.iteration:08d}")
    evaluations = trainer.state.evaluations
    resumed = run_and_report(again)
    return {
        "said": said,
        "iteration": trainer.state.iteration,
        "evaluations": [evaluations, again.state.evaluations],
        "val_loss": again.state.metrics["val/loss"],
        "resumed": resumed,
    }


def undisturbed_with_evaluations(ranks: Ranks, directory: Path) -> dict[str, Any]:
    trainer = make_trainer(ranks, directory=directory, val_loader=Unreadable(ranks, -1))
    report = run_and_report(trainer)
    val_loss = trainer.state.metrics["val/loss"]
    return {**report, "evaluations": trainer.state.evaluations, "val_loss": val_loss}


def out_of_time(ranks: Ranks) -> dict[str, Any]:
    """The clock of rank 1 alone reaches the limit, in its sixth step."""
    trainer = make_trainer(ranks)
    trainer.budget.limits = Limits(trainer.total_steps, max_seconds=1000.0)
    if ranks.rank == 1:
        trainer.budget.clock = lambda: 2000.0 if trainer.state.iteration >= FAULT_AT else 0.0
    return run_and_report(trainer)


def terminated(ranks: Ranks) -> dict[str, Any]:
    """A handler of rank 1 alone calls Ignite's terminate() in its sixth step."""
    trainer = make_trainer(ranks)
    if ranks.rank == 1:

        @trainer.on(Events.ITERATION_COMPLETED(once=FAULT_AT))
        def enough() -> None:
            trainer.terminate()

    return run_and_report(trainer)


def terminated_in_an_evaluation(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """A handler of the evaluator of rank 1 alone ends the run in its second evaluation."""
    trainer = make_trainer(ranks, directory=directory, val_loader=Unreadable(ranks, -1))
    if ranks.rank == 1:

        @trainer.evaluator.on(Events.COMPLETED)
        def enough() -> None:
            if trainer.state.evaluations == 2:
                trainer.terminate()

    report = run_and_report(trainer)
    again = make_trainer(ranks, directory=directory, val_loader=Unreadable(ranks, -1))
    again.resume(directory / f"step-{report['iteration']:08d}")
    return {
        **report,
        "evaluations": trainer.state.evaluations,
        "resumed": run_and_report(again),
    }


def epoch_ended(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """A handler of rank 1 alone ends the epoch at step 5; handlers of Ignite have states."""

    def make(place: Path) -> Trainer:
        trainer = make_trainer(ranks, directory=place)
        scheduler = PiecewiseLinear(trainer.optimizer, "lr", [(0, 0.0), (3, 0.02), (11, 0.001)])
        trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
        Average().attach(trainer, "mean")
        return trainer

    def report(trainer: Trainer) -> dict[str, Any]:
        known = run_and_report(trainer)
        rate, mean = trainer.state.metrics["train/lr"], trainer.state.metrics["mean"]
        return {**known, "cuts": trainer.epochs.state_dict(), "rate": rate, "mean": mean}

    whole = make(directory)
    if ranks.rank == 1:
        whole.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: whole.terminate_epoch())
    results = report(whole)
    again = make(directory / "again")
    again.resume(directory / "step-00000008")
    return {**results, "resumed": report(again)}


def evaluation(ranks: Ranks) -> dict[str, Any]:
    # Five batches: three for the first rank, two for the second.
    loader = ValidationLoader(
        tiny_tokens(70, VOCABULARY),
        Batching(LENGTH, 2, rank=ranks.rank, world_size=ranks.world_size),
    )
    model = make_model()
    trainer = make_trainer(ranks)
    output = Evaluator(model, trainer.precision, ranks)
    Accuracy().attach(output, "accuracy")
    TopKCategoricalAccuracy(3).attach(output, "top_3")
    Loss(F.cross_entropy).attach(output, "cross_entropy")
    letters = CharacterTokenizer("".join(map(chr, range(0xE0, 0xE0 + VOCABULARY))))
    BitsPerByte(loader, [Document("text", loader.tokens)], letters).attach(output)
    output.run(loader)
    metrics = dict(output.state.metrics)
    if ranks.rank == 1:
        output.add_event_handler(Events.ITERATION_COMPLETED(once=1), output.terminate)
    cut = dict(output.run(loader).metrics)
    return {
        "nll": output.nll,
        "num_tokens": output.num_tokens,
        "batches": len(list(loader)),
        "metrics": metrics,
        "cut": cut,
    }


class OfOneRank(Metric):
    """Forgets to sum over the ranks: it rises up to evaluation 2 on the first, else always."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.count = ranks, 0
        super().__init__()

    def reset(self) -> None:
        """Nothing is kept."""

    def update(self, output: Any) -> None:
        """Nothing is measured."""

    def compute(self) -> float:
        self.count += 1
        return float(min(self.count, 2) if self.ranks.is_writer else self.count)


def judged_by_a_metric_of_one_rank(ranks: Ranks, directory: Path) -> dict[str, Any]:
    trainer = make_trainer(ranks, steps=24, val_loader=Unreadable(ranks, -1))
    best = Checkpointing(directory, metric="val/own", mode="max")
    for handler in (best, EarlyStopping(1, metric="val/own", mode="max")):
        handler.attach(trainer)
    OfOneRank(ranks).attach(trainer.evaluator, "own")
    trainer.run()
    return {"step": trainer.state.iteration, "best": best.best_step, "ended": trainer.finished}


def sums(ranks: Ranks) -> dict[str, Any]:
    odd = ranks.rank == 1
    gathered = ranks.gather_bytes(torch.tensor([ranks.rank, 255, 0], dtype=torch.uint8))
    ranks.barrier()
    return {
        "ranks": [ranks.rank, ranks.world_size, ranks.local_rank],
        "writer": ranks.is_writer,
        "alone": ranks.alone,
        "counts": ranks.sum_counts([2**24 + 1 - odd, 2**53 + odd, 2**62 - 1 + odd, 0]),
        "any": [ranks.any(flag) for flag in (False, True, odd, not odd)],
        "text": [ranks.broadcast_text(text) for text in (f"rank {ranks.rank} \u00e9\u4e16", "")],
        "bytes": [part.tolist() for part in gathered],
        "tensor": ranks.sum_tensor(torch.tensor([0.5, math.inf if odd else 1.0])).tolist(),
    }


def decisions(ranks: Ranks) -> dict[str, Any]:
    def refuse() -> None:
        raise ValueError("no")

    agreed = ranks.first_decides(lambda: [ranks.rank, "\u00e9", None])
    try:
        ranks.first_decides(refuse)
    except (ValueError, SystemExit) as error:
        return {"agreed": agreed, "refused": repr(error)}
    return {"agreed": agreed}


def all_scenarios(ranks: Ranks, place: Path) -> Iterator[tuple[str, Any]]:
    yield "sums", sums(ranks)
    yield "decisions", decisions(ranks)
    for dtype in DTYPES:
        yield f"gradients {dtype}", gradients(ranks, dtype, chunked=False)
        yield f"chunked gradients {dtype}", gradients(ranks, dtype, chunked=True)
        yield f"course {dtype}", run_and_report(make_trainer(ranks, dtype, steps=20))
    yield "whole", run_and_report(make_trainer(ranks))
    yield "skip", told_to_skip(ranks)
    for rank in (0, 1):
        for kind in ("loss", "gradient"):
            inside = kind == "gradient"
            yield f"{kind} fault on {rank}", fault(ranks, None, rank, inside)
            directory = place / f"{kind}-{rank}"
            yield f"{kind} fault on {rank}, rolled back", fault(ranks, directory, rank, inside)
    for part in ("learning rate", "moment", "weight"):
        yield f"{part} of one rank", part_of_one_rank(ranks, place / part, part)
    for part in ("learning rate", "moment"):
        name = f"{part} of one rank, slow saves"
        yield name, part_of_one_rank(ranks, place / name.replace(" ", "-"), part, slow=True)
    for step in (5, 6):
        name = f"unreadable on 1 at {step}, slow saves"
        yield name, unreadable(ranks, place / name.replace(" ", "-"), 1, step, slow=True)
    yield "veto", veto(ranks)
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        yield f"stop at {event.name}", stop(ranks, place / event.name, event)
    yield "evaluated", undisturbed_with_evaluations(ranks, place / "evaluated")
    for rank in (0, 1):
        for step in UNREADABLE:
            name = f"unreadable on {rank} at {step}"
            yield name, unreadable(ranks, place / name.replace(" ", "-"), rank, step)
    yield "out of time", out_of_time(ranks)
    yield "terminated", terminated(ranks)
    yield "terminated in an evaluation", terminated_in_an_evaluation(ranks, place / "ended")
    yield "epoch ended", epoch_ended(ranks, place / "epoch-ended")
    yield "evaluation", evaluation(ranks)
    yield "own metric", judged_by_a_metric_of_one_rank(ranks, place / "own-metric")


def run_as_a_rank(place: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    results = dict(all_scenarios(ranks, place))
    (place / f"rank-{ranks.rank}.json").write_text(json.dumps(results))
    leave_ranks()


# ---------------------------------------------------------------- starting both


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture(scope="module")
def both(place: Path) -> list[dict[str, Any]]:
    """Results of rank 0 and rank 1; a rank that waits for ever is ended and is a failure."""
    processes = forked.run_ranks([str(place)], place, program=__file__)
    assert [process.returncode for process in processes] == [0, 0], [
        process.stderr[-3000:] for process in processes
    ]
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


def relative(actual: list[float], expected: list[float]) -> float:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (actual, expected))
    return float((a - b).norm() / b.norm())


def rejections(report: dict[str, Any]) -> dict[int, str]:
    return {step[0]: step[1] for step in report["steps"] if step[1]}


# ---------------------------------------------------------------- gradients


def large_batch(name: str) -> tuple[list[float], float, int]:
    """Gradient and loss of all rows of a layout as one batch, from the definition, in float64."""
    batches = [batch for rank in layout_windows()[name] for batch in rank]
    inputs = torch.cat([batch["input_ids"] for batch in batches])
    targets = torch.cat([batch["target_ids"] for batch in batches])
    model = make_model("float64")
    valid = targets >= 0
    log_p = model(inputs).log_softmax(-1)
    nll = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[valid].sum()
    loss = nll / valid.sum()
    loss.backward()
    return flat(p.grad for p in model.parameters()), float(loss.detach()), int(valid.sum())


@pytest.mark.parametrize("kind", ["gradients", "chunked gradients"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_with_accumulation_give_the_gradient_of_one_large_batch(
    both, layout, dtype, kind
):
    gradient, loss, num_tokens = large_batch(layout)
    first, second = (results[f"{kind} {dtype}"][layout] for results in both)
    assert first == second
    assert first["num_tokens"] == num_tokens
    assert relative(first["gradient"], gradient) <= GRADIENT_BOUND[dtype]
    assert first["loss"] == pytest.approx(loss, rel=GRADIENT_BOUND[dtype], abs=0)
    norm = math.hypot(*gradient)
    assert first["norm"] == pytest.approx(norm, rel=GRADIENT_BOUND[dtype], abs=0)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"equal"}))
def test_a_mean_over_ranks_would_break_the_bounds(layout):
    gradient, _, _ = large_batch(layout)
    total = torch.zeros(len(gradient), dtype=torch.float64)
    for batches in layout_windows()[layout]:
        model = make_model("float64")
        count = sum(count_valid(batch["target_ids"]) for batch in batches)
        for batch in batches:
            nll = compute_loss(model(batch["input_ids"]), batch["target_ids"], "sum")
            (nll / (2 * max(1, count))).backward()
        total += torch.tensor(flat(p.grad for p in model.parameters()))
    assert relative(total.tolist(), gradient) > 1e3 * GRADIENT_BOUND["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_take_the_course_of_one_process(both, dtype):
    one = run_and_report(make_trainer(Ranks(), dtype, accumulation=4, steps=20))
    first, second = (results[f"course {dtype}"] for results in both)
    assert first == second
    assert len(first["steps"]) == 20
    # Some steps were clipped, and each epoch ends with a shorter one.
    assert any(step[3] > 0.5 for step in first["steps"])
    assert [step[4] for step in first["steps"]] == [96, 96, 96, 40] * 5
    assert relative(first["weights"], one["weights"]) <= DRIFT[dtype]
    for two, single in zip(first["steps"], one["steps"], strict=True):
        assert two[:2] + two[4:] == list(single[:2] + single[4:])
        assert two[2:4] == pytest.approx(single[2:4], rel=10 * DRIFT[dtype], abs=0)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_fault_on_one_rank_makes_both_refuse_the_same_step(both, kind, rank):
    first, second = (results[f"{kind} fault on {rank}"] for results in both)
    assert first["weights"] == second["weights"]
    for report in (first, second):
        assert rejections(report) == {FAULT_AT: "nonfinite"}
        assert report["iteration"] == 12
    # The refused window changed nothing: as if it had been told to skip it.
    assert first["weights"] == both[0]["skip"]["weights"]
    assert first["weights"] != both[0]["whole"]["weights"]
    faulty = first["steps"][FAULT_AT - 1]
    assert math.isfinite(faulty[2]) == (kind == "gradient")
    assert math.isfinite(faulty[3]) == (kind == "loss")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_fault_on_one_rank_gets_one_verdict_and_both_pass_over_the_window(both, kind, rank):
    first, second = (results[f"{kind} fault on {rank}, rolled back"] for results in both)
    assert first["weights"] == second["weights"] == both[0]["skip"]["weights"]
    for report in (first, second):
        assert [step[0] for step in report["steps"]] == [*range(1, 13)]
        assert [step[1] for step in report["steps"] if step[0] == FAULT_AT] == ["nonfinite"]
        assert (report["rollbacks"], report["ledger"]) == (0, [FAULT_AT])


@pytest.mark.parametrize(
    ("part", "noticed"), [("learning rate", FAULT_AT), ("moment", 8), ("weight", 8)]
)
def test_what_goes_wrong_on_one_rank_without_a_trace_in_the_loss_is_healed_on_both(
    both, part, noticed
):
    first, second = (results[f"{part} of one rank"] for results in both)
    assert first["incidents"] == second["incidents"] == [[noticed, "state"]]
    assert first["rollbacks"] == second["rollbacks"] == 1
    assert first["weights"] == second["weights"] == both[0]["whole"]["weights"]


@pytest.mark.parametrize("part", ["learning rate", "moment"])
def test_ranks_agree_on_the_way_back_at_every_moment_of_a_background_save(both, part):
    first, second = (results[f"{part} of one rank, slow saves"] for results in both)
    assert first == second
    assert first["rollbacks"] == 1
    assert first["weights"] == both[0]["whole"]["weights"]
    # From the step after it was asked for, the save of step 4 counts.
    assert [5, 4, 0] in first["answers"]
    assert [4, 0, 0] in first["answers"]


@pytest.mark.parametrize("step", [5, 6])
def test_data_that_cannot_be_read_during_a_background_save_ends_both(both, step):
    first, second = (results[f"unreadable on 1 at {step}, slow saves"] for results in both)
    assert first == second
    assert first["iteration"] == step - 1
    for key in ("iteration", "weights", "finished", "saved"):
        assert first["resumed"][key] == both[0]["evaluated"][key], key


def test_a_veto_on_one_rank_holds_on_both(both):
    first, second = (results["veto"] for results in both)
    assert rejections(second) == {FAULT_AT: "no"}
    assert rejections(first) == {FAULT_AT: "rejected on another rank"}
    assert first["weights"] == second["weights"] == both[0]["skip"]["weights"]


# ---------------------------------------------------------------- votes


@pytest.mark.parametrize(
    ("event", "last"),
    [("ITERATION_STARTED", FAULT_AT), ("ITERATION_COMPLETED", FAULT_AT + 1)],
)
def test_an_interruption_of_one_rank_stops_both_at_one_step_saved_once(both, event, last):
    first, second = (results[f"stop at {event}"] for results in both)
    # The vote is taken at a step's start; what comes later counts for the next.
    assert [first["iteration"], second["iteration"]] == [last, last]
    assert [first["interrupted"], second["interrupted"]] == [None, 15]
    assert first["finished"] == second["finished"] == ""
    assert first["weights"] == second["weights"]
    assert first["writes"] == [f"step-{step:08d}" for step in (0, 4, last)]
    assert second["writes"] == []


@pytest.mark.parametrize("event", ["ITERATION_STARTED", "ITERATION_COMPLETED"])
def test_both_go_on_to_the_end_of_a_run_that_was_never_stopped(both, event):
    for results in both:
        resumed = results[f"stop at {event}"]["resumed"]
        assert resumed["iteration"] == 12
        assert resumed["weights"] == both[0]["whole"]["weights"]


@pytest.mark.parametrize("step", UNREADABLE)
@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_one_rank_cannot_read_ends_both_with_their_state_saved(both, rank, step):
    first, second = (results[f"unreadable on {rank} at {step}"] for results in both)
    whole = both[0]["evaluated"]
    assert first == second
    if step is None:
        assert first["said"] == "val.tokens: gone"
    else:
        assert first["said"].startswith("train.tokens: gone\n  got:      1 byte\n  fix:")
    assert first["iteration"] == (8 if step is None else step - 1)
    assert first["evaluations"] == [(first["iteration"] - (step is None)) // 4, 3]
    assert whole["evaluations"] == 3
    assert first["val_loss"] == whole["val_loss"]
    for key in ("iteration", "weights", "finished", "saved"):
        assert first["resumed"][key] == whole[key], key


def test_one_rank_out_of_time_finishes_both(both):
    first, second = (results["out of time"] for results in both)
    assert first["iteration"] == second["iteration"] == FAULT_AT
    assert first["finished"] == second["finished"] == "the budget is used up"
    assert first["weights"] == second["weights"]


def test_a_handler_of_one_rank_that_terminates_ends_both_at_the_next_step(both):
    first, second = (results["terminated"] for results in both)
    assert first["iteration"] == second["iteration"] == FAULT_AT + 1
    assert first["finished"].startswith("stopped by enough (test_two_ranks.py, line ")
    assert second["finished"] == first["finished"]
    assert first["weights"] == second["weights"]


def test_a_handler_of_one_rank_that_terminates_in_an_evaluation_ends_both_there(both):
    first, second = (results["terminated in an evaluation"] for results in both)
    assert (first["iteration"], first["evaluations"]) == (8, 2)
    assert (second["iteration"], second["evaluations"]) == (8, 2)
    assert first["finished"].startswith("stopped by enough (test_two_ranks.py, line ")
    assert second["finished"] == first["finished"]
    assert first["weights"] == second["weights"]
    for report in (first, second):
        assert report["resumed"]["iteration"] == 12
        assert report["resumed"]["weights"] == both[0]["evaluated"]["weights"]


def test_a_handler_of_one_rank_ends_the_epoch_of_both_and_a_resume_goes_on_exactly(both):
    first, second = (results["epoch ended"] for results in both)
    assert first == second
    assert first["cuts"] == [[6, 2]]  # heard with the next step
    assert first["rate"] == pytest.approx(0.001)
    resumed = first["resumed"]
    assert [step[0] for step in resumed["steps"]] == [9, 10, 11, 12]
    assert resumed["steps"] == first["steps"][8:]
    for key in ("weights", "cuts", "rate", "mean", "finished"):
        assert resumed[key] == first[key], key


def test_an_undisturbed_run_ends_alike_on_both(both):
    first, second = (results["whole"] for results in both)
    assert first == second
    assert rejections(first) == {}
    assert (first["iteration"], first["finished"]) == (12, "the last step is done")


# ---------------------------------------------------------------- sums


def test_counts_are_exact_beyond_what_floats_hold(both):
    for results in both:
        assert results["sums"]["counts"] == [2**25 + 1, 2**54 + 1, 2**63 - 1, 0]


def test_ranks_know_their_place_and_what_the_others_say(both):
    for rank, results in enumerate(both):
        found = results["sums"]
        assert found["ranks"] == [rank, 2, rank]
        assert (found["writer"], found["alone"]) == (rank == 0, False)
        assert found["any"] == [False, True, True, True]
        assert found["text"] == ["rank 0 \u00e9\u4e16", ""]
        assert found["bytes"] == [[0, 255, 0], [1, 255, 0]]
        assert found["tensor"] == [1.0, math.inf]


def test_the_first_rank_decides_for_both_and_its_failure_ends_the_other(
    both: list[dict[str, Any]],
) -> None:
    assert [rank["decisions"]["agreed"] for rank in both] == [[0, "\u00e9", None]] * 2
    assert [rank["decisions"]["refused"] for rank in both] == ["ValueError('no')", "SystemExit(1)"]


def test_evaluation_adds_up_over_ranks_with_unequal_shares(both):
    alone = evaluation(Ranks())
    assert alone["batches"] == 5
    assert [results["evaluation"]["batches"] for results in both] == [3, 2]
    for results in both:
        assert results["evaluation"]["num_tokens"] == alone["num_tokens"] == 69
        assert results["evaluation"]["nll"] == pytest.approx(alone["nll"], rel=1e-14)
        metrics = results["evaluation"]["metrics"]
        assert 0 < metrics["accuracy"] < metrics["top_3"]
        for name, value in alone["metrics"].items():
            exact = name in ("accuracy", "top_3")
            assert metrics[name] == (value if exact else pytest.approx(value, rel=1e-6))
        bits = alone["nll"] / math.log(2) / (69 * 2)  # each character takes two bytes
        assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
        assert results["evaluation"]["cut"] == {}  # by the second rank alone


def test_a_metric_that_differs_between_ranks_has_one_best_and_one_end(both):
    for results in both:
        found = results["own metric"]
        assert (found["step"], found["best"]) == (12, 8)
        assert found["ended"] == "no higher val/own in 1 evaluations (best 2.0000)"


if __name__ == "__main__":
    run_as_a_rank(Path(sys.argv[1]))
