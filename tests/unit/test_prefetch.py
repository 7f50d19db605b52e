"""Windows read ahead by a thread: the loader's own, in its order, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fundamentallm.compute.prefetch import Prefetch, ahead
from fundamentallm.data.batch import Batch, Window
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.errors import DataError

CPU = torch.device("cpu")


def make_loader() -> TokenWindowLoader:
    return TokenWindowLoader(list(range(200)), Batching(sequence_length=8, batch_size=2, seed=3))


def equal(one: Window, other: Window) -> bool:
    return one.num_tokens == other.num_tokens and all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True)
    )


def test_the_same_windows_in_the_same_order_for_two_epochs():
    plain, prefetched = make_loader(), make_loader()
    for _ in range(2):
        pairs = list(zip(plain, Prefetch(prefetched, CPU), strict=True))
        assert len(pairs) == len(plain)
        assert all(equal(one, other) for one, other in pairs)


def test_begins_where_the_loader_stands():
    plain, prefetched = make_loader(), make_loader()
    plain.set_position(1, 3)
    prefetched.set_position(1, 3)
    assert all(equal(*pair) for pair in zip(plain, Prefetch(prefetched, CPU), strict=True))


def test_the_window_after_the_one_in_hand_is_read_meanwhile():
    loader = make_loader()
    second_was_read = threading.Event()
    read = loader.window_at

    def window_at(epoch: int, step: int) -> Window:
        if step == 1:
            second_was_read.set()
        return read(epoch, step)

    loader.window_at = window_at  # type: ignore[method-assign]
    windows = iter(Prefetch(loader, CPU))
    next(windows)
    assert second_was_read.wait(10)


def test_an_error_comes_where_its_window_would_have():
    loader = make_loader()
    read = loader.window_at

    def window_at(epoch: int, step: int) -> Window:
        if step == 2:
            raise DataError("the file has shrunk")
        return read(epoch, step)

    loader.window_at = window_at  # type: ignore[method-assign]
    windows = iter(Prefetch(loader, CPU))
    next(windows), next(windows)
    with pytest.raises(DataError, match="shrunk"):
        next(windows)


def test_its_thread_ends_with_the_iteration():
    before = threading.active_count()
    windows = iter(Prefetch(make_loader(), CPU))
    next(windows)
    windows.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_only_a_gpu_reads_ahead_and_only_what_depends_on_nothing_else():
    loader = make_loader()
    assert ahead(loader, CPU) is loader
    others: list[Batch] = []
    assert ahead(others, torch.device("cuda")) is others


class FakeStream:
    """A stream without a GPU, which notes that another is waited for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        time.sleep(0.02)  # a read that is begun before comes first in the log
        self.log.append(f"{self.name} waits for {other.name}")


def test_computing_waits_for_the_copy_of_each_window_and_not_for_the_next(monkeypatch):
    log: list[str] = []
    kept: list[str] = []
    computing, copying = FakeStream("computing", log), FakeStream("copying", log)
    current = threading.local()

    @contextmanager
    def stream(chosen: FakeStream) -> Iterator[None]:
        current.name = chosen.name
        yield
        current.name = ""

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert current.name == "copying"
        return tensor

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, used: kept.append(used.name))
    loader = make_loader()
    read = loader.window_at

    def window_at(epoch: int, step: int) -> Window:
        log.append("read")
        return read(epoch, step)

    loader.window_at = window_at  # type: ignore[method-assign]
    prefetch = Prefetch(loader, CPU)
    prefetch._stream = copying  # type: ignore[assignment]
    tensors = 0
    for number, window in enumerate(prefetch, start=1):
        tensors += sum(len(batch) for batch in window.micro_batches)
        assert log.count("computing waits for copying") == number
        assert kept == ["computing"] * tensors
    assert number == len(loader) > 2
    assert log == ["read", "computing waits for copying"] * number


@pytest.mark.cuda
def test_arrives_on_the_gpu_whole():
    device = torch.device("cuda", 0)

    def windows() -> Iterator[Window]:
        yield from ahead(make_loader(), device)

    for one, other in zip(make_loader(), windows(), strict=True):
        assert other.micro_batches[0]["input_ids"].device == device
        assert equal(
            one,
            Window(
                [{k: v.cpu() for k, v in b.items()} for b in other.micro_batches], other.num_tokens
            ),
        )
