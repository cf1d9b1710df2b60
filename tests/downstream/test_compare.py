"""Two checkpoints compared: differences, intervals and tests are the textbook's; what can't be paired is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bertpipe.cli import main
from bertpipe.downstream.reporting import compare
from bertpipe.downstream.tasks import metrics
from bertpipe.errors import ArtifactError, DataError
from tests.downstream.test_understanding import classified, rated, write_run

HOSTILE = "<script>alert('x')</script>"


def answered(lines: list[dict], right: np.ndarray) -> tuple[list[dict], dict]:
    """The same examples, answered rightly where `right` says so; and the scores."""
    other = {"equivalent": "not_equivalent", "not_equivalent": "equivalent"}
    out = [
        line | {"prediction": line["label"] if ok else other[line["label"]]}
        for line, ok in zip(lines, right, strict=True)
    ]
    gold, predicted = ([int(line[key] == "equivalent") for line in out] for key in ("label", "prediction"))
    return out, metrics.compute("accuracy_and_f1", predicted, gold)


def test_a_split_without_labels_is_left_out(tmp_path):
    """mnli's second validation set may be secret."""
    lines, scores = classified(60, classes=("entailment", "neutral", "contradiction"))
    for name in "ab":
        run = write_run(tmp_path / name, "mnli", lines, scores)
        bare = [{key: value for key, value in line.items() if key != "label"} for line in lines]
        path = run / "predictions-validation_mismatched.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert [row.split for row in compare.compare(tmp_path / "a", tmp_path / "b", 10)] == ["validation_matched"]


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two artifacts with mrpc: of 200 examples A alone has 12 right, B alone 30."""
    lines, _ = classified(200)
    right = np.ones((2, 200), bool)
    right[0, :30], right[1, 30:42], right[:, 60:80] = False, False, False
    for name, own, seeds in (("a", right[0], (2, 1)), ("b", right[1], (1,))):
        out, scores = answered(lines, own)
        for seed in seeds:
            f1 = scores["f1"] if seed == seeds[0] else scores["f1"] - 0.05
            write_run(tmp_path / name, "mrpc", out, scores | {"f1": f1}, seed=seed)
    write_run(tmp_path / "b", "cola", lines, {"matthews_correlation": 0.5})
    return tmp_path / "a", tmp_path / "b"


def edit(folder: Path, change) -> Path:
    """Rewrite the predictions of the best run."""
    path = sorted(folder.glob("mrpc/runs/*"))[-1] / "predictions-validation.jsonl"
    lines = [json.loads(line) for line in path.open()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    return path


def test_the_figures_of_two_classifiers(pair):
    (row,) = compare.compare(*pair, 20_000)
    assert (row.task, row.metric, row.num_examples) == ("mrpc", "f1", 200)
    assert (row.only_a, row.only_b) == (12, 30)
    expected = 2 * stats.binom.cdf(12, 42, 0.5)
    assert row.mcnemar == pytest.approx(expected)
    assert row.difference.value == pytest.approx(row.score_b - row.score_a)
    assert row.difference.lowest < row.difference.value < row.difference.highest
    assert row.seeds is None, "B has one seed"
    swapped = compare.compare(pair[1], pair[0], 20_000)[0].difference
    assert (swapped.lowest, swapped.highest) == pytest.approx(
        (-row.difference.highest, -row.difference.lowest), abs=5e-3
    )


def test_the_interval_is_that_of_resampled_examples(pair):
    """A bootstrap written out: draw examples, score both with the official metric."""
    lines = [[json.loads(x) for x in next(f.glob("mrpc/runs/*/pred*")).open()] for f in pair]
    gold, a, b = (
        np.array([line[key] == "equivalent" for line in side])
        for side, key in ((lines[0], "label"), (lines[0], "prediction"), (lines[1], "prediction"))
    )
    draw, found = np.random.default_rng(7), []
    for _ in range(4_000):
        i = draw.integers(0, 200, 200)
        f1 = [2 * (gold[i] & p[i]).sum() / (gold[i].sum() + p[i].sum()) for p in (a, b)]
        found.append(f1[1] - f1[0])
    row = compare.compare(*pair, 20_000)[0].difference
    np.testing.assert_allclose([row.lowest, row.highest], np.quantile(found, [0.025, 0.975]), atol=0.006)


def test_numbers_are_compared_by_correlation_alone(tmp_path):
    for name, error, seeds in (("a", 1.5, (1, 2)), ("b", 0.7, (1, 2, 3))):
        for seed in seeds:
            lines, scores = rated(300, seed, error)
            gold = rated(300, 0)[0]
            lines = [line | {"label": g["label"]} for line, g in zip(lines, gold, strict=True)]
            scores = metrics.compute(
                "pearson_and_spearman", [line["prediction"] for line in lines], [line["label"] for line in lines]
            )
            write_run(tmp_path / name, "stsb", lines, scores, seed=seed)
    (row,) = compare.compare(tmp_path / "a", tmp_path / "b", 2_000)
    assert (row.only_a, row.only_b, row.mcnemar) == (None, None, None)
    assert row.seeds is not None and (row.seeds.a.num_runs, row.seeds.b.num_runs) == (2, 3)
    scores = [
        [json.loads(p.read_text())["scores"]["spearman"] for p in sorted(tmp_path.glob(f"{n}/stsb/runs/*/scores.json"))]
        for n in "ab"
    ]
    welch = stats.ttest_ind(scores[1], scores[0], equal_var=False).confidence_interval(0.95)
    assert (row.seeds.lowest, row.seeds.highest) == pytest.approx((welch.low, welch.high))
    assert row.score_a == max(scores[0]) and row.score_b == max(scores[1])


def test_runs_that_failed_are_counted(pair):
    """One that diverged has no predictions and counts as the majority's answer."""
    lines, scores = classified(200)
    write_run(pair[1], "mrpc", [], {}, seed=2, failed="diverged")
    write_run(pair[1], "mrpc", lines, scores | {"f1": 0.25}, seed=3, failed="predicts 'equivalent' for every example")
    before = compare.compare(pair[0], pair[1] / "mrpc/runs/model-seed-1")[0]
    row = compare.compare(*pair)[0]
    assert row.difference == before.difference and row.seeds is not None
    assert (row.seeds.b.num_runs, row.seeds.b.num_failed) == (3, 2)
    assert row.seeds.b.mean == pytest.approx((row.score_b + 0.125 + 0.25) / 3), "0.125: the majority's"
    assert "(mean of 3, 2 failed)" in compare.seed_line(row)
    with pytest.raises(ArtifactError, match="no run has a score here"):
        compare.compare(pair[0], pair[1] / "mrpc/runs/model-seed-2")


def test_a_score_without_a_quick_form_is_drawn(pair, monkeypatch):
    quick = compare.compare(*pair, 1_000)[0]
    monkeypatch.setattr(compare.bootstrap, "FACTORIES", {})
    monkeypatch.setattr(compare, "DRAWN", 40)
    slow = compare.compare(*pair, 1_000)[0]
    assert (slow.num_resamples, quick.num_resamples) == (40, 1_000)
    assert slow.difference.value == quick.difference.value
    assert slow.difference.lowest == pytest.approx(quick.difference.lowest, abs=0.05)
    assert "(mrpc: 40)" in compare.note([slow, quick])


def test_single_runs_and_tasks_are_compared_too(pair):
    a, b = pair
    whole = compare.compare(a, b)
    assert compare.compare(a / "mrpc", b / "mrpc") == whole
    assert compare.compare(a / "mrpc/runs/model-seed-2", b / "mrpc/runs/model-seed-1") == whole


def test_the_order_of_examples_does_not_matter(pair):
    before = compare.compare(*pair)
    edit(pair[1], lambda lines: lines[::-1])
    assert compare.compare(*pair)[0].only_b == before[0].only_b == 30


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:-2], r"2 examples of the other are not here, the first of them e198"),
        (
            lambda lines: [{**lines[0], "id": "new"}, *lines[1:]],
            r"1 examples of the other are not here, the first of them new",
        ),
        (lambda lines: [lines[0], *lines], r"two examples are called e0"),
        (
            lambda lines: [{**line, "label": line["prediction"]} for line in lines],
            r"example e0 has another label in .*: not_equivalent and equivalent|.*: equivalent and not_equivalent",
        ),
        (lambda lines: [lines[0], {**lines[1], "text": ["else"]}, *lines[2:]], r"example e1 has another text"),
    ],
)
def test_other_examples_or_labels_are_refused_by_name(pair, change, complaint):
    edit(pair[0], change)
    with pytest.raises(DataError, match=complaint):
        compare.compare(*pair)


def test_predictions_that_do_not_make_the_score_are_refused(pair):
    edit(pair[0], lambda lines: [{**line, "prediction": line["label"]} for line in lines])
    with pytest.raises(ArtifactError, match=r"predictions make 1\.0+, scores\.json says 0\.\d+"):
        compare.compare(*pair)


def test_the_command(pair, tmp_path, capsys):
    hostile = tmp_path / HOSTILE.replace("/", "|")
    pair[1].rename(hostile)
    arguments = ["--html", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json"), "--resamples", "500"]
    assert main(["compare", str(pair[0]), str(hostile), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"A: {pair[0]}" and printed[2].split()[:3] == ["task", "metric", "examples"]
    assert printed[3].split()[:3] == ["mrpc", "f1", "200"]
    page, figures = (tmp_path / "c.html").read_text(), json.loads((tmp_path / "c.json").read_text())
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert figures["tasks"][0]["only_b"] == 30 and figures["tasks"][0]["num_resamples"] == 500
    assert f"{figures['tasks'][0]['score_b']:.4f}" in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: A, B; `bertpipe compare --help`"),
        (["A"], "required: B"),
        (["A", "nowhere"], "nowhere: no such folder"),
        (["A", "empty"], "empty: no run with predictions here"),
        (["A", "other"], "no task to compare"),
        (["A", "A", "--resamples", "0"], "'0' is not a whole number from 1 on"),
        (["A", "A", "--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_mistakes_are_one_line(pair, tmp_path, capsys, arguments, complaint):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "other", "rte", classified(5)[0], {"accuracy": 0.5}, labels=["x", "y"])
    places = {"A": str(pair[0]), **{n: str(tmp_path / n) for n in ("nowhere", "empty", "other")}}
    assert main(["compare", *(places.get(a, a) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.count("\n") == 1 and not captured.out
