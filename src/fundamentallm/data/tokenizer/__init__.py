"""Text to token ids and back: one file for each kind of tokenizer; `base` has what they share."""

from fundamentallm.data.tokenizer.base import (
    TOKENIZER_FILE,
    TOKENIZERS,
    Tokenizer,
    build_tokenizer,
    changes_texts,
    load_tokenizer,
    tokenizer_from_dict,
)
from fundamentallm.data.tokenizer.byte import ByteTokenizer
from fundamentallm.data.tokenizer.character import CharacterTokenizer
from fundamentallm.data.tokenizer.subword import BpeTokenizer, FileTokenizer, SubwordTokenizer

__all__ = [
    "TOKENIZERS",
    "TOKENIZER_FILE",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "FileTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "changes_texts",
    "load_tokenizer",
    "tokenizer_from_dict",
]
