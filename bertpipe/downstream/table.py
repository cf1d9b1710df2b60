"""What a fine-tuning command says at its end: a row a task, and the published models beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bertpipe.downstream.grid import MODEL, Point


def lines(tables: dict[str, Any]) -> list[str]:
    """The tasks' parts of scores.json as an aligned table, its notes, and the failed runs by name."""
    inits = [init for init in _different(row["summary"] for row in tables.values()) if init != MODEL]
    others = _different(_label(one) for row in tables.values() for one in row["published"])
    gridded = any(row["grid"] for row in tables.values())
    head = ["task", "metric", "median [quartiles]", "failed", *(["chosen"] if gridded else []), *inits, *others]
    rows = [head]
    for name, row in tables.items():
        own = row["summary"][MODEL]
        cells = [name, row["metric"].replace("_", " "), _spread(own), f"{own['num_failed']} of {own['num_runs']}"]
        if gridded:
            cells.append(str(Point(**own["point"])) if "point" in own else "")
        cells += [_number(row["summary"].get(init, {}).get("median")) for init in inits]
        known = {_label(one): one for one in row["published"]}
        cells += [
            _number(known[label]["score"]) + ("" if known[label]["same_metric"] else "*") if label in known else "-"
            for label in others
        ]
        rows.append(cells)
    return [*_aligned(rows), *_notes(tables, others)]


def _notes(tables: dict[str, Any], others: list[str]) -> list[str]:
    notes = []
    for name, row in tables.items():
        notes += [f"{name} {metric.replace('_', ' ')}: median {x:.3f}" for metric, x in row["further"].items()]
        for init, figures in row["summary"].items():
            if "median_of_sound" in figures:
                notes.append(f"{name} {init}: median of the sound runs {figures['median_of_sound']:.3f}")
        notes += [
            f"{name} {run['init']} seed {run['seed']} failed: {run['failed']}" for run in row["runs"] if run["failed"]
        ]
    for label in others:
        sources = _different(
            one["source"] for row in tables.values() for one in row["published"] if _label(one) == label
        )
        notes.append(f"{label}: {'; '.join(sources)}")
    if any(not one["same_metric"] for row in tables.values() for one in row["published"]):
        notes.append("* the paper doesn't say which of the task's two metrics this is")
    return notes


def _label(one: dict[str, Any]) -> str:
    return f"{one['model']} {one['split']}"


def _spread(figures: dict[str, Any]) -> str:
    if figures["num_runs"] == 1:
        return _number(figures["median"])
    return f"{figures['median']:.3f} [{figures['lower_quartile']:.3f}, {figures['upper_quartile']:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _different(values: Iterable[Any]) -> list[Any]:
    """Each once, in order; of mappings their keys."""
    return list(dict.fromkeys(one for value in values for one in ([value] if isinstance(value, str) else value)))


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
