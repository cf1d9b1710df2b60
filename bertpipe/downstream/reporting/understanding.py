"""Where a fine-tuned model goes wrong: what the report says of a task beyond its score.

Computed from what the best run wrote (runs.py), and kept small: tables are capped, and nothing grows with the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertpipe.downstream.finetuning.grid import MODEL
from bertpipe.downstream.reporting import runs
from bertpipe.downstream.reporting.record import columns, is_number, read_record
from bertpipe.downstream.tasks import bootstrap
from bertpipe.downstream.tasks.kind import Split

MAX_CLASSES = 40  # rows of a confusion matrix; the rarest share the last one
MAX_BINS = 8  # of length
LEAST_IN_BIN = 20  # examples
MAX_MISTAKES = 20
MAX_CONFUSED = 10  # pairs of classes
MAX_BESIDE = 20  # words shown on either side of a wrong one
MAX_CHARACTERS = 600  # of a text that is shown
MAX_DOTS = 1_500  # of a scatter plot
MAX_CURVES = 12  # runs whose learning curves are shown
MAX_POINTS = 60  # of a learning curve: so few that each averages the noise of several steps
RESAMPLES = 1_000
SPACED = 15  # characters a word, at most, where words are told apart by spaces
OTHERS = "(others)"


def understand(folder: Path) -> dict[str, Any] | None:
    """Of a task's folder in a finetune artifact, as JSON; None where no run of the model left predictions."""
    found = [run for run in runs.find(folder) if run.result["init"] == MODEL]
    best = runs.best(found)
    if best is None:
        return None
    split = best.task.validation
    lines = best.lines(split)
    if not lines:
        return None
    broken: list[str] = []
    facts = {
        "kind": best.task.kind,
        "metric": best.task.headline,
        "score": best.headline(),
        "seed": best.seed,
        "split": split,
        "num_examples": len(lines),
        "curves": curves(found, best, broken),
        "broken": broken,
        "by_length": by_length(best, lines),
        "per_type": best.result.get("per_type"),
    }
    return facts | VIEWS.get(best.task.kind, _plain)(best, lines)


# --- classes ----------------------------------------------------------------------------------------------------------


def confusion(gold: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K]: examples by label (row) and prediction (column)."""
    flat = np.bincount(gold * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def per_class(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 (0 where undefined) and support of each class of a confusion matrix."""
    return rates(np.diag(matrix), matrix.sum(0), matrix.sum(1), names)


def rates(right: np.ndarray, given: np.ndarray, labelled: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The same, of how often each class is right, predicted and labelled, int64 [K]."""
    shares = {
        "precision": right / np.maximum(given, 1),
        "recall": right / np.maximum(labelled, 1),
        "f1": 2 * right / np.maximum(given + labelled, 1),
    }
    return [
        {"class": name} | {key: float(values[row]) for key, values in shares.items()} | {"support": int(labelled[row])}
        for row, name in enumerate(names)
    ]


def gathered(matrix: np.ndarray, names: Sequence[str], most: int = MAX_CLASSES) -> tuple[np.ndarray, list[str]]:
    """The same matrix with at most `most` classes in their order: those with the least support are put together."""
    if len(names) <= most:
        return matrix, list(names)
    kept = np.sort(np.argsort(-matrix.sum(1), kind="stable")[: most - 1])
    place = np.full(len(names), most - 1)
    place[kept] = np.arange(most - 1)
    small = np.zeros((most, most), np.int64)
    np.add.at(small, (place[:, None], place[None]), matrix)
    return small, [*(names[k] for k in kept), OTHERS]


def confused(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for one another most often: label, prediction and number of examples."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSED]
    places = [divmod(int(place), len(matrix)) for place in order]
    return [
        {"label": names[gold], "prediction": names[predicted], "num": int(wrong[gold, predicted])}
        for gold, predicted in places
        if wrong[gold, predicted]
    ]


def _classification(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    names = run.names or ()
    split, found = run.parse(lines)
    labels, predicted = np.asarray(split.labels), np.asarray(found)
    matrix = confusion(labels, predicted, len(names))
    shown, shown_names = gathered(matrix, names)
    logits = np.array([line["logits"] for line in lines], np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    rows = np.arange(len(lines))
    wrong = np.flatnonzero(predicted != labels)
    sure, gold = shares[rows, predicted], shares[rows, labels]
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:MAX_MISTAKES]
    return {
        "confusion": {"classes": shown_names, "counts": shown.tolist()},
        "confused": confused(matrix, names),
        "per_class": per_class(matrix, names),
        "num_wrong": len(wrong),
        "mistakes": [
            _shown(lines[row]) | {"probability": float(sure[row]), "gold_probability": float(gold[row])}
            for row in surest
        ],
    }


def _tokens(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of words, and their tags."""
    names = run.names or ()
    split, found = run.parse(lines)
    gold, predicted = np.concatenate(split.labels), np.concatenate(found)
    matrix = confusion(gold, predicted, len(names))
    shown, shown_names = gathered(matrix, names)
    sure, label_sure = (np.concatenate([line[key] for line in lines]) for key in ("probability", "label_probability"))
    sizes = np.array([len(line["text"]) for line in lines])
    wrong = np.flatnonzero(predicted != gold)
    mistakes = []
    for place in wrong[np.argsort(-sure[wrong], kind="stable")][:MAX_MISTAKES]:
        row = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        word = int(place - sizes[:row].sum())
        words = lines[row]["text"]
        text = " ".join([*words[:word][-MAX_BESIDE:], f"[{words[word]}]", *words[word + 1 :][:MAX_BESIDE]])
        answers = {"label": names[gold[place]], "prediction": names[predicted[place]]}
        chances = {"probability": float(sure[place]), "gold_probability": float(label_sure[place])}
        mistakes.append(_shown(lines[row] | answers | {"text": [text]}) | chances)
    return {
        "confusion": {"classes": shown_names, "counts": shown.tolist()},
        "confused": confused(matrix, names),
        "per_class": per_class(matrix, names),
        "num_wrong": len(wrong),
        "mistakes": mistakes,
    }


def _sets(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several labels an example; the surest of its wrong decisions counts."""
    split, predicted = run.parse(lines)
    labels = split.labels.astype(np.int64)
    certainty = 1 / (1 + np.exp(-np.abs([line["logits"] for line in lines])))
    worst = np.where(predicted != labels, certainty, 0).max(1)
    surest = np.argsort(-worst, kind="stable")[: min(MAX_MISTAKES, int((worst > 0).sum()))]
    return {
        "per_class": rates((labels & predicted).sum(0), predicted.sum(0), labels.sum(0), run.names or ()),
        "num_wrong": int((worst > 0).sum()),
        "mistakes": [
            _shown(lines[row]) | {"probability": float(worst[row]), "gold_probability": float(1 - worst[row])}
            for row in surest
        ],
    }


# --- numbers ----------------------------------------------------------------------------------------------------------


def _regression(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    gold, predicted = (np.array([line[key] for line in lines], np.float64) for key in ("label", "prediction"))
    error = np.abs(predicted - gold)
    dots = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), MAX_DOTS)).astype(np.int64))
    return {
        "scatter": {"gold": gold[dots].tolist(), "predicted": [round(float(x), 4) for x in predicted[dots]]},
        "mean_error": float(error.mean()),
        "mistakes": [
            _shown(lines[row]) | {"error": float(error[row])}
            for row in np.argsort(-error, kind="stable")[:MAX_MISTAKES]
        ],
    }


# --- all --------------------------------------------------------------------------------------------------------------


def _plain(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a form without a view of its own: examples whose prediction is not the label, in the split's order."""
    wrong = [line for line in lines if not runs.is_right(line)]
    return {"num_wrong": len(wrong), "mistakes": [_shown(line) for line in wrong[:MAX_MISTAKES]]}


def _answers(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of questions: those answered worst, the surest first, with the part of the context that they ask for."""
    wrong = [line for line in lines if not runs.is_right(line)]
    mistakes = []
    for line in sorted(wrong, key=lambda line: (line["f1"], -line["score"]))[:MAX_MISTAKES]:
        question, context = line["text"]
        place = context.find(next(iter(line["label"]), line["answer"]))
        start = max(0, place - MAX_CHARACTERS // 2)
        shown = ("… " if start else "") + context[start:]
        mistakes.append(_shown(line | {"text": [question, shown]}) | {"f1": line["f1"]})
    return {"num_wrong": len(wrong), "mistakes": mistakes}


def _shown(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line stands on the page: its texts cut to MAX_CHARACTERS, several answers side by side."""
    cut = [text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …" for text in line.get("text", ())]
    answers = {}
    for key in ("label", "prediction"):
        answer = line[key]
        answers[key] = " | ".join(dict.fromkeys(map(str, answer))) if isinstance(answer, list) else answer
    return {"id": line["id"], "text": cut} | answers


def by_length(run: runs.Run, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The headline score of short and long examples: bins of about as many examples each, with the 95 % interval of
    resampled examples where that is quick; None without the texts."""
    if any("text" not in line for line in lines):
        return None
    unit, lengths = measure([line["text"] for line in lines])
    bins = []
    for chosen in length_bins(lengths):
        split, predicted = run.parse([lines[row] for row in chosen])
        figures: dict[str, Any] = {"shortest": int(lengths[chosen].min()), "longest": int(lengths[chosen].max())}
        bins.append(figures | {"num": len(chosen)} | _score(run, split, predicted))
    return {"unit": unit, "bins": bins}


def _score(run: runs.Run, split: Split, predicted: Any) -> dict[str, float]:
    """The headline score, with the interval over resampled examples unless that would take long."""
    if (run.task.metric, run.task.headline) in bootstrap.FACTORIES:
        (gold, answers), counts = bootstrap.cells(np.asarray(split.labels), np.asarray(predicted))
        score = bootstrap.weighted(run.task.metric, run.task.headline, gold, answers)
    else:
        score, counts = run.kind.weighted(run.task, split, predicted), np.ones(len(split), np.int64)
    if score is None:
        return {"score": run.score(split, predicted)}
    found = bootstrap.interval([score], counts, RESAMPLES)
    return {"score": found.value, "lowest": found.lowest, "highest": found.highest}


def measure(texts: Sequence[Sequence[str]]) -> tuple[str, np.ndarray]:
    """("words", int64 [examples]) of all texts of an example; characters of a script that puts no spaces."""
    words = np.array([sum(len(text.split()) for text in example) for example in texts], np.int64)
    characters = np.array([sum(map(len, example)) for example in texts], np.int64)
    return ("words", words) if characters.sum() <= SPACED * max(1, words.sum()) else ("characters", characters)


def length_bins(lengths: np.ndarray, most: int = MAX_BINS, least: int = LEAST_IN_BIN) -> list[np.ndarray]:
    """The places of the examples in each of at most `most` bins, the shortest first, cut at the quantiles.

    Equal lengths are in one bin. Bins have about as many examples each, `least` where the lengths allow it.
    """
    num = max(1, min(most, len(lengths) // least))
    edges = np.unique(np.quantile(lengths, np.arange(1, num) / num, method="higher"))
    which = np.searchsorted(edges, lengths, side="left")  # the bin up to and with an edge
    return [np.flatnonzero(which == number) for number in np.unique(which)]


def curves(found: Sequence[runs.Run], best: runs.Run, broken: list[str]) -> list[dict[str, Any]]:
    """Training loss by step and dev score by epoch of the runs, the best run among them; lines that can't be read go
    to `broken`."""
    others = sorted((run for run in found if run is not best), key=lambda run: -run.headline())
    chosen = {run.folder for run in (best, *others[: MAX_CURVES - 1])}
    out = []
    for run in (run for run in found if run.folder in chosen):
        rows = [row for row in read_record(run.folder / "metrics.jsonl", broken) if "loss" in row]
        scores = [value if is_number(value) else None for value in run.result.get("by_epoch", [])]
        out.append(
            {"seed": run.seed, "best": run is best, "scores": scores} | columns(rows, ("step", "loss"), MAX_POINTS)
        )
    return out


VIEWS = {
    "classification": _classification,
    "choices": _classification,
    "regression": _regression,
    "multi_label": _sets,
    "tokens": _tokens,
    "answers": _answers,
}
"""What is shown of a form of task beside what is shown of all."""
