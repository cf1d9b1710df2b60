"""Texts -> token ids, exactly as the stock tokenizer makes them, not padded, with the truncated examples counted."""

from __future__ import annotations

from collections.abc import Sequence
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
