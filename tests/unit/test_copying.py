"""The longest shared span, against the search by all substrings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data import copying
from fundamentallm.data.copying import CopyingFigures, TrainingText, distinct_share, passages

LETTERS = st.text("ab\U0001f600 ", max_size=40)


def longest_by_hand(text: str, documents: list[str]) -> int:
    return max(
        (
            end - start
            for start in range(len(text))
            for end in range(start + 1, len(text) + 1)
            if any(text[start:end] in document for document in documents)
        ),
        default=0,
    )


@given(LETTERS, st.lists(LETTERS, max_size=4))
def test_the_longest_span_is_that_of_all_substrings(text: str, documents: list[str]) -> None:
    found = TrainingText((str(i), one) for i, one in enumerate(documents)).examine(text)
    assert found.length == longest_by_hand(text, documents) == len(found.span)
    assert found.span in text
    if found.place is not None:
        document = documents[int(found.place.document)]
        assert document[found.place.column - 1 :].startswith(found.span)


def test_a_planted_span_is_found_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_CHUNK", 1000)  # the span crosses the end of a chunk
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefgh ", k=59)) for _ in range(100)]
    text = "\n".join(lines)
    start = text.index(lines[15]) + 7
    span = text[start : start + 200]
    training = TrainingText([("a.txt", "".join(rng.choices("xyz", k=5000))), ("b.txt", text)])
    found = training.examine("QQQ" + span + "QQQ")
    assert (found.length, found.span) == (200, span)
    assert str(found.place) == "b.txt:16:8"


def test_a_span_over_the_end_of_a_document_is_none() -> None:
    assert TrainingText([("a", "abc"), ("b", "def")]).examine("bcde").length == 2
    assert TrainingText([]).examine("abc").place is None


@given(LETTERS)
def test_the_longest_repetition_is_that_of_all_substrings(text: str) -> None:
    expected = max(
        (
            length
            for length in range(1, len(text))
            for start in range(len(text) - length)
            if text.find(text[start : start + length], start + 1) >= 0
        ),
        default=0,
    )
    assert TrainingText([]).examine(text).repeated == expected


def test_distinct_n_grams() -> None:
    assert distinct_share("a b c d a b c d") == 4 / 5
    assert distinct_share("a b c") is None


def test_passages_are_of_the_documents() -> None:
    documents = ["short", "abcdefghij" * 5, "0123456789" * 5]
    found = passages(documents, 20)
    assert [len(passage) for passage in found] == [20] * 4
    assert all(any(passage in one for one in documents) for passage in found)
    assert passages(documents, 1000) == []


def test_the_figures_of_a_sample_stand_beside_those_of_validation_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copying, "SEARCHED", 1000)
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=600)) for _ in range(2)]
    span = texts[0][100:150]
    figures = CopyingFigures([("a.txt", texts[0])], [texts[1]])
    found = figures.of(f"QQQ{span}QQQ")
    assert (found["longest"], found["start"], found["place"]) == (50, 3, "a.txt:1:101")
    assert (found["searched"], found["whole"]) == (600, True)
    # 56 characters: the passages have 56, the nearest length of three binary digits from it on.
    expected = [TrainingText([("a.txt", texts[0])]).examine(one) for one in passages(texts[1:], 56)]
    usual = found["validation"]
    assert usual["count"] == 4
    assert usual["longest"] == sum(one.length for one in expected) / 4
    assert usual["repeated"] == sum(one.repeated for one in expected) / 4
    assert found["longest"] > 3 * usual["longest"]
    assert not CopyingFigures([("a", "x" * 1000)], []).of("xx")["whole"]
    assert CopyingFigures([("a", "x")], ["short"]).of("x" * 100)["validation"] is None
    assert figures.of("")["place"] is None
