"""What a fine-tuning command says at its end: a row a task, the failed runs by name, and the published scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bertpipe.downstream.finetuning.grid import MODEL, Point


def lines(tables: dict[str, Any]) -> list[str]:
    """The tasks' parts of scores.json as aligned text: what was scored, what failed, what others score."""
    inits = [init for init in _once(init for row in tables.values() for init in row["summary"]) if init != MODEL]
    gridded = any(row["grid"] for row in tables.values())
    rows = [["task", "metric", "median [quartiles]", "failed", *inits, *(["chosen"] if gridded else [])]]
    for name, row in tables.items():
        own = row["summary"][MODEL]
        rows.append([name, row["metric"].replace("_", " "), _spread(own), f"{own['num_failed']} of {own['num_runs']}"])
        rows[-1] += [_number(row["summary"].get(init, {}).get("median")) for init in inits]
        if gridded:
            rows[-1].append(str(Point(**own["point"])) if "point" in own else "")
    return [*_aligned(rows), *_notes(tables), *_published(tables)]


def _notes(tables: dict[str, Any]) -> list[str]:
    """What further splits scored; why runs failed, and the median of the others."""
    told = []
    for name, row in tables.items():
        told += [f"{name} {metric.replace('_', ' ')}: median {x:.3f}" for metric, x in row["further"].items()]
        told += [
            f"{name} {run['init']} seed {run['seed']} failed: {run['failed']}" for run in row["runs"] if run["failed"]
        ]
        told += [
            f"{name} {init}: the median of the sound runs is {figures['median_of_sound']:.3f}"
            for init, figures in row["summary"].items()
            if "median_of_sound" in figures
        ]
    return told


def _published(tables: dict[str, Any]) -> list[str]:
    """What the papers print, a row a model, the tasks side by side."""
    found = {name: row["published"] for name, row in tables.items() if row["published"]}
    labels = _once(_label(one) for rows in found.values() for one in rows)
    if not labels:
        return []
    rows = [["", *found], ["this model, dev", *(_own(tables[name]["summary"][MODEL]) for name in found)]]
    for label in labels:
        scores = [next((_score(one) for one in ones if _label(one) == label), "-") for ones in found.values()]
        rows.append([label, *scores])
    starred = any(not one["same_metric"] for ones in found.values() for one in ones)
    return [
        *_aligned(rows),
        *(["* of two metrics; the paper doesn't say which, or whether their mean"] if starred else []),
    ]


def _own(figures: dict[str, Any]) -> str:
    """The median of our runs; some may have failed."""
    failed = f" ({figures['num_failed']} of {figures['num_runs']} failed)" if figures["num_failed"] else ""
    return _number(figures["median"]) + failed


def _label(one: dict[str, Any]) -> str:
    return f"{one['model']}, {one['split']} ({one['source']})"


def _score(one: dict[str, Any]) -> str:
    return _number(one["score"]) + ("" if one["same_metric"] else "*")


def _spread(figures: dict[str, Any]) -> str:
    if figures["median"] is None:
        return "not scored: no labels"
    if figures["num_runs"] == 1:
        return _number(figures["median"])
    return f"{figures['median']:.3f} [{figures['lower_quartile']:.3f}, {figures['upper_quartile']:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
