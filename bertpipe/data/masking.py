"""Masked language modelling: which positions are predicted, and what is shown there (Devlin et al. 2019, 3.1).

A token's fate is a hash of (seed, epoch, its place in the corpus), so it is the same in whatever batch, process or
order the token comes. A sequence of n maskable tokens has floor(n p + u) of them predicted, u its own uniform draw: the
share is exact in expectation, and at least one is predicted where one can be. Special tokens never are. Words and spans
of words are taken whole, so that they come within half a word of that. The share p may change with the step (`Rate`).

Arrays below describe the tokens of several sequences end to end, special tokens around them not included:
n tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bertpipe.data import keyed
from bertpipe.errors import ConfigError

SPAN_P = 0.2
SPAN_LONGEST = 10  # words


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
class Rate:
    """Share of the tokens to predict at each step of a run: a pure function of the step."""

    schedule: str
    first: float
    last: float
    steps: int

    def __call__(self, step: int) -> float:
        """The share at a step, from 0 to `steps` - 1."""
        return RATES[self.schedule](min(1.0, step / max(1, self.steps - 1)), self.first, self.last)

    @property
    def highest(self) -> float:
        """The largest share of the run, which is that of its first or its last step."""
        return max(self(0), self(self.steps - 1))


@dataclass(frozen=True)
class Masking:
    """How to mask; `draw` gives positions and what to show there."""

    strategy: str
    probability: float
    mask_share: float
    random_share: float
    vocabulary: Vocabulary
    rate: Rate | None = None
    """Gives `probability` at each step, through `at`; None leaves it."""

    def at(self, step: int) -> Masking:
        """The same with the probability of a step."""
        return self if self.rate is None else replace(self, probability=self.rate(step))

    @property
    def highest(self) -> float:
        """The largest probability of the run."""
        return self.probability if self.rate is None else self.rate.highest

    def draw(self, tokens: Tokens, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions to predict, int64 [P] ascending, and the ids to show there, int64 [P]."""
        choose = MASKINGS[self.strategy]
        maskable = ~self.vocabulary.special[tokens.ids]
        positions, deciders = choose(tokens, maskable, self, keyed.key(seed, "mask", epoch))
        return positions, self._shown(tokens, positions, deciders, keyed.key(seed, "show", epoch))

    def _shown(self, tokens: Tokens, positions: np.ndarray, deciders: np.ndarray, key: int) -> np.ndarray:
        """`deciders` [P]: the token whose draw says what kind of thing is shown at each position."""
        draw = keyed.uniform(key, tokens.places[deciders])
        regular = np.flatnonzero(~self.vocabulary.special)
        pick = keyed.bits(keyed.key(key, "random"), tokens.places[positions]) % np.uint64(len(regular))
        shown = np.where(draw < self.mask_share + self.random_share, regular[pick], tokens.ids[positions])
        return np.where(draw < self.mask_share, self.vocabulary.mask_id, shown)


def check(strategy: str, mask_share: float, random_share: float) -> None:
    """ConfigError for a strategy that isn't there or shares that exceed 1."""
    if strategy not in MASKINGS:
        raise ConfigError(f"masking.strategy: {strategy!r} is not one of {', '.join(MASKINGS)}")
    if mask_share + random_share > 1:
        raise ConfigError(f"masking: mask_share {mask_share} + random_share {random_share} exceed 1")


def check_rate(schedule: str, final_probability: float | None) -> None:
    """ConfigError for a schedule that isn't there, or an end that it lacks or doesn't use."""
    if schedule not in RATES:
        raise ConfigError(f"masking.schedule: {schedule!r} is not one of {', '.join(RATES)}")
    if schedule != "constant" and final_probability is None:
        raise ConfigError(f"masking.final_probability: set it, e.g. to 0.15; masking.schedule {schedule} ends there")
    if schedule == "constant" and final_probability is not None:
        raise ConfigError("masking.final_probability: masking.schedule constant has no use for it; set linear")


def _budgets(counts: np.ndarray, first_places: np.ndarray, probability: float, key: int) -> np.ndarray:
    """How many of `counts` [S] units of each sequence to predict."""
    draw = keyed.uniform(keyed.key(key, "budget"), first_places)
    wanted = np.floor(counts * probability + draw).astype(np.int64)
    return np.minimum(np.maximum(wanted, 1), counts)


def _sort_keys(sequence: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """uint64 [m]: by sequence, within it by draw; both [m]."""
    return (sequence.astype(np.uint64) << np.uint64(40)) | (draws >> np.uint64(24))


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def mask_tokens(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Single tokens, each maskable one as likely as any other of its sequence."""
    sequence = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)[maskable]
    candidates = np.flatnonzero(maskable)
    counts = np.bincount(sequence, minlength=len(tokens.lengths))
    budgets = _budgets(counts, tokens.places[_starts(tokens.lengths)], masking.probability, key)
    keys = _sort_keys(sequence, keyed.bits(key, tokens.places[candidates]))
    # the budget-th smallest draw of each sequence is the last one taken; sorting values is faster than their order
    last = np.sort(keys)[np.maximum(_starts(counts) + budgets - 1, 0)[counts > 0]]
    taken = keys <= np.repeat(last, counts[counts > 0])
    if np.count_nonzero(taken) > budgets.sum():  # two draws of a sequence alike: the earlier token goes first
        order = np.argsort(keys, kind="stable")
        taken[order] = np.arange(len(order)) - np.repeat(_starts(counts), counts) < np.repeat(budgets, counts)
    return candidates[taken], candidates[taken]


@dataclass(frozen=True)
class _Words:
    """The maskable words of some sequences."""

    number: np.ndarray
    """int64 [n]: the word that each token belongs to; tokens that can't be masked are words of their own."""
    first: np.ndarray
    """int64 [m]: first token of each maskable word."""
    size: np.ndarray
    """int64 [m]: its tokens."""
    sequence: np.ndarray
    """int64 [m]: its sequence."""
    budgets: np.ndarray
    """int64 [S]: tokens to predict."""

    @staticmethod
    def find(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> _Words:
        sequence = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
        begins = ~masking.vocabulary.continues[tokens.ids] | ~maskable
        begins[_starts(tokens.lengths)] = True
        begins[1:] |= ~maskable[:-1]
        number = np.cumsum(begins) - 1
        first = np.flatnonzero(begins)
        size = np.diff(np.append(first, len(begins)))[maskable[first]]
        first = first[maskable[first]]
        counts = np.bincount(sequence[maskable], minlength=len(tokens.lengths))
        budgets = _budgets(counts, tokens.places[_starts(tokens.lengths)], masking.probability, key)
        return _Words(number, first, size, sequence[first], budgets)

    def take(self, draws: np.ndarray) -> np.ndarray:
        """Words [k] in the order of their draws [m], as many as come nearest to the budgets; at least one a sequence.

        Words of one sequence with one draw keep their order.
        """
        keys = _sort_keys(self.sequence, draws)
        order = np.argsort(keys, kind="stable")
        size, sequence = self.size[order], self.sequence[order]
        words = np.bincount(sequence, minlength=len(self.budgets))
        before = np.cumsum(size) - size
        before -= np.repeat(before[_starts(words)[words > 0]], words[words > 0])
        return order[(before == 0) | (before + size / 2 <= self.budgets[sequence])]

    def tokens_of(self, words: np.ndarray) -> np.ndarray:
        """bool [n]: the tokens of some words [k]."""
        chosen = np.zeros(len(self.number) + 1, bool)
        chosen[self.number[self.first[words]]] = True
        return chosen[self.number]


def mask_whole_words(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole words in random order, as many as come nearest to the budget of tokens; at least one.

    (The "whole word masking" of the BERT repository's README, 2019-05-31.)
    """
    words = _Words.find(tokens, maskable, masking, key)
    positions = np.flatnonzero(words.tokens_of(words.take(keyed.bits(key, tokens.places[words.first]))))
    return positions, positions


def span_lengths(key: int, places: np.ndarray) -> np.ndarray:
    """int64 [m]: words of the span that starts at each place; geometric, p = 0.2, conditioned on at most 10.

    The mean is 3.8 words (Joshi et al. 2020, "SpanBERT", 3.1 and figure 2).
    """
    shorter = 1 - (1 - SPAN_P) ** np.arange(1, SPAN_LONGEST + 1)
    return 1 + np.searchsorted(shorter[:-1] / shorter[-1], keyed.uniform(keyed.key(key, "span"), places), side="right")


def mask_spans(tokens: Tokens, maskable: np.ndarray, masking: Masking, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans of whole words until the budget of tokens is reached, each shown alike (Joshi et al. 2020, 3.1).

    Every word has a draw, its turn to start a span, and a span length; spans are laid in the order of the turns. One
    that meets the end of its sequence or a special token ends there, one that runs over another adds what that left
    free, and the last one is cut after the word that comes nearest to the budget. 80/10/10 is drawn by span, the random
    tokens one by one.
    """
    words = _Words.find(tokens, maskable, masking, key)
    turn = keyed.bits(key, tokens.places[words.first])
    lengths = span_lengths(key, tokens.places[words.first])
    joins = (words.first[1:] == (words.first + words.size)[:-1]) & (words.sequence[1:] == words.sequence[:-1])
    stretch = np.cumsum(np.append(True, ~joins))[: len(turn)]  # words with nothing between them that can't be masked
    earliest, span = turn.copy(), np.arange(len(turn))  # of the spans over each word, the one with the first turn
    for back in range(1, min(SPAN_LONGEST, len(turn))):
        over = (lengths[:-back] > back) & (stretch[back:] == stretch[:-back]) & (turn[:-back] < earliest[back:])
        earliest[back:][over] = turn[:-back][over]
        span[back:][over] = np.flatnonzero(over)
    taken = words.take(earliest)
    positions = np.flatnonzero(words.tokens_of(taken))
    start_of = np.zeros(len(tokens.ids), np.int64)  # by number of a word: first token of its span
    start_of[words.number[words.first]] = words.first[span]
    return positions, start_of[words.number[positions]]


MASKINGS: dict[str, Callable[[Tokens, np.ndarray, Masking, int], tuple[np.ndarray, np.ndarray]]] = {
    "token": mask_tokens,
    "whole_word": mask_whole_words,
    "span": mask_spans,
}
"""Each gives the positions to predict, int64 [P] ascending, and for each the token whose draw decides what is shown."""

RATES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda progress, first, last: first,
    "linear": lambda progress, first, last: first + (last - first) * progress,
}
"""Share to predict, given the part of the run that is over (0 to 1), the first and the last share.

More than 15 % can be better, 40 for large models (Wettig et al. 2023, "Should You Mask 15% in Masked Language
Modeling?"); a linear fall beat fixed shares (Ankner et al. 2024, "Dynamic Masking Rate Schedules for MLM Pretraining").
"""
