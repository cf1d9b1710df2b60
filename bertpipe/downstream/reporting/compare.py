"""Two fine-tuned checkpoints on the tasks they share: `bertpipe compare A B`.

The same examples, one by one: the difference of the headline scores of the two best runs with a paired bootstrap
interval (Koehn 2004), how many examples each alone got right, and McNemar's exact test of those (McNemar 1947;
Dietterich 1998, Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms). Where both
have several seeds, also the difference of the means over the seeds, with Welch's interval: the examples say how far the
two best models differ, the seeds how far the two recipes do.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertpipe.artifact import write_json
from bertpipe.downstream.finetuning.grid import MODEL
from bertpipe.downstream.reporting import pages, runs
from bertpipe.downstream.reporting.runs import Run, is_right
from bertpipe.downstream.tasks import bootstrap
from bertpipe.downstream.tasks.bootstrap import Interval
from bertpipe.errors import ArtifactError, DataError

DRAWN = 1_000  # resamples of a score that has no quick form


@dataclass(frozen=True)
class Side:
    """The runs of one checkpoint that differ in their seeds alone."""

    num_runs: int
    num_failed: int
    """Of those; one that diverged has no score and counts as the majority's answer, or less if others are lower."""
    mean: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} (mean of {self.num_runs}{f', {self.num_failed} failed' if self.num_failed else ''})"


@dataclass(frozen=True)
class Seeds:
    """The difference over seeds."""

    a: Side
    b: Side
    lowest: float
    """Of the difference of the means B - A: Welch's 95 % interval."""
    highest: float


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints on one split of a task."""

    task: str
    split: str
    metric: str
    num_examples: int
    score_a: float
    score_b: float
    difference: Interval
    """B - A over resampled examples."""
    num_resamples: int
    only_a: int | None
    """Examples that A alone has right; None where answers are numbers, which are never quite right."""
    only_b: int | None
    mcnemar: float | None
    """Two-sided p value."""
    seeds: Seeds | None


def compare(first: Path, second: Path, resamples: int = bootstrap.RESAMPLES, seed: int = 0) -> list[Comparison]:
    """A row for each labelled split of the tasks that the runs in both folders share.

    The folders are finetune artifacts, or those of a task or of one run. ArtifactError where there are no runs with
    predictions, or a run's predictions don't make its score; DataError where the examples or their labels differ.
    """
    found = [_by_task(folder) for folder in (first, second)]
    shared = [name for name in found[0] if name in found[1]]
    if not shared:
        raise DataError(f"{first} has {', '.join(found[0])}, {second} has {', '.join(found[1])}: no task to compare")
    rows = []
    for name in shared:
        a, b = (_candidates(those[name]) for those in found)
        best = _best(a), _best(b)
        rows += [
            _compare(name, split, a, b, best, resamples, seed)
            for split in best[0].task.evaluated
            if _scored(best, split)
        ]
    return rows


def _by_task(folder: Path) -> dict[str, list[Run]]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; compare takes two finetune artifacts or two of their runs")
    tasks: dict[str, list[Run]] = {}
    for run in runs.find(folder):
        tasks.setdefault(run.task.name, []).append(run)
    if not tasks:
        raise ArtifactError(f"{folder}: no run with predictions here; `bertpipe finetune` makes them")
    return tasks


def _best(found: list[Run]) -> Run:
    best = runs.best(found)
    if best is None:
        raise ArtifactError(f"{found[0].folder.parent}: no run has a score here, so there is nothing to compare")
    return best


def _scored(both: tuple[Run, Run], split: str) -> bool:
    """Whether the split has labels, by which both runs were scored."""
    return all(math.isfinite(run.headline(split)) for run in both)


def _candidates(found: list[Run]) -> list[Run]:
    """The runs of the model; of a folder that is a baseline's run, that one."""
    return [run for run in found if run.result["init"] == MODEL] or found


def _compare(
    name: str, split: str, a: list[Run], b: list[Run], best: tuple[Run, Run], resamples: int, seed: int
) -> Comparison:
    for what, values in (
        ("metric", [run.task.headline for run in best]),
        ("label names", [run.names for run in best]),
    ):
        if values[0] != values[1]:
            raise DataError(f"{name}: {what} {values[0]} in {best[0].folder}, {values[1]} in {best[1].folder}")
    lines = paired(name, best[0].path(split), best[1].path(split), best[0].lines(split), best[1].lines(split))
    parsed = [run.parse(own) for run, own in zip(best, lines, strict=True)]
    scores = [run.score(*answers) for run, answers in zip(best, parsed, strict=True)]
    for run, score in zip(best, scores, strict=True):
        if abs(score - run.headline(split)) > 1e-9:
            raise ArtifactError(
                f"{run.path(split)}: these predictions make {score:.6f}, scores.json says {run.headline(split):.6f}; "
                f"run `bertpipe finetune` again"
            )
    task, gold = best[0].task, parsed[0][0].labels
    key, predicted = (task.metric, task.headline), [answers for _, answers in parsed]
    if key in bootstrap.FACTORIES:
        columns, counts = bootstrap.cells(*map(np.asarray, (gold, *predicted)))
        weighted = [bootstrap.FACTORIES[key](columns[0], answers) for answers in columns[1:]]
    elif None not in (quick := [run.kind.weighted(task, *own) for run, own in zip(best, parsed, strict=True)]):
        weighted, counts = [one for one in quick if one], np.ones(len(lines[0]), np.int64)
    else:
        resamples, counts = min(resamples, DRAWN), np.ones(len(lines[0]), np.int64)
        weighted = [bootstrap.by_drawing(_score_of(run, own), len(own)) for run, own in zip(best, lines, strict=True)]
    only_a, only_b = _alone(*lines)
    return Comparison(
        task=name,
        split=split,
        metric=task.headline,
        num_examples=len(lines[0]),
        score_a=scores[0],
        score_b=scores[1],
        difference=bootstrap.interval(weighted, counts, resamples, seed),
        num_resamples=resamples,
        only_a=only_a,
        only_b=only_b,
        mcnemar=None if only_a is None or only_b is None else mcnemar(only_a, only_b),
        seeds=over_seeds(a, b, split),
    )


def paired(
    name: str, path_a: Path, path_b: Path, a: list[dict[str, Any]], b: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both lists of lines in the order of `a`; DataError names the first example that they don't share, or whose label
    or text differs."""
    own, others = ({str(line["id"]): line for line in lines} for lines in (a, b))
    for path, lines, by_id in ((path_a, a, own), (path_b, b, others)):
        if len(by_id) < len(lines):
            twice = Counter(str(line["id"]) for line in lines).most_common(1)[0][0]
            raise DataError(f"{path}: two examples are called {twice}; give each its own `idx` to compare them")
    for path, missing in ((path_b, own.keys() - others.keys()), (path_a, others.keys() - own.keys())):
        if missing:
            raise DataError(
                f"{path}: {len(missing)} examples of the other are not here, the first of them "
                f"{next(i for i in (*own, *others) if i in missing)}; compare runs on the same data"
            )
    for example, line in own.items():
        for part in ("label", "text"):
            values = line.get(part), others[example].get(part)
            if values[0] != values[1] and (part == "label" or None not in values):
                shown = f": {_short(values[0])} and {_short(values[1])}" if part == "label" else ""
                raise DataError(
                    f"{name}: example {example} has another {part} in {path_a} than in {path_b}{shown}; "
                    f"compare runs on the same data"
                )
    return a, [others[example] for example in own]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]} …"


def _score_of(run: Run, lines: list[dict[str, Any]]) -> Any:
    return lambda places: run.score(*run.parse([lines[place] for place in places]))


def _alone(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[int, int] | tuple[None, None]:
    """Examples that one alone has right; None for numbers."""
    if isinstance(a[0]["label"], float):
        return None, None
    right = [np.array([is_right(line) for line in lines]) for lines in (a, b)]
    return int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p value of so uneven a split, were either as likely: binomial with 1/2."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _counted(those: list[Run], split: str) -> list[float]:
    """What each run counts as, as in scores.json's summary (summary.py)."""
    scored = [run.headline(split) for run in those if run.result["scores"]]
    return scored + [min([those[0].result["floor"], *scored])] * (len(those) - len(scored))


def over_seeds(runs_a: list[Run], runs_b: list[Run], split: str) -> Seeds | None:
    """Means over seeds and Welch's interval of their difference; None unless both have several."""
    if min(len(runs_a), len(runs_b)) < 2:
        return None
    from scipy.stats import ttest_ind

    a, b = (_counted(those, split) for those in (runs_a, runs_b))
    side_a, side_b = (
        Side(len(those), sum(bool(run.result.get("failed")) for run in those), statistics.fmean(scores))
        for those, scores in ((runs_a, a), (runs_b, b))
    )
    if len(set(a)) == len(set(b)) == 1:  # no spread: the difference is what it is
        return Seeds(side_a, side_b, b[0] - a[0], b[0] - a[0])
    found = ttest_ind(b, a, equal_var=False).confidence_interval(bootstrap.COVERED)
    return Seeds(side_a, side_b, float(found.low), float(found.high))


# --- shown ------------------------------------------------------------------------------------------------------------

COLUMNS = ("task", "metric", "examples", "A", "B", "B - A", "95 % interval", "only A", "only B", "McNemar p")


def cells(row: Comparison) -> tuple[str, ...]:
    """The texts of COLUMNS."""
    name = row.task if row.split == "validation" else f"{row.task} ({row.split.removeprefix('validation_')})"
    alone = ["-" if number is None else f"{number:,}" for number in (row.only_a, row.only_b)]
    return (
        name,
        row.metric.replace("_", " "),
        f"{row.num_examples:,}",
        f"{row.score_a:.4f}",
        f"{row.score_b:.4f}",
        f"{row.difference.value:+.4f}",
        f"[{row.difference.lowest:+.4f}, {row.difference.highest:+.4f}]",
        *alone,
        "-" if row.mcnemar is None else f"{row.mcnemar:.3g}",
    )


def seed_line(row: Comparison) -> str:
    """What the seeds say, in words."""
    seeds = row.seeds
    if seeds is None:
        return ""
    return (
        f"{cells(row)[0]} over seeds: A {seeds.a}, B {seeds.b}, B - A {seeds.b.mean - seeds.a.mean:+.4f} "
        f"[{seeds.lowest:+.4f}, {seeds.highest:+.4f}]"
    )


def table(first: Path, second: Path, rows: list[Comparison]) -> Iterator[str]:
    """The comparison as lines of text."""
    yield f"A: {first}"
    yield f"B: {second}"
    texts = [COLUMNS, *map(cells, rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(COLUMNS))]
    for row in texts:
        parts = [text.ljust(width) for text, width in zip(row[:2], widths, strict=False)]
        parts += [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(parts).rstrip()
    yield from filter(None, map(seed_line, rows))
    yield note(rows)


def note(rows: list[Comparison]) -> str:
    """How to read it."""
    most = max(row.num_resamples for row in rows)
    fewer = [cells(row)[0] for row in rows if row.num_resamples < most]
    less = f" ({', '.join(fewer)}: {min(row.num_resamples for row in rows):,})" if fewer else ""
    return (
        f"The best run of each; intervals: {most:,} paired resamples of the examples{less}, over seeds Welch's. "
        f"One that holds 0 shows no difference."
    )


def write(first: Path, second: Path, rows: list[Comparison], html: Path | None, json: Path | None) -> None:
    """The comparison as one HTML page, as JSON, or as both."""
    if json is not None:
        write_json(json, {"a": str(first), "b": str(second), "tasks": [asdict(row) for row in rows]})
    if html is not None:
        reach = max((abs(x) for row in rows for x in (row.difference.lowest, row.difference.highest)), default=0) or 1.0
        page = pages.render(
            "compare.html.jinja",
            first=first,
            second=second,
            rows=[(cells(row), row.difference, seed_line(row)) for row in rows],
            columns=COLUMNS,
            reach=reach,
            note=note(rows),
        )
        html.write_text(page, encoding="utf-8")
