"""Official scores against values worked out by hand or from the definitions, and nothing left on the disk."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.downstream.tasks.metrics import METRICS, compute
from bertpipe.errors import DataError

# 12 examples: 5 true positives, 2 false positives, 1 false negative, 4 true negatives.
PREDICTED = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
TRUE = [1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
CODED = [name for name in METRICS if name != "entities"]  # that one scores tags: test_entities.py


def ranks(values: list[float]) -> list[float]:
    """Fractional ranks by the definition: ties share the mean of their places."""
    return [
        (sum(other < value for other in values) + sum(other <= value for other in values) + 1) / 2 for value in values
    ]


def correlation(left: list[float], right: list[float]) -> float:
    """Pearson's r by the definition."""
    x, y = math.fsum(left) / len(left), math.fsum(right) / len(right)
    covariance = math.fsum((a - x) * (b - y) for a, b in zip(left, right, strict=True))
    return covariance / math.sqrt(math.fsum((a - x) ** 2 for a in left) * math.fsum((b - y) ** 2 for b in right))


def test_matthews_by_hand():
    by_hand = (5 * 4 - 2 * 1) / math.sqrt(7 * 6 * 6 * 5)
    assert compute("matthews_correlation", PREDICTED, TRUE) == {
        "matthews_correlation": pytest.approx(by_hand, abs=1e-12)
    }


def test_accuracy_by_hand():
    assert compute("accuracy", PREDICTED, TRUE) == {"accuracy": 0.75}


def test_f1_by_hand():
    scores = compute("accuracy_and_f1", PREDICTED, TRUE)
    assert scores == {"accuracy": 0.75, "f1": pytest.approx(2 * 5 / (2 * 5 + 2 + 1), abs=1e-12)}


def test_f1_is_of_class_one():
    """Swapping the two classes changes F1 and leaves the accuracy."""
    swapped = compute("accuracy_and_f1", [1 - code for code in PREDICTED], [1 - code for code in TRUE])
    assert swapped == {"accuracy": 0.75, "f1": pytest.approx(2 * 4 / (2 * 4 + 2 + 1), abs=1e-12)}


def test_macro_f1_by_hand():
    scores = compute("accuracy_and_macro_f1", [0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 2, 2])
    each = [2 * 1 / (3 + 1), 2 * 2 / (2 + 3), 2 * 1 / (1 + 2)]  # 2 TP / (predicted + true)
    assert scores == {"accuracy": pytest.approx(4 / 6), "macro_f1": pytest.approx(sum(each) / 3, abs=1e-12)}


def test_correlations_by_definition():
    predicted, true = [0.1, 2.0, 2.0, 4.5, 3.3, 5.2], [0.0, 1.0, 3.0, 4.0, 4.0, 5.0]
    pearson, spearman = correlation(predicted, true), correlation(ranks(predicted), ranks(true))
    assert pearson != pytest.approx(spearman, abs=1e-3)
    scores = compute("pearson_and_spearman", np.array(predicted), np.array(true))
    expected = {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}
    assert scores == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}


def as_taken(metric: str, codes: list[int]) -> list:
    """The codes, for a metric of sets of labels as sets of one label."""
    return [[code] for code in codes] if metric == "micro_and_macro_f1" else codes


@pytest.mark.parametrize("metric", CODED)
def test_perfect_is_one(metric):
    labels = as_taken(metric, [0, 1, 1, 0, 1])
    assert compute(metric, labels, labels) == {name: pytest.approx(1.0) for name in compute(metric, labels, labels)}


@pytest.mark.parametrize("metric", CODED)
@pytest.mark.parametrize(
    "answers", [([1, 1, 1], [0, 1, 1]), ([0, 0, 0], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([1], [1])]
)
def test_constant_answers_are_defined(metric, answers):
    scores = compute(metric, *(as_taken(metric, codes) for codes in answers))
    assert all(type(value) is float and -1 <= value <= 1 for value in scores.values())
    json.dumps(scores, allow_nan=False)


def test_constant_predictions_correlate_with_nothing():
    assert compute("pearson_and_spearman", [2.5, 2.5], [1.0, 4.0]) == {"pearson": 0, "spearman": 0, "combined": 0}
    assert compute("matthews_correlation", [1, 1, 1], [0, 1, 1]) == {"matthews_correlation": 0}
    assert compute("accuracy_and_f1", [0, 0], [0, 1]) == {"accuracy": 0.5, "f1": 0}


@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 5)), min_size=1, max_size=8))
def test_any_finite_numbers_give_a_finite_score(rows):
    scores = compute("pearson_and_spearman", [row[0] for row in rows], [row[1] for row in rows])
    assert all(-1.001 <= value <= 1.001 for value in scores.values())


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_score(metric):
    with pytest.raises(DataError, match="no examples"):
        compute(metric, [], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_predictions(value):
    with pytest.raises(DataError, match="not a finite number"):
        compute("pearson_and_spearman", [1.0, value], [1.0, 2.0])


def test_numbers_are_not_taken_for_codes():
    with pytest.raises(AssertionError, match="codes"):
        compute("accuracy", [0.9, 0.2], [1, 0])


def test_nothing_is_left_on_the_disk_and_no_random_state_is_moved(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    code = """
import numpy as np, torch
from bertpipe.downstream.tasks.metrics import METRICS, compute
np.random.seed(3); torch.manual_seed(3)
before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
for metric in METRICS:
    tags = [["O", "B-x"]] if metric == "entities" else [[0], [1], [1]] if metric == "micro_and_macro_f1" else [0, 1, 1]
    compute(metric, tags, tags)
assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(tmp_path / "mpl")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=600)
    assert [*home.rglob("*"), *temporary.rglob("*")] == []
