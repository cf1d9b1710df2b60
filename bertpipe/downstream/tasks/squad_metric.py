"""Exact match and F1 of answers, as the official scripts of SQuAD count them; plain Python, and from 0 to 1, where the
scripts print percentages.

SQuAD 1.1: Rajpurkar et al. 2016, section 6.1 (evaluate-v1.1.py). SQuAD 2.0, where a question may have no answer:
Rajpurkar et al. 2018 (evaluate-v2.0.py).

    squad(["the Nile"], [["Nile", "river Nile"]])     {"exact": 1.0, "f1": 1.0}
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_ANSWER = [""]


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and white space but single blanks between the words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, gold: str) -> float:
    """1 if both are normalized alike, else 0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str) -> float:
    """Of the bags of normalized words; 0 where one of them is empty (1.1)."""
    found, wanted = normalize(prediction).split(), normalize(gold).split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def f1_or_none(prediction: str, gold: str) -> float:
    """The same, but 1 where both bags are empty: no answer is one too (2.0)."""
    return f1(prediction, gold) or float(normalize(prediction) == normalize(gold) == "")


def best(measure: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    """By the gold answer that suits the prediction best."""
    return max(measure(prediction, gold) for gold in golds)


def squad(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact` and `f1`, means over the questions; each has one or more gold answers."""
    return {
        "exact": _mean([best(exact, p, g) for p, g in zip(predictions, golds, strict=True)]),
        "f1": _mean([best(f1, p, g) for p, g in zip(predictions, golds, strict=True)]),
    }


def squad_v2(
    predictions: Sequence[str],
    odds: Sequence[float],
    golds: Sequence[Sequence[str]],
    withheld: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Scores of answers that are given where the odds of there being none are at most a threshold.

    Args:
        predictions: for each question the best answer, whatever the odds; "" only where there is nothing to answer.
        odds: score of no answer minus that of the prediction.
        golds: the gold answers of each question; none if it can't be answered.
        withheld: the answers that are not given, where a threshold has been chosen elsewhere.

    Returns:
        `best_f1` and `best_exact`, the highest means that a threshold gives, and those thresholds, `best_f1_thresh` and
        `best_exact_thresh`, chosen on these very questions. `exact` and `f1` of the answers that are given, without
        `withheld` at `best_f1_thresh`, as Devlin et al. 2019, 4.3, choose it; also of the questions with answers
        (`HasAns_`) and without (`NoAns_`), where there are such. `exact_at_zero` and `f1_at_zero`, at the threshold 0,
        which is chosen on nothing.
    """
    wanted = [[gold for gold in row if normalize(gold)] or NO_ANSWER for row in golds]
    answerable = [len(row) > 0 for row in golds]
    kept_back = [float(not has) for has in answerable]
    scores: dict[str, float] = {}
    given = {}
    for name, measure in (("exact", exact), ("f1", f1_or_none)):
        given[name] = [best(measure, p, g) for p, g in zip(predictions, wanted, strict=True)]
        scores[f"best_{name}"], scores[f"best_{name}_thresh"] = _best_threshold(given[name], kept_back, odds)
        scores[f"{name}_at_zero"] = _mean(_at(0.0, given[name], kept_back, odds))
    if withheld is None:
        withheld = [o > scores["best_f1_thresh"] for o in odds]
    for name, all_given in given.items():
        values = [k if kept else g for g, k, kept in zip(all_given, kept_back, withheld, strict=True)]
        scores[name] = _mean(values)
        for part, has in (("HasAns", True), ("NoAns", False)):
            chosen = [value for value, mine in zip(values, answerable, strict=True) if mine is has]
            if chosen:
                scores[f"{part}_{name}"] = _mean(chosen)
    return scores


def _at(threshold: float, given: list[float], kept_back: list[float], odds: Sequence[float]) -> list[float]:
    return [g if o <= threshold else k for g, k, o in zip(given, kept_back, odds, strict=True)]


def _best_threshold(given: list[float], kept_back: list[float], odds: Sequence[float]) -> tuple[float, float]:
    """The highest mean, and the lowest threshold that gives it.

    evaluate-v2.0.py goes through the questions by their odds in the same way. It can stop between questions of equal
    odds, which no threshold can, and says 0 for the threshold under which nothing is answered.
    """
    order = sorted(range(len(odds)), key=lambda i: odds[i])
    total = sum(kept_back)
    highest, threshold = total, odds[order[0]] - 1
    for place, i in enumerate(order):
        total += given[i] - kept_back[i]
        last = place + 1 == len(order) or odds[order[place + 1]] > odds[i]
        if last and total > highest:
            highest, threshold = total, odds[i]
    return highest / len(odds), threshold


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
