"""Adding a corpus's own words to an adopted WordPiece vocabulary, so that a checkpoint can go on in another domain.

Whole words are added, never continuing pieces ("##x"): WordPiece takes the longest entry that begins a word, so only
words that begin with an added one change their encoding, and every other text keeps its ids (held on arbitrary text by
tests/data/test_new_words.py). New entries follow the old ones, whose ids stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bertpipe.config import TokenizerConfig
from bertpipe.data.encoding import DELETED
from bertpipe.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT = ["BertNormalizer", "BertPreTokenizer", "WordPiece"]


def add_words(tokenizer: Any, texts: Iterable[str], settings: TokenizerConfig) -> list[str]:
    """Extend a `transformers` tokenizer, in place, by the `settings.add_tokens` words of `texts` that save most tokens.

    Returns the words added, best first: fewer when no other that occurs `settings.min_frequency` times would save any.
    Single continuing characters that longer entries have but the vocabulary lacks come on top, since a word that begins
    with an added one could otherwise become unknown. Raises ConfigError for tokenizers other than BERT's WordPiece.
    """
    from tokenizers import models

    backend = tokenizer.backend_tokenizer
    check_grows(backend)
    words = useful_words(backend, count_words(backend, texts), settings.add_tokens, settings.min_frequency)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    new = [*missing_continuations(backend), *words] if words else []
    old = backend.model
    backend.model = models.WordPiece(
        vocab=vocabulary | {piece: len(vocabulary) + number for number, piece in enumerate(new)},
        unk_token=old.unk_token,
        max_input_chars_per_word=old.max_input_chars_per_word,
        continuing_subword_prefix=old.continuing_subword_prefix,
    )
    return words


def check_grows(backend: Tokenizer) -> None:
    """ConfigError unless `backend` is BERT's: cut into words as by BERT, WordPiece, ids without a gap, all its own."""
    kinds = [type(part).__name__ for part in (backend.normalizer, backend.pre_tokenizer, backend.model)]
    if kinds != BERT or not backend.normalizer.clean_text:
        found = ", ".join(kind for kind in kinds if kind not in BERT) or "clean_text is off"
        raise ConfigError(f"tokenizer.add_tokens: only BERT's WordPiece can take more words, not this one ({found})")
    added = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    if added or ids != list(range(len(ids))):
        reason = f"added tokens such as {added[0]!r}" if added else "ids with gaps"
        raise ConfigError(f"tokenizer.add_tokens: the adopted tokenizer has {reason}, and can't take more words")


def count_words(backend: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words as the model of BERT's tokenizer sees them (normalised, cut at punctuation), with their occurrences.

    BERT treats each stretch between white space by itself, so each distinct stretch is normalised once.
    """
    stretches: Counter[str] = Counter()
    for text in texts:
        stretches.update(DELETED.sub("", text).split())
    words: Counter[str] = Counter()
    for stretch, count in stretches.items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(stretch)):
            words[word] += count
    return words


def useful_words(backend: Tokenizer, counts: Counter[str], num: int, min_frequency: int) -> list[str]:
    """The at most `num` words that save the most tokens as entries of their own, best first, ties by code points.

    A word saves its occurrences times one less than its pieces. One that is unknown now is worth a piece a character
    more, however little it has: to know it at all counts for something.
    """
    model = backend.model
    unknown = backend.token_to_id(model.unk_token)
    saved = {}
    for word, count in counts.items():
        if count < min_frequency or len(word) > model.max_input_chars_per_word or backend.token_to_id(word) is not None:
            continue
        pieces = [token.id for token in model.tokenize(word)]
        saved[word] = count * (len(word) if pieces == [unknown] else len(pieces) - 1)
    return sorted(saved, key=lambda word: (-saved[word], word))[:num]


def missing_continuations(backend: Tokenizer) -> list[str]:
    """Entries "##c" for the characters c that continue some entry while there is no such entry, in code-point order."""
    prefix = backend.model.continuing_subword_prefix
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    vocabulary = backend.get_vocab(with_added_tokens=True).keys() - special
    tails = (entry.removeprefix(prefix) if entry.startswith(prefix) else entry[1:] for entry in vocabulary)
    return sorted({prefix + character for tail in tails for character in tail} - vocabulary)


def split_added(old: Tokenizer, new: Tokenizer) -> list[list[int]] | None:
    """For each entry that `new` has beyond those of `old`, in id order, the ids of the pieces `old` makes of it.

    None when `new` is not `old` with entries of WordPiece's appended. Never empty: what `old` can't make is its unknown
    token, or for a continuing character the plain one.
    """
    before, after = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (old, new))
    entries = sorted(after.items(), key=lambda item: item[1])
    if dict(entries[: len(before)]) != before or [number for _, number in entries] != list(range(len(entries))):
        return None
    added = [entry for entry, _ in entries[len(before) :]]
    if added and [type(part.model).__name__ for part in (old, new)] != ["WordPiece", "WordPiece"]:
        return None
    prefix = new.model.continuing_subword_prefix if added else ""
    return [[token.id for token in old.model.tokenize(_whole(entry, prefix))] for entry in added]


def _whole(entry: str, prefix: str) -> str:
    return entry[len(prefix) :] if entry.startswith(prefix) else entry
