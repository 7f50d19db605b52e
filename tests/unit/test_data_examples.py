from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.precision import Precision
from fundamentallm.data.batch import IGNORED
from fundamentallm.data.examples import (
    EncodedExamples,
    Example,
    _ended,
    digest,
    encode_examples,
    read_examples,
)
from fundamentallm.data.loaders import Batching, ExampleLoader, ExampleValidationLoader
from fundamentallm.data.sources import ExampleSource, read_source
from fundamentallm.data.tokenizer import ByteTokenizer, CharacterTokenizer
from fundamentallm.errors import DataError
from fundamentallm.inference.evaluate import evaluate_documents, example_documents
from fundamentallm.testing import tiny_model
from fundamentallm.training.losses import LanguageModelingLoss
from fundamentallm.training.step import TrainStep

CPU = Precision("fp32", torch.device("cpu"))
PAIRS = st.lists(
    st.tuples(st.text("abcdé", max_size=4), st.text("abcdé", min_size=2, max_size=5)),
    min_size=1,
    max_size=12,
)


def encoded(pairs: list[tuple[str, str]], length: int = 30) -> EncodedExamples:
    examples = [Example(p, r, f"file:{n}") for n, (p, r) in enumerate(pairs, start=1)]
    return encode_examples(examples, ByteTokenizer(), length)


def naive_losses(model: torch.nn.Module, pairs: list[tuple[str, str]]) -> list[torch.Tensor]:
    """The negative log-likelihood of each response token, one example at a time, unpadded."""
    losses = []
    for prompt, response in pairs:
        ids = list((prompt + response).encode())
        log_probabilities = model(torch.tensor([ids]))[0].log_softmax(-1)
        for place in range(max(len(prompt.encode()), 1), len(ids)):
            losses.append(-log_probabilities[place - 1, ids[place]])
    return losses


@given(PAIRS)
def test_every_response_token_is_a_target_once_and_nothing_else(
    pairs: list[tuple[str, str]],
) -> None:
    batch = encoded(pairs).batch(np.arange(len(pairs)), 30)
    for inputs, targets, (prompt, response) in zip(
        batch["input_ids"].tolist(), batch["target_ids"].tolist(), pairs, strict=True
    ):
        ids, given_tokens = list((prompt + response).encode()), len(prompt.encode())
        assert inputs == ids[:-1] + [0] * (31 - len(ids))
        expected = [
            token if place >= given_tokens else IGNORED
            for place, token in enumerate(ids[1:], start=1)
        ]
        assert targets == expected + [IGNORED] * (31 - len(ids))
    counts = (batch["target_ids"] >= 0).sum(1)
    assert counts.tolist() == encoded(pairs).num_targets.tolist()


PROMPTED = [("ab", "cde"), ("", "xy"), ("long prompt", "z"), ("a", "longer response"), ("q", "rs")]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(5, 1), (2, 3), (1, 5), (3, 2)])
def test_a_step_s_gradient_is_that_of_the_naive_loss(batch_size: int, accumulation: int) -> None:
    torch.manual_seed(0)
    model = tiny_model(256, 20).double()
    torch.stack(naive_losses(model, PROMPTED)).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    naive = torch.stack(naive_losses(model, PROMPTED)).mean().item()
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.update({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]

    optimizer = Recording(model.parameters(), lr=0.1)
    loader = ExampleLoader(encoded(PROMPTED, 20), Batching(20, batch_size, accumulation, seed=1))
    assert len(loader) == 1
    window = loader.window_at(0, 0)
    assert window.num_tokens == 3 + 1 + 1 + 15 + 2
    step = TrainStep(
        model, model, optimizer, LanguageModelingLoss(), CPU, Ranks(), None, lambda event: None
    )
    output = step(window, window.num_tokens, len(PROMPTED))
    assert output.loss == pytest.approx(naive, abs=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-9)


def test_evaluation_counts_the_responses_alone() -> None:
    torch.manual_seed(0)
    model = tiny_model(256, 20).double().eval()
    examples = [Example(prompt, response, prompt) for prompt, response in PROMPTED]
    documents = example_documents(encoded(PROMPTED, 20), examples, ByteTokenizer())
    result, each = evaluate_documents(model, ByteTokenizer(), documents, 20, 2, CPU)
    naive = torch.stack(naive_losses(model, PROMPTED)).detach()
    assert result.num_tokens == len(naive) == 22
    assert result.loss == pytest.approx(float(naive.mean()), abs=1e-12)
    assert result.num_characters == result.num_bytes == 22
    assert result.bits_per_byte == pytest.approx(float(naive.mean()) / np.log(2))
    assert [one.num_tokens for one in each] == [3, 1, 1, 15, 2]
    for one, losses in zip(each, naive.split([3, 1, 1, 15, 2]), strict=True):
        assert one.loss == pytest.approx(float(losses.mean()), abs=1e-12)


@given(PAIRS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_visits_each_example_once_on_any_ranks(
    pairs: list[tuple[str, str]], batch_size: int, accumulation: int, ranks: int, epoch: int
) -> None:
    examples = encoded(pairs)
    loaders = [
        ExampleLoader(examples, Batching(30, batch_size, accumulation, 7, rank, ranks))
        for rank in range(ranks)
    ]
    rows: list[tuple[int, ...]] = []
    for step in range(len(loaders[0])):
        windows = [loader.window_at(epoch, step) for loader in loaders]
        assert len({len(window.micro_batches) for window in windows}) == 1
        for window in windows:
            valid = [m["target_ids"] >= 0 for m in window.micro_batches]
            assert window.num_tokens == sum(int(v.sum()) for v in valid)
            for micro_batch in window.micro_batches:
                for inputs, targets in zip(*micro_batch.values(), strict=True):
                    if (targets >= 0).any():
                        rows.append((*inputs.tolist(), *targets.tolist()))
    whole = examples.batch(np.arange(len(pairs)), 30)
    expected = [(*i.tolist(), *t.tolist()) for i, t in zip(*whole.values(), strict=True)]
    assert sorted(rows) == sorted(expected)


def test_the_order_is_a_pure_function_of_seed_epoch_and_position() -> None:
    examples = encoded([("p", f"response {n}") for n in range(23)])
    loader = ExampleLoader(examples, Batching(30, 4, seed=3))
    straight = [w.micro_batches[0]["input_ids"] for _ in range(2) for w in loader]
    other = ExampleLoader(examples, Batching(30, 4, seed=3))
    other.set_position(1, 2)
    jumped = [window.micro_batches[0]["input_ids"] for window in other]
    assert all(map(torch.equal, jumped, straight[len(loader) + 2 :]))
    assert len(jumped) == len(loader) - 2
    assert not torch.equal(straight[0], straight[len(loader)])  # another epoch, another order
    third = ExampleLoader(examples, Batching(30, 4, seed=4))
    assert not torch.equal(third.window_at(0, 0).micro_batches[0]["input_ids"], straight[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_visits_each_example_once_in_order(world_size: int) -> None:
    examples = encoded([("p", f"response {n}") for n in range(10)])
    loaders = [
        ExampleValidationLoader(examples, Batching(30, 3, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    batches: dict[int, torch.Tensor] = {}
    for rank, loader in enumerate(loaders):
        assert len(loader) == 4
        assert loader.num_tokens == int(examples.num_targets.sum())
        for place, batch in enumerate(loader):
            batches[place * world_size + rank] = batch["target_ids"]
    joined = torch.cat([batches[number] for number in sorted(batches)])
    assert torch.equal(joined, examples.batch(np.arange(10), 30)["target_ids"])


def test_the_end_of_a_document_is_learnt_behind_each_response() -> None:
    pairs = [("ab", "cd"), ("", "efg")]
    examples = [Example(p, r, "file:1") for p, r in pairs]
    ended = encode_examples(examples, ByteTokenizer(end=True), 4)
    assert ended.ids.tolist() == [*b"abcd", 256, *b"efg", 256]
    assert ended.num_targets.tolist() == [3, 3]
    assert ended.batch(np.arange(1), 5)["target_ids"].tolist() == [[IGNORED, *b"cd", 256, IGNORED]]
    with pytest.raises(DataError, match="no token to learn"):  # the end alone is nothing to learn
        encode_examples([Example("ab", "", "file:1")], ByteTokenizer(end=True), 9)
    with pytest.raises(DataError, match="longer than the context"):  # the end has no room
        encode_examples(examples, ByteTokenizer(end=True), 3)


def test_a_part_holds_its_own_examples() -> None:
    examples = encoded([("p", f"response {n}") for n in range(10)])
    part = examples.part(np.arange(3, 7))
    assert len(part) == 4
    whole = examples.batch(np.arange(3, 7), 30)
    assert torch.equal(part.batch(np.arange(4), 30)["input_ids"], whole["input_ids"])
    assert part.num_targets.tolist() == examples.num_targets[3:7].tolist()
    nothing = examples.part(np.arange(0))
    assert (len(nothing), nothing.num_targets.tolist()) == (0, [])
    assert len(ExampleValidationLoader(nothing, Batching(30, 2))) == 0


def test_tokens_of_a_step_are_the_average_that_counts() -> None:
    loader = ExampleLoader(encoded([("pp", "rr")] * 10), Batching(30, 2, 2))
    assert len(loader) == 3
    assert loader.tokens_per_step == round(20 / 3)


def test_training_needs_an_example() -> None:
    with pytest.raises(DataError, match="no examples to train on"):
        ExampleLoader(encoded([("a", "b")]).part(np.arange(0)), Batching(30, 2))
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            ExampleLoader(encoded([("a", "b")]), Batching(*sizes))


# -------------------------------------------------------------------------------- files


def write(path: Path, *lines: Any) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_lines_are_read_in_order_with_their_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p\n", "response": "r\u2028é", "id": 7},
        "  ",
        '{"response": "x", "prompt": ""}\r',
        "",
    )
    assert read_examples(path) == [
        Example("p\n", "r\u2028é", f"{path}:1"),
        Example("", "x", f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ({"prompt": "a"}, "no text under 'response'"),
        ({"response": "a"}, "no text under 'prompt'"),
        ({"prompt": None, "response": "a"}, "no text under 'prompt'"),
        ({"prompt": "a", "response": 3}, "no text under 'response'"),
        ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, line)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert caught.value.where.startswith(f"{path}:2")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a", ""), "no token to learn"),
        (("", "a"), "no token to learn"),
        (("", ""), "no token to learn"),
        (("aaa", "bbb"), "longer than the context"),
        (("a", "c"), "not in the vocabulary"),
    ],
)
def test_an_example_that_does_not_fit_is_named(pair: tuple[str, str], message: str) -> None:
    examples = [Example("a", "bbbb", "f:1"), Example(*pair, "f:2")]
    with pytest.raises(DataError, match=message) as caught:
        encode_examples(examples, CharacterTokenizer("ab"), 4)
    assert caught.value.where.startswith("f:2")


@pytest.mark.parametrize(
    ("response", "end", "expected"),
    [
        ("one", "\n", "one\n"),
        ("one\n", "\n", "one\n"),
        ("\n", "\n", "\n"),
        ("a\nb", "\n\n", "a\nb\n\n"),
        ("a<end>", "<end>", "a<end>"),
        ("xaa", "aa", "xaa"),
        ("a\n", "\n\n", "a\n\n"),
        ("a\nb\n", "\n\n\n", "a\nb\n\n\n"),
        ("a\n", "\n<end>", "a\n<end>"),
        ("a\n\n", None, "a\n\n"),
        ("", "\n", ""),  # refused when it is encoded
    ],
)
def test_a_response_ends_once(
    response: str, end: str | None, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a\nb\n", "response": response})
    example = Example("a\nb\n", expected, f"{path}:1")
    assert read_examples(path, end) == [example]
    source = read_source(str(path), response_end=end)
    assert isinstance(source, ExampleSource)
    assert source.examples == [example]
    assert source.text == "a\nb\n" + expected


@pytest.mark.parametrize(
    ("response", "end", "after"),
    [("one\ntwo", "\n", 3), ("a\n\n", "\n", 1), ("xa", "aa", 1)],
)
def test_a_response_that_would_be_cut_is_named(
    response: str, end: str, after: int, tmp_path: Path
) -> None:
    """A reader that stops at the first end must get the whole response."""
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "", "response": "fine"},
        {"prompt": "", "response": response},
    )
    with pytest.raises(DataError, match="would stop there") as caught:
        read_examples(path, end)
    assert caught.value.where == f"{path}:2"
    assert f"after {after} characters" in str(caught.value)
    assert "data.response_end" in str(caught.value)


@given(st.text("ab\n", max_size=6), st.text("ab\n", min_size=1, max_size=3))
def test_what_is_accepted_stops_exactly_at_its_end(response: str, end: str) -> None:
    try:
        ended = _ended(Example("", response, ""), end).response
    except DataError:
        return
    if response:
        read, found, rest = ended.partition(end)
        assert (found, rest) == (end, "")
        # Nothing of the response is lost but line feeds that the end begins with.
        lost = response.removesuffix(end).removeprefix(read)
        assert read + lost == response.removesuffix(end)
        assert end.startswith(lost)
        assert not lost.strip()


def test_a_source_of_examples(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "one", "response": "two"})
    second = write(tmp_path / "b.jsonl", {"prompt": "", "response": "three"})
    source = read_source([str(first), str(second)])
    assert isinstance(source, ExampleSource)
    assert [example.response for example in source.examples] == ["two", "three"]
    assert source.text == "onetwothree"
    assert source.name == f"{first}, {second}"
    # The same text cut elsewhere is other data.
    moved = write(tmp_path / "c.jsonl", {"prompt": "onet", "response": "wo"})
    assert read_source([str(moved), str(second)]).sha256 != source.sha256
    assert digest(source.examples) == source.sha256


def test_examples_are_not_mixed_with_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "one", "response": "two"})
    text = write(tmp_path / "a.txt", "text")
    with pytest.raises(DataError, match="cannot be joined with plain text") as caught:
        read_source([str(path), str(text)])
    assert caught.value.where == str(text)


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source holds no examples"):
        read_source(str(write(tmp_path / "a.jsonl", "", " ")))


PAIRS = [{"prompt": "a", "response": "one\n"}, {"prompt": "b", "response": "two\n"}]


@pytest.mark.parametrize("suffix", ["jsonl", "JSONL", "Jsonl", "ndjson", "NDJSON", "json", "JSON"])
def test_every_spelling_of_json_lines_is_examples(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"train.{suffix}", *PAIRS)
    source = read_source(str(path))
    assert isinstance(source, ExampleSource)
    assert [(one.prompt, one.response) for one in source.examples] == [
        ("a", "one\n"),
        ("b", "two\n"),
    ]
    assert source.examples[1].where == f"{path}:2"


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_records_is_examples(indent: int | None, tmp_path: Path) -> None:
    lines = read_source(str(write(tmp_path / "a.jsonl", *PAIRS)))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIRS, indent=indent))
    source = read_source(str(path))
    assert isinstance(source, ExampleSource)
    assert source.sha256 == lines.sha256
    assert source.examples[1].where == f"{path}: record 2"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ('{"prompt": 1}', "no text under 'prompt'", "a.json:1"),
        ('[{"prompt": "", "response": "a"}, 3]', "not a JSON object", "a.json: record 2"),
        ('[{"prompt": "", "response": "a"}', "this file is not JSON", "a.json"),
        ("[" * 100_000, "this file is not JSON", "a.json"),
        ("[]", "no example", "a.json"),
    ],
)
def test_a_json_file_that_is_no_examples(text: str, what: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        read_source(str(tmp_path / "a.json"))
    assert caught.value.where.endswith(where)
