"""`benchmarks/gpu.py` on a CPU: each phase tells what it should, and its checks can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import forked

from fundamentallm.compute.plan import Plan
from fundamentallm.engine.tuning import tune as tune_module
from fundamentallm.engine.tuning.measuring import Measurement, failed
from fundamentallm.models.layers import attention
from fundamentallm.training.checkpoint import snapshot
from fundamentallm.training.checkpoint.tree import copied

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu() -> Any:
    import gpu

    return gpu


@pytest.fixture
def exact() -> Any:
    import gpu_exact

    return gpu_exact


# ------------------------------------------------------------------ exactness


def faults(rows: Iterator[dict[str, Any]]) -> list[str]:
    return [row["what"] for row in rows if not row["holds"]]


def test_a_cpu_is_as_exact_as_a_cpu(exact):
    assert faults(exact.gradients(CPU, compiled=False)) == []
    assert faults(exact.courses(CPU)) == []


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # it is off on purpose
def test_a_gpu_is_as_exact_as_a_cpu(exact, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows = exact.exact(torch.device("cuda", 0))
    assert faults(iter(rows)) == [], rows


def rounded(linear: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
    """Return a product of factors with ten bits, as TF32 has it."""
    short = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (*inputs, linear.weight)]
    return F.linear(*short, linear.bias) + (output - output.detach())


def test_products_that_round_like_tf32_are_found(exact, monkeypatch):
    place = Plan.place

    def worse(plan: Plan, model: torch.nn.Module) -> torch.nn.Module:
        if next(model.parameters()).dtype == torch.float32:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(rounded)
        return place(plan, model)

    monkeypatch.setattr(Plan, "place", worse)
    monkeypatch.setattr(exact, "CASES", {"Llama": exact.CASES["Llama"]})
    assert "Llama: gradient in float32" in faults(exact.gradients(CPU, compiled=False))
    assert "adamw: what 5 steps moved" in faults(exact.courses(CPU))


def test_a_mask_that_is_forgotten_is_found(exact, monkeypatch):
    def forgetful(visible: torch.Tensor, dropout: float, *heads: torch.Tensor) -> torch.Tensor:
        if heads[0].dtype == torch.float64:  # of the reference
            return kept(visible, dropout, *heads)
        return attention.flash_attention(*heads, dropout)

    kept = attention.document_attention
    monkeypatch.setattr("fundamentallm.models.transformer.document_attention", forgetful)
    found = faults(exact.gradients(CPU, compiled=False))
    assert {name.partition(":")[0] for name in found} == {"Llama, shared heads, documents"}


def test_a_run_that_goes_on_with_other_random_numbers_is_found(exact, monkeypatch):
    assert exact.resumed(CPU, "fp32", steps=2) == 0.0
    monkeypatch.setattr(snapshot.RandomState, "load_state_dict", lambda self, state: None)
    assert exact.resumed(CPU, "fp32", steps=2) > 1e-6


@pytest.mark.long
def test_curves_of_types_lie_close_together(exact):
    assert faults(exact.curves(CPU, 60)) == []


def test_a_check_that_breaks_off_is_a_row_beside_the_others(exact, monkeypatch):
    def broken(device: torch.device, *_: Any) -> Iterator[dict[str, Any]]:
        yield exact.row("one", 0.0, 1.0)
        raise RuntimeError("no such kernel")

    for name in ("gradients", "narrow_gradients", "courses", "resumes", "curves"):
        monkeypatch.setattr(exact, name, broken if name == "courses" else lambda *_: iter(()))
    first, second = exact.exact(CPU)
    assert first["holds"]
    assert second == {"what": "steps", "fault": "RuntimeError: no such kernel", "holds": False}


@pytest.mark.cuda
def test_a_copy_for_the_background_is_whole_before_the_weights_change():
    weights = torch.zeros(1 << 26, device="cuda")
    buffers: dict[str, torch.Tensor] = {}
    for step in range(3):
        state = copied({"weights": weights}, buffers)
        weights += 1  # what the next step does, at once
        assert bool((state["weights"] == step).all())


# ------------------------------------------------------------------ the other phases


@pytest.fixture
def task(gpu) -> Any:
    return gpu.smoke(gpu.Task(CPU))


def test_the_fastest_settings_are_found_and_kept_for_the_run(gpu, task, monkeypatch, capsys):
    asked = []

    def measured(config: Any, plan: Plan, **_: Any) -> Measurement:
        asked.append(plan)
        if plan.batch_size == 8:
            return failed("out of memory")
        kind = 1.0 if plan.precision == "bf16" and plan.attention == "explicit" else 2.0
        return Measurement(kind / plan.batch_size, 0.0, 2**30)

    monkeypatch.setattr(tune_module, "measure_in_process", measured)
    written = [*task.overrides, "data.batch_size=2", "training.accumulation_steps=4"]
    keep = ("compile", "threads")
    wide = replace(task, seconds=60.0, overrides=written, keep=keep, settings=task.settings)
    found = gpu.settings(wide)
    assert found["best"]["micro-batch"] == 4
    assert (found["best"]["precision"], found["best"]["attention"]) == ("bf16", "explicit")
    assert found["best"]["tokens a second"] == 1024
    assert found["times as fast as the file's"] == 4.0
    assert found["measured"][-1]["fault"] == "out of memory"
    assert {"data.batch_size=4", 'training.attention="explicit"'} <= set(task.settings)
    assert len(asked) == len(set(asked)) == len(found["measured"])
    precisions = [plan.precision for plan in asked]
    first_wide = precisions.index("fp32")
    assert {4, 8} <= {plan.batch_size for plan in asked[:first_wide]}
    assert json.loads(json.dumps(found)) == found
    assert capsys.readouterr().out == ""  # the report stands there alone


def test_where_nothing_can_be_measured_the_phase_says_why(gpu, task, monkeypatch):
    monkeypatch.setattr(tune_module, "measure_in_process", lambda *_, **__: failed("no kernel"))
    report: dict[str, Any] = {}
    gpu.run_phases(task, ["settings"], report)
    assert not report["holds"]
    assert "no kernel" in report["settings"]["error"]


def test_tests_are_listed_by_their_result(gpu, task, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('no GPU')\n"
    )
    found = gpu.cuda_tests(replace(task, tests=[str(tmp_path)]))
    assert [found[f"number {name}"] for name in ("passed", "skipped", "failed")] == [1, 1, 1]
    (passed,) = found["passed"]
    assert passed.endswith("test_some::test_good")  # behind the folders down to it
    assert "no GPU" in found["skipped"][0]
    assert found["failed"][0].startswith("test_some::test_bad: ")
    assert not gpu.holds("tests", found)


def test_a_phase_that_fails_leaves_the_others(gpu, task, tmp_path, monkeypatch, capsys):
    def broken(_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    phases = {"exact": lambda _: {"checks": 2, "do not hold": [], "rows": []}, "speed": broken}
    monkeypatch.setattr(gpu, "PHASES", phases)
    report: dict[str, Any] = {"GPU": "one"}
    gpu.run_phases(task, ["speed", "exact"], report, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert not report["holds"]
    assert (
        report["speed"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert gpu.holds("exact", report["exact"])
    assert not gpu.holds("speed", report["speed"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["speed", "exact"]


def test_the_gpu_and_its_software_are_told(gpu, monkeypatch):
    facts = {"name": "NVIDIA X", "total_memory": 3 << 30, "major": 9, "minor": 0}
    properties = SimpleNamespace(**facts, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu, "driver_version", lambda: "580.1")
    found = gpu.gpu_report(torch.device("cuda", 0))
    assert (found["name"], found["memory GiB"], found["driver"]) == ("NVIDIA X", 3.0, "580.1")
    assert found["compute capability"] == "9.0"
    assert {"torch", "CUDA", "cuDNN"} <= found.keys()
    json.dumps(found)


def test_without_a_gpu_it_says_so_in_a_line(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert gpu.main(["--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert "CUDA" in first
    assert "got: cpu" in second


def test_a_run_is_measured(gpu, task):
    found = gpu.speed(task)
    assert found["tokens a step"] == 256
    assert found["tokens a second"] == pytest.approx(256e3 / found["ms a step"], rel=0.01)
    assert 0 < found["MFU"] < 1
    assert 0 <= found["input: share of a step that waits for data"] < 1
    hold = found["save in the background: holds the step up, s"]
    assert 0 < hold <= found["save in the background: all, s"]


@pytest.mark.long
def test_the_whole_command(tmp_path):
    done = forked.run(["--smoke"], tmp_path, program=str(BENCHMARKS / "gpu.py"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert report["smoke"]
    assert report["GPU"] == {"name": None}
    assert report["machine"]["torch"] == torch.__version__
    assert report["exact"]["checks"] > 25
    assert report["speed"]["settings"]["data"] == {
        "batch_size": report["settings"]["best"]["micro-batch"]
    }
    assert report["tests"]["number skipped"] == (not torch.cuda.is_available())
