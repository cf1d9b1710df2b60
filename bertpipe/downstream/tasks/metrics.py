"""The official score of each task, as `evaluate.Metric` classes that live here.

`evaluate.load("glue", ...)` downloads a script and runs it; these need no network and run no foreign code. The numbers
are scikit-learn's and SciPy's, as in GLUE (Wang et al. 2019, section 3). This module imports `evaluate` at its top,
for the base class: import it where it is used.

    compute("matthews_correlation", [1, 0, 1], [1, 0, 0])     {"matthews_correlation": 0.5}
"""

from __future__ import annotations

import itertools
import math
import operator
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from bertpipe.downstream.tasks import entities
from bertpipe.errors import DataError

_TAGS = {"predictions": List(Value("string")), "references": List(Value("string"))}
_CODES = {"predictions": Value("int64"), "references": Value("int64")}
_SETS = {"predictions": List(Value("int64")), "references": List(Value("int64"))}
_NUMBERS = {"predictions": Value("float64"), "references": Value("float64")}


def _info(description: str, features: Mapping[str, Value | List]) -> evaluate.MetricInfo:
    # Without a format `_compute` is given lists; "numpy" would round every number to float32 on the way.
    return evaluate.MetricInfo(description=description, citation="", features=Features(features))


def _accuracy(predictions: list[Any], references: list[Any]) -> float:
    return sum(map(operator.eq, predictions, references)) / len(references)


class MatthewsCorrelation(evaluate.Metric):
    """CoLA. Matthews 1975; from -1 to 1, and 0 where the predictions or the references are all alike."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Matthews correlation", _CODES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": matthews_corrcoef(references, predictions)}


class Accuracy(evaluate.Metric):
    """SST-2, RTE."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of the examples that are right", _CODES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": _accuracy(predictions, references)}


class AccuracyAndF1(evaluate.Metric):
    """MRPC: accuracy, and F1 of the class 1 (0 where nothing is rightly called 1)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Accuracy and F1 of the positive class", _CODES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        f1 = f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0)
        return {"accuracy": _accuracy(predictions, references), "f1": f1}


class AccuracyAndMacroF1(evaluate.Metric):
    """docs: accuracy, and the mean over the classes of each one's F1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Accuracy and macro-averaged F1", _CODES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        macro = f1_score(references, predictions, average="macro", zero_division=0.0)
        return {"accuracy": _accuracy(predictions, references), "macro_f1": macro}


class AccuracyAndMeanF1(evaluate.Metric):
    """CB: accuracy, the mean of the classes' F1, and the mean of both (Wang et al. 2019, SuperGLUE, section 3.1)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Accuracy, unweighted mean of the F1 of the classes, mean of both", _CODES)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        accuracy = _accuracy(predictions, references)
        f1 = f1_score(references, predictions, average="macro", zero_division=0.0)
        return {"accuracy": accuracy, "f1": f1, "combined": (accuracy + f1) / 2}


class MicroAndMacroF1(evaluate.Metric):
    """Multi-label: F1 over all decisions together, the mean of each label's, and the share of the examples all of whose
    labels are right; an F1 without any yes, predicted or true, is 0."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Micro- and macro-averaged F1, subset accuracy", _SETS)

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        # scikit-learn takes a matrix of one column for plain classes
        kinds = ("micro", "macro") if len(references[0]) > 1 else ("binary", "binary")
        micro, macro = (f1_score(references, predictions, average=kind, zero_division=0.0) for kind in kinds)
        return {"f1": micro, "macro_f1": macro, "subset_accuracy": _accuracy(predictions, references)}


class PearsonAndSpearman(evaluate.Metric):
    """STS-B: both correlations and their mean; 0 where one side is constant, so that they are undefined."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Pearson and Spearman correlation", _NUMBERS)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        if len(set(predictions)) == 1 or len(set(references)) == 1:
            return {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
        # pearsonr gives nan where the numbers lie too close together, or too far apart, for float64
        pearson = float(np.nan_to_num(pearsonr(predictions, references).statistic))
        spearman = float(spearmanr(predictions, references).statistic)
        return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}


class Entities(evaluate.Metric):
    """CoNLL-2003, WNUT-17: precision, recall and F1 of the entities, whose type and extent must be right, over all
    types together; the share of the words whose tag is right. As conlleval and, by default, seqeval count them."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Precision, recall and F1 of entities, accuracy of tags", _TAGS)

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        found = entities.total(entities.count(predictions, references))
        words = [list(itertools.chain.from_iterable(side)) for side in (predictions, references)]
        return entities.rates(*found) | {"accuracy": _accuracy(*words)}


def compute(metric: str, predictions: Any, references: Any) -> dict[str, float]:
    """Score `predictions` [examples] against `references` [examples]: finite Python floats by name.

    Codes (integers) for classification, numbers for regression, codes 0 and 1 [examples, labels] for several labels,
    lists of tags for tokens. Raises DataError when there is nothing to score, or a prediction is not a finite number.
    """
    assert metric in METRICS, f"no metric {metric!r}; there are {', '.join(METRICS)}"
    assert len(predictions) == len(references), f"{len(predictions)} predictions, {len(references)} references"
    if len(predictions) == 0:
        raise DataError(f"{metric}: no examples to score")
    tags = isinstance(predictions[0], list)
    if not tags and not np.isfinite(np.asarray(predictions, dtype=np.float64)).all():
        raise DataError(f"{metric}: a prediction is not a finite number: training diverged; lower finetune.lr")
    # In its default form `evaluate` writes predictions to a file below ~/.cache that every process on the machine
    # shares, under a lock. Here they stay in memory, and the folder it makes anyway is gone with the block.
    with tempfile.TemporaryDirectory(prefix="bertpipe-metric-") as folder:
        module = METRICS[metric](cache_dir=folder, keep_in_memory=True, seed=0)
        if module.features["predictions"] in (Value("int64"), _SETS["predictions"]):  # numbers would be rounded down
            assert np.asarray(predictions).dtype.kind in "iu", f"{metric} scores codes, not numbers"
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of constant answers, for which the classes above define the score
            scores = module.compute(predictions=predictions, references=references)
    assert scores is not None
    result = {name: float(value) for name, value in scores.items()}
    assert all(map(math.isfinite, result.values())), f"{metric}: {result}"
    return result


METRICS: dict[str, type[evaluate.Metric]] = {
    "matthews_correlation": MatthewsCorrelation,
    "accuracy": Accuracy,
    "accuracy_and_f1": AccuracyAndF1,
    "accuracy_and_macro_f1": AccuracyAndMacroF1,
    "accuracy_and_mean_f1": AccuracyAndMeanF1,
    "micro_and_macro_f1": MicroAndMacroF1,
    "pearson_and_spearman": PearsonAndSpearman,
    "entities": Entities,
}
