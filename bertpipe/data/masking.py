"""Masked language modelling: which positions are predicted, and what is shown there (Devlin et al. 2019, 3.1).

A token's fate is a hash of (seed, epoch, its place in the corpus), so it is the same in whatever batch, process or
order the token comes. A sequence of n maskable tokens has floor(n p + u) of them predicted, u its own uniform draw: the
share is exact in expectation, and at least one is predicted where one can be. Special tokens never are.

Arrays below describe the tokens of several sequences end to end, special tokens around them not included:
n tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bertpipe.data import keyed
from bertpipe.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """Tokens of some sequences, end to end."""

    ids: np.ndarray
    """int64 [n]: vocabulary ids."""
    places: np.ndarray
    """int64 [n]: each token's place in the corpus, the counter of its draws."""
    lengths: np.ndarray
    """int64 [S]: tokens of each sequence, summing to n."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a vocabulary."""

    mask_id: int
    special: np.ndarray
    """bool [V]: special tokens, never predicted and never shown as a random replacement."""
    continues: np.ndarray
    """bool [V]: pieces that continue a word (## in WordPiece)."""


@dataclass(frozen=True)
class Masking:
    """How to mask; `draw` gives positions and what to show there."""

    strategy: str
    probability: float
    mask_share: float
    random_share: float
    vocabulary: Vocabulary

    def draw(self, tokens: Tokens, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions to predict, int64 [P] ascending, and the ids to show there, int64 [P]."""
        choose = MASKINGS[self.strategy]
        maskable = ~self.vocabulary.special[tokens.ids]
        positions = choose(tokens, maskable, self, keyed.key(seed, "mask", epoch))
        return positions, self._shown(tokens, positions, keyed.key(seed, "show", epoch))

    def _shown(self, tokens: Tokens, positions: np.ndarray, key: int) -> np.ndarray:
        ids, places = tokens.ids[positions], tokens.places[positions]
        draw = keyed.uniform(key, places)
        regular = np.flatnonzero(~self.vocabulary.special)
        pick = keyed.bits(keyed.key(key, "random"), places) % np.uint64(len(regular))
        shown = np.where(draw < self.mask_share + self.random_share, regular[pick], ids)
        return np.where(draw < self.mask_share, self.vocabulary.mask_id, shown)


def check(strategy: str, mask_share: float, random_share: float) -> None:
    """ConfigError for a strategy that isn't there or shares that exceed 1."""
    if strategy not in MASKINGS:
        raise ConfigError(f"masking.strategy: {strategy!r} is not one of {', '.join(MASKINGS)}")
    if mask_share + random_share > 1:
        raise ConfigError(f"masking: mask_share {mask_share} + random_share {random_share} exceed 1")


def _budgets(counts: np.ndarray, first_places: np.ndarray, probability: float, key: int) -> np.ndarray:
    """How many of `counts` [S] units of each sequence to predict."""
    draw = keyed.uniform(keyed.key(key, "budget"), first_places)
    wanted = np.floor(counts * probability + draw).astype(np.int64)
    return np.minimum(np.maximum(wanted, 1), counts)


def _by_draw(sequence: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Sort order: by sequence, within it by draw; both [m]."""
    return np.argsort((sequence.astype(np.uint64) << np.uint64(40)) | (draws >> np.uint64(24)), kind="stable")


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def mask_tokens(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> np.ndarray:
    """Single tokens, each maskable one as likely as any other of its sequence."""
    sequence = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)[maskable]
    candidates = np.flatnonzero(maskable)
    counts = np.bincount(sequence, minlength=len(tokens.lengths))
    budgets = _budgets(counts, tokens.places[_starts(tokens.lengths)], masking.probability, key)
    order = _by_draw(sequence, keyed.bits(key, tokens.places[candidates]))
    rank = np.arange(len(order)) - np.repeat(_starts(counts), counts)
    return np.sort(candidates[order[rank < np.repeat(budgets, counts)]])


def mask_whole_words(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> np.ndarray:
    """Whole words in random order, as many as come nearest to the budget of tokens; at least one.

    (The "whole word masking" of the BERT repository's README, 2019-05-31.)
    """
    sequence = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
    begins = ~masking.vocabulary.continues[tokens.ids] | ~maskable
    begins[_starts(tokens.lengths)] = True
    begins[1:] |= ~maskable[:-1]
    word = np.cumsum(begins) - 1  # [n]: the word each token belongs to
    first = np.flatnonzero(begins)
    first = first[maskable[first]]
    size = np.bincount(word, minlength=len(tokens.ids))[word[first]]
    in_sequence = sequence[first]
    token_counts = np.bincount(sequence[maskable], minlength=len(tokens.lengths))
    budgets = _budgets(token_counts, tokens.places[_starts(tokens.lengths)], masking.probability, key)
    order = _by_draw(in_sequence, keyed.bits(key, tokens.places[first]))
    size, in_sequence = size[order], in_sequence[order]
    words = np.bincount(in_sequence, minlength=len(tokens.lengths))
    before = np.cumsum(size) - size
    before -= np.repeat(before[_starts(words)[words > 0]], words[words > 0])
    keep = (before == 0) | (before + size / 2 <= budgets[in_sequence])
    chosen = np.zeros(len(tokens.ids) + 1, bool)
    chosen[word[first[order[keep]]]] = True
    return np.flatnonzero(chosen[word] & maskable)


MASKINGS: dict[str, Callable[[Tokens, np.ndarray, Masking, int], np.ndarray]] = {
    "token": mask_tokens,
    "whole_word": mask_whole_words,
}
