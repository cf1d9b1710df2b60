"""What a tokenizer does to text it was not trained on: the figures of report.json, and its warnings."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertpipe.data import tokenizer as stage

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

NUM_EXAMPLES = 20
BATCH = 64
WORD_LIMIT = 30
"""Longer words are counted together, in the histograms' last bin."""
DELETED_SHARE = 0.001
"""Warn when this share of the letters loses a mark (Latin and Greek aside, where BERT means it)."""
UNKNOWN_SHARE = 0.01
ACCENTED_SCRIPTS = ("LATIN", "GREEK")


def measure(folder: Path, texts: Iterable[str], max_length: int) -> dict[str, Any]:
    """Measure the tokenizer in `folder` on documents, of which one at a time is held.

    Returns vocab_size; documents, words, tokens, characters and unknown (counts); tokens_per_word (a word is what the
    pre-tokenizer cuts out, punctuation marks among them), characters_per_token, unknown_rate (share of the tokens),
    over_length_rate (share of documents longer than `max_length` with [CLS] and [SEP]); histograms document_tokens
    (by power of two above), word_characters and word_tokens, each value -> count; longest_tokens; examples (frequent
    words in several pieces); deleted_marks (share of all letters that lose a mark, by script); warnings.
    """
    tokenizer = stage.load(folder)
    unknown = stage.read_special_ids(folder)[0]["unk"]
    totals = Counter(documents=0, words=0, tokens=0, characters=0, unknown=0, over_length=0)
    raw, lengths, word_characters, word_tokens, split_words = (Counter[Any]() for _ in range(5))
    for text in texts:
        raw.update(text)
        length = 0
        for encoding in _encode(tokenizer, text):
            length += len(encoding.ids)
            totals["unknown"] += encoding.ids.count(unknown)
            for characters, tokens in _words(encoding):
                word_characters[min(characters, WORD_LIMIT)] += 1
                word_tokens[min(len(tokens), WORD_LIMIT)] += 1
                if len(tokens) > 1:
                    split_words[tokens] += 1
        lengths[1 << max(length - 1, 0).bit_length()] += 1
        totals.update(documents=1, tokens=length, characters=len(text), over_length=int(length + 2 > max_length))
    totals["words"] = word_tokens.total()
    deleted = deleted_marks(tokenizer, raw)
    unknown_rate = _ratio(totals["unknown"], totals["tokens"])
    vocabulary = sorted(tokenizer.get_vocab(), key=lambda piece: (-len(piece), piece))
    return {
        "vocab_size": len(vocabulary),
        **totals,
        "tokens_per_word": _ratio(totals["tokens"], totals["words"]),
        "characters_per_token": _ratio(totals["characters"], totals["tokens"]),
        "unknown_rate": unknown_rate,
        "over_length_rate": _ratio(totals["over_length"], totals["documents"]),
        "document_tokens": dict(sorted(lengths.items())),
        "word_characters": dict(sorted(word_characters.items())),
        "word_tokens": dict(sorted(word_tokens.items())),
        "longest_tokens": vocabulary[:NUM_EXAMPLES],
        "examples": [" ".join(tokens) for tokens, _ in _most_common(split_words)],
        "deleted_marks": deleted,
        "warnings": [*_warn_deleted(deleted), *_warn_unknown(unknown_rate)],
    }


def compare(before: dict[str, Any], after: dict[str, Any], words: list[str], wanted: int) -> dict[str, Any]:
    """The report `after` of a tokenizer that `words` were added to, with what they save on the same text under `added`.

    `wanted` is how many should have been added; fewer is warned of.
    """
    tokens, saved = before["tokens"], before["tokens"] - after["tokens"]
    added = {
        "words": len(words),
        "examples": words[:NUM_EXAMPLES],
        "tokens_per_word_before": before["tokens_per_word"],
        "tokens_saved": saved,
        "share_saved": round(saved / tokens, 6) if tokens else 0.0,
        "unknown_rate_before": before["unknown_rate"],
    }
    if len(words) < wanted:
        short = f"only {len(words)} words of the corpus would save tokens, fewer than tokenizer.add_tokens: {wanted}"
        after["warnings"].append(short)
    return {**after, "added": added}


def _encode(tokenizer: Tokenizer, text: str) -> Iterator[Encoding]:
    pieces = list(stage.split_long(text))
    for first in range(0, len(pieces), BATCH):
        yield from tokenizer.encode_batch(pieces[first : first + BATCH], add_special_tokens=False)


def _words(encoding: Encoding) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(characters, tokens) of each word of a text."""
    columns = zip(encoding.word_ids, encoding.tokens, encoding.offsets, strict=True)
    for _, rows in groupby(columns, key=lambda row: row[0]):
        _, tokens, offsets = zip(*rows, strict=True)
        yield offsets[-1][1] - offsets[0][0], tokens


def _most_common(counts: Counter) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_EXAMPLES]


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def deleted_marks(tokenizer: Tokenizer, characters: Counter[str]) -> dict[str, float]:
    """Share of all letters whose combining mark (Unicode category Mn) the normaliser deletes, by script.

    `characters` counts the raw text's characters. A mark standing alone counts for the script its name tells; Latin,
    Greek and generic combining marks are left out.
    """
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return {}
    lost: Counter[str] = Counter()
    letters = 0
    for character, count in characters.items():
        if unicodedata.category(character)[0] not in "LM":
            continue
        letters += count
        decomposed = unicodedata.normalize("NFD", character)
        marks = _count_marks(decomposed)
        if marks > _count_marks(unicodedata.normalize("NFD", normalizer.normalize_str(character))):
            lost[unicodedata.name(decomposed[0], "UNKNOWN").split()[0]] += count
    scripts = {script: _ratio(count, letters) for script, count in lost.most_common()}
    return {s: share for s, share in scripts.items() if s not in (*ACCENTED_SCRIPTS, "COMBINING") and share}


def _count_marks(text: str) -> int:
    return sum(unicodedata.category(character) == "Mn" for character in text)


def _warn_deleted(deleted: dict[str, float]) -> list[str]:
    found = [f"{script.title()} {share:.1%}" for script, share in deleted.items() if share >= DELETED_SHARE]
    if not found:
        return []
    return [
        f"accent stripping deletes vowel signs or other marks of: {', '.join(found)} of all letters; "
        "set tokenizer.strip_accents: false"
    ]


def _warn_unknown(rate: float) -> list[str]:
    if rate < UNKNOWN_SHARE:
        return []
    return [
        f"{rate:.1%} of the tokens are [UNK]; raise tokenizer.limit_alphabet or vocab_size, "
        "or adopt a tokenizer of this language"
    ]
