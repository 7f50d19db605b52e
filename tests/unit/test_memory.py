"""Memory that runs out in each place of a run: one typed error, and the last checkpoint kept."""

from __future__ import annotations

import pytest
import torch

from fundamentallm.compute.memory import is_out_of_memory
from fundamentallm.config.training import TrainingConfig
from fundamentallm.engine import cli
from fundamentallm.engine.cli import main
from fundamentallm.errors import MachineError
from fundamentallm.events import TrainingEvents
from fundamentallm.testing import tiny_loaders, tiny_model
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import Checkpointing, Evaluation
from fundamentallm.training.trainer import Trainer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


class FullModel(torch.nn.Module):
    """Runs out of memory at one place of step 3, or of the evaluation after step 4."""

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__()
        self.inner, self.place, self.error = tiny_model(), place, error
        self.calls = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(input_ids)
        if not self.training:
            if self.place == "evaluation" and self.calls >= 4:
                raise self.error
            return logits
        self.calls += 1
        if self.calls == 3 and self.place == "forward":
            raise self.error
        if self.calls == 3 and self.place == "backward":
            logits.register_hook(self.fail)
        return logits

    def fail(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer", "evaluation"])
def test_the_error_says_what_to_lower_and_the_last_checkpoint_stays(tmp_path, place, error):
    model, (train, val) = FullModel(place, error), tiny_loaders()
    trainer = Trainer(
        model,
        train,
        val,
        device="cpu",
        config=TrainingConfig(total_steps=8, eval_steps=2, checkpoint_steps=2),
        handlers=[Checkpointing(tmp_path), Evaluation()],
    )
    if place == "optimizer":
        step = trainer.optimizer.step

        def full(*args, **kwargs):
            if trainer.state.iteration == 3:
                raise error
            return step(*args, **kwargs)

        trainer.optimizer.step = full
    ended = []
    trainer.add_event_handler(TrainingEvents.FLLM_RUN_ENDED, lambda: ended.append(True))
    with pytest.raises(MachineError) as caught:
        trainer.run()
    assert caught.value.__cause__ is error
    step = 4 if place == "evaluation" else 3
    assert caught.value.what == f"out of memory at step {step}; the last checkpoint is kept"
    for key in ("batch_size", "accumulation_steps", "gradient_checkpointing", "precision"):
        assert key in caught.value.fix
    assert ended == [True]
    store = CheckpointStore(tmp_path)
    newest = store.newest()
    assert newest is not None
    assert newest.step in ((2, 4) if place == "evaluation" else (2,))
    store.verify(tmp_path / store.step_names()[-1])


def test_another_error_stays_what_it_is():
    model, (train, _) = FullModel("forward", RuntimeError("shapes differ")), tiny_loaders()
    trainer = Trainer(model, train, device="cpu", config=TrainingConfig(total_steps=8))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.run()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_command_without_a_loop_tells_it_too(monkeypatch, capsys, error):
    def full(options: object) -> int:
        raise error

    monkeypatch.setattr(cli.COMMANDS["verify"], "execute", full)
    assert is_out_of_memory(error)
    assert main(["verify", "runs/none"]) == 5
    said = capsys.readouterr().err
    assert said.startswith("reading runs/none\nerror: out of memory\n")
    assert "gradient_checkpointing" in said
