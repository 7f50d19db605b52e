"""How a model is trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fundamentallm.config.base import (
    BaseConfig,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Seed,
    Text,
)
from fundamentallm.config.component import Component
from fundamentallm.config.yaml.problems import problem
from fundamentallm.errors import ConfigError

DEFAULT_WARMUP_STEPS = 500


class TrainingConfig(BaseConfig):
    """Optimization, budgets and cadence. A step is an optimizer step."""

    learning_rate: Positive = 1e-4
    """Peak learning rate; the schedule multiplies it."""

    optimizer: Component = Component(name="adamw")
    """The optimizer: adamw, adam, sgd, rmsprop, lion, muon."""

    optimizer_eps: Positive = 1e-8
    """The epsilon added to the denominator of an adaptive optimizer."""

    optimizer_weight_decay: NonNegative = 0.01
    """Weight decay of linear weights, in optimizers that have one."""

    scheduler: Component = Component(name="linear_warmup")
    """The learning rate over time: linear_warmup, constant, cosine, linear,
    exponential, warmup_stable_decay, inverse_square_root."""

    warmup_steps: CountOrZero = DEFAULT_WARMUP_STEPS
    """Steps over which the learning rate rises from 0; left unset in a run shorter than 5,000
    steps: a tenth of the run; in a run that only the clock ends, a tenth of its time at most."""

    min_learning_rate: NonNegative = 0.0
    """Learning rate at the end of a decaying schedule."""

    loss: Component = Component(name="cross_entropy")
    """The loss: cross_entropy, chunked_cross_entropy."""

    max_grad_norm: Positive | None = 1.0
    """Largest gradient norm over all parameters; larger ones are scaled down. null: no limit."""

    max_grad_value: Positive | None = None
    """Largest gradient element; larger ones are clipped, after the norm. null: no limit."""

    accumulation_steps: Count = 1
    """Micro-batches of one rank in one step; with `data.global_batch` it follows from that."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    mixed_precision: bool = False
    """Run matrix multiplications in the device's narrow type: bf16, or fp16 on GPUs without bf16.
    With precision unset, true makes that "auto", and a CPU takes bf16 too; left unset, it is true
    if precision is bf16 or fp16."""

    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Type of matrix multiplications; auto: the narrow type on a GPU; on a CPU bf16 if the start of
    a run measures it as faster or mixed_precision is true, else fp32."""

    bf16_weights: bool | Literal["auto"] = "auto"
    """In bf16, compute with bfloat16 copies of the weights, made for each micro-batch, in place of
    autocast; auto: on a CPU, if the model's parts can."""

    attention: Literal["auto", "flash", "explicit"] = "auto"
    """How attention is computed, to the same result: torch's fused kernel, or batched products and
    a softmax; auto: explicit on a CPU in bf16 with a context up to 1,024 tokens, else flash."""

    compile: bool | Literal["auto", "native"] = False
    """Compile the model's block: true with torch.compile, native (on CPUs, bf16 or fp32) as our own
    C++ code; auto: the faster one as measured at the start of a run, if there is a C++ compiler."""

    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads of each rank; null: torch's choice, the cores or OMP_NUM_THREADS."""

    deterministic: bool = False
    """Choose kernels of torch that add in a fixed order, so that a resumed run is bitwise the
    uninterrupted one on a GPU too; slower there."""

    num_epochs: Count = 3
    """Passes over the training split, if no other budget ends the run."""

    total_steps: Count | None = None
    """Steps of the run; null: num_epochs times the steps of an epoch."""

    max_tokens: Count | None = None
    """Tokens of the run over all ranks; null: no such limit."""

    max_seconds: Positive | None = None
    """Seconds in which the run ends, the last validation and sample included; they count from the
    start of a process, over all processes of the run; null: no limit."""

    stop_after_seconds: Positive | None = None
    """Seconds from the start of the process after which the run is saved and stops; it can be
    resumed; null: no limit."""

    eval_steps: Count = 100
    """Steps from one validation to the next."""

    eval_epochs: bool = True
    """Whether validation also runs at the end of each epoch."""

    log_steps: Count = 10
    """Steps from one line of metrics to the next."""

    checkpoint_steps: Count | None = None
    """Steps from one checkpoint to the next; null: one before every validation."""

    checkpoint_dir: Text = "./checkpoints"
    """Where checkpoints go; a relative path lies inside the run directory."""

    keep_last: Annotated[Count, Field(json_schema_extra={"minimum": 2})] = 3
    """Newest checkpoints to keep in addition to the best, at least 2: with only one, a failing
    disk could end the run."""

    device: Text = "cpu"
    """Where to compute: cpu, cuda, cuda:N, mps, or auto."""

    seed: Seed = 42
    """Seed of initial weights and dropout."""

    @field_validator("keep_last")
    @classmethod
    def _never_one_alone(cls, keep_last: int) -> int:
        if keep_last < 2:
            raise problem(
                "",
                "one checkpoint is not safe: if it is damaged, the run is lost",
                got=keep_last,
                expected="an integer from 2",
                fix="set keep_last to 2",
            )
        return keep_last

    def _unwritten(self) -> Collection[str]:
        # Writing the default, 500, would stop it from adapting to a short run.
        return () if "warmup_steps" in self.model_fields_set else ("warmup_steps",)

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingConfig:
        given = self.model_fields_set
        narrow = self.precision in ("bf16", "fp16")
        if self.mixed_precision and "precision" not in given:
            self._settle(precision="auto")
        elif narrow and "mixed_precision" not in given:
            self._settle(mixed_precision=True)
        elif self.precision != "auto" and self.mixed_precision != narrow:
            raise problem(
                "mixed_precision",
                f"mixed_precision {str(self.mixed_precision).lower()} and precision "
                f"{self.precision} disagree",
                fix="remove one of the two",
            )
        return self

    @model_validator(mode="after")
    def _native_reads_float32(self) -> TrainingConfig:
        if self.compile != "native":
            return self
        if self.precision == "fp16":
            raise problem(
                "compile",
                "compile native computes in bfloat16 or float32, and precision is fp16",
                fix="set precision: bf16 or fp32, or compile: true",
            )
        if self.bf16_weights is True:
            raise problem(
                "bf16_weights",
                "compile native reads the weights in float32",
                fix="remove bf16_weights, or set compile: true",
            )
        self._settle(bf16_weights=False)
        return self

    @model_validator(mode="after")
    def _one_optimizer_option(self) -> TrainingConfig:
        """Make `optimizer_eps` and the optimizer's option `eps` agree; likewise weight decay."""
        for option in ("eps", "weight_decay"):
            field = f"optimizer_{option}"
            value = self.optimizer.options.get(option)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue  # not set, or of a type that the registry refuses
            if value < 0 or (value == 0 and option == "eps"):
                raise problem(
                    f"optimizer.{option}",
                    "out of range",
                    got=value,
                    expected="a number above 0" if option == "eps" else "a number from 0",
                )
            if field in self.model_fields_set and getattr(self, field) != value:
                raise problem(
                    field,
                    f"{field} {getattr(self, field)} and the optimizer's option {option} {value} "
                    "disagree",
                    fix="remove one of the two",
                )
            self._settle(**{field: float(value)})
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainingConfig:
        if self.min_learning_rate > self.learning_rate:
            raise problem(
                "min_learning_rate",
                f"min_learning_rate {self.min_learning_rate} is above learning_rate "
                f"{self.learning_rate}",
                fix="lower min_learning_rate",
            )
        return self


def resolve_warmup(config: TrainingConfig, total_steps: int | None) -> tuple[int, str | None]:
    """Choose the number of warmup steps of a run whose schedule warms up.

    Args:
        config: the configuration.
        total_steps: steps of the run; None if only the clock ends it.

    Returns:
        The steps over which the learning rate rises, and a note for the user if they were
        chosen here: with warmup_steps unset, a run shorter than 5,000 steps warms up for a tenth.

    Raises:
        ConfigError: `warmup_steps` is set and not below `total_steps`; `key` is "warmup_steps".
    """
    steps = config.warmup_steps
    if total_steps is None:
        return steps, None
    if "warmup_steps" in config.model_fields_set:
        if steps >= total_steps:
            raise ConfigError(
                f"warmup_steps {steps} is not below the run's total_steps {total_steps}",
                key="warmup_steps",
                fix=f"remove warmup_steps (the default is {total_steps // 10}), or train longer",
            )
        return steps, None
    tenth = total_steps // 10
    if tenth >= steps:
        return steps, None
    return tenth, (
        f"warmup_steps: {tenth}, a tenth of the run's {total_steps:,} steps "
        f"({steps} is for runs of at least {10 * steps:,} steps)"
    )
