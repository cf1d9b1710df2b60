"""The runs of a task, summed up: median, quartiles, failed runs, and the point of the grid that is chosen.

A run has failed when it diverged, gives one answer to everything, or scores no more than the majority's answer does
(training.failure). Median and quartiles are those of all runs, the failed ones too; one that diverged, which has no
score, counts as the majority's answer, or as the lowest of the others where that is lower. Where some failed, the
median of the sound ones stands beside. A point of the grid is chosen as if a run that diverged scored -inf. Where
validation has no labels there are no scores, and the figures are None.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from bertpipe.downstream.finetuning.cells import Cell
from bertpipe.downstream.finetuning.grid import Point
from bertpipe.downstream.tasks.kind import Task

T = TypeVar("T")


def summarise(outcomes: Sequence[dict[str, Any]], headline: str) -> dict[str, Any]:
    """The figures of runs that differ in their seeds alone; `outcomes` as cells hold them, one at least."""
    if outcomes[0]["floor"] is None:
        counts = {"num_runs": len(outcomes), "num_failed": sum(bool(outcome["failed"]) for outcome in outcomes)}
        return dict.fromkeys(("median", "lowest", "highest", "lower_quartile", "upper_quartile")) | counts
    scored = [outcome["scores"][headline] for outcome in outcomes if outcome["scores"]]
    values = scored + [min([outcomes[0]["floor"], *scored])] * (len(outcomes) - len(scored))
    sound = [outcome["scores"][headline] for outcome in outcomes if not outcome["failed"]]
    lower, upper = map(float, np.percentile(values, [25, 75]))
    figures = {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "num_runs": len(values),
        "num_failed": len(values) - len(sound),
    }
    if sound and len(sound) < len(values):
        figures["median_of_sound"] = statistics.median(sound)
    return figures


def further(task: Task, outcomes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The medians of what splits beside the one that chooses scored, over the runs that have scores."""
    prefixes = tuple(map(task.prefix, task.splits[2:]))
    scores = [outcome["scores"] for outcome in outcomes if outcome["scores"]]
    names = [name for name in (scores[0] if scores else ()) if name.startswith(prefixes)]
    return {name: statistics.median(one[name] for one in scores) for name in names}


def by_point(cells: Iterable[Cell], init: str) -> dict[Point | None, list[Cell]]:
    """The runs of an init, in the order of the grid."""
    return _grouped((one for one in cells if one.run.init == init), lambda one: one.run.point)


def choose(cells: Iterable[Cell], init: str, headline: str) -> list[Cell]:
    """The runs of the point with the highest median; all of them must be finished."""

    def median(group: list[Cell]) -> float:
        return statistics.median(one.outcome["scores"].get(headline, -math.inf) for one in group)

    return max(by_point(cells, init).values(), key=median)


def best(cells: Iterable[Cell], headline: str) -> Cell | None:
    """Of finished runs the one with the highest score, without labels the first; None when all of them diverged."""
    done = [one for one in cells if one.is_done and not (one.outcome["failed"] or "").startswith("diverged")]
    return max(done, key=lambda one: one.outcome["scores"].get(headline, 0.0), default=None)


def wanted(cells: Sequence[Cell], init: str, headline: str) -> list[Cell]:
    """Runs whose models may still be the one that is kept: the best of the leading point, and of unfinished points."""
    groups = by_point(cells, init).values()
    finished = [one for group in groups if all(cell.is_done for cell in group) for one in group]
    unfinished = [group for group in groups if not all(cell.is_done for cell in group)]
    leading = [choose(finished, init, headline)] if finished else []
    return [one for group in (*leading, *unfinished) if (one := best(group, headline)) is not None]


def grid_rows(cells: Sequence[Cell], headline: str) -> list[dict[str, Any]]:
    """A row for each init and point: its figures, and whether it is the chosen one. Empty where there is no choice."""
    rows = []
    for init in dict.fromkeys(one.run.init for one in cells):
        groups = by_point(cells, init)
        chosen = choose(cells, init, headline)[0].run.point
        for point, group in groups.items():
            if len(groups) > 1 and point is not None:
                scores = {str(one.run.seed): one.outcome["scores"].get(headline) for one in group}
                figures = summarise([one.outcome for one in group], headline)
                rows.append({"init": init, **vars(point), "chosen": point == chosen, **figures, "scores": scores})
    return rows


def _grouped(values: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for one in values:
        groups.setdefault(key(one), []).append(one)
    return groups
