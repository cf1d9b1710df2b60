"""Runs side by side: their curves in one plot, their figures in one table, and the settings in which they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.downstream.reporting import pages, report
from bertpipe.downstream.reporting.alternatives import alternative
from bertpipe.downstream.reporting.facts import describe, pretraining
from bertpipe.downstream.reporting.figures import INIT_NAMES
from bertpipe.downstream.reporting.record import is_number, read_json
from bertpipe.downstream.reporting.run_figures import AXES, run_figures

FIGURES = (
    ("steps", "Steps", report.integer),
    ("tokens", "Tokens", report.compact),
    ("eval_loss", "Hold-out loss", report.fixed),
    ("gap", "Below unigram", report.fixed),
    ("eval_accuracy", "Masked accuracy", report.percent),
    ("eval_nsp_accuracy", "Next sentence", report.percent),
    ("eval_sop_accuracy", "Sentence order", report.percent),
    ("train_seconds", "Training time", report.duration),
    ("tokens_per_second", "Tokens/s", report.integer),
    ("mfu", "MFU", report.percent),
    ("data_wait_share", "Waiting for data", report.percent),
    ("fill", "Text in slots", report.percent),
    ("memory_bytes", "Peak memory", report.byte_size),
    ("parameters", "Parameters", report.compact),
    ("device", "Device", str),
    ("precision", "Precision", str),
    ("world_size", "Processes", report.integer),
    ("threads", "Threads each", report.integer),
)
"""Columns of the table of pretraining runs: key, label, and how it is shown."""
ELSEWHERE = {"pretrain": ("finetune", "report", "publish"), "finetune": ("report", "publish")}
"""Sections of a run's settings that are about something else."""
PLACES = ("runtime.root",)


def read(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run, as JSON; `unfinished` is there while it is still going."""
    broken: list[str] = []
    config = dict(manifest.get("config", {}))
    run: dict[str, Any] = {
        "stage": manifest["stage"],
        "folder": str(folder),
        "title": config.get("report", {}).get("title"),
        "artifact": describe(manifest["stage"], folder, manifest),
        "parents": manifest.get("parents", {}),
        "broken": broken,
    }
    if manifest["stage"] == "pretrain":
        run |= pretraining(folder, manifest, config, broken)
        if run.get("unfinished"):
            run["pretrain"].setdefault("steps", run["unfinished"]["step"])
        _place(run["curves"])
    else:
        run["finetune"] = read_json(folder / "scores.json").get("tasks", {})
        if not artifact.is_complete(folder):
            run["unfinished"] = {}
    return run | {"settings": settings(manifest, config)}


def settings(manifest: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Every setting, parent and version that may tell runs apart, flat; a setting that is newer than the run has its
    default."""
    away = ELSEWHERE[manifest["stage"]]
    if manifest["stage"] == "finetune" and config.get("finetune", {}).get("model"):
        away += ("corpus", "tokenizer", "shards", "model", "masking", "optim", "train")
    given, default = (_flat(tree, away) for tree in (config, Config().model_dump(mode="json")))
    flat = {key: value for key, value in (default | given).items() if key not in PLACES}
    for key, value in _flat(manifest.get("raw") or {}).items():
        flat[f"content of {key}"] = artifact.digest(value)[:12] if isinstance(value, list) else value
    flat |= {f"made from {stage}": mark[:12] for stage, mark in manifest.get("parents", {}).items()}
    versions = {"bertpipe": manifest.get("code_version")} | manifest.get("environment", {})
    return flat | {f"version of {name}": version for name, version in versions.items() if version}


def _flat(tree: dict[str, Any], away: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in away:
            out |= _flat(value, (), f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def differing(runs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) where those that have it are not all alike; a dash where a run has none."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run["settings"]):
        known = [run["settings"][key] for run in runs if key in run["settings"]]
        if any(value != known[0] for value in known):
            values = [run["settings"].get(key, report.UNKNOWN) for run in runs]
            rows.append((key, ["none" if value is None else str(value) for value in values]))
    return rows


def _place(curves: dict[str, Any]) -> None:
    """Give the curves of steps and evaluations `x`: where each point lies by steps, by tokens and by hours; a point
    after the last line of speed.jsonl has no hour."""
    train, speed = curves["train"], curves["speed"]
    for name in ("train", "eval", "speed"):
        steps = curves[name].get("step", [])
        x = {"step": steps, "tokens": _along(steps, train.get("step", []), train.get("tokens", []))}
        x["hours"] = _along(
            steps, speed.get("step", []), [value and value / 3600 for value in speed.get("seconds", [])]
        )
        curves[name]["x"] = x


def _along(steps: list, known: list, values: list) -> list[float | None]:
    """Where steps lie on another scale that begins at 0, between the points that are known; None beyond them."""
    pairs = [(step, value) for step, value in zip(known, values, strict=False) if is_number(value)]
    if not pairs:
        return [None] * len(steps)
    at, there = zip((0, 0), *pairs, strict=True)
    found = np.interp(steps, at, there)
    return [round(float(value), 6) if step <= at[-1] else None for step, value in zip(steps, found, strict=True)]


def render(runs: list[dict[str, Any]]) -> str:
    """The page. Every text is escaped by the template engine."""
    for number, run in enumerate(runs):
        run["name"] = chr(ord("A") + number) if len(runs) <= 26 else str(number + 1)
        run["colour"] = f"run{number % 8}"
    trained = [run for run in runs if run["stage"] == "pretrain"]
    figures = report.clean(run_figures(runs))
    shown = [row for row in FIGURES if any(run["pretrain"].get(row[0]) is not None for run in trained)]
    return pages.render(
        "side_by_side.html.jinja",
        report.FILTERS,
        runs=runs,
        trained=trained,
        tuned=[run for run in runs if run["stage"] == "finetune"],
        columns=[label for _, label, _ in shown],
        table=[[_cell(run["pretrain"].get(key), show) for key, _, show in shown] for run in trained],
        same_text=len({run["parents"].get("shards") for run in trained}) < 2,
        scores=score_rows(runs),
        differing=differing(runs),
        figures=figures,
        alternatives={name: alternative(figure) for name, figure in figures.items()},
        axes=AXES,
        broken=[line for run in runs for line in run["broken"]],
        now=report.now(),
        **pages.with_plots("plots.js"),
    )


def _cell(value: Any, show: Any) -> str:
    return report.UNKNOWN if value is None else show(value)


def score_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and start: {"task", "metric", "start", "ours", "summaries"}, of each finetune run its summary
    or None."""
    tuned = [run["finetune"] for run in runs if run["stage"] == "finetune"]
    rows = []
    for task in dict.fromkeys(name for tasks in tuned for name in tasks):
        found = [tasks.get(task, {}) for tasks in tuned]
        starts = dict.fromkeys(start for one in found for start in one.get("summary") or {})
        metric = next((one["metric"] for one in found if one.get("metric")), "")
        for start in starts:
            summaries = [(one.get("summary") or {}).get(start) for one in found]
            names = {"task": task, "metric": metric.replace("_", " "), "start": INIT_NAMES.get(start, start)}
            rows.append(names | {"ours": start == "model", "summaries": summaries})
    return rows
