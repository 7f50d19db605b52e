"""A model as llama.cpp and Ollama open it: `model.gguf`, tokenizer included, and a `Modelfile`.

A GGUF file is a header of typed values, names and shapes, then the tensors, each at a multiple of
32 bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The package `gguf` opens its
files itself and writes no empty list (of merges); here a file goes through the same durable steps
as every export, and nothing has to be installed. The tests read it with that package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from fundamentallm.data.tokenizer.gguf_vocabulary import gguf_vocabulary
from fundamentallm.errors import ConfigError
from fundamentallm.inference.load import Trained
from fundamentallm.models.layouts import require_transformer
from fundamentallm.models.layouts.gguf import gguf_metadata, gguf_tensors

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
TensorType = Literal["F32", "F16", "Q8_0"]
Value = bool | int | float | str | Sequence[int] | Sequence[str]

_ALIGNMENT, _VERSION, _QUANTIZATION_VERSION = 32, 3, 2
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
_ENDS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
_TEMPLATE = "tokenizer.chat_template"
_BLOCK = 32  # values that share a scale in Q8_0
_BLOCK_BYTES = 2 + _BLOCK


def gguf_files(trained: Trained, type: TensorType) -> dict[str, Iterable[bytes]]:
    """Return the files of a folder that llama.cpp and Ollama open, by name.

    Args:
        trained: the model.
        type: of the matrices; vectors and the table of positions stay F32. A matrix whose rows are
            no multiple of 32 long is F16 where Q8_0 is asked for.

    Raises:
        ConfigError: llama.cpp cannot express the model or its tokenizer, or a weight is too large
            for the type; `key` says which.
    """
    config = require_transformer(trained.config.model)
    architecture, sizes = gguf_metadata(config)
    vocabulary = gguf_vocabulary(trained.tokenizer, config.vocab_size or 0)
    end, origin = vocabulary.end_id, trained.came_from
    begin = [one for one in origin.ids("bos_token_id") if one < len(vocabulary.tokens)]
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": trained.config.name,
        "general.file_type": _FILE_TYPES[type],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.model": vocabulary.model,
        **({} if vocabulary.pre is None else {"tokenizer.ggml.pre": vocabulary.pre}),
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        **({} if vocabulary.merges is None else {"tokenizer.ggml.merges": vocabulary.merges}),
        # Without these llama.cpp takes some ordinary token, and puts it before a text.
        **({} if end is None else dict.fromkeys(_ENDS, end)),
        **({_ENDS[0]: begin[0]} if begin else {}),
        **({} if origin.chat_template is None else {_TEMPLATE: origin.chat_template}),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tensors = {
        name: tensor.detach().cpu().float().numpy()
        for name, tensor in gguf_tensors(config, trained.model.state_dict())
    }
    if type != "F32":
        _check_range(tensors, type)
    return {
        MODEL_FILE: gguf_chunks(metadata, tensors, type),
        MODELFILE: [modelfile(trained).encode()],
    }


def modelfile(trained: Trained) -> str:
    """Return Ollama's description of the model: its file, context, sampling and stops.

    The sampling is that of `generate`, or of the folder that the run started from. The prompt goes
    to the model as it is, unless there is a chat template. What ends a response here ends it there.
    """
    config, origin = require_transformer(trained.config.model), trained.came_from
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 1, "repeat_penalty": 1}
    kept = {"repeat_penalty": origin.generation.get("repetition_penalty"), **origin.generation}
    sampling |= {name: kept[name] for name in sampling if type(kept.get(name)) in (int, float)}
    stops = [stop for stop in trained.stop if stop and '"""' not in stop]
    return "\n".join(
        [
            f"FROM ./{MODEL_FILE}",
            *(['TEMPLATE """{{ .Prompt }}"""'] if origin.chat_template is None else []),
            f"PARAMETER num_ctx {config.sequence_length}",
            *(f"PARAMETER {name} {value:g}" for name, value in sampling.items()),
            *(f'PARAMETER stop """{stop}"""' for stop in stops),
            "",
        ]
    )


def gguf_chunks(
    metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray], type: TensorType
) -> Iterator[bytes]:
    """Yield the bytes of a GGUF file.

    Args:
        metadata: by key; a whole number is written as uint32, a fraction as float32.
        tensors: float32, by name.
        type: of the matrices.
    """
    head = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(value)]
    start = 0
    for name, tensor in tensors.items():
        kind = _type_of(name, tensor, type)
        # The dimensions are listed from the innermost.
        head.append(_string(name) + struct.pack("<I", tensor.ndim))
        head.append(struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)))
        head.append(struct.pack("<IQ", _TYPES[kind], start))
        start += _aligned(_size(tensor, kind))
    yield _padded(b"".join(head))
    for name, tensor in tensors.items():
        yield _padded(encoded(tensor, _type_of(name, tensor, type)))


def encoded(tensor: np.ndarray, type: TensorType) -> bytes:
    """Return the values of a float32 tensor in a type.

    Q8_0 is llama.cpp's: blocks of 32 values q * d, where d is a float16, and the largest q is 127.
    """
    if type == "F32":
        return tensor.astype("<f4").tobytes()
    if type == "F16":
        return tensor.astype("<f2").tobytes()
    blocks = tensor.reshape(-1, _BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    size = np.abs(blocks * inverse)
    whole = np.floor(size)
    rounded = np.copysign(whole + np.floor(2 * (size - whole)), blocks)  # halves go outwards
    parts = (scales.astype("<f2").view(np.uint8), rounded.astype(np.int8).view(np.uint8))
    return np.concatenate(parts, axis=1).tobytes()


def _type_of(name: str, tensor: np.ndarray, type: TensorType) -> TensorType:
    if tensor.ndim < 2 or name == "position_embd.weight":
        return "F32"
    return "F16" if type == "Q8_0" and tensor.shape[-1] % _BLOCK else type


def _size(tensor: np.ndarray, type: TensorType) -> int:
    return (
        tensor.size * (4 if type == "F32" else 2)
        if type != "Q8_0"
        else (tensor.size // _BLOCK * _BLOCK_BYTES)
    )


def _check_range(tensors: Mapping[str, np.ndarray], type: TensorType) -> None:
    """Refuse weights that become infinite in a type."""
    largest = float(np.finfo(np.float16).max)
    for name, tensor in tensors.items():
        reach = largest * (127 if _type_of(name, tensor, type) == "Q8_0" else 1)
        if _type_of(name, tensor, type) != "F32" and float(np.abs(tensor).max()) > reach:
            raise ConfigError(
                f"a weight of {name} is too large for {type}",
                key="--type",
                got=f"{float(np.abs(tensor).max()):g}",
                expected=f"at most {reach:g}",
                fix="use --type F32",
            )


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    texts = b"".join(_string(str(one)) for one in value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + texts


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(data: bytes) -> bytes:
    return data + bytes(_aligned(len(data)) - len(data))
