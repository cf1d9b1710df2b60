"""How far a score depends on which examples happened to be drawn: scores of resampled examples.

A resample of n examples is n draws with replacement (Efron and Tibshirani 1993, An Introduction to the Bootstrap,
chapters 6 and 13); for two models the same resample scores both (Koehn 2004, Statistical Significance Tests for Machine
Translation Evaluation). It is given as weights, how often each example was drawn, so that a thousand resamples are
scored at once. Examples of equal label and predictions are alike to every score: they are drawn as one cell, whose
weight is multinomial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
COVERED = 0.95
CHUNK = 1 << 22  # weights drawn at once

Weighted = Callable[[np.ndarray], np.ndarray]
"""Weights, int64 [R, n], of which each row adds up to at least 1 -> scores, float64 [R]."""


@dataclass(frozen=True)
class Interval:
    """A figure and what it was in the resamples."""

    value: float
    lowest: float
    """95 % of the resamples lie from here ..."""
    highest: float
    """... to here (the percentile interval)."""
    positive: float
    """Share of the resamples above 0; those at 0 count half."""


def weighted(metric: str, headline: str, gold: np.ndarray, predicted: np.ndarray) -> Weighted | None:
    """The headline score of a metric of `metrics.METRICS` as a function of the examples' weights; None where there is
    only the slow way, `by_drawing`."""
    return FACTORIES[metric, headline](gold, predicted) if (metric, headline) in FACTORIES else None


def by_drawing(score: Callable[[list[int]], float], size: int) -> Weighted:
    """Any score of a list of the `size` examples, in which an example may stand several times."""
    places = np.arange(size)
    return lambda weights: np.array([score(np.repeat(places, row).tolist()) for row in weights])


def mean_of(values: np.ndarray) -> Weighted:
    """Of what each example scores, float64 [examples]."""
    return lambda weights: weights @ values / weights.sum(1)


def f1_of(numbers: np.ndarray) -> Weighted:
    """F1 over all examples together, of how many things each has right, predicted and labelled, int64 [examples, 3]."""

    def f1(weights: np.ndarray) -> np.ndarray:
        right, given, labelled = (weights @ numbers).T
        return 2 * right / np.maximum(1, given + labelled)

    return f1


def draw(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights of the cells in each resample, int64 [some, cells], `resamples` rows in all; `counts` are those of the
    examples as they are."""
    generator, size = np.random.default_rng(seed), int(counts.sum())
    rows = max(1, CHUNK // len(counts))
    for start in range(0, resamples, rows):
        yield generator.multinomial(size, counts / size, size=min(rows, resamples - start))


def interval(scores: Sequence[Weighted], counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Of one score, or of the difference second - first of two, over the same resamples of cells of `counts`."""

    def figure(weights: np.ndarray) -> np.ndarray:
        found = [score(weights) for score in scores]
        return found[-1] - found[0] if len(found) == 2 else found[0]

    values = np.concatenate([figure(weights) for weights in draw(counts, resamples, seed)])
    lowest, highest = np.quantile(values, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    above = float(np.mean(values > 0) + np.mean(values == 0) / 2)
    return Interval(float(figure(counts[None])[0]), float(lowest), float(highest), above)


def cells(*columns: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The different rows of `columns`, each [examples], as columns [cells], and how many examples are of each."""
    found, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    return [found[:, i].astype(column.dtype) for i, column in enumerate(columns)], counts


# --- scores by weights ------------------------------------------------------------------------------------------------


def _of_classes(finish: Callable[..., np.ndarray]) -> Callable[[Any, Any], Weighted]:
    """A score of the number of examples of each class that are right, that have it as label, that are given it.

    `finish(right, labelled, given)`, each float64 [R, K], gives [R].
    """

    def factory(gold: np.ndarray, predicted: np.ndarray) -> Weighted:
        classes = np.arange(max(int(gold.max()), int(predicted.max()), 1) + 1)
        labelled, given = gold[:, None] == classes, predicted[:, None] == classes
        indicators = np.concatenate([labelled & given, labelled, given], axis=1).astype(np.float64)  # [cells, 3 K]
        return lambda weights: finish(*np.split(weights @ indicators, 3, axis=1))

    return factory


def _accuracy(right: np.ndarray, labelled: np.ndarray, given: np.ndarray) -> np.ndarray:
    return right.sum(1) / labelled.sum(1)


def _f1s(right: np.ndarray, labelled: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[R, K]; 0 where a class has neither"""
    return 2 * right / np.maximum(labelled + given, 1)


def _macro_f1(right: np.ndarray, labelled: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Over the classes that occur, as scikit-learn takes it."""
    return _f1s(right, labelled, given).sum(1) / (labelled + given > 0).sum(1)


def _matthews(right: np.ndarray, labelled: np.ndarray, given: np.ndarray) -> np.ndarray:
    """For K classes (Gorodkin 2004); 0 where labels or predictions are all alike."""
    size = labelled.sum(1)
    covariance = right.sum(1) * size - (labelled * given).sum(1)
    spread = (size**2 - (labelled**2).sum(1)) * (size**2 - (given**2).sum(1))
    return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)


def _correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's of each resample, [R]; `x` and `y` are [cells] or [R, cells]. 0 where a side is constant."""
    (x, x_spread), (y, y_spread) = _centred(weights, x), _centred(weights, y)
    spread = x_spread * y_spread
    return np.where(spread > 0, (weights * x * y).sum(1) / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def _centred(weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x` less its mean, [R, cells], and the sum of its squares, [R]: 0 where all drawn are equal but for rounding."""
    squares = (weights * x * x).sum(1)
    x = x - (weights * x).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    spread = (weights * x * x).sum(1)
    return x, np.where(spread > 1e-24 * squares, spread, 0.0)


def _pearson(gold: np.ndarray, predicted: np.ndarray) -> Weighted:
    return lambda weights: _correlation(weights, gold, predicted)


def _spearman(gold: np.ndarray, predicted: np.ndarray) -> Weighted:
    """Pearson's of the ranks, which every resample has anew; equals share the mean of theirs."""
    levels = [np.unique(values, return_inverse=True)[1] for values in (gold, predicted)]

    def score(weights: np.ndarray) -> np.ndarray:
        return _correlation(weights, *(_ranks(weights, level) for level in levels))

    return score


def _ranks(weights: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Mean rank of each cell in each resample, [R, cells], the lowest level first."""
    order = np.argsort(level, kind="stable")
    firsts = np.flatnonzero(np.diff(level[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], firsts, axis=1)
    return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, level]


def _combined(gold: np.ndarray, predicted: np.ndarray) -> Weighted:
    both = _pearson(gold, predicted), _spearman(gold, predicted)
    return lambda weights: (both[0](weights) + both[1](weights)) / 2


FACTORIES: dict[tuple[str, str], Callable[[np.ndarray, np.ndarray], Weighted]] = {
    ("matthews_correlation", "matthews_correlation"): _of_classes(_matthews),
    ("accuracy", "accuracy"): _of_classes(_accuracy),
    ("accuracy_and_f1", "accuracy"): _of_classes(_accuracy),
    ("accuracy_and_f1", "f1"): _of_classes(lambda *counts: _f1s(*counts)[:, 1]),
    ("accuracy_and_macro_f1", "accuracy"): _of_classes(_accuracy),
    ("accuracy_and_macro_f1", "macro_f1"): _of_classes(_macro_f1),
    ("accuracy_and_mean_f1", "accuracy"): _of_classes(_accuracy),
    ("accuracy_and_mean_f1", "f1"): _of_classes(_macro_f1),
    ("accuracy_and_mean_f1", "combined"): _of_classes(lambda *counts: (_accuracy(*counts) + _macro_f1(*counts)) / 2),
    ("pearson_and_spearman", "pearson"): _pearson,
    ("pearson_and_spearman", "spearman"): _spearman,
    ("pearson_and_spearman", "combined"): _combined,
}
"""By (metric, headline)."""
