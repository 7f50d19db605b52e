"""From tokens to streamed text: characters in pieces, stop strings, batches, their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples

from fundamentallm.config import TransformerConfig
from fundamentallm.data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer
from fundamentallm.engine.commands.generate import history_path
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.inference.generate import Piece, TextStream, in_order, stream_text, stream_texts
from fundamentallm.models.generation.batch import Generation
from fundamentallm.models.transformer import Transformer

BYTES = ByteTokenizer()
ABC = CharacterTokenizer("abc\ufffd")


def model(vocab_size: int = 256) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        TransformerConfig(
            vocab_size=vocab_size, sequence_length=16, d_model=16, num_layers=1, num_heads=2
        )
    )


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop=stop)
    out = []
    for token in ids:
        out.append(stream.feed(token))
        if stream.stopped:
            break
    return [*out, stream.rest()]


@given(st.lists(st.integers(0, 255) | st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 0x41])))
@settings(max_examples=examples(300))
def test_pieces_of_any_bytes_join_to_their_text(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


@given(st.text())
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    text = text.replace("\ufffd", "")
    expected = []
    for character in text:
        expected += [""] * (len(character.encode()) - 1) + [character]
    assert pieces(BYTES, list(text.encode())) == [*expected, ""]


def test_a_real_replacement_character_is_given_out_after_the_next_token() -> None:
    ids = ABC.encode("a\ufffdb\ufffd").tolist()
    assert pieces(ABC, ids) == ["a", "", "\ufffdb", "", "\ufffd"]


class SpacedWords(CharacterTokenizer):
    """Decodes words with spaces between them, as word tokenizers do: a token by its neighbour."""

    def decode(self, ids: Any) -> str:
        return " ".join(ABC.decode([token]) for token in ids)


def test_a_token_is_decoded_beside_the_one_before_it() -> None:
    tokenizer = SpacedWords("abc")
    stream = TextStream(tokenizer, before=[0])
    assert [stream.feed(1), stream.feed(2), stream.rest()] == [" b", " c", ""]


def until(text: str, stop: tuple[str, ...]) -> str:
    """Return the text before the stop string that is whole first, looking at every prefix."""
    for end in range(len(text) + 1):
        ending = [len(s) for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(ending)]
    return text


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=examples(500))
def test_text_ends_before_the_stop_string_that_is_whole_first(text: str, stop: list[str]) -> None:
    strings = tuple(stop)
    given_out = pieces(ABC, ABC.encode(text).tolist(), strings)
    assert "".join(given_out) == until(text, strings)


@given(
    text=st.text("ab", max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2),
    cuts=st.lists(st.integers(1, 4), min_size=12, max_size=12),
)
@settings(max_examples=examples(300))
def test_what_the_text_comes_in_makes_no_difference_to_its_end(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    class Chunks(CharacterTokenizer):
        def decode(self, ids: Any) -> str:
            return "".join(chunks[token] for token in ids)

    chunks, rest = [], text
    for cut in cuts:
        chunks.append(rest[:cut])
        rest = rest[cut:]
    given_out = pieces(Chunks("ab"), list(range(len(chunks))), tuple(stop))
    assert "".join(given_out) == until("".join(chunks), tuple(stop))


def test_only_what_a_stop_string_may_begin_with_is_held_back() -> None:
    ids = ABC.encode("aabab").tolist()
    assert pieces(ABC, ids, ("abc",)) == ["", "a", "", "ab", "", "ab"]


def written(prompts: list[str], seeds: list[int], **options: Any) -> list[str]:
    texts, ended = [""] * len(prompts), set()
    for piece in stream_texts(model(), BYTES, prompts, 40, seeds=seeds, **options):
        assert piece.row not in ended
        assert piece.text or piece.last
        texts[piece.row] += piece.text
        if piece.last:
            ended.add(piece.row)
    assert ended == set(range(len(prompts)))
    return texts


def alone(prompt: str, seed: int, **options: Any) -> str:
    return "".join(stream_text(model(), BYTES, prompt, 40, seed=seed, **options))


PROMPTS = ["", "the ", "a much longer prompt than the context", "x"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"top_k": 40, "min_p": 0.01},
        {"stop": ["e", "\ufffd\ufffd"]},
    ],
)
def test_a_text_of_a_batch_is_the_one_that_its_prompt_gets_alone(options: dict[str, Any]) -> None:
    expected = [alone(prompt, seed, **options) for seed, prompt in enumerate(PROMPTS)]
    assert written(PROMPTS, [0, 1, 2, 3], **options) == expected
    assert len(set(expected)) == 4


def test_stop_strings_end_a_row_and_not_its_neighbours() -> None:
    plain = written(PROMPTS, [0, 1, 2, 3])
    stop = plain[1][5:7]
    assert written(PROMPTS, [0, 1, 2, 3], stop=[stop]) == [text.split(stop)[0] for text in plain]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.0}])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_a_text_that_ends_gives_its_place_to_the_next_and_none_of_them_changes(
    batch_size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "bcabcabcabcabcabcabcabc", "", "ab", "c" * 40, "b"]
    seeds, network = list(range(6)), model(4)

    def texts_and_steps(**more: Any) -> tuple[list[str], int]:
        steps = 0
        step = Generation.step

        def counted(self: Generation) -> torch.Tensor:
            nonlocal steps
            steps += 1
            assert len(self.rows) <= more.get("batch_size", 6)
            return step(self)

        texts = [""] * len(prompts)
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "step", counted)
            for piece in stream_texts(
                network, ABC, prompts, 70, seeds=seeds, stop=["ab"], **options, **more
            ):
                texts[piece.row] += piece.text
        return texts, steps

    alone, _ = texts_and_steps()
    found, steps = texts_and_steps(batch_size=batch_size)
    assert found == alone
    tokens = [min(len(text) + 2, 70) for text in alone]  # up to the stop string, and that
    free = [0] * batch_size  # the step at which a place is free, by the rule and no model
    for count in tokens:
        free[free.index(min(free))] += count
    assert steps == max(free)


def test_a_batch_without_a_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        stream_texts(model(4), ABC, ["a"], 5, seeds=[0], batch_size=0)


def test_stop_strings_of_the_prompt_do_not_count() -> None:
    assert alone("the ", 1, stop=["the "]) == alone("the ", 1)


def test_stop_ids_end_a_row() -> None:
    plain = alone("the ", 1)
    token = plain.encode()[0]
    assert written(["the ", "the "], [1, 2], stop_ids=[token])[0] == ""
    assert written(["the "], [1], stop_ids=[256]) == [plain]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"repetition_penalty": 2.0}])
def test_a_padded_vocabulary_is_drawn_from_where_the_tokenizer_has_tokens(
    options: dict[str, Any],
) -> None:
    text = "".join(stream_text(model(600), ABC, "a", 60, **options))
    assert len(text) == 60
    assert set(text) <= set("abc\ufffd")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused_before_the_first_token(
    options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        stream_text(model(), BYTES, "a", 5, **options)
    assert caught.value.key == key


def test_a_prompt_outside_the_vocabulary_is_refused_before_the_first_token() -> None:
    with pytest.raises(DataError, match="not in the vocabulary"):
        stream_texts(model(4), ABC, ["a", "z"], 5, seeds=[0, 1])


@given(st.lists(st.tuples(st.integers(0, 3), st.text("ab", max_size=2)), max_size=20))
def test_rows_are_shown_one_after_the_other_and_the_first_as_it_comes(
    arrivals: list[tuple[int, str]],
) -> None:
    ends = [Piece(row, "!", last=True) for row in (2, 0, 3, 1)]
    arriving = [Piece(row, text, last=False) for row, text in arrivals] + ends
    shown = list(in_order(iter(arriving)))
    assert [piece.row for piece in shown] == sorted(piece.row for piece in shown)
    for row in range(4):
        expected = "".join(piece.text for piece in arriving if piece.row == row)
        assert "".join(piece.text for piece in shown if piece.row == row) == expected
        assert [piece.last for piece in shown if piece.row == row][-1]

    taken = 0

    def counted() -> Any:
        nonlocal taken
        for taken, piece in enumerate(arriving, start=1):  # noqa: B007
            yield piece

    for piece in in_order(counted()):
        if piece.row == 0:
            assert arriving[taken - 1] == piece
        else:
            break


def test_prompts_are_kept_where_the_xdg_specification_says(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "fundamentallm" / "prompts"
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    for relative in ("", "not/absolute"):
        monkeypatch.setenv("XDG_STATE_HOME", relative)
        assert history_path() == home / ".local" / "state" / "fundamentallm" / "prompts"
