"""Subword tokens, by the `tokenizers` library: byte-level BPE trained here, or any tokenizer.json.

The library is imported when a tokenizer is made, never before.

A long text is encoded in pieces, side by side on all cores. It is cut before a space behind a word,
or before a line feed behind a letter or digit. The patterns of byte-level BPE (GPT-2's, Radford et
al. 2019; those of later models alike) end a word there in any context, so the ids
are those of the whole. Only where a whole piece holds no such place is a text cut within a word.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from fundamentallm.data.text_file import read_text, to_utf8
from fundamentallm.data.tokenizer.base import TOKENIZERS, Tokenizer, checked_ids
from fundamentallm.errors import ConfigError, DataError, MachineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

BATCH = 1 << 20  # characters encoded at once: the library needs some 100 bytes a token meanwhile
END = "<|endoftext|>"
logger = logging.getLogger(__name__)

KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "<|end|>")
"""Names of the end of a document in a tokenizer.json, unless configured."""

MOST_GROWTH = 64
"""How many times longer a tokenizer.json may make a text; SentencePiece's own rules reach 33."""

MOST_HOLES = 1 << 20  # ids that no token has cost a row of the embedding each
WIDEST_CHARACTER = 3  # bytes that a rule for one character replaces, nearly always

_MARK = 32  # hexadecimal digits
_OUT_OF_REACH = re.compile(rf"\0(?:[0-9a-f]{{{_MARK}}})?(?P<name>.+)\0", re.DOTALL)

UNUSED = ("truncation", "padding", "post_processor")
"""Keys of a tokenizer.json about what is cut off a text or put around it, which is never done."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # the name of a byte's token

# Of these, none looks across a boundary.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library. Special tokens in a text are text.

    Args:
        state: the object of its tokenizer.json.
        end: the token that ends a document; None: the first of `KNOWN_ENDS` that it has.

    Attributes:
        json: the object as it was given, special tokens under the names that they had before
            `out_of_reach`. What is in `UNUSED` is left out of account.

    Raises:
        ConfigError: it has no such token as `end`.
        MachineError: the library is not installed.
        ValueError: the library cannot read it.
    """

    kind = "file"

    def __init__(self, state: Mapping[str, Any], end: str | None = None) -> None:
        try:
            self._open(state, end)
        except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _open(self, state: Mapping[str, Any], end: str | None) -> None:
        self.json = _without_dropout(_within_reach(dict(state)))
        check_growth(self.json)
        if end is not None and not isinstance(end, str):
            raise ValueError(f"the end of a document must be the name of a token, not {end!r:.50}")
        self.end = end = None if end is None else _plain(end)
        library = _from_json(self.json, None)
        self._vocab_size = 1 + max(library.get_vocab().values(), default=-1)
        if not self._vocab_size:
            raise ValueError("the vocabulary is empty")
        known = ids_by_name(self.json)
        _check_ids(set(library.get_vocab().values()), set(known.values()))
        names = [name for name in (KNOWN_ENDS if end is None else (end,)) if name in known]
        if end is not None and not names:
            raise ConfigError(
                "the tokenizer has no such token",
                key="end",
                got=end,
                fix="choose one of its tokens",
            )
        self._end_id = known[names[0]] if names else None
        self._library = _from_json(self.json, names[0]) if names else library
        self._cuts = _is_local(self.json)
        self._bytes, self._silent = _byte_ids(self.json), _special_ids(self.json)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def end_id(self) -> int | None:
        """The id of the token that ends a document."""
        return self._end_id

    def find_cut(self, text: str) -> int:
        """Return the place before the last space behind a word, else the end of the text.

        0 where the tokenizer.json might read across such a place.
        """
        if not self._cuts:
            return 0
        return last_boundary(text) or len(text)

    def find_join(self, ids: Sequence[int]) -> int:
        """Return how many ids stand before the last run of bytes, where bytes are fallen back on.

        Bytes in a row decode as one; special tokens, which have no text, do not part them.
        """
        if not self._bytes:
            return len(ids)
        end = len(ids)
        first = end
        while end and (ids[end - 1] in self._bytes or ids[end - 1] in self._silent):
            end -= 1
            if ids[end] in self._bytes:
                first = end
        return first

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text.

        Raises:
            DataError: it holds half of a surrogate pair.
        """
        batches = _batches(self.pieces([text]))
        encoded = [ids for batch in batches for ids in self.encode_many(batch)]
        return np.concatenate(encoded) if encoded else np.empty(0, self._dtype)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, on all cores.

        Raises:
            DataError: one holds half of a surrogate pair, or the tokenizer.json has no way to
                encode it.
        """
        try:
            with _faults_of_the_library("encode this text"):
                encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except DataError:
            for text in texts:
                to_utf8(text)  # says which character
            raise
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        checked = checked_ids(ids, self.vocab_size).tolist()
        with _faults_of_the_library("decode these tokens"):
            return str(self._library.decode(checked))

    def to_dict(self) -> dict[str, Any]:
        """Return the type, the object of the tokenizer.json, and the end if it was chosen."""
        end = {} if self.end is None else {"end": self.end}
        return {"type": self.kind, "json": self.json, **end}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SubwordTokenizer:
        """Make a tokenizer from `to_dict`."""
        tokenizer = cls.__new__(cls)
        SubwordTokenizer.__init__(tokenizer, state["json"], state.get("end"))
        return tokenizer

    def fingerprint(self) -> str:
        """Return a SHA-256 of what is used of the tokenizer.json, wherever it came from."""
        return _digest(self.json)

    def to_json(self) -> str:
        """Return the tokenizer.json, which the library and all that use it open."""
        return json.dumps(self.json, ensure_ascii=False, indent=1) + "\n"

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.min_scalar_type(self._vocab_size - 1)


@TOKENIZERS.register("bpe")
class BpeTokenizer(SubwordTokenizer):
    """Byte-level BPE (Sennrich et al. 2016 on the bytes and words of Radford et al. 2019).

    Any text can be encoded, and decoding gives it back. Equal texts train equal tokenizers.

    Args:
        vocab_size: V at most: 256 bytes, the end of a document, and merges as long as a pair
            occurs twice; from 257 to 2^20.
        texts: what to learn from.

    Raises:
        DataError: a text holds half of a surrogate pair.
        MachineError: the library is not installed.
        ValueError: vocab_size is out of range.
    """

    kind = "bpe"

    def __init__(
        self,
        vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096,
        *,
        texts: Iterable[str] = (),
    ) -> None:
        # The library sets memory aside for them all; where there is too little it ends the process.
        if not 257 <= vocab_size <= 2**20:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes and the end) and at most {2**20:,},"
                f" got {vocab_size}"
            )
        super().__init__(_train(vocab_size, texts))


@TOKENIZERS.register("file")
class FileTokenizer(SubwordTokenizer):
    """Any tokenizer.json of the `tokenizers` library.

    Args:
        path: the file.
        end: the token that ends a document; None: the first of `KNOWN_ENDS` that it has.

    Raises:
        DataError: it cannot be read.
        MachineError: the library is not installed.
    """

    def __init__(
        self,
        path: Annotated[str, Field(examples=["tokenizer.json"])],
        end: Annotated[str | None, Field(examples=["<|endoftext|>"])] = None,
    ) -> None:
        try:
            state = json.loads(read_text(Path(path).expanduser()))
            super().__init__(state, end)
        except (ValueError, RecursionError, RuntimeError, TypeError) as error:
            raise DataError(
                "this is not a tokenizer.json that the library `tokenizers` can read",
                where=path,
                got=str(error),
                fix="name the tokenizer.json of a model",
            ) from error


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MachineError(
            "subword tokenizers need the package `tokenizers`",
            got=str(error),
            fix="pip install 'fundamentallm[tokenizers]', or choose the tokenizer byte",
        ) from error
    return tokenizers


@contextmanager
def _faults_of_the_library(doing: str) -> Iterator[None]:
    """Turn what the library `tokenizers` raises into a DataError.

    It raises the base class of exceptions, and where its own code panics (a regular expression that
    gives up, say) an exception that only `BaseException` is the base of.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the tokenizer.json cannot {doing}",
            got=str(error) or type(error).__name__,
            fix="use another tokenizer, or change the text",
        ) from error


def check_growth(state: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json whose rules make a text, or what is decoded, very much longer.

    Rules in a row multiply: a few lines of JSON can ask for more memory than there is.

    Raises:
        ValueError: by more than `MOST_GROWTH` times, as far as the rules tell.
    """
    for part, key in (("normalizer", "normalizers"), ("decoder", "decoders")):
        growth = math.prod(_growth(rule) for rule in _flat(state.get(part), key))
        if growth > MOST_GROWTH:
            raise ValueError(
                f"its {part} can make a text more than {MOST_GROWTH} times as long"
                f" ({min(growth, 10**18):,} times)"
            )


def _growth(rule: Mapping[str, Any]) -> int:
    """Return how many times longer a rule may make a text, counted in bytes of UTF-8."""
    if rule.get("type") == "Replace":
        pattern, size = rule["pattern"], len(rule["content"].encode("utf-8", "surrogatepass"))
        if "String" not in pattern:
            return 1 + size  # a regular expression can match an empty text
        replaced = len(pattern["String"].encode("utf-8", "surrogatepass"))
        return max(1, -(-size // replaced)) if replaced else 1 + size
    if rule.get("type") == "Precompiled":
        # A table of SentencePiece: the size of a trie, the trie, and texts that end in a zero byte.
        table = base64.b64decode(rule["precompiled_charsmap"] or "")
        texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
        return max(1, max(map(len, texts)) // WIDEST_CHARACTER)
    return 1


def _check_ids(of_library: set[int], of_json: set[int]) -> None:
    """Refuse ids that the library would read as others, and vocabularies that are mostly holes.

    Raises:
        ValueError: so it is.
    """
    if of_library != of_json:
        first = min(of_library ^ of_json)
        raise ValueError(f"its tokens have other ids than the library gives them, as {first}")
    if max(of_json) >= max(MOST_HOLES, 4 * len(of_json)):
        raise ValueError(
            f"it has {len(of_json):,} tokens, and one of them has the id {max(of_json)}"
        )


def _from_json(state: Mapping[str, Any], end: str | None) -> LibraryTokenizer:
    """Return the library's tokenizer, which makes no special token and no end of a text."""
    tokenizers = _library()
    text = json.dumps(_unreachable(state, end))
    try:
        with _faults_of_the_library("read this"):
            library: LibraryTokenizer = tokenizers.Tokenizer.from_str(text)
    except DataError as error:
        raise ValueError(error.got) from error
    library.no_truncation()
    library.no_padding()
    # Else "<|endoftext|>" in somebody's text would end the document.
    library.encode_special_tokens = True
    return library


def ids_by_name(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of a tokenizer.json."""
    vocabulary = state["model"].get("vocab", {})
    if not isinstance(vocabulary, Mapping):  # Unigram: pairs of a token and its score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in _added(state)}}


def _added(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return state.get("added_tokens") or []


def _special_ids(state: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids of the tokens that have no text."""
    return frozenset(token["id"] for token in _added(state) if token.get("special"))


def _byte_ids(state: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids that stand for single bytes and are decoded in runs."""
    decoders = _flat(state.get("decoder"), "decoders")
    if not any(part.get("type") == "ByteFallback" for part in decoders):
        return frozenset()
    found = {number for name, number in ids_by_name(state).items() if _BYTE.fullmatch(name)}
    return frozenset(found) - _special_ids(state)


def _digest(state: Mapping[str, Any]) -> str:
    used = {key: value for key, value in state.items() if key not in UNUSED}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def out_of_reach(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the special tokens that a model would find in a text by looking words up.

    BPE makes tokens of merges, which never make a special one; the other kinds would take "</s>"
    in somebody's text for the end of it, whatever the library is told about special tokens.
    """
    if "merges" in state["model"]:
        return dict(state)
    mark = _digest(state)[:_MARK]  # the same in every export, and in no text by accident
    return _renamed(state, lambda name: f"\0{mark}{name}\0")


def _unreachable(state: Mapping[str, Any], end: str | None) -> dict[str, Any]:
    """Rename special tokens, and the end where it is none, to what no text can spell.

    A name that anybody can know could be written, with whatever signs around it; this one is drawn
    anew in each process, is never stored, and does not change how anything else is encoded.

    Args:
        state: a tokenizer.json.
        end: the token that ends a document.
    """
    secret = secrets.token_hex(_MARK // 2)
    added = list(_added(state))
    if end is not None and not any(one["content"] == end and one.get("special") for one in added):
        number = ids_by_name(state)[end]
        others = [token for token in added if token["content"] != end]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [*others, {"id": number, "content": end, **flags, "special": True}]
        added.sort(key=lambda token: token["id"])
    special = {token["content"] for token in added if token.get("special")}
    model = dict(state["model"])
    kept: set[str] = set()
    if "merges" in model:
        if model.get("byte_fallback"):  # the library looks these up by name; no merge makes them
            kept = {name for name in special if _BYTE.fullmatch(name) and name != end}
        model["merges"] = merges_without(model, special - kept)
    hidden = {**state, "model": model, "added_tokens": added}
    return _renamed(hidden, lambda name: name if name in kept else f"\0{secret}{name}\0")


def merges_without(model: Mapping[str, Any], special: set[str]) -> list[Any]:
    """Return the merges of a BPE that neither make nor use a special token."""
    prefix = model.get("continuing_subword_prefix") or ""
    kept = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if special.isdisjoint((left, right, left + right.removeprefix(prefix))):
            kept.append(merge)
    return kept


def _without_dropout(state: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that encodes a text in one way only."""
    dropout = state["model"].get("dropout")
    if not isinstance(dropout, (int, float)) or not dropout:
        return state
    logger.warning(
        "the tokenizer.json draws its merges at random (dropout %g); that is left out, so that"
        " equal texts have equal ids",
        dropout,
    )
    return {**state, "model": {**state["model"], "dropout": None}}


def _within_reach(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `out_of_reach`."""
    if not any(_plain(token["content"]) != token["content"] for token in _added(state)):
        return dict(state)
    return _renamed(state, _plain)


def _plain(name: str) -> str:
    found = _OUT_OF_REACH.fullmatch(name)
    return found["name"] if found else name


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return a tokenizer.json whose special tokens have other names."""
    special = {token["content"] for token in _added(state) if token.get("special")}
    if not special:
        return dict(state)

    def renamed(token: str) -> str:
        return rename(token) if token in special else token

    model = dict(state["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        model["vocab"] = {renamed(token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed(model["unk_token"])
    added = [{**token, "content": renamed(token["content"])} for token in _added(state)]
    return {**state, "model": model, "added_tokens": added}


def _train(vocab_size: int, texts: Iterable[str]) -> dict[str, Any]:
    tokenizers = _library()
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )

    def checked() -> Iterator[str]:
        for text in texts:
            to_utf8(text)
            yield text

    _in_a_thread(lambda: library.train_from_iterator(checked(), trainer))
    state: dict[str, Any] = json.loads(library.to_str())
    return state


def _in_a_thread(work: Callable[[], object]) -> None:
    """Do work that looks at no signal; one that comes meanwhile raises here at once."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again below
            failures.append(error)

    thread = threading.Thread(target=run, name="train-tokenizer", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failures:
        raise failures[0]


def last_boundary(text: str) -> int:
    """Return the last place where a word ends, whatever pattern of GPT-2's family finds words.

    Before a space behind any character that is seen, or before a line feed behind a letter or digit
    (behind others, later patterns take line feeds into the word). 0 for none.
    """
    end = len(text)
    while (end := text.rfind(" ", 0, end)) > 0:
        # Of white space and what is not printable, tables of Unicode differ in what they call it.
        if text[end - 1].isprintable() and text[end - 1] != " ":
            break
    line = len(text)
    while (line := text.rfind("\n", max(end, 0), line)) > 0:
        if text[line - 1].isalnum():
            return line
    return max(end, 0)


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_local(state: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json reads nothing across a space behind a word.

    So it is where its words are those of a byte-level pattern and nothing changes the text before;
    a tokenizer.json with anything else encodes a document in one piece.
    """
    if state.get("added_tokens") and any(
        any(map(str.isspace, token.get("content", "")))
        or token.get("lstrip")
        or token.get("rstrip")
        for token in state["added_tokens"]
        if not token.get("special")
    ):
        return False
    normalizers = _flat(state.get("normalizer"), "normalizers")
    if any(part.get("type") not in _LOCAL_NORMALIZERS for part in normalizers):
        return False
    parts = _flat(state.get("pre_tokenizer"), "pretokenizers")
    return any(_ends_words(part) for part in parts) and not any(
        part.get("add_prefix_space") for part in parts
    )


def _ends_words(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "ByteLevel":
        return bool(part.get("use_regex", True))
    # Patterns of GPT-2's family, as in Llama 3 and Qwen: a word takes a space before it at most.
    pattern = str(part.get("pattern", {}).get("Regex", ""))
    return part.get("type") == "Split" and "\\s+(?!\\S)" in pattern


def _flat(part: Any, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if isinstance(part, Mapping) and part.get("type") == "Sequence":
        return [inner for item in part.get(key, []) for inner in _flat(item, key)]
    return [part]
