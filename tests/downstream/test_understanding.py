"""What the report says of a task equals scikit-learn's figures, and stays small."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from bertpipe.downstream.reporting import runs, understanding
from bertpipe.downstream.reporting.task_figures import task_figures
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Split, Task
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.tasks.kinds.answers import Gold
from bertpipe.downstream.tasks.metrics import compute
from bertpipe.downstream.tasks.spans import Answer

WORDS = ["the", "value", "of", "a", "function", "is", "returned", "to", "its", "caller", "as", "one", "new", "array"]


def write_run(
    folder: Path, name, lines: list[dict], scores: dict, seed: int = 1, init: str = "model", labels=None, **more
) -> Path:
    """A run's folder below `folder`, an artifact, as the finetune stage leaves it; `name` of a task, or a Task."""
    task = tasks.get(name) if isinstance(name, str) else name
    name = task.name
    path = folder / name / "runs" / f"{init}-seed-{seed}"
    path.mkdir(parents=True)
    listed = folder / name / "scores.json"
    rows = json.loads(listed.read_text())["runs"] if listed.is_file() else []
    rows.append({"init": init, "seed": seed, "scores": scores, "folder": f"{name}/runs/{path.name}"})
    listed.write_text(json.dumps({"runs": rows}))
    result = {
        "init": init,
        "seed": seed,
        "scores": scores,
        "task": asdict(task),
        "floor": 0.125,
        "labels": labels or task.labels,
    }
    (path / "scores.json").write_text(json.dumps(result | {"by_epoch": [0.1, 0.2]} | more))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / f"predictions-{task.validation}.jsonl").write_text(text)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 301)] + [{"step": 300, "eval_f1": 0.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def classified(size: int, seed: int = 0, classes=("not_equivalent", "equivalent")) -> tuple[list[dict], dict]:
    """Lines of a classifier that is right more often on short texts, and its scores."""
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, len(classes), size)
    logits = draw.normal(size=(size, len(classes)))
    lengths = draw.integers(3, 40, size)
    logits[np.arange(size), gold] += 3 - lengths / 15
    predicted = logits.argmax(1)
    lines = [
        {
            "id": f"e{row}",
            "prediction": classes[predicted[row]],
            "label": classes[gold[row]],
            "logits": [round(float(x), 5) for x in logits[row]],
            "text": [" ".join(draw.choice(WORDS, lengths[row] - 1)), "end"],
        }
        for row in range(size)
    ]
    return lines, compute("accuracy_and_f1" if len(classes) == 2 else "accuracy", predicted, gold)


def rated(size: int, seed: int = 0, error: float = 1.0) -> tuple[list[dict], dict]:
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, 26, size) / 5
    predicted = (gold + draw.normal(scale=error, size=size)).astype(np.float32).astype(np.float64)
    lines = [
        {"id": row, "prediction": float(p), "label": float(g), "logits": [round(float(p), 5)], "text": ["a b", "c d"]}
        for row, (g, p) in enumerate(zip(gold, predicted, strict=True))
    ]
    return lines, compute("pearson_and_spearman", predicted, gold)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_confusion_and_classes_are_scikit_learns(pairs):
    gold, predicted = (np.array(values) for values in zip(*pairs, strict=True))
    matrix = understanding.confusion(gold, predicted, 5)
    assert (matrix == sk.confusion_matrix(gold, predicted, labels=range(5))).all()
    expected = sk.precision_recall_fscore_support(gold, predicted, labels=range(5), zero_division=0.0)
    found = understanding.per_class(matrix, list("abcde"))
    for row, *values in zip(found, *expected, strict=True):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300))
def test_bins_hold_every_example_once_and_equal_lengths_together(lengths):
    lengths = np.array(lengths)
    bins = understanding.length_bins(lengths, most=5, least=10)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert 1 <= len(bins) <= 5 and all(len(places) for places in bins)
    ends = [(lengths[places].min(), lengths[places].max()) for places in bins]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))


def test_bins_of_different_lengths_are_even():
    bins = understanding.length_bins(np.random.default_rng(0).permutation(1_000))
    assert [len(places) for places in bins] == [126, *[125] * 6, 124]


def test_many_classes_are_gathered_and_none_is_lost():
    draw = np.random.default_rng(0)
    gold, predicted = draw.zipf(1.3, 5_000) % 90, draw.zipf(1.3, 5_000) % 90
    matrix = understanding.confusion(gold, predicted, 90)
    names = [f"class {k}" for k in range(90)]
    small, shown = understanding.gathered(matrix, names, 10)
    assert small.shape == (10, 10) and small.sum() == 5_000 and shown[-1] == understanding.OTHERS
    kept = [names.index(name) for name in shown[:-1]]
    assert kept == sorted(kept) and (small[:-1, :-1] == matrix[np.ix_(kept, kept)]).all()
    assert min(matrix.sum(1)[kept]) >= max(np.delete(matrix.sum(1), kept))
    assert understanding.gathered(matrix, names, 90)[1] == names
    pairs = understanding.confused(matrix, names)
    wrong = matrix - np.diag(np.diag(matrix))
    assert [row["num"] for row in pairs] == sorted(wrong.ravel().tolist(), reverse=True)[:10]
    top = pairs[0]
    assert wrong[names.index(top["label"]), names.index(top["prediction"])] == top["num"] > 0


def test_length_is_in_words_or_where_there_are_no_spaces_in_characters():
    unit, lengths = understanding.measure([["one two", "three"], ["a  b\nc d"]])
    assert (unit, lengths.tolist()) == ("words", [3, 4])
    unit, lengths = understanding.measure(
        [["今日は天気がとても良いので散歩に行きました"], ["雨が降っているので傘を持って出かけた"]]
    )
    assert (unit, lengths.tolist()) == ("characters", [21, 18])


def test_a_classification(tmp_path):
    lines, scores = classified(400)
    write_run(tmp_path, "mrpc", lines, scores, seed=3)
    worse, low = classified(400, seed=9)
    write_run(tmp_path, "mrpc", worse, low | {"f1": 0.1}, seed=1)
    write_run(tmp_path, "mrpc", worse, low | {"f1": 0.99}, seed=1, init="scratch")
    facts = understanding.understand(tmp_path / "mrpc")
    assert (facts["seed"], facts["num_examples"], facts["score"]) == (3, 400, scores["f1"])
    wrong = [line for line in lines if line["prediction"] != line["label"]]
    assert facts["num_wrong"] == len(wrong) > 20
    sure = {}
    for line in wrong:
        names, shares = ("not_equivalent", "equivalent"), np.exp(line["logits"]) / np.exp(line["logits"]).sum()
        sure[line["id"]] = dict(zip(names, shares, strict=True))
    shown = facts["mistakes"]
    ranked = sorted(wrong, key=lambda line: -sure[line["id"]][line["prediction"]])
    assert [row["id"] for row in shown] == [line["id"] for line in ranked[:20]]
    for row, line in zip(shown, ranked, strict=False):
        assert (row["text"], row["label"], row["prediction"]) == (line["text"], line["label"], line["prediction"])
        assert row["probability"] == pytest.approx(sure[line["id"]][line["prediction"]])
        assert row["gold_probability"] == pytest.approx(sure[line["id"]][line["label"]])
    bins = facts["by_length"]["bins"]
    assert sum(b["num"] for b in bins) == 400 and facts["by_length"]["unit"] == "words"
    first = [line for line in lines if len(" ".join(line["text"]).split()) <= bins[0]["longest"]]
    gold, predicted = ([int(line[key] == "equivalent") for line in first] for key in ("label", "prediction"))
    assert bins[0]["score"] == pytest.approx(sk.f1_score(gold, predicted))
    assert bins[0]["lowest"] < bins[0]["score"] < bins[0]["highest"]
    assert bins[0]["score"] > bins[-1]["score"], "made so"
    assert [curve["seed"] for curve in facts["curves"]] == [3, 1]
    curve = facts["curves"][0]
    assert curve["best"] and len(curve["loss"]) == understanding.MAX_POINTS and curve["scores"] == [0.1, 0.2]
    assert set(task_figures(facts)) == {"confusion", "length", "loss", "epochs"}


def test_multiple_choice(tmp_path):
    """Whose answers are numbers: which choice is preferred wrongly, and the choices as text."""
    lines, scores = classified(200, classes=tuple("0123"))
    for line in lines:
        line |= {key: int(line[key]) for key in ("prediction", "label")}
        line["text"] = ["first", *(f"choice {k}" for k in range(4))]
    write_run(tmp_path, "swag", lines, scores)
    (run,) = runs.find(tmp_path)
    assert run.score(*run.parse(lines)) == run.headline()
    facts = understanding.understand(tmp_path / "swag")
    gold, predicted = ([line[key] for line in lines] for key in ("label", "prediction"))
    assert facts["confusion"] == {"classes": list("0123"), "counts": sk.confusion_matrix(gold, predicted).tolist()}
    assert facts["mistakes"][0]["text"] == ["first", "choice 0", "choice 1", "choice 2", "choice 3"]


def test_a_regression(tmp_path):
    lines, scores = rated(2_000)
    write_run(tmp_path, "stsb", lines, scores)
    facts = understanding.understand(tmp_path / "stsb")
    errors = {line["id"]: abs(line["prediction"] - line["label"]) for line in lines}
    assert [row["id"] for row in facts["mistakes"]] == sorted(errors, key=lambda i: -errors[i])[:20]
    assert facts["mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert len(facts["scatter"]["gold"]) == len(facts["scatter"]["predicted"]) == understanding.MAX_DOTS
    assert set(task_figures(facts)) == {"scatter", "length", "loss", "epochs"}


TOPICS = Task("topics", "multi_label", ("text",), "tags", (), "micro_and_macro_f1", "f1", "own")


def tagged(size: int) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Lines of a multi-label task of three labels, its labels and predictions as 0 and 1."""
    draw = np.random.default_rng(0)
    gold, logits = draw.integers(0, 2, (size, 3)), draw.normal(size=(size, 3)).round(3)
    predicted = (logits > 0).astype(np.int64)
    gold[: size // 2] = predicted[: size // 2]
    lines = [
        {
            "id": row,
            "prediction": [name for name, on in zip("abc", predicted[row], strict=True) if on],
            "label": [name for name, on in zip("abc", gold[row], strict=True) if on],
            "logits": logits[row].tolist(),
            "text": [" ".join(WORDS[: 1 + row % 9])],
        }
        for row in range(size)
    ]
    return lines, gold, predicted


def test_multi_label(tmp_path):
    lines, gold, predicted = tagged(200)
    write_run(tmp_path, TOPICS, lines, compute("micro_and_macro_f1", predicted, gold), labels=list("abc"))
    facts = understanding.understand(tmp_path / "topics")
    expected = sk.precision_recall_fscore_support(gold, predicted, average=None, zero_division=0.0)
    for row, *values in zip(facts["per_class"], *expected, strict=True):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(values)
    wrong = (gold != predicted).any(1)
    assert facts["num_wrong"] == wrong.sum() > 20
    logits = np.where(gold != predicted, np.abs([line["logits"] for line in lines]), 0).max(1)
    assert [row["id"] for row in facts["mistakes"]] == np.argsort(-logits, kind="stable")[:20].tolist()
    first = facts["mistakes"][0]
    assert first["probability"] == pytest.approx(1 / (1 + np.exp(-logits.max())))
    assert first["label"] == " | ".join(lines[first["id"]]["label"])
    assert set(task_figures(facts)) == {"length", "loss", "epochs"}


def answered(size: int) -> list[dict]:
    """Lines of SQuAD 2.0: some answers are right, some partly, some withheld, rightly or not."""
    draw, lines = np.random.default_rng(0), []
    for row in range(size):
        context = " ".join(draw.choice(WORDS, 300))
        gold = [] if row % 3 == 0 else [context[900:915], context[900:920]]
        text = [context[900:915], context[905:930], context[:9]][draw.integers(3)]
        answer = Answer(text, float(draw.normal()), float(draw.normal()), withheld=bool(draw.random() < 0.3))
        split = Split([("who?", context)], [[Gold(g, 0, 0) for g in gold]], [f"q{row}"], None)
        line = KINDS["answers"].line(split, None, None, [answer], 0)
        lines.append({"id": f"q{row}"} | json.loads(json.dumps(line)) | {"text": ["who?", context]})
    return lines


def test_questions(tmp_path):
    lines = answered(120)
    split, predicted = KINDS["answers"].parse(lines, None)
    scores = KINDS["answers"].score(tasks.get("squad_v2"), split, predicted)
    write_run(tmp_path, "squad_v2", lines, scores)
    facts = understanding.understand(tmp_path / "squad_v2")
    by_id = {line["id"]: line for line in lines}
    assert facts["num_wrong"] == sum(not line["exact"] for line in lines) > 20
    shown = [by_id[row["id"]] for row in facts["mistakes"]]
    assert all(not line["exact"] for line in shown)
    assert [line["f1"] for line in shown] == sorted(line["f1"] for line in lines if not line["exact"])[:20]
    for row, line in zip(facts["mistakes"], shown, strict=True):
        question, context = row["text"]
        assert question == "who?" and len(context) <= understanding.MAX_CHARACTERS + 4
        assert next(iter(line["label"]), line["answer"]) in context
        assert row["prediction"] == line["prediction"] and (row["prediction"] == "") == line["withheld"]
    assert facts["by_length"]["bins"][0]["lowest"] < facts["score"]


@pytest.mark.parametrize(
    ("task", "make", "names"),
    [(TOPICS, lambda: tagged(30)[0], tuple("abc")), (tasks.get("squad_v2"), lambda: answered(30), None)],
    ids=["multi_label", "answers"],
)
def test_quick_scores_are_those_of_repeated_examples(task, make, names):
    kind, lines = KINDS[task.kind], make()
    quick = kind.weighted(task, *kind.parse(lines, names))
    weights = np.random.default_rng(0).integers(0, 3, (4, len(lines)))
    for row, found in zip(weights, quick(weights), strict=True):
        repeated = [line for line, times in zip(lines, row, strict=True) for _ in range(times)]
        assert found == pytest.approx(kind.score(task, *kind.parse(repeated, names))[task.headline])


def test_a_large_split_makes_a_small_page(tmp_path):
    lines, _ = classified(2_000)
    for number, line in enumerate(lines):
        line["text"] = [f"{number} " + "word " * 400]
    write_run(tmp_path, "mrpc", lines, {"f1": 0.5, "accuracy": 0.5})
    facts = understanding.understand(tmp_path / "mrpc")
    assert all(len(text) <= understanding.MAX_CHARACTERS + 2 for row in facts["mistakes"] for text in row["text"])
    assert len(json.dumps([facts, task_figures(facts)])) < 60_000


def test_what_is_missing_is_left_out(tmp_path):
    assert understanding.understand(tmp_path) is None
    lines, scores = classified(30)
    path = write_run(tmp_path, "mrpc", lines, scores)
    (path / "metrics.jsonl").unlink()
    old = [{key: value for key, value in line.items() if key != "text"} for line in lines]
    (path / "predictions-validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    facts = understanding.understand(tmp_path / "mrpc")
    assert facts["by_length"] is None and facts["mistakes"][0]["text"] == []
    assert set(task_figures(facts)) == {"confusion", "epochs"}


@pytest.mark.parametrize("name", ["mrpc", "stsb"])
def test_the_lines_make_the_score(tmp_path, name):
    lines, scores = classified(300) if name == "mrpc" else rated(300)
    write_run(tmp_path, name, lines, scores)
    (run,) = runs.find(tmp_path)
    assert run.score(*run.parse(lines)) == run.headline()
