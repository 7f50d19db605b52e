"""The `new` command: a commented configuration that is fit for this machine and text."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fundamentallm.config import RunConfig
from fundamentallm.config.base import dump_yaml, write_yaml
from fundamentallm.config.yaml.file import MODELINE, SCHEMA, with_schema
from fundamentallm.data.folder import files_in
from fundamentallm.data.paths import is_tokens
from fundamentallm.data.sources import read_source
from fundamentallm.engine.console import command, say, tell
from fundamentallm.engine.tuning.sizing import Size, choose_size, training_rate
from fundamentallm.errors import DataError
from fundamentallm.training.handlers.progress import format_seconds

_MOST_CHARACTERS = 512
_MOST_FILES = 200
_SECONDS_TO_START = 10.0  # of a process, until its first step


class Text(NamedTuple):
    """What matters of a text: its tokens, and the YAML of its tokenizer; None where unknown."""

    num_tokens: int | None
    tokenizer: str | None


def new(path: Path, data: Sequence[str], seconds: int) -> int:
    """Write a configuration and say the next commands; return the exit code.

    Args:
        path: the file, which must not exist.
        data: what to train on, as `data.source`.
        seconds: the budget.

    Raises:
        ConfigError: the file exists.
        DataError: the data cannot be read.
        MachineError: the file cannot be written.
    """
    source = _source_of(data)
    text = _look_at(source)
    device, speed = _machine()
    content = configuration(path.stem, source, seconds, text, device, speed)
    RunConfig.from_yaml(content)
    schema = path.parent / SCHEMA.name
    had_schema = schema.exists()
    write_yaml(path, with_schema(content, path), "x")
    if schema.exists() > had_schema:
        tell(f"{schema}: written too, with which editors complete and check {path.name}")
    size = choose_size(speed * seconds, text.num_tokens)
    if text.num_tokens is not None and (least := least_seconds(size, text, speed)) > seconds:
        tell(
            f"warning: {format_seconds(seconds)} is short for this text: the start and one"
            f" validation take about half of it; {math.ceil(least / 60)}m or more would do"
        )
    say(f"Written to {path}: {', '.join(data)}, {format_seconds(seconds)} on {device}. Next:")
    say(f"  {command('check', path)}")
    say(f"  {command('run', path)}")
    return 0


def least_seconds(size: Size, text: Text, speed: float) -> float:
    """Return the seconds of which the start of a run and one validation take half.

    Args:
        size: of the model.
        text: to train on.
        speed: FLOP/s of training.
    """
    return 2 * (_SECONDS_TO_START + _validation(size, text) / speed)


def _validation(size: Size, text: Text) -> float:
    """Return the floating-point operations of one validation, on a tenth of the text."""
    return 2 * size.parameters * 0.1 * (text.num_tokens or 0)


def _validations(operations: float, size: Size, text: Text) -> float:
    """Return how many validations a run has: ten, or fewer where they took a tenth of its time."""
    one = _validation(size, text)
    return min(10.0, max(3.0, 0.1 * operations / one)) if one else 10.0


def _source_of(data: Sequence[str]) -> str | list[str]:
    """Return what stands under `data.source`.

    In place of a folder without text files stand its files of the most frequent other ending.
    """
    names = [name for one in data for name in _files_in_place_of(one)]
    return names[0] if len(names) == 1 else names


def _files_in_place_of(name: str) -> list[str]:
    folder = Path(name)
    if not folder.is_dir() or is_tokens(name) or files_in(folder, ("text",)).read:
        return [name]
    others = [path for path in files_in(folder, ("",)).read if path.suffix]
    if not others:
        return [name]
    suffix, number = Counter(path.suffix for path in others).most_common(1)[0]
    if number > _MOST_FILES:
        raise DataError(
            "there are too many files to list",
            where=name,
            got=f"{number:,} files that end in {suffix}",
            expected=f"at most {_MOST_FILES:,}",
            fix=f"turn them into tokens once, with `{command('prepare', f'{name}/**/*{suffix}')}"
            f" --out DIR`, and give --data DIR",
        )
    tell(f"{name}: no .txt or .md files; taking its {number:,} files that end in {suffix}")
    return [str(path) for path in others if path.suffix == suffix]


def _look_at(data: str | Sequence[str]) -> Text:
    source = read_source(data)
    if not source.text:
        has_tokenizer = isinstance(data, str) and is_tokens(data)
        return Text(None, None if has_tokenizer else "character")
    if len(set(source.text)) > _MOST_CHARACTERS:
        return Text(len(source.text.encode()), "byte")
    # llama.cpp takes a vocabulary of characters beyond ASCII only with an end of text.
    plain = source.text.isascii()
    return Text(len(source.text), "character" if plain else "{name: character, end: true}")


def _machine() -> tuple[str, float]:
    """Return the kind of device that `device: auto` takes here, and its FLOP/s in training."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    return device.type, training_rate(device, "auto")


def configuration(
    stem: str, data: str | Sequence[str], seconds: int, text: Text, device: str, speed: float
) -> str:
    """Return the text of the configuration.

    Args:
        stem: the file's name without its suffix.
        data: as `data.source`.
        seconds: the budget.
        text: what is known of the data.
        device: the kind of device.
        speed: its FLOP/s in training.
    """
    operations = speed * seconds
    size = choose_size(operations, text.num_tokens)
    length = 128 if size.d_model <= 128 else 256
    if text.num_tokens is not None:  # a tenth of the text, for validation, holds two sequences
        length = max(16, min(length, 2 ** int(math.log2(max(text.num_tokens // 20, 1)))))
    batch_size = 16 if device == "cpu" else 64
    steps = operations / (6 * size.parameters * length * batch_size)
    times = _validations(operations, size, text)
    eval_steps = max(50, int(round(steps / times, -2 if steps > 2000 else -1)))
    rate = 3e-3 if size.d_model <= 192 else 1e-3 if size.d_model <= 512 else 6e-4
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip(".-").rstrip(".")[:100] or "run"
    tokenizer = "  tokenizer: {}    # character, byte, or {{name: bpe, vocab_size: 4096}}\n"
    plain = data if isinstance(data, str) else list(data)
    source = dump_yaml(plain).removesuffix("...\n").strip().replace("\n", " ")
    told = source if len(source) < 60 or isinstance(data, str) else f"{len(data)} files"
    return f"""\
{MODELINE}{SCHEMA.name}
# A model of {told} in {format_seconds(seconds)}, for this machine: \
{device}, about {speed:.2g} FLOP/s in training.
#
#   fundamentallm check {shlex.quote(stem)}.yaml      costs, and what happens when
#   fundamentallm run {shlex.quote(stem)}.yaml        the same command continues it after a stop
#   fundamentallm list optimizers       what the keys below can name, with options
name: {dump_yaml(name).splitlines()[0]}
seed: 42
data:
  source: {source}    # a file, a folder, a built-in name, or a list
{tokenizer.format(text.tokenizer) if text.tokenizer else ""}\
  sequence_length: {length}    # tokens that the model sees at once
  batch_size: {batch_size}    # sequences in a micro-batch
model:    # about {size.parameters / 1e6:.1f} million parameters in its blocks
  d_model: {size.d_model}
  num_layers: {size.num_layers}
  num_heads: {size.num_heads}
  dropout: 0.0    # 0.1 or 0.2 where validation loss rises while training loss falls
training:
  max_seconds: {seconds}    # of the whole run, its end included; the schedule follows it
  learning_rate: {rate:g}    # `fundamentallm tune --learning-rate` suggests one
  min_learning_rate: {rate / 10:g}
  optimizer: adamw
  optimizer_weight_decay: 0.1
  scheduler: cosine
  device: auto
  precision: auto    # measured when the run begins
  compile: auto
  eval_steps: {eval_steps}    # steps from one validation and checkpoint to the next
handlers:
  samples: {{num_tokens: 200}}    # a text after each validation
"""
