"""Energy is read where it can be, adds up over wraps, and never fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fundamentallm.compute.energy import EnergyMeter

CPU = torch.device("cpu")


def write_zone(powercap: Path, zone: str, name: str, joules: float, largest: float = 100.0) -> None:
    directory = powercap / zone
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (directory / "max_energy_range_uj").write_text(f"{round(largest * 1e6)}\n")


def test_packages_and_memory_add_up_over_a_wrap(tmp_path: Path) -> None:
    zones = [("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")]
    for zone, name in zones:
        write_zone(tmp_path, zone, name, 90.0)
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.read() == {"cpu package-0": 0.0, "memory 0:1": 0.0}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 97.5)
    assert meter.read() == {"cpu package-0": 7.5, "memory 0:1": 0.0}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 4.0)  # 100 J were reached
    write_zone(tmp_path, "intel-rapl:0:1", "dram", 91.0)
    assert meter.read() == {"cpu package-0": 14.0, "memory 0:1": 1.0}


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert EnergyMeter(CPU, tmp_path / "missing").read() == {}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert EnergyMeter(CPU, tmp_path).read() == {}
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1.0)
    meter = EnergyMeter(CPU, tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("none")
    assert meter.read() == {}


def test_the_energy_of_a_gpu_is_that_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    millijoules = iter([1_000, 4_500])
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-two": 2}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {2: next(millijoules)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    devices = {1: SimpleNamespace(uuid="two")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    meter = EnergyMeter(torch.device("cuda:1"), tmp_path)
    assert meter.read() == {"gpu 1": 3.5}
    assert meter.read() == {"gpu 1": 3.5}  # the counter is no longer there
