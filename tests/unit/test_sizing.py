"""`model: {size: auto}`: chosen once from the machine, the time and the text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fundamentallm.compute.plan import Machine
from fundamentallm.compute.processor import Rates
from fundamentallm.config import RunConfig, load_config
from fundamentallm.engine.cli import main
from fundamentallm.engine.tuning import sizing
from fundamentallm.engine.tuning.sizing import SIZES, Size, choose_size, sized, training_rate
from fundamentallm.engine.wiring import assemble
from fundamentallm.errors import ConfigError

# FLOP/s in float32 and bfloat16 as measured on two threads; and what was best in two minutes.
AVX2, AMX = Rates(1.37e11, 1.8e9), Rates(3.05e11, 1.5e12)


def config_of(**training: Any) -> RunConfig:
    values = {"precision": "auto", "max_seconds": 120.0, **training}
    return RunConfig.model_validate(
        {"name": "sized", "data": {"source": "x"}, "model": {"size": "auto"}, "training": values}
    )


def chosen(config: RunConfig, rates: Rates, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    monkeypatch.setattr(sizing, "cpu_rates", lambda: rates)
    model, note = sized(config, 1_115_394, Machine.open("cpu"))
    assert model.size is None
    assert f"d_model {model.d_model}" in note
    return model.d_model, model.num_layers, model.num_heads


def test_two_minutes_get_the_measured_best_of_each_processor(monkeypatch) -> None:
    assert chosen(config_of(), AVX2, monkeypatch) == (96, 4, 3)
    assert chosen(config_of(), AMX, monkeypatch) == (128, 4, 2)
    assert chosen(config_of(precision="fp32"), AMX, monkeypatch) == (128, 4, 2)
    assert chosen(config_of(max_seconds=600.0), AVX2, monkeypatch) == (128, 4, 2)
    assert chosen(config_of(max_seconds=600.0), AMX, monkeypatch) == (192, 6, 3)


def test_more_operations_train_a_larger_model() -> None:
    sizes = [choose_size(10.0**power, None) for power in range(8, 26)]
    assert [size.parameters for size in sizes] == sorted(size.parameters for size in sizes)
    assert {sizes[0], sizes[-1]} == {SIZES[0], SIZES[-1]}


@pytest.mark.parametrize("size", SIZES[:5])
def test_in_short_runs_a_parameter_gets_eight_tokens(size: Size) -> None:
    tokens = 8 * size.parameters
    assert choose_size(6 * size.parameters * tokens, None) == size


def test_a_short_text_bounds_the_size() -> None:
    assert choose_size(1e20, 250_000) == Size(128, 4, 2)  # three parameters a token: 0.75 M


def test_the_rate_is_that_of_the_faster_type_where_the_precision_is_open(monkeypatch) -> None:
    monkeypatch.setattr(sizing, "cpu_rates", lambda: AMX)
    cpu = torch.device("cpu")
    assert training_rate(cpu, "auto") == pytest.approx(4.2e11)
    assert training_rate(cpu, "fp32") == 1.525e11
    monkeypatch.setattr(sizing, "cpu_rates", lambda: AVX2)
    assert training_rate(cpu, "auto") == training_rate(cpu, "fp32") == 6.85e10


def test_without_a_time_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs to know the time") as caught:
        sized(config_of(max_seconds=None), None, Machine.open("cpu"))
    assert "max_seconds" in caught.value.fix


@pytest.mark.parametrize("given", [{"d_model": 64}, {"num_heads": 2}, {"d_ff": 64}])
def test_a_size_of_ones_own_beside_it_is_refused(given: dict[str, int]) -> None:
    text = yaml.safe_dump(
        {"name": "x", "data": {"source": "x"}, "model": {"size": "auto", **given}}
    )
    with pytest.raises(ConfigError, match="both say how large") as caught:
        RunConfig.from_yaml(text)
    assert caught.value.key == "model.size"
    assert next(iter(given)) in caught.value.fix


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("All that is gold does not glitter.\n" * 200)
    values = {
        "name": "tiny",
        "data": {"source": "text.txt", "sequence_length": 16, "batch_size": 2},
        "model": {"size": "auto"},
        "training": {
            "total_steps": 4,
            "max_seconds": 600.0,
            "eval_epochs": False,
            "checkpoint_steps": 2,
        },
        "handlers": {"samples": False, "tensorboard": False},
    }
    path = Path("tiny.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def stored_in(run: str) -> dict[str, Any]:
    last = sorted(Path(run, "checkpoints").glob("step-*"))[-1]
    return json.loads((last / "MANIFEST.json").read_text())["metadata"]


def test_a_run_keeps_its_size_on_a_faster_machine(written: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sizing, "cpu_rates", lambda: Rates(1e6, 1e6))
    monkeypatch.setattr(assemble, "seconds_since_start", lambda: 1.0)  # not those of all tests
    assert main(["run", str(written), "--run-dir", "run"]) == 0
    assert "model.size: auto: d_model 64, num_layers 2" in capsys.readouterr().err
    stored = stored_in("run")
    assert stored["config_as_written"]["model"]["size"] == "auto"
    assert "d_model" not in stored["config_as_written"]["model"]
    assert stored["config"]["model"]["d_model"] == 64
    assert "size" not in stored["config"]["model"]
    assert load_config(written).model.to_dict()["size"] == "auto"

    monkeypatch.setattr(sizing, "cpu_rates", lambda: Rates(1e13, 1e13))
    words = ["training.total_steps=6", "--resume", "run", "--change"]
    assert main(["run", str(written), *words]) == 0
    assert "step 4" in capsys.readouterr().err
    after = stored_in("run")
    assert after["config"]["model"] == stored["config"]["model"]
    assert main(["verify", "run"]) == 0
