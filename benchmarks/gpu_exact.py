"""Whether a device computes what the CPU does: gradients, steps, a resumed run, a loss curve.

Each check is a row with its error, its bound and whether it holds. The reference is the plain model
in float64 on the CPU; what float32 costs there is told beside it. TF32 is off, as by default.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn

from fundamentallm.compute.compilation import CompiledBlocks
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine, Plan
from fundamentallm.compute.precision import has_bf16
from fundamentallm.config import TrainingConfig
from fundamentallm.data.batch import Batch, as_window, count_computed
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.models.native.library import find_compiler
from fundamentallm.testing import tiny_model, tiny_tokens
from fundamentallm.training.losses import ChunkedCrossEntropy, LanguageModelingLoss
from fundamentallm.training.optimizers import OptimizerBuilder
from fundamentallm.training.step import TrainStep
from fundamentallm.training.trainer import Trainer

CPU = torch.device("cpu")
VOCABULARY, CONTEXT, ROWS = 64, 64, 8
# Relative to the norm of the whole gradient; TF32, a wrong mask or a lost row are far above it.
GRADIENT = 1e-5
LOSS = 1e-6
STEPS = 5
COURSE = 1e-5  # of the losses of STEPS steps; the tests of accumulation allow as much
MOVED = 1e-4  # relative to how far the weights moved; with rounding like TF32's it is 1e-2
NARROW = 2.0  # times the error that bfloat16 has on the CPU
CURVE = 0.02  # nats between the ends of two curves; half-way they may be twice as far apart

MODERN: dict[str, Any] = {
    "normalization": "rmsnorm",
    "positions": "rotary",
    "feedforward": "swiglu",
    "qk_norm": True,
    "bias": False,
}
SHARED = {**MODERN, "num_kv_heads": 2}


@dataclass(frozen=True)
class Case:
    """One way to compute a model.

    Attributes:
        model: fields of `TransformerConfig`.
        documents: whether rows hold several documents that do not see each other.
        attention, compile, gradient_checkpointing: as in the configuration.
        chunked: whether the loss takes the head a few tokens at a time.
    """

    model: dict[str, Any]
    documents: bool = False
    attention: str = "flash"
    compile: bool = False
    gradient_checkpointing: bool = False
    chunked: bool = False


CASES = {
    "GPT-2": Case({}),
    "GPT-2, explicit attention": Case({}, attention="explicit"),
    "GPT-2, activations computed again": Case({}, gradient_checkpointing=True),
    "GPT-2, chunked loss": Case({}, chunked=True),
    "Llama": Case(MODERN),
    "Llama, shared heads": Case(SHARED),
    "Llama, shared heads, documents": Case(SHARED, documents=True),
}
COMPILED = {
    "GPT-2, compiled": Case({}, compile=True),
    "Llama, shared heads, compiled": Case(SHARED, compile=True),
}


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4}
    return tiny_model(VOCABULARY, CONTEXT, **sizes, **case.model)


def make_batch(documents: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, : CONTEXT // 3] = -100  # a masked prompt
    batch = {"input_ids": ids[:, :-1].contiguous(), "target_ids": targets}
    if documents:
        batch["document_ids"] = (batch["input_ids"] < 3).cumsum(dim=1)
    return batch


def plan_of(
    case: Case, device: torch.device, precision: str = "fp32", narrow: bool = False
) -> Plan:
    return Plan(
        precision,
        narrow,
        case.compile,
        case.attention,
        ROWS,
        gradient_checkpointing=case.gradient_checkpointing,
        machine=Machine(device),
    )


class OneStep:
    """A step of a case on a device, to be taken any number of times.

    Args:
        case, device, precision, narrow: how it is computed.
        optimizer: its name.
        double: compute in float64.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        precision: str = "fp32",
        narrow: bool = False,
        optimizer: str = "sgd",
        double: bool = False,
    ) -> None:
        plan = plan_of(case, device, precision, narrow)
        self.model = plan.place(make_model(case).double() if double else make_model(case))
        batch = make_batch(case.documents)
        self.window = as_window(batch)
        options = {"dtype": "float32"} if optimizer == "muon" else {}
        self.step = TrainStep(
            plan.prepare(self.model, (ROWS, CONTEXT)),
            self.model,
            OptimizerBuilder.build(optimizer, self.model, 1e-3, **options),
            ChunkedCrossEntropy(100) if case.chunked else LanguageModelingLoss(),
            plan.build_precision(),
            Ranks(),
            None,
            lambda event: None,
        )

    def take(self) -> float:
        """Take the step; return its loss. The loss scale of fp16 may be too large at first."""
        rows, _ = count_computed(self.window)
        while (output := self.step(self.window, self.window.num_tokens, rows)).rejection:
            assert output.rejection == "overflow", output.rejection
        runner = getattr(self.model, "run_block", None)
        if isinstance(runner, CompiledBlocks) and runner.compiled is None:
            raise RuntimeError("torch.compile failed, and the step was taken without it")
        return output.loss

    def gradient(self) -> Tensor:
        """Return the gradient of the step that was taken last, in float64 on the CPU."""
        return flat(p.grad for p in self.model.parameters() if p.grad is not None)

    def weights(self) -> Tensor:
        """Return the weights likewise."""
        return flat(self.model.parameters())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def distance(one: Tensor, other: Tensor) -> float:
    """Return how far one is from the other, relative to the other's norm."""
    return float((one - other).norm() / other.norm())


def row(what: str, error: float, bound: float, **more: Any) -> dict[str, Any]:
    shown = error if math.isfinite(error) else str(error)  # JSON has no NaN
    return {"what": what, "error": shown, "bound": bound, "holds": error <= bound, **more}


def gradients(device: torch.device, compiled: bool) -> Iterator[dict[str, Any]]:
    """Compare the first loss and gradient of each case with float64 on the CPU."""
    for name, case in {**CASES, **(COMPILED if compiled else {})}.items():
        plain = Case(case.model, case.documents)
        reference = OneStep(plain, CPU, double=True)
        loss, gradient = reference.take(), reference.gradient()
        host, here = OneStep(plain, CPU), OneStep(case, device)
        host.take()
        error = abs(here.take() - loss) / loss
        yield row(f"{name}: loss in float32", error, LOSS)
        yield row(
            f"{name}: gradient in float32",
            distance(here.gradient(), gradient),
            GRADIENT,
            on_the_cpu=distance(host.gradient(), gradient),
        )


def narrow_gradients(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare the gradients of half types with float64, by what bfloat16 costs on the CPU."""
    half = [("bf16", False), ("bf16", True)] if has_bf16(device) else []
    half += [("fp16", False)] if device.type == "cuda" else []
    for name in ("GPT-2", "Llama, shared heads", "Llama, shared heads, documents"):
        case = CASES[name]
        reference, host = OneStep(case, CPU, double=True), OneStep(case, CPU, "bf16")
        reference.take(), host.take()
        bound = NARROW * distance(host.gradient(), reference.gradient())
        for precision, weights in half:
            here = OneStep(case, device, precision, weights)
            here.take()
            kind = f"{precision}{' weights' if weights else ' autocast'}"
            error = distance(here.gradient(), reference.gradient())
            yield row(f"{name}: gradient in {kind}", error, bound)


def courses(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare a few steps of optimizers with those in float64 on the CPU."""
    # Without biases: the gradient of a key's bias is 0 but for rounding, which Adam makes large.
    case = CASES["Llama"]
    for optimizer in ("adamw", "muon", "lion"):
        reference = OneStep(case, CPU, optimizer=optimizer, double=True)
        here = OneStep(case, device, optimizer=optimizer)
        start = reference.weights()
        losses = [(here.take(), reference.take()) for _ in range(STEPS)]
        error = max(abs(one - other) / other for one, other in losses)
        yield row(f"{optimizer}: losses of {STEPS} steps in float32", error, COURSE)
        if optimizer != "lion":  # which takes a sign, and that of a gradient near 0 is chance
            error = distance(here.weights() - start, reference.weights() - start)
            yield row(f"{optimizer}: what {STEPS} steps moved", error, MOVED)


def make_trainer(device: torch.device, folder: Path, precision: str, **fields: Any) -> Trainer:
    """Return a trainer of a small model with dropout, the same each time."""
    torch.manual_seed(0)
    model = tiny_model(11, 32, d_model=64, num_heads=4, dropout=fields.pop("dropout", 0.0))
    loader = TokenWindowLoader(tiny_tokens(20_000), Batching(32, 8, 2, seed=0))
    config = TrainingConfig(
        precision=precision,
        checkpoint_dir=str(folder),
        warmup_steps=0,
        learning_rate=1e-3,
        device=str(device),
        **fields,
    )
    return Trainer(model, loader, device=str(device), config=config)


def resumed(
    device: torch.device, precision: str, steps: int = 6, deterministic: bool = False
) -> float:
    """Return how far a resumed run is from one that was not stopped; 0 is bitwise."""
    with tempfile.TemporaryDirectory() as scratch:
        fields = {"total_steps": steps, "dropout": 0.1, "checkpoint_steps": steps // 2}
        fields["deterministic"] = deterministic
        whole = make_trainer(device, Path(scratch) / "whole", precision, **fields)
        whole.train()
        first = make_trainer(device, Path(scratch) / "parts", precision, **fields)
        stop = Events.ITERATION_COMPLETED(once=steps // 2)
        first.add_event_handler(stop, lambda engine: engine.interrupt_run(15))
        first.train()
        second = make_trainer(device, Path(scratch) / "parts", precision, **fields)
        torch.manual_seed(99)
        second.resume(Path(scratch) / "parts" / f"step-{steps // 2:08d}")
        second.train()
        assert second.state.iteration == whole.state.iteration == steps
        pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
        if all(torch.equal(one, other) for one, other in pairs):
            return 0.0
        one, other = (flat(trainer.model.parameters()) for trainer in (second, whole))
        return max(distance(one, other), math.ulp(0.0))


def resumes(device: torch.device) -> Iterator[dict[str, Any]]:
    """Check that a resumed run is bitwise the other, with kernels that add in a fixed order.

    Of torch's own choice of kernels it is told: the fused attention of a GPU may add in any order.
    """
    precisions = ["fp32", *(["bf16"] if has_bf16(device) else [])]
    for precision in [*precisions, *(["fp16"] if device.type == "cuda" else [])]:
        error = resumed(device, precision, deterministic=True)
        torch.use_deterministic_algorithms(False)  # again
        free = resumed(device, precision)
        yield row(f"resumed run in {precision}", error, 0.0, with_torchs_own_kernels=free)


def curve(device: torch.device, precision: str, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(device, Path(scratch), precision, total_steps=steps)
        trainer.train()
        return trainer.history.train_loss


def curves(device: torch.device, steps: int) -> Iterator[dict[str, Any]]:
    """Compare the loss curve of the GPU's half type with that in float32."""
    span = max(1, steps // 10)
    narrow = "bf16" if has_bf16(device) else "fp16"
    wide, half = (
        [statistics.mean(losses[at : at + span]) for at in range(0, steps - span + 1, span)]
        for losses in (curve(device, name, steps) for name in ("fp32", narrow))
    )
    apart = [abs(one - other) for one, other in zip(wide, half, strict=True)]
    what = f"loss curve of {steps} steps in {narrow}, against fp32"
    fell = {"from": wide[0], "to": wide[-1]}
    yield row(f"{what}: at the end", apart[-1], CURVE, **fell)
    yield row(f"{what}: anywhere", max(apart), 2 * CURVE, **fell)


def exact(device: torch.device, steps: int = 200, compiled: bool = True) -> list[dict[str, Any]]:
    """Return the rows of all checks; a check that fails with an error has a row for it.

    Args:
        device: the device to check.
        steps: of the loss curves.
        compiled: check compiled blocks too, if there is a compiler.
    """
    checks: dict[str, Iterator[dict[str, Any]]] = {
        "gradients": gradients(device, compiled and find_compiler() is not None),
        "gradients in half types": narrow_gradients(device),
        "steps": courses(device),
        "resumed runs": resumes(device),
        "loss curves": curves(device, steps),
    }
    rows: list[dict[str, Any]] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        for name, check in checks.items():
            try:
                rows.extend(check)
            except Exception as error:  # the other checks tell more
                fault = f"{type(error).__name__}: {error}"
                rows.append({"what": name, "fault": fault, "holds": False})
    finally:
        torch.set_float32_matmul_precision(before)
    return rows
