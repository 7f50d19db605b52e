"""Timers of devices."""

from __future__ import annotations

import time

import pytest
import torch

from fundamentallm.compute.timing import CudaTimer, HostTimer, device_timer


def test_a_cpu_is_timed_by_the_host():
    timer = device_timer(torch.device("cpu"))
    assert isinstance(timer, HostTimer)
    began = timer.mark()
    time.sleep(0.02)
    taken = timer.seconds(began, timer.mark())
    assert taken is not None
    assert 0.02 <= taken < 10


@pytest.mark.cuda
def test_a_gpu_is_timed_by_its_own_clock_and_not_waited_for():
    device = torch.device("cuda", 0)
    timer = device_timer(device)
    assert isinstance(timer, CudaTimer)
    began = timer.mark()
    torch.cuda._sleep(200_000_000)  # cycles: some tenth of a second
    ended = timer.mark()
    assert timer.seconds(began, ended) is None
    torch.cuda.synchronize(device)
    taken = timer.seconds(began, ended)
    assert taken is not None
    assert 0.01 < taken < 10
