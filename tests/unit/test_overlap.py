from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.config.data import SourceConfig
from fundamentallm.data.overlap import overlap
from fundamentallm.data.sources import TextSource, TokenSource, read_source, split_tokens, tokens
from fundamentallm.data.sources.text import SHORTEST_PASSAGE as SHORTEST
from fundamentallm.data.tokenizer import ByteTokenizer
from fundamentallm.engine.cli import main

TOKENIZER = ByteTokenizer()
HALVES = (0.5, 0.5, 0.0)


def long(word: str, length: int = SHORTEST) -> str:
    return (word * length)[:length]


def of_text(*files: str) -> TextSource:
    """A text that is cut in two by position."""
    return TextSource.of([(f"{n}.txt", file) for n, file in enumerate(files)], by_position=True)


def of_tokens(ids: Sequence[int], end_id: int | None = 0) -> TokenSource:
    return TokenSource("ids", "", np.array(ids, np.uint8), end_id=end_id)


def test_a_file_that_stands_in_both_parts() -> None:
    again = of_text("one\n", "two\n", "six\n", "two\n")
    assert overlap(again, TOKENIZER, HALVES) == 0.5
    assert overlap(of_text("one\n", "two\n", "six\n", "ten\n"), TOKENIZER, HALVES) == 0.0


@pytest.mark.parametrize("between", ["\n\n", "\n \n", "\n"])
def test_long_passages_of_one_text(between: str) -> None:
    a, b, c = (long(word) for word in ("apple ", "bread ", "cider "))
    one = a + between + b + between
    other = c + between + b + between
    assert overlap(of_text(one + other), TOKENIZER, HALVES) == pytest.approx(0.5, abs=0.01)
    assert overlap(of_text(one + other.replace("bread", "BREAD")), TOKENIZER, HALVES) == 0.0
    short = "a line that repeats" + between
    assert len(short) * 9 < SHORTEST
    repeats = short * 9 + a + between + short * 9 + c + between
    assert overlap(of_text(repeats), TOKENIZER, HALVES) == 0.0


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 7))
def test_documents_between_ends(ids: list[int], chunk: int) -> None:
    def naive(part: np.ndarray) -> list[tuple[int, ...]]:
        documents: list[list[int]] = [[]]
        for token in part.tolist():
            if token == 0:
                documents.append([])
            else:
                documents[-1].append(token)
        # Behind the last end there is no document, before each end there is one.
        return [tuple(d) for d in documents[:-1]] + [tuple(d) for d in documents[-1:] if d]

    parts = split_tokens(np.array(ids), HALVES)
    train, val = naive(parts["train"]), naive(parts["val"])
    size = sum(map(len, val))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK", chunk)
        found = overlap(of_tokens(ids), TOKENIZER, HALVES)
    if size:
        assert found == sum(len(one) for one in val if one in train) / size
    else:
        assert np.isnan(found)


def test_nothing_to_compare() -> None:
    assert np.isnan(overlap(of_tokens([1, 0, 1, 0], end_id=None), TOKENIZER, HALVES))
    assert np.isnan(overlap(of_text("one", "one"), TOKENIZER, (1.0, 0.0, 0.0)))


def test_examples(tmp_path: Path) -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "b"), ("a", "b")]
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
    path.write_text("\n".join(lines))
    assert overlap(read_source(str(path)), TOKENIZER, HALVES) == 0.5


CONFIG = """\
name: tiny
data: {sequence_length: 16, batch_size: 4, tokenizer: byte, split: [0.5, 0.5, 0.0]}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 2, eval_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.mark.long
def test_a_run_and_a_check_warn_of_it_and_a_resumed_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    documents = [f"document {number} " * 9 for number in range(20)]
    for name, half in (("new", documents[10:]), ("old", documents[8:10] + documents[:8])):
        lines = [json.dumps({"text": text}) for text in documents[:10] + half]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
        for split in ("position", "document"):
            words = [f"{name}.jsonl", "--out", f"{name}-{split}", "--tokenizer", "byte"]
            fractions = ["--fractions", "0.5", "0.5", "0"]
            assert main(["prepare", *words, "--split", split, *fractions]) == 0

    def warned(command: str, source: str, *more: str) -> bool:
        capsys.readouterr()
        assert main([command, "tiny.yaml", f"data.source={source}", *more]) == 0
        error = capsys.readouterr().err
        assert ("100.0 % of" in error) == ("is in the training text too" in error)
        return "is in the training text too" in error

    for command in ("check", "run"):
        assert not warned(command, "new-position")
        assert warned(command, "old-position")
        assert not warned(command, "old-document")
    assert not warned("run", "old-position", "training.total_steps=4", "--resume", "runs/tiny-2")


def test_a_mixture_is_searched_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in (("a", "one two six ten"), ("b", "six new far odd")):
        lines = [json.dumps({"text": word}) for word in words.split()]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
        assert main(["prepare", f"{name}.jsonl", "--out", name, "--tokenizer", "byte"]) == 0
    sources = [SourceConfig(path=name, weight=1) for name in "ab"]
    # In training: one, two; six, new. To measure on: six, ten; far, odd.
    assert overlap(read_source(sources), TOKENIZER, HALVES) == 0.25
