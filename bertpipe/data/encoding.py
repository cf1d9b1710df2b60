"""Documents -> token ids and sentence lengths.

BERT's tokenizer treats each stretch between white space by itself, so such a stretch is encoded once and looked up from
then on: several times the speed of encoding whole documents, with the same ids (tests/data/test_shards.py holds that on
arbitrary text). Tokenizers built otherwise (byte-level, ...) encode the document and place sentences by offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DELETED = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
"""White space to Python, but deleted by BERT's normaliser, which so joins what stands around it."""
BLOCK_WORDS = 1 << 17
"""Words looked up at once."""
MAX_WORDS = 1 << 19
MAX_TABLE_TOKENS = 1 << 22
"""The memory of words is emptied when it holds more words, or their tokens, than this (together some 100 MB)."""
LONG = 2_000
"""A word of more characters is encoded in pieces where that changes nothing."""
LONG_TEXT = 10_000
"""The same for documents that are encoded by offsets."""


class Encoder:
    """Encodes documents with one tokenizer (`tokenizer.load`), sentences split by sentencex for `language`."""

    def __init__(self, tokenizer: Tokenizer, language: str):
        self.tokenizer, self.language = tokenizer, language
        self.by_words = _is_bert(tokenizer)
        self._separates = lru_cache(maxsize=1 << 16)(self._test_separates)
        self._forget()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode documents, without special tokens.

        Returns ids (uint32 [T], end to end), tokens of each document (int64 [len(texts)], 0 where nothing is left) and
        tokens of each sentence (int64 [S], all >= 1; none crosses a document's end).
        """
        blocks = self._encode_by_words(texts) if self.by_words else self._encode_by_offsets(texts)
        ids, lengths, documents = (list(column) for column in zip(*blocks, strict=True)) if texts else ([], [], [])
        if not ids:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        sentences, document = np.concatenate(lengths), np.concatenate(documents)
        per_document = np.bincount(document, sentences, minlength=len(texts)).astype(np.int64)
        return np.concatenate(ids), per_document, sentences[sentences > 0]

    # --- BERT's: word by word ---

    def _encode_by_words(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Blocks of (ids, tokens of each sentence, document of each sentence)."""
        words: list[str] = []
        ends: list[int] = []  # words before the end of each sentence
        documents: list[int] = []
        for number, text in enumerate(texts):
            for sentence in self._sentences(text):
                words += sentence.split()
                ends.append(len(words))
                documents.append(number)
                if len(words) >= BLOCK_WORDS:
                    yield *self._look_up(words, ends), np.array(documents, np.int64)
                    words, ends, documents = [], [], []
        yield *self._look_up(words, ends), np.array(documents, np.int64)

    def _sentences(self, text: str) -> list[str]:
        """`text` in sentences, none beginning where that would change the tokens."""
        text = DELETED.sub("", text)
        merged: list[str] = []
        for part in _segment(self.language, text):
            if merged and not (self._separates(merged[-1][-1]) or self._separates(part[0])):
                merged[-1] += part
            else:
                merged.append(part)
        return merged

    def _test_separates(self, character: str) -> bool:
        """Whether BERT's words always end at this character: white space, punctuation, CJK."""
        normalizer, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        assert normalizer is not None and pre_tokenizer is not None
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(f"a{character}a"))]
        return len(pieces) > 1 and pieces[0] == pieces[-1] == "a"

    def _look_up(self, words: list[str], ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `words` end to end, and tokens of each sentence."""
        if len(self._numbers) > MAX_WORDS or self._used > MAX_TABLE_TOKENS:
            self._forget()
        numbers = np.fromiter(map(self._numbers.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            new = [words[i] for i in missing]
            self._learn(list(dict.fromkeys(new)))
            numbers[missing] = [self._numbers[word] for word in new]
        lengths = self._lengths[numbers]
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.repeat(self._starts[numbers] - running[:-1], lengths) + np.arange(running[-1])
        return self._table[places], np.diff(running[np.array([0, *ends])])

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}  # word -> row of the columns below
        self._lengths = self._starts = np.zeros(0, np.int64)
        self._table = np.zeros(0, np.uint32)
        self._used = 0

    def _learn(self, words: list[str]) -> None:
        ids: list[list[int]] = []
        for first in range(0, len(words), 1000):
            ids += self._encode_words(words[first : first + 1000])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        self._starts = np.concatenate([self._starts, self._used + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._table = np.concatenate([self._table, np.fromiter(chain.from_iterable(ids), np.uint32)])
        self._used = len(self._table)
        self._numbers.update(zip(words, range(len(self._numbers), len(self._lengths)), strict=True))

    def _encode_words(self, words: list[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(
            [word if len(word) <= LONG else "" for word in words], add_special_tokens=False
        )
        ids = [encoding.ids for encoding in encoded]
        for number, word in enumerate(words):
            if len(word) > LONG:
                pieces = self.tokenizer.encode_batch_fast(list(self._cut(word)), add_special_tokens=False)
                ids[number] = list(chain.from_iterable(piece.ids for piece in pieces))
        return ids

    def _cut(self, word: str) -> Iterator[str]:
        """A long word in pieces of at least LONG characters, each ending with a character that separates words."""
        start = 0
        for end in range(LONG, len(word)):
            if end - start >= LONG and self._separates(word[end - 1]):
                yield word[start:end]
                start = end
        yield word[start:]

    # --- any other: by offsets ---

    def _encode_by_offsets(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for number, text in enumerate(texts):
            boundaries = np.cumsum([len(part) for part in _segment(self.language, text)], dtype=np.int64)
            pieces = _cut_at_spaces(text)
            ids, ends, base = [], [], 0
            for piece, encoding in zip(
                pieces, self.tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True
            ):
                ids.append(np.array(encoding.ids, np.uint32))
                ends.append(np.array([base + end for _, end in encoding.offsets], np.int64))
                base += len(piece)
            # A token belongs to the sentence of its last character: its first may be the space before.
            last = np.maximum.accumulate(np.concatenate(ends)) - 1
            sentence = np.searchsorted(boundaries, np.maximum(last, 0), side="right")
            lengths = np.bincount(sentence, minlength=len(boundaries))
            yield np.concatenate(ids), lengths.astype(np.int64), np.full(len(lengths), number, np.int64)


def _is_bert(tokenizer: Tokenizer) -> bool:
    """Whether words are encoded each by itself, cut as by BERT, and no added token can match in a text."""
    kinds = [type(part).__name__ for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)]
    if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    return tokenizer.normalizer.clean_text and all(token.special for token in added)


def _segment(language: str, text: str) -> list[str]:
    """Sentences whose concatenation is `text`, white space after them included; none is empty."""
    import sentencex

    parts = [part for part in sentencex.segment(language, text) if part]
    return parts if sum(map(len, parts)) == len(text) and "".join(parts) == text else [text][: len(text)]


def _cut_at_spaces(text: str) -> list[str]:
    """A long text in pieces, cut before single spaces between other characters, where every tokenizer cuts."""
    pieces, start = [], 0
    for match in re.finditer(r"(?<=\S) (?=\S)", text):
        if match.start() - start >= LONG_TEXT:
            pieces.append(text[start : match.start()])
            start = match.start()
    return [*pieces, text[start:]]
