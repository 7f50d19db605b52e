"""Megabytes of UTF-8 a second: characters on one core, and `prepare` on all against `tokenizers`.

    python benchmarks/encode.py [--megabytes 64] [--rounds 5] [--vocab-size 2048]

Each round measures every way in turn, so that a machine that is busy for a while slows them alike;
a ratio is the median over the rounds of the ratio within a round. Prints one JSON object.

- character, ascii and mixed: `CharacterTokenizer.encode` of a text in memory, on one core; mixed
  has a character beyond Latin-1 in most lines.
- loop: the dictionary look-up of each character, as most write it first.
- direct: `encode_batch` of the library on lists of documents as large as `prepare` hands over, on
  all cores, the ids of each read out to numpy and written. It reads no file, looks for no
  duplicate, checks nothing and makes nothing durable.
- prepare: the command's function on the same documents in a file, tokenizer given, with all that it
  does.
- prepare, characters: the same with characters, both passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import tokenizers

from fundamentallm.config.component import Component
from fundamentallm.data.preparing.folder import write_prepared
from fundamentallm.data.preparing.options import Options
from fundamentallm.data.preparing.pieces import BATCH
from fundamentallm.data.tokenizer import BpeTokenizer, CharacterTokenizer


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def corpus(megabytes: int) -> list[str]:
    """Documents of the language reference, over and over, each time a little different."""
    texts = [topics[name] for name in sorted(topics)]
    documents: list[str] = []
    size = turn = 0
    while size < megabytes * 1e6:
        for text in texts:
            documents.append(f"{turn} {text}")
            size += len(documents[-1].encode())
        turn += 1
    return documents


def direct(library: tokenizers.Tokenizer, documents: list[str], path: Path) -> None:
    with path.open("wb") as file:
        batch: list[str] = []
        size = 0
        for document in [*documents, ""]:
            if size >= BATCH or not document:
                for encoding in library.encode_batch(batch, add_special_tokens=False):
                    file.write(np.array(encoding.ids, np.uint16).tobytes())
                batch, size = [], 0
            batch.append(document)
            size += len(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=2048)
    options = parser.parse_args()
    documents = corpus(options.megabytes)
    whole = "".join(documents)[: options.megabytes * 1_000_000]
    ascii_text = whole.encode("ascii", "replace").decode()
    mixed = ascii_text.replace(" the ", " \N{EM DASH} ")
    characters = CharacterTokenizer.from_text(ascii_text + mixed)
    ids = {character: number for number, character in enumerate(characters.vocabulary)}
    part = ascii_text[:4_000_000]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        lines = place / "documents.jsonl"
        with lines.open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"text": document}) + "\n")
        saved = place / "tokenizer.json"
        BpeTokenizer(options.vocab_size, texts=documents[:200]).save(saved)
        library = tokenizers.Tokenizer.from_file(str(saved))
        subwords = Options(Component(name="file", options={"path": str(saved)}))
        size = sum(len(document.encode()) for document in documents) / 1e6
        plain = Options(Component(name="character"))
        speeds: dict[str, list[float]] = {}
        for number in range(options.rounds):
            out = place / str(number)
            ways: dict[str, tuple[float, Callable[[], object]]] = {
                "character_ascii": (len(ascii_text) / 1e6, partial(characters.encode, ascii_text)),
                "character_mixed": (len(mixed.encode()) / 1e6, partial(characters.encode, mixed)),
                "loop": (len(part) / 1e6, lambda: np.array([ids[c] for c in part], np.uint16)),
                "direct": (size, partial(direct, library, documents, place / "direct")),
                "prepare": (size, partial(write_prepared, [str(lines)], out / "bpe", subwords)),
                "prepare_characters": (
                    size,
                    partial(write_prepared, [str(lines)], out / "characters", plain),
                ),
            }
            for name, (megabytes, act) in ways.items():
                speeds.setdefault(name, []).append(megabytes / seconds(act))
    ratios = [
        ours / theirs for ours, theirs in zip(speeds["prepare"], speeds["direct"], strict=True)
    ]
    print(
        json.dumps(
            {
                "megabytes": options.megabytes,
                "rounds": options.rounds,
                "cores": len(os.sched_getaffinity(0)),
                "tokenizers": tokenizers.__version__,
                "megabytes_per_second": {
                    name: round(statistics.median(found), 1) for name, found in speeds.items()
                },
                "prepare_over_direct": round(statistics.median(ratios), 3),
                "prepare_over_direct_rounds": [round(ratio, 3) for ratio in ratios],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
