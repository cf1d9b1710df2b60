"""Texts -> token ids, exactly as the stock tokenizer makes them, not padded, with the truncated examples counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 1_000
"""Examples a call of the tokenizer: bounds the memory, and lets Ctrl-C through."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of the examples of one split."""

    input_ids: list[np.ndarray]
    """For each example [length] int64: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; length <= max_length."""
    token_type_ids: list[np.ndarray]
    """For each example [length] int64: 0, and 1 from b on (always 0 for families without segments)."""
    truncated: list[int]
    """The examples that were longer than max_length."""

    @property
    def num_truncated(self) -> int:
        """How many they are."""
        return len(self.truncated)


def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> Tokens:
    """Encode single texts or pairs with a `transformers` tokenizer.

    Equals `tokenizer([a], [b], truncation="longest_first", max_length=max_length)` for each example: from a pair that
    is too long, tokens are taken off the longer side first (Devlin et al. 2019, `_truncate_seq_pair`).
    """
    result = Tokens([], [], [])
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        rows, types = _call(tokenizer, chunk)
        long = [row for row, ids in enumerate(rows) if len(ids) > max_length]
        result.truncated.extend(start + row for row in long)
        if long:
            cut = _call(tokenizer, [chunk[row] for row in long], truncation="longest_first", max_length=max_length)
            for row, ids, type_ids in zip(long, *cut, strict=True):
                rows[row], types[row] = ids, type_ids
        result.input_ids.extend(np.asarray(ids, dtype=np.int64) for ids in rows)
        result.token_type_ids.extend(np.asarray(ids, dtype=np.int64) for ids in types)
    return result


def _call(tokenizer: Any, texts: Sequence[tuple[str, ...]], **truncation: Any) -> tuple[list, list]:
    sides = [list(side) for side in zip(*texts, strict=True)]
    encoding = tokenizer(*sides, return_attention_mask=False, return_token_type_ids=True, verbose=False, **truncation)
    return encoding["input_ids"], encoding["token_type_ids"]


def encode_words(words: Iterable[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """The pieces of each different word, int64, without special tokens: as it stands in a sentence split into words.

    Equals `tokenizer(sentence, is_split_into_words=True)`, with `add_prefix_space=True` where there is a choice:
    byte-level tokenizers would otherwise read the words as if written together. A word may have no pieces (a control
    character, for one).
    """
    different = list(dict.fromkeys(words))
    spaced = _reads_spaces(tokenizer)
    pieces: dict[str, np.ndarray] = {}
    for start in range(0, len(different), CHUNK):
        chunk = different[start : start + CHUNK]
        given = [[f" {word}" if spaced and word and not word.startswith(" ") else word] for word in chunk]
        rows = tokenizer(given, is_split_into_words=True, add_special_tokens=False, verbose=False)["input_ids"]
        pieces |= {word: np.asarray(ids, np.int64) for word, ids in zip(chunk, rows, strict=True)}
    return pieces


def _reads_spaces(tokenizer: Any) -> bool:
    """Whether it is a byte-level one that puts no space before the first word."""
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] if tokenizer.is_fast else None
    steps = (steps or {}).get("pretokenizers", [steps] if steps else [])
    return any(step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in steps)


def special_tokens(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens before and behind a single text, int64 each."""
    whole = tokenizer([["a"]], is_split_into_words=True, return_special_tokens_mask=True)
    ids, mask = np.asarray(whole["input_ids"][0], np.int64), np.asarray(whole["special_tokens_mask"][0])
    inner = np.flatnonzero(mask == 0)
    return ids[: inner[0]], ids[inner[-1] + 1 :]
