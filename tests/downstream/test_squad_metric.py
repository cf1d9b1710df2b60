"""Scores of answers, against values worked out by hand from the official definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.downstream.tasks import squad_metric
from bertpipe.downstream.tasks.squad_metric import best, exact, f1, f1_or_none, normalize, squad, squad_v2


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The Nile,\n a RIVER. ", "nile river"),
        ("theatre an-other (a)", "theatre another"),  # articles are words, and go after the punctuation
        ("don't U.S.A. 3.5%", "dont usa 35"),
        ("naïve – “quoted”", "naïve – “quoted”"),  # ASCII punctuation alone
        ("An a THE", ""),
    ],
)
def test_normalized(text, normal):
    assert normalize(text) == normal


def test_f1_counts_words_as_often_as_they_occur():
    # found: cat sat on mat, wanted: cat on mat: 3 shared, precision 3/4, recall 1
    assert f1("the cat sat on the mat", "a cat on mat") == pytest.approx(6 / 7)
    # new new york against new york york: 2 shared of 3 and 3
    assert f1("new new york", "new york york") == pytest.approx(2 / 3)
    assert f1("Paris", "London") == 0 and f1("In Paris.", "in paris") == 1


def test_nothing_left_is_an_answer_in_2_0_only():
    assert exact("the", "a") == 1
    assert f1("the", "a") == 0 and f1_or_none("the", "a") == 1
    assert f1_or_none("", "") == 1 and f1_or_none("", "x") == 0 and f1_or_none("x", "") == 0


def test_each_measure_takes_the_gold_answer_that_suits_it():
    golds = ["Denver Broncos of Colorado", "Denver"]
    assert best(exact, "Denver", golds) == 1
    assert best(f1, "Denver Broncos", golds) == pytest.approx(2 / 3)  # 2*2/(2+4) and 2*1/(2+1)
    scores = squad(["Denver Broncos", "308"], [golds, ["308"]])
    assert scores == {"exact": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2)}


PREDICTIONS = ["Paris", "river Nile", "Rome", "ten", "x"]
ODDS = [-3.0, -1.0, 0.5, 2.0, 5.0]
GOLDS = [["Paris"], ["the Nile", "Egypt"], [], ["ten of them"], []]


def test_thresholds_by_hand():
    """Answers are given one after the other by their odds; two questions of five can't be answered.

    F1: none 2, then +1, +2/3, -1, +1/2, -1: the best is 2 + 5/3, at -1. Exact: 2, then +1, 0, -1, 0, -1: 3, at -3.
    """
    scores = squad_v2(PREDICTIONS, ODDS, GOLDS)
    assert scores == {
        "best_f1": pytest.approx(11 / 15),
        "best_f1_thresh": -1.0,
        "best_exact": pytest.approx(3 / 5),
        "best_exact_thresh": -3.0,
        "exact": pytest.approx(3 / 5),
        "f1": pytest.approx(11 / 15),
        "HasAns_exact": pytest.approx(1 / 3),
        "HasAns_f1": pytest.approx(5 / 9),
        "NoAns_exact": 1.0,
        "NoAns_f1": 1.0,
        "exact_at_zero": pytest.approx(3 / 5),
        "f1_at_zero": pytest.approx(11 / 15),
    }


def test_answers_that_were_withheld_elsewhere_are_scored_as_they_are():
    scores = squad_v2(PREDICTIONS, ODDS, GOLDS, withheld=[False, True, False, False, True])
    assert scores["exact"] == 2 / 5 and scores["f1"] == pytest.approx((1 + 0 + 0 + 1 / 2 + 1) / 5)
    assert scores["best_f1"] == pytest.approx(11 / 15) and scores["best_f1_thresh"] == -1.0


def test_equal_odds_are_answered_together_or_not_at_all():
    scores = squad_v2(["right", "wrong"], [1.0, 1.0], [["right"], []])
    assert scores["best_f1"] == 0.5 and scores["f1"] == 0.5


def test_answering_nothing_may_be_best():
    """The official threshold for it is 0, which the odds of logits can be below."""
    scores = squad_v2(["wrong"], [-4.0], [[]])
    assert scores["best_f1"] == scores["f1"] == scores["NoAns_exact"] == 1 and scores["best_f1_thresh"] < -4
    assert scores["f1_at_zero"] == 0 and "HasAns_f1" not in scores


words = st.lists(st.sampled_from(["a", "the", "Nile", "river", "Paris", "ten"]), min_size=1, max_size=3).map(" ".join)
questions = st.tuples(words, st.integers(-3, 3).map(float), st.lists(words, max_size=2))


@settings(max_examples=50)
@given(st.lists(questions, min_size=1, max_size=8))
def test_no_threshold_is_better(rows):
    predictions, odds, golds = zip(*rows, strict=True)
    scores = squad_v2(predictions, odds, golds)

    def at(threshold):
        scored = [best(f1_or_none, p, [g for g in row if normalize(g)] or [""]) for p, _, row in rows]
        return [s if o <= threshold else float(not row) for s, (_, o, row) in zip(scored, rows, strict=True)]

    means = {t: sum(at(t)) / len(rows) for t in (-9.0, *odds)}
    assert scores["best_f1"] == pytest.approx(max(means.values()))
    assert scores["f1"] == pytest.approx(sum(at(scores["best_f1_thresh"])) / len(rows)) == scores["best_f1"]
    assert scores["f1_at_zero"] == pytest.approx(sum(at(0.0)) / len(rows))


def test_two_lists_of_different_lengths_are_a_mistake_of_ours():
    with pytest.raises(ValueError):
        squad_metric.squad(["x"], [["x"], ["y"]])
