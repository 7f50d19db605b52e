"""Export a trained model for other tools.

`hf`     a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` open
`gguf`   a folder for llama.cpp and Ollama (`gguf.py`)
`torch`  one file for `torch.load(path, weights_only=True)`

An export is complete or absent, and never replaces anything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fundamentallm.data.tokenizer import TOKENIZER_FILE
from fundamentallm.data.tokenizer.subword import ids_by_name
from fundamentallm.data.tokenizer.tokenizer_json import token_name, tokenizer_json
from fundamentallm.errors import CheckpointError
from fundamentallm.files.filesystem import (
    Filesystem,
    ReadableFilesystem,
    make_directories,
    random_suffix,
    write_file,
)
from fundamentallm.inference.gguf import TensorType, gguf_files
from fundamentallm.inference.load import Trained
from fundamentallm.inference.model_card import CARD, model_card
from fundamentallm.inference.origin import CHAT_TEMPLATE, NAMES, SPECIAL, Origin
from fundamentallm.models.layouts import layout_for, require_transformer
from fundamentallm.registry import Registry
from fundamentallm.training.checkpoint.manager import save_weights
from fundamentallm.training.checkpoint.tensor_file import tensor_file_chunks

EXPORTS: Registry[None] = Registry("export format", supplied=("trained", "path"))


def export(
    trained: Trained, format_name: str, path: Path, options: Mapping[str, Any] | None = None
) -> None:
    """Write a model in one of the formats of `EXPORTS`.

    Args:
        trained: the model; its weights are written as float32.
        format_name: "hf", "gguf" or "torch".
        path: must not exist; missing parents are made.
        options: of the format, as `{"type": "Q8_0"}`.

    Raises:
        ConfigError: the format is unknown or has no such option, or it cannot express the model:
            `key` is the field.
        CheckpointError: the path exists already.
        OSError: the disk refuses; nothing is left at the path.
    """
    write, checked = EXPORTS.get(format_name), EXPORTS.check(format_name, options or {})
    if Filesystem().status(path) is not None:
        raise CheckpointError(
            "the path exists already, and an export replaces nothing",
            where=str(path),
            fix="choose a new path with --out, or remove what is there",
        )
    write(trained, path, **checked)


@EXPORTS.register("hf")
def export_hf(trained: Trained, path: Path) -> None:
    """Write a folder of the transformers library.

    No text is a special token: `<unk>` is five characters, and nothing precedes a prompt. The
    end of a document is the end of a text there, where the tokenizer has one. Where a model learnt
    to end its responses with one token, `generate` there stops at it too.

    A model that started from such a folder keeps the folder's tokens that begin, end and pad a
    text, its chat template and its settings of generation. A chat template writes special tokens
    by their names, so with one the names are tokens in any text.
    """
    config = require_transformer(trained.config.model)
    layout = layout_for(config)
    weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
    length = config.sequence_length
    tokenizer = tokenizer_json(trained.tokenizer)
    end_id = trained.tokenizer.end_id
    end = None if end_id is None else token_name(tokenizer, end_id)
    origin = trained.came_from
    # Written as null: the families' own defaults are ids that mean something else here.
    special = {
        **dict.fromkeys(SPECIAL),
        **origin.special,
        "eos_token_id": _one_or_all(_distinct(origin.ids("eos_token_id"), trained.stop_ids)),
    }
    reading = (
        {"split_special_tokens": True}
        if origin.chat_template is None
        else {CHAT_TEMPLATE: origin.chat_template}
    )
    write_folder(
        path,
        {
            "config.json": _json(
                {
                    **layout.describe(config),
                    **special,
                    "use_cache": True,
                    # The first name is read by transformers 4, the second by 5.
                    "torch_dtype": "float32",
                    "dtype": "float32",
                }
            ),
            "generation_config.json": _json({**origin.generation, **special, **_stops(trained)}),
            "model.safetensors": tensor_file_chunks(layout.to_theirs(config, weights)),
            TOKENIZER_FILE: _json(tokenizer),
            CARD: [model_card(trained, "hf").encode()],
            "tokenizer_config.json": _json(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": length,
                    "clean_up_tokenization_spaces": False,
                    **reading,
                    **_names(origin, tokenizer),
                    **({} if end is None else {"eos_token": end}),
                    "model_input_names": ["input_ids", "attention_mask"],
                }
            ),
        },
    )


@EXPORTS.register("gguf")
def export_gguf(trained: Trained, path: Path, *, type: TensorType = "F32") -> None:
    """Write a folder that llama.cpp and Ollama open.

    Args:
        trained, path: as in `export`.
        type: of the matrices, as in `gguf_files`.
    """
    card = [model_card(trained, "gguf").encode()]
    write_folder(path, {**gguf_files(trained, type), CARD: card})


@EXPORTS.register("torch")
def export_torch(trained: Trained, path: Path) -> None:
    """Write one file: `model` (the state_dict), `config`, `tokenizer`, `step`, `metrics`."""
    weights: dict[str, Tensor] = trained.model.state_dict()
    score = trained.val_loss
    save_weights(
        path,
        weights,
        step=trained.manifest.step,
        metrics={} if score is None else {"val_loss": score},
        config=trained.config.model_dump(mode="json"),
        tokenizer=trained.tokenizer.to_dict(),
    )


def _names(origin: Origin, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that begin, end and pad a text, by the names of an exported tokenizer."""
    known, names = ids_by_name(tokenizer), {}
    for key in NAMES:
        name, ids = origin.names.get(key), origin.ids(f"{key}_id")
        if name not in known:  # or it would be a new token
            name = token_name(tokenizer, ids[0]) if ids else None
        if name is not None:
            names[key] = name
    return names


def _stops(trained: Trained) -> dict[str, int | list[int] | None]:
    """Return the ids that end a text in `generate` there, where there are any."""
    learnt = [trained.tokenizer.encode(text).tolist() for text in trained.stop]
    one_token = [ids[0] for ids in learnt if len(ids) == 1]
    kept = trained.came_from
    ids = _distinct(kept.ids("eos_token_id"), trained.stop_ids, one_token)
    if not ids:
        return {}
    # Padding comes after the end alone, so it may be any token.
    padding = _distinct(kept.ids("pad_token_id"), ids)[0]
    return {"eos_token_id": _one_or_all(ids), "pad_token_id": padding}


def _distinct(*parts: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(number for part in parts for number in part))


def _one_or_all(ids: list[int]) -> int | list[int] | None:
    return ids if len(ids) > 1 else ids[0] if ids else None


def write_folder(
    path: Path,
    files: Mapping[str, Iterable[bytes | memoryview]],
    filesystem: Filesystem | None = None,
) -> None:
    """Write a new folder of files that appears under its name when all of it is on the disk.

    Args:
        path: the folder; missing parents are made.
        files: contents by name, in chunks.
        filesystem: the disk operations.

    Raises:
        OSError: the disk refuses, or something is at the path; nothing new is left there.
    """
    filesystem = filesystem or ReadableFilesystem()
    make_directories(filesystem, path.absolute().parent)
    staging = path.with_name(f".{path.name}.tmp-{random_suffix()}")
    filesystem.make_directory(staging)
    try:
        for name, chunks in files.items():
            write_file(filesystem, staging / name, chunks)
        filesystem.sync_directory(staging)
        filesystem.rename(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            for name in filesystem.names(staging):
                filesystem.remove_file(staging / name)
            filesystem.remove_directory(staging)
        raise
    filesystem.sync_directory(path.absolute().parent)


def _json(value: Mapping[str, Any]) -> list[bytes]:
    return [json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False).encode() + b"\n"]
