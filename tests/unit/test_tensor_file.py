from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.properties import examples

from fundamentallm.errors import CheckpointError
from fundamentallm.training.checkpoint.tensor_file import (
    DTYPE_NAMES,
    num_bytes,
    parse_tensor_file,
    tensor_file_chunks,
)


def file_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(tensor_file_chunks(tensors))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, of odd sizes, filled with every byte value."""
    raw = torch.arange(256, dtype=torch.uint8).repeat(2)
    table = {
        str(dtype): raw[: 3 * dtype.itemsize * 5].view(dtype).reshape(3, 5)
        for dtype in DTYPE_NAMES
        if dtype != torch.bool
    }
    return {**table, "bool": torch.tensor([True, False, True])}


def test_the_library_reads_every_dtype_bit_for_bit(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(file_bytes(tensors))

    for loaded in (load_file(path), parse_tensor_file(path.read_bytes(), "")):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_empties_and_views_are_kept(tmp_path: Path) -> None:
    grid = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": grid.t(),
        "strided": grid[::2, 1::2],
        "expanded": torch.tensor([7]).expand(3),
        "a/b.c~2 \N{SNOWMAN}": grid[0],
        "": grid[1],
    }

    loaded = parse_tensor_file(file_bytes(tensors), "")

    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_a_loaded_tensor_may_be_written_to() -> None:
    loaded = parse_tensor_file(file_bytes({"a": torch.zeros(2), "b": torch.zeros(2)}), "")
    loaded["a"].fill_(1)

    assert loaded["b"].tolist() == [0, 0]


def test_every_tensor_is_aligned(tensors: dict[str, torch.Tensor]) -> None:
    chunks = list(tensor_file_chunks(tensors))
    start = len(chunks[0])

    assert start % 8 == 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        assert start % tensors[name].element_size() == 0
        start += num_bytes({name: tensors[name]})
    assert start == sum(len(memoryview(chunk)) for chunk in chunks)


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match="'rope'") as caught:
        file_bytes({"rope": torch.zeros(2, dtype=torch.complex64)})

    assert "complex64" in str(caught.value)


@given(st.binary(max_size=200) | st.just(b"\xff" * 200) | st.just(b"\x80\x04."))
@settings(max_examples=examples(200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="where"):
        parse_tensor_file(data, "where")
