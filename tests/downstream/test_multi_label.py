"""Any number of labels for each example: decisions, scores by their definitions, and what a saved model gives."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from bertpipe.downstream.finetuning.baselines import majority
from bertpipe.downstream.tasks.kind import Encoded, Outputs, Split
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.tasks.metrics import compute

NAMES = ("a", "b", "c")
KIND = KINDS["multi_label"]


def split(labels) -> Split:
    return Split([("x",)] * len(labels), np.array(labels, np.float32), list(range(len(labels))), NAMES)


def test_scores_by_hand():
    """4 right yeses, 1 wrong, 2 missed; of the labels: a 2 2 0, b 1 wrong 1 missed, c 2 right 1 missed."""
    predicted = [[1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]]
    true = [[1, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]]
    each = [2 * 2 / (2 + 2), 0.0, 2 * 2 / (2 + 3)]
    assert compute("micro_and_macro_f1", predicted, true) == {
        "f1": pytest.approx(2 * 4 / (5 + 6)),
        "macro_f1": pytest.approx(sum(each) / 3),
        "subset_accuracy": 1 / 4,
    }


SETS = st.integers(1, 4).flatmap(
    lambda labels: st.lists(
        st.tuples(*[st.lists(st.integers(0, 1), min_size=labels, max_size=labels)] * 2), min_size=1, max_size=8
    )
)


@settings(deadline=None, max_examples=50)
@given(SETS)
def test_any_scores_are_scikit_learns(rows):
    predicted, true = (np.array(side, np.int64) for side in zip(*rows, strict=True))
    if predicted.shape[1] == 1:  # a column, of which scikit-learn would make two classes
        micro = macro = f1_score(true[:, 0], predicted[:, 0], zero_division=0.0)
    else:
        micro, macro = (f1_score(true, predicted, average=how, zero_division=0.0) for how in ("micro", "macro"))
    expected = {"f1": micro, "macro_f1": macro, "subset_accuracy": accuracy_score(true, predicted)}
    assert compute("micro_and_macro_f1", predicted, true) == pytest.approx(expected)


def test_a_label_holds_when_it_is_likelier_than_not():
    outputs = Outputs(np.array([[0.1, -0.1, 5.0], [0.0, -3.0, -0.01]], np.float32), np.arange(3))
    data = split([[1, 0, 0], [0, 0, 0]])
    decided = KIND.decide(data, Encoded(None), outputs)  # type: ignore[arg-type]
    assert decided.tolist() == [[1, 0, 1], [0, 0, 0]]
    line = KIND.line(data, Encoded(None), outputs, decided, 0)  # type: ignore[arg-type]
    assert line == {"prediction": ["a", "c"], "label": ["a"], "logits": [0.1, -0.1, 5.0]}
    assert KIND.line(split([[0, 0, 0]] * 2), Encoded(None), outputs, decided, 1)["label"] == []  # type: ignore[arg-type]
    json.dumps(line)


def test_the_stock_config_says_so():
    fields = KIND.model_fields(split([[1, 0, 0]]))
    assert fields["problem_type"] == "multi_label_classification" and fields["num_labels"] == 3
    assert fields["id2label"] == {0: "a", 1: "b", 2: "c"}


def test_majority_is_the_most_frequent_set():
    splits = {"train": split([[1, 1, 0], [0, 0, 1], [1, 1, 0]]), "validation": split([[0, 0, 0]] * 2)}
    assert majority(splits).tolist() == [[1, 1, 0]] * 2
