"""Numerical faults on purpose: noticed in time, judged rightly, healed exactly, within bounds.

    python -m fault_injection.heal [--only detection state verdicts bounds bundles] [--verdicts 200]
        [--plans 100] [--bundles 20] [--seed 0]

detection  NaN, +inf and -inf in every module's output and output gradient, every weight's gradient,
           the loss and the learning rate of two architectures: the step is refused with weights,
           moments and averages bitwise as before, and the first bad module is the injected one
state      the same numbers in every moment of the optimizer, which no loss shows in time: no
           checkpoint ever holds them, and the run heals
verdicts   faults whose cause is known: the verdict, and the healed run against a clean run that is
           given its ledger, bit for bit
bounds     random plans of faults that never end: the run ends within its limits, with exit code 20
           and a bundle
bundles    incidents of real weights and tokens, replayed by the command

A site that an unguarded step shows to reach neither the loss nor a gradient is counted apart.
Prints one JSON object; exits with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from torch import Tensor, nn

from fault_injection.faults import Crash, FaultyFilesystem, scratch_directory, silent
from fundamentallm.compute.precision import Precision
from fundamentallm.config import TrainingConfig
from fundamentallm.engine.cli import main as command_line
from fundamentallm.errors import NumericalError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.finite import nonfinite_tensors
from fundamentallm.training.checkpoint.tree import flatten
from fundamentallm.training.handlers import (
    Checkpointing,
    Evaluation,
    LossEMA,
    NaNRollback,
    Schedule,
    Spikes,
    WeightEMA,
)
from fundamentallm.training.recovery.diagnosis import Incident
from fundamentallm.training.trainer import Trainer

STEPS = 14
EVAL_STEPS = 4
VALUES = (math.nan, math.inf, -math.inf)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 1, "qk_norm": True, "logit_softcap": 15.0},
    "gpt2": {
        "normalization": "layernorm",
        "positions": "learned",
        "feedforward": "gelu",
        "bias": True,
        "tie_embeddings": False,
    },
}
VERDICTS = ("transient", "precision", "divergence", "data", "data_with_weights")
MAX_STEPS_OF_A_PLAN = 5000  # those that a rollback takes back and takes again included
# How much was done to get there, and when and under which name.
NOT_COMPARED = (
    "incidents",
    "rollbacks",
    "micro_batches",
    "skipped_steps",
    "checkpoints",
    "elapsed_before",
    "run_id",
)


def build(
    directory: Path | None,
    seed: int = 0,
    architecture: str = "llama",
    *,
    precision: str = "fp32",
    rollback: NaNRollback | None = None,
    handlers: Sequence[Any] = (),
    **options: Any,
) -> Trainer:
    """Return a trainer with the guard, its controllers and an average of the weights.

    Args:
        directory: of the checkpoints; None keeps none.
        seed: of weights, dropout and order.
        architecture: one of ARCHITECTURES.
        precision: "fp32", or "fp16" with its loss scale, which the CPU computes as well.
        rollback: the controller; the default one if None.
        handlers: further ones.
        options: of the training.
    """
    torch.manual_seed(seed)
    fields = {"total_steps": STEPS, "eval_steps": EVAL_STEPS, "learning_rate": 1e-2, **options}
    attached = [rollback or NaNRollback(), WeightEMA(0.9), LossEMA(), Evaluation(), *handlers]
    if directory is not None:
        checkpointing = Checkpointing(directory)
        checkpointing.store.filesystem = FaultyFilesystem(None, Crash)  # syncs are not the matter
        attached.append(checkpointing)
    trainer = Trainer(
        tiny_model(dropout=0.1, **ARCHITECTURES[architecture]),
        *tiny_loaders(accumulation_steps=2, batch_size=2, seed=seed),
        device="cpu",
        config=TrainingConfig(warmup_steps=2, **fields),
        handlers=attached,
    )
    Schedule(trainer.scheduler).attach(trainer)
    if precision == "fp16":
        half = Precision("fp16", trainer.device)
        half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        trainer.precision = trainer.step.precision = half
    return trainer


def incidents_of(trainer: Trainer) -> list[Incident]:
    """Return a list that fills with the run's incidents."""
    found: list[Incident] = []
    trainer.add_event_handler(
        TrainingEvents.FLLM_INCIDENT_DETECTED, lambda: found.append(trainer.state.incident)
    )
    return found


def all_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of weights, moments and averages by name."""
    parts = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "average": trainer.attached["weight_ema"].state_dict(),
    }
    return {name: tensor.clone() for name, tensor in flatten(parts)[1].items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def spoilt(tensor: Tensor, value: float, where: random.Random) -> Tensor:
    """Return a copy with one element replaced."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    copy.view(-1)[where.randrange(copy.numel())] = value
    return copy


# ---------------------------------------------------------------------- detection


@dataclass(frozen=True)
class Site:
    """Where a number is put.

    Attributes:
        kind: "output", "gradient" (of a module's output), "weight" (its gradient), "loss", "lr".
        name: of the module or weight.
    """

    kind: str
    name: str = ""

    @property
    def module(self) -> str:
        """The module that a diagnosis should name."""
        if self.kind == "weight":
            return self.name.rpartition(".")[0]
        return "loss" if self.kind == "loss" else self.name or "model"


def sites(architecture: str) -> list[Site]:
    """Return every site of a model: its modules are found by a forward pass."""
    trainer = build(None, architecture=architecture)
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                names.append(name)

        return hook

    for name, module in trainer.model.named_modules():
        module.register_forward_hook(note(name))
    trainer.model(trainer.train_loader.window_at(0, 0).micro_batches[0]["input_ids"])
    weights = [name for name, _ in trainer.model.named_parameters()]
    return [
        *(Site("output", name) for name in dict.fromkeys(names)),
        *(Site("gradient", name) for name in dict.fromkeys(names)),
        *(Site("weight", name) for name in weights),
        Site("loss"),
        Site("lr"),
    ]


@contextlib.contextmanager
def injected(
    model: nn.Module, site: Site, value: float, seed: int, active: Callable[[], bool]
) -> Iterator[None]:
    """Put a number into a module's output or gradient, or a weight's gradient, while active."""
    where = random.Random(f"{site} {value} {seed}")

    def forward_hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not active():
            return output
        if site.kind == "output":
            return spoilt(output, value, where)
        if output.requires_grad:
            output.register_hook(lambda gradient: spoilt(gradient, value, where))
        return output

    def weight_hook(gradient: Tensor) -> Tensor:
        return spoilt(gradient, value, where) if active() else gradient

    if site.kind == "weight":
        handle = dict(model.named_parameters())[site.name].register_hook(weight_hook)
    elif site.kind in ("output", "gradient"):
        handle = model.get_submodule(site.name).register_forward_hook(forward_hook)
    else:
        yield
        return
    try:
        yield
    finally:
        handle.remove()


def reaches(site: Site, value: float, seed: int, architecture: str) -> bool:
    """Tell by a plain step, without any of the guard's code, whether a fault shows at all."""
    if site.kind in ("loss", "lr"):
        return True
    trainer = build(None, seed, architecture)
    model = trainer.model.train()
    total = torch.zeros(())
    with injected(model, site, value, seed, lambda: True):
        for batch in trainer.train_loader.window_at(0, 0).micro_batches:
            logits = model(batch["input_ids"])
            loss = F.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return not all(bool(torch.isfinite(t).all()) for t in [total, *gradients])


@dataclass
class Tally:
    """Counts, and what went wrong, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def fail(self, *words: object) -> None:
        """Note a broken promise."""
        self.wrong.append(" ".join(map(str, words)))

    def report(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.counts, "wrong": self.wrong[:10]}


def detect(site: Site, value: float, seed: int, architecture: str, tally: Tally) -> None:
    """Inject into one step of a run and look whether anything came of it."""
    at = random.Random(f"{site} {value} {seed}").choice((3, 6, 9))
    trainer = build(None, seed, architecture)
    model, incidents = trainer.model, incidents_of(trainer)
    before: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []
    rejections: list[str] = []

    def active() -> bool:
        return trainer.state.iteration == at and model.training

    def start() -> None:
        if trainer.state.iteration == at:
            before.append(all_tensors(trainer))
            if site.kind == "lr":
                trainer.optimizer.param_groups[0]["lr"] = value

    def refused() -> None:
        if trainer.state.iteration == at:
            rejections.append(trainer.state.output.rejection)
            after.append(all_tensors(trainer))

    trainer.add_event_handler(Events.ITERATION_STARTED, start)
    trainer.add_event_handler(TrainingEvents.FLLM_STEP_REJECTED, refused)
    if site.kind == "loss":
        trainer.step.loss_fn = spoilt_loss(trainer, value, active)
        trainer.loss_fn = trainer.step.loss_fn
    with injected(model, site, value, seed, active):
        trainer.run()

    if site.kind == "lr":  # not a tensor of the state: the group's own value is the fault
        for tensors in (*before, *after):
            for name in [n for n in tensors if n.endswith(".lr")]:
                del tensors[name]
    if len(before) != 1 or not rejections or not same(before[0], after[0]):
        tally.fail(architecture, site, value, "was not caught before the update")
        return
    if list(nonfinite_tensors(all_tensors(trainer))):
        tally.fail(architecture, site, value, "left NaN or infinity behind")
    tally.counts["caught"] += 1
    if site.kind == "lr":
        return
    diagnosis = incidents[0].diagnosis
    assert diagnosis is not None
    first = diagnosis.first_bad_forward or diagnosis.first_bad_backward
    tally.counts["named"] += 1
    if first is not None and first.module == site.module:
        tally.counts["named rightly"] += 1
    else:
        tally.counts["named wrongly"] += 1
        tally.counts[f"named wrongly: {site} as {first and first.module}"] += 1


def spoilt_loss(
    trainer: Trainer, value: float, active: Callable[[], bool]
) -> Callable[..., Tensor]:
    """Return the trainer's loss, with another value while active."""
    plain = trainer.loss_fn

    def loss(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        result: Tensor = plain(logits, targets, reduction=reduction)
        return result * value if active() else result

    loss.is_nll = True  # type: ignore[attr-defined]
    return loss


def detection(seed: int, share: float = 1.0) -> dict[str, Any]:
    """Inject at every site; `share` of them, drawn at random, if below 1."""
    tally = Tally()
    chosen = random.Random(seed)
    for architecture in ARCHITECTURES:
        for site in sites(architecture):
            for value in VALUES:
                if chosen.random() >= share:
                    continue
                if not reaches(site, value, seed, architecture):
                    tally.counts["reach nothing"] += 1
                    continue
                tally.counts["sites"] += 1
                detect(site, value, seed, architecture, tally)
    report = tally.report()
    if tally.counts["named rightly"] < 0.99 * tally.counts["named"]:
        report["wrong"].append("less than 99 % of the first bad modules are right")
    return report


# ---------------------------------------------------------------------- optimizer state


def state_damage(seed: int, share: float = 1.0) -> dict[str, Any]:
    """Put numbers into moments; nothing but a scan of the state can see some of them in time."""
    tally = Tally()
    chosen = random.Random(seed)
    for architecture in ARCHITECTURES:
        names = [
            name for name, _ in build(None, architecture=architecture).model.named_parameters()
        ]
        for name in names:
            for moment in ("exp_avg", "exp_avg_sq"):
                for value in VALUES:
                    if chosen.random() < share:
                        where = random.Random(f"{seed} {name} {moment} {value}")
                        damage_once(name, moment, value, where, architecture, tally)
    return tally.report()


def damage_once(
    name: str, moment: str, value: float, where: random.Random, architecture: str, tally: Tally
) -> None:
    """Damage one number of the optimizer after a step; count what noticed it."""
    at = where.randrange(1, STEPS)
    with scratch_directory() as directory:
        trainer = build(directory, architecture=architecture)
        incidents, left = incidents_of(trainer), [at]

        def act() -> None:
            if left == [trainer.state.iteration]:
                left.clear()
                moments = trainer.optimizer.state[dict(trainer.model.named_parameters())[name]]
                moments[moment].copy_(spoilt(moments[moment], value, where))

        trainer.add_event_handler(Events.ITERATION_COMPLETED, act)
        trainer.run()
        tally.counts["damages"] += 1
        place = f"{architecture} {name} {moment} {value} at {at}"
        if not incidents or not trainer.state.rollbacks:
            tally.fail(place, "was not noticed")
        if list(nonfinite_tensors(all_tensors(trainer))):
            tally.fail(place, "was not healed")
        store = trainer.restore_point.store  # type: ignore[union-attr]
        for saved in store.step_names():
            state = store.read(store.directory / saved)
            if list(nonfinite_tensors({k: state[k] for k in ("model", "optimizer", "handlers")})):
                tally.fail(place, "was committed in", saved)
        if incidents:
            tally.counts[f"noticed as {incidents[0].verdict}"] += 1


# ---------------------------------------------------------------------- verdicts


class Fault:
    """A fault of a known cause at a step, put into a model by hooks.

    Args:
        cause: one of VERDICTS.
        seed: chooses step, place, value and sequence.
    """

    def __init__(self, cause: str, seed: int) -> None:
        self.cause = cause
        self.chance = random.Random(f"{cause} {seed}")
        self.step = self.chance.randrange(2, STEPS)
        self.value = self.chance.choice(VALUES)
        self.left = True
        self.weights: Tensor | None = None
        self.form = ""

    def attach(self, trainer: Trainer) -> None:
        """Put the hooks in."""
        self.trainer = trainer
        self.model = trainer.model
        getattr(self, f"_{self.cause}")()

    def _now(self) -> bool:
        return self.trainer.state.iteration == self.step and self.model.training

    def _a_block(self) -> nn.Module:
        return self.model.get_submodule(self.chance.choice(("blocks.0", "blocks.1")))

    def _once(self, tensor: Tensor) -> Tensor:
        if not (self._now() and self.left):
            return tensor
        self.left = False
        return spoilt(tensor, self.value, self.chance)

    def _transient(self) -> None:
        self.form = self.chance.choice(("output", "gradient", "weight", "accumulated"))
        if self.form == "output":
            self._a_block().register_forward_hook(lambda m, i, output: self._once(output))
        elif self.form == "gradient":

            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                if output.requires_grad and self._now():
                    output.register_hook(self._once)

            self._a_block().register_forward_hook(hook)
        elif self.form == "weight":
            self.chance.choice(list(self.model.parameters())).register_hook(self._once)
        else:
            weight = self.chance.choice(list(self.model.parameters()))

            def spoil() -> None:
                if weight.grad is not None:
                    weight.grad = self._once(weight.grad)

            self.trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, spoil)

    def _bad_sequence(self) -> Tensor:
        loader = self.trainer.train_loader
        batches = loader.window_at(*divmod(self.step - 1, len(loader))).micro_batches
        rows = self.chance.choice(batches)["input_ids"]
        return rows[self.chance.randrange(len(rows))]

    def _on_sequence(self, act: Callable[[Tensor], Tensor], narrow: bool = False) -> None:
        """Act on what a block makes of one sequence, whoever computes it, in whatever company."""
        bad = self._bad_sequence()
        here: list[int] = []

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            ids = inputs[0]
            here[:] = [
                row
                for row in range(len(ids))
                if ids.shape[1] == len(bad) and torch.equal(ids[row], bad)
            ]

        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not here:
                return output
            rows = output.clone()
            for row in here:
                rows[row] = act(output[row])
            return rows

        self.model.get_submodule("token_embedding").register_forward_hook(look)
        block = self._a_block()
        # The residual stream is wide whatever the precision; what is added to it is not.
        place = block.get_submodule("feedforward.output") if narrow else block
        place.register_forward_hook(spoil)

    def _data(self) -> None:
        self._on_sequence(lambda row: spoilt(row, self.value, self.chance))

    def _data_with_weights(self) -> None:
        def act(row: Tensor) -> Tensor:
            weights = next(iter(self.model.parameters())).detach()
            if self.weights is None:
                self.weights = weights.clone()
            if not torch.equal(weights, self.weights):
                return row
            return spoilt(row, self.value, self.chance)

        self._on_sequence(act)

    def _precision(self) -> None:
        # Beyond what half precision can hold, and far from what single precision cannot.
        self._on_sequence(lambda row: row * 1e7, narrow=True)

    def _divergence(self) -> None:
        self.form = self.chance.choice(("all weights", "one matrix", "learning rate"))
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        matrix = self.chance.choice(matrices)

        def act() -> None:
            now = self.trainer.state.iteration == self.step - (self.form == "learning rate")
            if not (now and self.left):
                return
            self.left = False
            with torch.no_grad():
                if self.form == "all weights":
                    for weight in self.model.parameters():
                        weight.mul_(1e30)
                elif self.form == "one matrix":
                    matrix.fill_(3e38)
                else:
                    for group in self.trainer.optimizer.param_groups:
                        group["lr"] = 1e38

        # After the schedule has written the rate, and in time for the forward pass.
        self.trainer.add_event_handler(Events.ITERATION_STARTED, act)


def judge(cause: str, seed: int, tally: Tally, confusion: Counter[str]) -> None:
    """Let a run meet a fault; compare the verdict, and the healed run with the clean one."""
    precision = "fp16" if cause == "precision" else "fp32"
    architecture = ("llama", "gpt2")[seed % 2]
    options: dict[str, Any] = {"precision": precision, "architecture": architecture}
    with scratch_directory() as directory:
        broken = build(directory / "broken", seed, **options)
        fault = Fault(cause, seed)
        fault.attach(broken)
        incidents = incidents_of(broken)
        broken.run()
        tally.counts["faults"] += 1
        name = f"{cause} {seed} {fault.form} at {fault.step}"
        if not incidents:
            tally.fail(name, "was not noticed")
            return
        verdict = incidents[0].verdict
        confusion[f"{cause} as {verdict}"] += 1
        tally.counts["right"] += verdict == cause
        if cause == "transient" and "data" in verdict:
            tally.fail(name, "was called", verdict)
        clean = build(directory / "clean", seed, **options)
        clean.interventions.load_state_dict(broken.interventions.state_dict())
        clean.run()
        tally.counts["healed runs compared"] += 1
        if differences := unequal(broken, clean):
            tally.fail(name, "healed to another run:", differences[:3])


def unequal(one: Trainer, other: Trainer) -> list[str]:
    """Return the leaves of two runs' states that differ, but for the count of what happened."""
    told: list[dict[str, Any]] = []
    tensors: list[dict[str, Tensor]] = []
    for trainer in (one, other):
        state = snapshot.capture(trainer)
        for name in NOT_COMPARED:
            del state["trainer"][name]
        del state["handlers"]["nan_rollback"]
        skeleton, found = flatten(state)
        told.append({**skeleton, "lr": list(trainer.history.lr)})
        tensors.append(found)
    names = [n for n in tensors[0] if not torch.equal(tensors[0][n], tensors[1][n])]
    return [
        *names,
        *(key for key in told[0] if json.dumps(told[0][key]) != json.dumps(told[1][key])),
    ]


def verdicts(count: int, seed: int) -> dict[str, Any]:
    """Judge faults of every cause in turn."""
    tally, confusion = Tally(), Counter[str]()
    for number in range(count):
        judge(VERDICTS[number % len(VERDICTS)], seed * 10_000 + number, tally, confusion)
    report = {**tally.report(), "cause as verdict": dict(confusion)}
    if tally.counts["right"] < 0.95 * tally.counts["faults"]:
        report["wrong"].append("less than 95 % of the verdicts are right")
    return report


# ---------------------------------------------------------------------- bounds


class EndlessRunError(Exception):
    """A run goes on and on."""


class Plan:
    """Faults that never end, of random kinds from random steps on.

    Args:
        seed: chooses all.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(f"plan {seed}")
        kinds = ("everything", "weights", "sequences", "machine", "rate", "moments", "spikes")
        self.kinds = self.chance.sample(kinds, self.chance.choice((1, 1, 2, 3)))
        self.first = {kind: self.chance.randrange(1, 30) for kind in self.kinds}
        self.odds = {kind: self.chance.choice((0.1, 0.3, 1.0)) for kind in self.kinds}
        if "spikes" in self.kinds:  # what is always there stands out from nothing
            self.first["spikes"] += 20
            self.odds["spikes"] = self.chance.choice((0.1, 0.3))
        self.seed = seed
        self.told = 0

    def attach(self, trainer: Trainer) -> None:
        """Put the faults in."""
        self.trainer = trainer
        model = trainer.model
        model.register_forward_hook(self._spoil)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._before)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after)

    def _strikes(self, kind: str, *of: object) -> bool:
        """Tell whether a fault strikes; the same question has the same answer."""
        step = self.trainer.state.iteration
        if kind not in self.kinds or step < self.first[kind]:
            return False
        return random.Random(f"{self.seed} {kind} {of or step}").random() < self.odds[kind]

    def _spoil(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if not module.training:
            return logits
        self.told += 1
        if self._strikes("everything"):
            return logits * math.nan
        if self._strikes("machine", self.told):
            return logits * math.inf
        if self._strikes("spikes"):
            return logits * 1e4
        if "sequences" in self.kinds:
            bad = [self._strikes("sequences", row.sum().item()) for row in inputs[0]]
            return torch.where(torch.tensor(bad)[:, None, None], logits * math.nan, logits)
        return logits

    def _before(self, trainer: Trainer) -> None:
        if self._strikes("rate"):
            trainer.optimizer.param_groups[-1]["lr"] = math.inf

    def _after(self, trainer: Trainer) -> None:
        if self._strikes("weights"):
            with torch.no_grad():
                next(iter(trainer.model.parameters())).mul_(1e38)
        if self._strikes("moments") and trainer.optimizer.state:
            state = next(iter(trainer.optimizer.state.values()))
            state["exp_avg_sq"].view(-1)[0] = math.inf


def carry_out(seed: int, tally: Tally) -> None:
    """Carry one plan out to its end."""
    with scratch_directory() as directory:
        rollback = NaNRollback(run_dir=directory, max_transients=20, max_spikes=20)
        plan = Plan(seed)
        # A spike that is only reported ends nothing, and should not.
        policies = ("reject", "rollback") if "spikes" in plan.kinds else ("report", "rollback")
        # Without checkpoints nobody looks at the moments, nor would anything come of them.
        keeps = seed % 4 or "moments" in plan.kinds
        trainer = build(
            directory / "checkpoints" if keeps else None,
            seed,
            rollback=rollback,
            handlers=[Spikes(plan.chance.choice(policies), needed=8, patience=3)],
            total_steps=10**9,
        )
        plan.attach(trainer)
        incidents = incidents_of(trainer)
        taken: Counter[str] = Counter()

        def count() -> None:
            taken["steps"] += 1
            if taken["steps"] > MAX_STEPS_OF_A_PLAN:
                raise EndlessRunError

        trainer.add_event_handler(Events.ITERATION_STARTED, count)
        name = f"plan {seed} {plan.kinds} {plan.odds}"
        tally.counts["plans"] += 1
        try:
            trainer.run()
        except NumericalError as error:
            tally.counts[f"exit {error.exit_code}"] += 1
            if error.exit_code != 20:
                tally.fail(name, "ended with exit code", error.exit_code)
        except EndlessRunError:
            tally.fail(name, "had not ended after", MAX_STEPS_OF_A_PLAN, "steps")
            return
        for reason in ("region", "incidents", "transient", "spikes"):
            tally.counts[f"ended by {reason}"] += reason in incidents[-1].fault
        if trainer.state.rollbacks > rollback.max_rollbacks or rollback.total > 10:
            tally.fail(name, "went beyond its limits:", rollback.total, trainer.state.rollbacks)
        if incidents[-1].decision != "giving up":
            tally.fail(name, "did not say that it gives up")
        bundles = sorted((directory / "incidents").iterdir())
        reports = [json.loads((b / "report.json").read_text()) for b in bundles]
        if not any(report["decision"] == "giving up" for report in reports):
            tally.fail(name, "left no bundle of its end")
        tally.counts["steps"] += taken["steps"]
        tally.counts["bundles"] += len(bundles)


def bounds(plans: int, seed: int) -> dict[str, Any]:
    """Carry out random plans."""
    tally = Tally()
    for number in range(plans):
        carry_out(seed * 10_000 + number, tally)
    return tally.report()


# ---------------------------------------------------------------------- bundles

CONFIG = """
data: {{source: {text}, sequence_length: 16, batch_size: 4}}
model: {{d_model: 16, num_layers: 2, num_heads: 2, dropout: 0.1, {model}}}
training: {{total_steps: 40, eval_steps: 4, learning_rate: 1e-3, device: cpu}}
handlers: {{progress: false, samples: false, tensorboard: false, throughput: false}}
seed: {seed}
"""
TEXT = "the rare letter stands at a few places only; this is one of them: q. then it goes on. " * 40


def make_incident(directory: Path, seed: int) -> tuple[Path, str]:
    """Run a YAML whose weights overflow, by themselves or for one letter; return its incident."""
    from fundamentallm.config import load_config
    from fundamentallm.engine.wiring import run_directory
    from fundamentallm.engine.wiring.assemble import assemble, open_machine

    chance = random.Random(f"bundle {seed}")
    text, config = directory / "text.txt", directory / "run.yaml"
    text.write_text(TEXT, encoding="utf-8")
    model = chance.choice(
        ("tie_embeddings: false", "normalization: layernorm, positions: learned, feedforward: gelu")
    )
    config.write_text(CONFIG.format(text=text, model=model, seed=seed), encoding="utf-8")
    loaded = load_config(config)
    place = run_directory.choose(loaded, "never", directory / "run")
    run = assemble(loaded, place, open_machine(loaded))
    trainer, at = run.trainer, chance.randrange(2, 12)
    incidents = incidents_of(trainer)
    letter = chance.random() < 0.5
    matrices = {n: p for n, p in trainer.model.named_parameters() if p.ndim == 2 and "pos" not in n}
    name = chance.choice(sorted(matrices))
    left = [at]

    def overflow() -> None:
        if left == [trainer.state.iteration]:
            left.clear()
            with torch.no_grad():
                if letter:
                    row = run.tokenizer.encode("q")[0]
                    trainer.model.get_submodule("token_embedding").weight[row] = 3e38  # type: ignore[operator]
                else:
                    matrices[name].fill_(3e38)

    trainer.add_event_handler(Events.ITERATION_STARTED, overflow)
    with contextlib.suppress(NumericalError):
        trainer.run()
    found = sorted((directory / "run" / "incidents").iterdir())
    return found[0], incidents[0].verdict


def replay_bundle(seed: int, tally: Tally) -> None:
    """Replay one incident by the command, which compares the module itself."""
    with tempfile.TemporaryDirectory(prefix="heal-") as name:
        bundle, verdict = make_incident(Path(name), seed)
        report = json.loads((bundle / "report.json").read_text())
        with contextlib.redirect_stdout(Lines()) as said:
            code = command_line(["replay", str(bundle)])
        recorded = report["first_bad"]["forward"] or report["first_bad"]["backward"]
        again = any(recorded["module"] in line and "recorded" in line for line in said.lines)
        tally.counts["bundles"] += 1
        tally.counts[f"verdict {verdict}"] += 1
        tally.counts["reproduced"] += code == 0 and again
        tally.counts[f"module {recorded['module']}"] += 1
        if code != 0 or not again:
            tally.fail("bundle", seed, verdict, recorded["module"], "was not reproduced", code)


class Lines:
    """A standard output that keeps its lines."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        """Keep a text."""
        self.lines += text.splitlines()
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


def bundles(count: int, seed: int) -> dict[str, Any]:
    """Make incidents and replay them."""
    tally = Tally()
    for number in range(count):
        replay_bundle(seed * 10_000 + number, tally)
    return tally.report()


# ---------------------------------------------------------------------- the trials

PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "detection": lambda o: detection(o.seed, o.share),
    "state": lambda o: state_damage(o.seed, o.share),
    "verdicts": lambda o: verdicts(o.verdicts, o.seed),
    "bounds": lambda o: bounds(o.plans, o.seed),
    "bundles": lambda o: bundles(o.bundles, o.seed),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the sites")
    parser.add_argument("--verdicts", type=int, default=200)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--bundles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"seed": options.seed}
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        with silent():
            report[name] = PARTS[name](options)
        report[name]["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(report[name]), file=sys.stderr, flush=True)
    report["sound"] = not any(report[name]["wrong"] for name in options.only)
    print(json.dumps(report, indent=2))
    return 0 if report["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
