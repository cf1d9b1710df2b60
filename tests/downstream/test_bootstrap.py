"""Weighted scores are the official scores of the resampled examples; intervals are what theory gives."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from bertpipe.downstream.tasks import bootstrap
from bertpipe.downstream.tasks.metrics import METRICS, compute

CODES = st.integers(0, 3)
NUMBERS = st.one_of(st.floats(-5, 5, width=16), st.integers(0, 2).map(float))  # equals too


def columns(metric: str) -> st.SearchStrategy[list[tuple]]:
    value = (
        NUMBERS
        if metric == "pearson_and_spearman"
        else CODES
        if "f1" in metric and metric != "accuracy_and_f1"
        else st.integers(0, 1)
    )
    return st.lists(st.tuples(value, value, st.integers(0, 3)), min_size=2, max_size=12)


def test_every_metric_of_one_label_an_example_has_a_quick_form():
    assert {metric for metric, _ in bootstrap.FACTORIES} <= set(METRICS)


@pytest.mark.parametrize(("metric", "headline"), list(bootstrap.FACTORIES))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_weights_are_repeated_examples(metric, headline, data):
    rows = data.draw(columns(metric))
    gold, predicted, weights = (np.array(values) for values in zip(*rows, strict=True))
    if weights.sum() == 0:
        weights[0] = 1
    quick = bootstrap.weighted(metric, headline, gold, predicted)
    assert quick is not None
    found = quick(np.stack([weights, np.ones_like(weights)]))
    drawn = np.repeat(np.arange(len(gold)), weights)
    for score, chosen in zip(found, (drawn, np.arange(len(gold))), strict=True):
        expected = compute(metric, predicted[chosen].tolist(), gold[chosen].tolist())[headline]
        assert score == pytest.approx(expected, abs=1e-9)


def test_cells_are_the_examples():
    gold, a = np.array([1, 0, 1, 1]), np.array([0, 0, 0, 1])
    (gold_of, a_of), counts = bootstrap.cells(gold, a)
    assert sorted(zip(gold_of, a_of, counts, strict=True)) == [(0, 0, 1), (1, 0, 2), (1, 1, 1)]
    numbers, once = bootstrap.cells(np.array([0.5, 0.25]), np.array([1.0, 2.0]))
    assert numbers[0].dtype == np.float64 and once.tolist() == [1, 1]


def test_drawn_weights_are_multinomial():
    counts = np.array([50, 30, 20])
    weights = np.concatenate(list(bootstrap.draw(counts, 20_000, seed=1)))
    assert weights.shape == (20_000, 3) and (weights.sum(1) == 100).all()
    np.testing.assert_allclose(weights.mean(0), counts, atol=0.15)
    share = counts / 100
    np.testing.assert_allclose(np.cov(weights.T), 100 * (np.diag(share) - np.outer(share, share)), atol=0.6)
    again = np.concatenate(list(bootstrap.draw(counts, 20_000, seed=1)))
    assert (weights == again).all() and (weights != np.concatenate(list(bootstrap.draw(counts, 20_000, 2)))).any()


def test_many_cells_are_drawn_in_chunks(monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 10)
    sizes = [len(rows) for rows in bootstrap.draw(np.ones(4, np.int64), 5, seed=0)]
    assert sizes == [2, 2, 1]


def test_interval_of_an_accuracy_is_binomial():
    gold, predicted = np.ones(400, np.int64), np.repeat([1, 0], [300, 100])
    (gold, predicted), counts = bootstrap.cells(gold, predicted)
    score = bootstrap.weighted("accuracy", "accuracy", gold, predicted)
    found = bootstrap.interval([score], counts, 20_000, seed=0)
    assert found.value == 0.75
    assert found.lowest == pytest.approx(binom.ppf(0.025, 400, 0.75) / 400, abs=0.0026)
    assert found.highest == pytest.approx(binom.ppf(0.975, 400, 0.75) / 400, abs=0.0026)


def test_paired_interval_is_narrower_than_that_of_strangers():
    """Two models that err on the same examples differ little; the variance of the paired difference is (b + c) / n^2
    less its square / n."""
    gold = np.ones(1_000, np.int64)
    a, b = np.repeat([1, 0], [700, 300]), np.repeat([1, 0], [720, 280])
    (gold, a, b), counts = bootstrap.cells(gold, a, b)
    scores = [bootstrap.weighted("accuracy", "accuracy", gold, answers) for answers in (a, b)]
    found = bootstrap.interval(scores, counts, 20_000, seed=0)
    assert found.value == pytest.approx(0.02)
    half = 1.96 * math.sqrt((20 / 1_000 - 0.02**2) / 1_000)
    assert found.highest - found.lowest == pytest.approx(2 * half, rel=0.08)
    assert found.positive > 0.999
    swapped = bootstrap.interval(scores[::-1], counts, 20_000, seed=0)
    assert (swapped.value, swapped.lowest, swapped.highest) == pytest.approx(
        (-found.value, -found.highest, -found.lowest)
    )


def test_any_score_can_be_drawn():
    values = np.array([1.0, 2.0, 4.0])
    slow = bootstrap.by_drawing(lambda places: float(np.mean(values[places])), 3)
    assert slow(np.array([[1, 1, 1], [0, 0, 2]])).tolist() == pytest.approx([7 / 3, 4.0])
