"""A tokenizer in a form that llama.cpp has, with the same ids for every text that it encodes.

llama.cpp has a fixed set of tokenizers (`llama-vocab.cpp`). Two of them can express ours:

`gpt2`  byte-level BPE behind one of its built-in patterns for words. Bytes are BPE without merges.
        A character is the merge of its bytes, which UTF-8 never lets overlap with another's. What
        then is no token is left out.
`rwkv`  the longest token at each place. It is the only one whose vocabulary may lack an end of
        text; what is no token has the id -1, which llama.cpp refuses to compute.

In all others, and in `gpt2` where none is named, some token ends a text: id 11, say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fundamentallm.data.tokenizer import CharacterTokenizer, Tokenizer
from fundamentallm.data.tokenizer.subword import END, ids_by_name, merges_without
from fundamentallm.data.tokenizer.tokenizer_json import byte_characters, tokenizer_json
from fundamentallm.errors import ConfigError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in llama.cpp. Only a USER_DEFINED one is found in a text as a whole."""

_OTHERS = "characters outside of the vocabulary"
_NEVER = 0xFF  # a byte that UTF-8 never has, so that no text which was trained on has it

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_BYTE_LEVEL, _GPT2 = ("ByteLevel", False), ("ByteLevel", True)
_PATTERNS: dict[tuple[object, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (("Digits", True), _GPT2): {False: "smollm"},
    (("Split", _LLAMA3), _BYTE_LEVEL): {False: "smaug-bpe", True: "llama-bpe"},
    (("Split", _QWEN2), _BYTE_LEVEL): {False: "qwen2"},
}
"""llama.cpp's names of pre-tokenizers, by the parts of a tokenizer.json's and its ignore_merges."""


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's name of the kind.
        pre: its name of the pre-tokenizer; None where the kind has none.
        tokens: their texts as the kind spells them, (V,), all different.
        types: their kinds, (V,).
        merges: pairs of tokens, the first first; None where the kind has none.
        end_id: the token that ends a text; None without one.
        note: what differs for texts that the tokenizer cannot encode; empty if nothing.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    end_id: int | None
    note: str = ""


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> GgufVocabulary:
    """Return a tokenizer in llama.cpp's form.

    Args:
        tokenizer: any; a plugin's counts as its tokenizer.json.
        rows: V, of the embedding; ids beyond the tokenizer's are unused tokens.

    Raises:
        ConfigError: llama.cpp has no form of it; the message says what stands in the way.
    """
    if isinstance(tokenizer, CharacterTokenizer):
        return _characters(tokenizer, rows)
    return _byte_level_bpe(tokenizer_json(tokenizer), tokenizer.end_id, rows)


def _characters(tokenizer: CharacterTokenizer, rows: int) -> GgufVocabulary:
    if tokenizer.unknown == "replace":
        raise _refused(
            "a token that stands for each character outside of the vocabulary",
            "unknown: replace",
            "unknown: skip or unknown: error",
        )
    texts = tokenizer.vocabulary
    if tokenizer.end_id is not None:
        known = dict(enumerate(_stand_ins(text) for text in texts))
        merges = dict.fromkeys(pair for name in known.values() for pair in _chain(name))
        tokens, types = _listed({**known, tokenizer.end_id: END}, {tokenizer.end_id: CONTROL}, rows)
        note = "" if tokenizer.unknown == "skip" else f"{_OTHERS} are left out there"
        return GgufVocabulary("gpt2", "gpt-2", tokens, types, list(merges), tokenizer.end_id, note)
    # Where a text shares only the first bytes of a token, `rwkv` never comes to an end.
    if tokenizer.unknown == "skip" or not "".join(texts).isascii():
        raise _refused(
            "a vocabulary without an end of text, but for one of ASCII characters that refuses"
            " others",
            f"unknown: {tokenizer.unknown}, end: false, "
            + ("ASCII" if "".join(texts).isascii() else "characters beyond ASCII"),
            "data.tokenizer: {name: character, end: true}, which adds an end of text",
        )
    escaped = {
        number: text if text.isprintable() and text != "\\" else f"\\x{ord(text):02x}"
        for number, text in enumerate(texts)
    }
    # An unused name holds a byte that no text has; else the name would be found in a text.
    tokens, types = _listed(escaped, {}, rows, unused=r"\xff")
    return GgufVocabulary(
        "rwkv", None, tokens, types, None, None, f"{_OTHERS} are refused there too, as the id -1"
    )


def _stand_ins(text: str) -> str:
    """Return a text as byte-level BPE spells its bytes."""
    characters = byte_characters()
    return "".join(characters[byte] for byte in text.encode())


def _chain(name: str) -> Iterable[str]:
    """Return the merges that make a token of its characters, from the left."""
    return (f"{name[:end]} {name[end]}" for end in range(1, len(name)))


def _byte_level_bpe(state: Mapping[str, Any], end_id: int | None, rows: int) -> GgufVocabulary:
    model, added = state["model"], state.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _refused(
            "a tokenizer.json of this kind with the same ids",
            f"{model.get('type', 'no BPE')}",
            "byte-level BPE",
        )
    # Where nothing is merged it does not matter where words end.
    pre = _pre_tokenizer(state) if model["merges"] else "gpt-2"
    missing = [one for one in byte_characters() if one not in model["vocab"]]
    if pre is None or missing or model.get("byte_fallback"):
        raise _refused(
            "the way in which this tokenizer.json finds words",
            f"pre_tokenizer {state.get('pre_tokenizer')}"[:300],
            "byte-level BPE with the words of GPT-2, Llama 3, Qwen 2 or SmolLM",
        )
    for key, value in {
        "normalizer": state.get("normalizer"),
        "continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "end_of_word_suffix": model.get("end_of_word_suffix"),
    }.items():
        if value:
            raise _refused(f"the {key} of this tokenizer.json", f"{value}"[:300], f"no {key}")
    names = {number: name for name, number in ids_by_name(state).items()}
    special = {token["content"] for token in added if token.get("special")}
    whole = [token for token in added if not token.get("special")]
    _check_whole(whole, model["vocab"])
    kinds = {token["id"]: USER_DEFINED for token in whole}
    kinds |= {token["id"]: CONTROL for token in added if token.get("special")}
    if end_id is not None:
        special.add(names[end_id])
        kinds[end_id] = CONTROL
    tokens, types = _listed(names, kinds, rows)
    merges = [
        one if isinstance(one, str) else " ".join(one) for one in merges_without(model, special)
    ]
    end = model["vocab"][byte_characters()[_NEVER]] if end_id is None else end_id
    return GgufVocabulary("gpt2", pre, tokens, types, merges, end)


def _pre_tokenizer(state: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer; None if it has none."""
    whole = state.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", []) if whole.get("type") == "Sequence" else [whole]
    form: list[object] = []
    for part in parts:
        kind = part.get("type")
        if kind == "ByteLevel" and not part.get("add_prefix_space", True):
            form.append((kind, bool(part.get("use_regex", True))))
        elif kind == "Digits":
            form.append((kind, bool(part.get("individual_digits"))))
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            form.append((kind, part["pattern"].get("Regex")))
        else:
            return None
    return _PATTERNS.get(tuple(form), {}).get(bool(state["model"].get("ignore_merges")))


def _check_whole(tokens: list[Mapping[str, Any]], vocabulary: Mapping[str, int]) -> None:
    """Refuse tokens that llama.cpp would find in another order, or write in another way."""
    for token in tokens:
        if token["content"] in vocabulary and not token["content"].isascii():
            raise _refused(
                "a token that is bytes in the vocabulary and text as an added one",
                repr(token["content"]),
                "added tokens that the vocabulary lacks",
            )
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refused(
                "a token that takes white space along or stands between words",
                repr(token["content"]),
                "added tokens without lstrip, rstrip and single_word",
            )
    names = [token["content"] for token in tokens]
    for first in names:
        for second in names:
            # The library takes the leftmost, llama.cpp the longest; of runs of one character both
            # take the same.
            if len(set(first + second)) > 1 and any(
                second.startswith(first[start:]) for start in range(1, len(first))
            ):
                raise _refused(
                    "two added tokens that overlap in a text",
                    f"{first!r} and {second!r}",
                    "tokens that cannot overlap",
                )


def _listed(
    names: Mapping[int, str], kinds: Mapping[int, int], rows: int, unused: str = ""
) -> tuple[list[str], list[int]]:
    """Return the names and kinds of all ids, those without a token included."""
    tokens = [names.get(number, f"{unused}[unused{number}]") for number in range(rows)]
    types = [kinds.get(number, NORMAL if number in names else UNUSED) for number in range(rows)]
    if len(set(tokens)) < rows:
        twice, _ = Counter(tokens).most_common(1)[0]
        raise _refused("two tokens of one name", repr(twice), "tokens of different names")
    return tokens, types


def _refused(what: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp cannot express {what}",
        key="data.tokenizer",
        got=got,
        expected=expected,
        fix="train with such a tokenizer, or with bpe or byte; --format hf keeps this one",
    )
