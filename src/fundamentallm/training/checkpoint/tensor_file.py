"""Tensors <-> the bytes of a safetensors file.

A file is an 8-byte little-endian header length, a JSON header with each tensor's dtype, shape and
byte range, and the tensors' bytes (https://github.com/huggingface/safetensors, "Format"). Writing
is done here, chunk by chunk, because the library's writer opens the file itself and would escape
the hash and the file-system seam; it also holds a second copy of everything. Reading is left to
the library, which checks the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fundamentallm.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes of data the tensors hold, each counted whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tensor_file_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: the header, then one chunk a tensor.

    Args:
        tensors: names -> tensors of any shape and device, with a dtype of DTYPE_NAMES. One tensor
            at a time is copied to the host; the copy lives until the next is asked for.

    Raises:
        CheckpointError: a dtype that the format lacks.
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"tensor '{name}' cannot be saved: safetensors has no such dtype",
                got=str(tensor.dtype),
                expected=", ".join(str(dtype) for dtype in DTYPE_NAMES),
                fix="convert the tensor, for example a complex one with torch.view_as_real",
            )
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            host = tensors[name].detach().cpu().contiguous()
            yield host.reshape(-1).view(torch.uint8).numpy().data


def parse_tensor_file(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU, in memory of their own.

    Raises:
        CheckpointError: the bytes are no such file; `where` names it.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype unknown to the library
        raise CheckpointError(
            "this is not a readable safetensors file", where=where, got=str(error)
        ) from error
