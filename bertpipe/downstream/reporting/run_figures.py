"""The plots of runs side by side: a colour for each run, and its name at the end of each curve; as figures.py, whose
helpers they use.

A trace's `meta` holds its x values by steps, tokens and hours; the page shows those that the reader chose.
"""

from __future__ import annotations

import html
from typing import Any

from bertpipe.downstream.reporting.figures import INIT_NAMES, smooth, validated
from bertpipe.downstream.reporting.record import is_number
from bertpipe.downstream.reporting.task_figures import Figure

AXES = {"step": "optimizer step", "tokens": "tokens seen", "hours": "hours of training"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def run_figures(runs: list[dict[str, Any]]) -> dict[str, Figure]:
    """Every figure that these runs, as side_by_side.py reads them, allow, by name."""
    trained = [run for run in runs if run["stage"] == "pretrain"]
    figures: dict[str, Figure] = {}
    if loss := [trace for run in trained for trace in _loss(run)]:
        figures["loss"] = _over_steps(loss + _floors(trained), "loss (nats per predicted token)")
    for name, curve, key, scale, unit, label in CURVES:
        data = [_curve(run, curve, key, scale, unit) for run in trained if _has(run, curve, key)]
        if data:
            figures[name] = _over_steps(data, label)
            if curve == "speed":
                figures[name]["layout"]["yaxis"]["rangemode"] = "tozero"
    tuned = [run for run in runs if run["stage"] == "finetune"]
    if any(_dots(run) for run in tuned):
        figures["scores"] = _scores(tuned)
    return {name: validated(figure) for name, figure in figures.items()}


def _over_steps(data: list[dict[str, Any]], label: str) -> Figure:
    axes: dict[str, Any] = {"xaxis": {"title": {"text": AXES["step"]}}, "yaxis": {"title": {"text": label}}}
    return {"data": data, "layout": axes | {"meta": {"axes": AXES}, "hovermode": "closest"}}


def _has(run: dict[str, Any], curve: str, key: str) -> bool:
    return any(is_number(value) for value in run["curves"][curve].get(key, []))


def _line(run: dict[str, Any], curve: str, values: list, **extra: Any) -> dict[str, Any]:
    """A curve of a run; `extra` goes over what is usual."""
    points = run["curves"][curve]["x"]
    known = [at for at, value in enumerate(values) if is_number(value)]
    last = max((at for at in known if points["hours"][at] is not None), default=max(known, default=None))
    return {
        "type": "scatter",
        "mode": "lines+text",
        "text": [run["name"] if at == last else "" for at in range(len(values))],
        "textposition": "middle right",
        "cliponaxis": False,
        "name": run["name"],
        "legendgroup": run["name"],
        "x": points["step"],
        "y": values,
        "meta": {"role": run["colour"], "x": points},
        "line": {"width": 1.8},
    } | extra


def _curve(run: dict[str, Any], curve: str, key: str, scale: float, unit: str) -> dict[str, Any]:
    values = [None if value is None else scale * value for value in run["curves"][curve][key]]
    extra = {"mode": "lines+markers+text", "marker": {"size": 5}} if curve == "eval" else {}
    values = smooth(values) if curve == "train" else values
    return _line(run, curve, values, hovertemplate=f"{run['name']}: %{{y:,.4~g}} {unit} at %{{x:,.4~g}}", **extra)


def _loss(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Training loss (moving average, thin and see-through), hold-out loss, and where phases begin."""
    curves, name = run["curves"], run["name"]
    train = curves["train"].get("mlm_loss", curves["train"].get("loss"))
    out, hover = [], "%{y:.3f} nats at %{x:,.4~g}<extra></extra>"
    evaluated = _has(run, "eval", "eval_loss")
    if train:
        faint = {"role": run["colour"], "opacity": 0.5 if evaluated else 1, "x": curves["train"]["x"]}
        look = {"line": {"width": 1.1}, "meta": faint, "showlegend": not evaluated}
        look |= {"mode": "lines"} if evaluated else {}
        hovered = {"hovertemplate": f"{name} training: {hover}"}
        out.append(_line(run, "train", smooth(train), name=f"{name} training", **look, **hovered))
    if evaluated:
        dots = {"mode": "lines+markers+text", "marker": {"size": 6}, "hovertemplate": f"{name} hold-out: {hover}"}
        out.append(_line(run, "eval", curves["eval"]["eval_loss"], **dots))
    return out + _phases(run, train)


def _phases(run: dict[str, Any], train: list | None) -> list[dict[str, Any]]:
    """A diamond on the training curve where each phase begins, with the length that comes."""
    steps, points = run["curves"]["train"].get("step", []), run["curves"]["train"]["x"]
    begun = [row for row in run.get("phases", [])[1:] if train]
    if not begun or not train:
        return []
    places = [next(at for at, step in enumerate(steps) if step >= row["first"]) for row in begun]
    x = {axis: [values[at] for at in places] for axis, values in points.items()}
    smoothed = smooth(train)
    return [
        _line(run, "train", [smoothed[at] for at in places], name=f"{run['name']}, longer sequences", showlegend=False)
        | {"x": x["step"], "meta": {"role": run["colour"], "x": x}, "mode": "markers+text", "textposition": "top right"}
        | {"text": [f"{row['sequence_length']} tokens" for row in begun], "marker": {"size": 9, "symbol": "diamond"}}
        | {"hovertemplate": f"{run['name']}: %{{text}} from here<extra></extra>"}
    ]


def _floors(trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The unigram cross-entropy: one line for the runs that share it, as far as the longest of them on each axis."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for run in trained:
        floor = run["pretrain"].get("eval_unigram_cross_entropy")
        if is_number(floor) and run["curves"]["train"].get("step"):
            groups.setdefault(round(floor, 3), []).append(run)
    return [_floor(those, floor, len(groups) == 1) for floor, those in groups.items()]


def _floor(runs: list[dict[str, Any]], floor: float, alone: bool) -> dict[str, Any]:
    name = "unigram cross-entropy" if alone else f"{', '.join(run['name'] for run in runs)} unigram"
    points = [run["curves"]["train"]["x"] for run in runs]
    x = {axis: [0, max((at for one in points for at in one[axis] if at is not None), default=0)] for axis in AXES}
    role = runs[0]["colour"] if len(runs) == 1 and not alone else "muted"
    line = {"width": 1.4, "dash": "dash"}
    return _line(runs[0], "train", [floor] * 2, name=name, legendgroup=name, line=line, mode="lines") | {
        "x": x["step"],
        "meta": {"role": role, "x": x, "opacity": 0.7},
        "hovertemplate": f"{name}: %{{y:.3f}} nats<extra></extra>",
    }


def _dots(run: dict[str, Any]) -> list[tuple[str, Any, float]]:
    """(task, seed, score) of a finetune run's own model."""
    return [
        (task, row.get("seed"), row["scores"][facts["metric"]])
        for task, facts in run["finetune"].items()
        for row in facts.get("runs") or []
        if row.get("init") == "model" and is_number((row.get("scores") or {}).get(facts.get("metric")))
    ]


def _scores(tuned: list[dict[str, Any]]) -> Figure:
    """Tasks down the side; of each run a dot a seed and a stroke at the median."""
    tasks = list(dict.fromkeys(task for run in tuned for task, _, _ in _dots(run)))
    data = [trace for number, run in enumerate(tuned) for trace in _score_traces(run, tasks, number, len(tuned))]
    axes: dict[str, Any] = {"xaxis": {"title": {"text": f"score of the {INIT_NAMES['model']} model"}}}
    axes["yaxis"] = {
        "tickvals": list(range(len(tasks))),
        "ticktext": [html.escape(task) for task in tasks],
        "range": [len(tasks) - 0.5, -0.5],
    }
    height = 110 + len(tasks) * max(50, 18 * len(tuned))
    return {"data": data, "layout": axes | {"hovermode": "closest", "height": height}}


def _score_traces(run: dict[str, Any], tasks: list[str], number: int, count: int) -> list[dict[str, Any]]:
    heights = {task: row + (number - (count - 1) / 2) * min(0.18, 0.8 / count) for row, task in enumerate(tasks)}
    dots = _dots(run)
    medians = {
        task: found["median"]
        for task in tasks
        if (found := (run["finetune"].get(task, {}).get("summary") or {}).get("model", {})).get("num_runs", 1) > 1
        and is_number(found.get("median"))
    }
    shared = {"type": "scatter", "mode": "markers", "name": run["name"], "legendgroup": run["name"]}
    shared |= {"meta": {"role": run["colour"]}}
    return [
        shared
        | {"x": [score for _, _, score in dots], "y": [heights[task] for task, _, _ in dots]}
        | {"text": [f"{html.escape(task)}, seed {seed}" for task, seed, _ in dots]}
        | {
            "marker": {"size": 9, "opacity": 0.75, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            "hovertemplate": f"{run['name']}: %{{text}}: %{{x:.4f}}<extra></extra>",
        },
        shared
        | {"x": list(medians.values()), "y": [heights[task] for task in medians]}
        | {
            "marker": {"symbol": "line-ns", "size": 18, "line": {"width": 2.4}},
            "showlegend": False,
            "hoverinfo": "skip",
        },
    ]


CURVES = (
    ("accuracy", "eval", "eval_accuracy", 100, "%", "hold-out tokens right (%)"),
    ("throughput", "speed", "tokens_per_second", 1, "tokens/s", "throughput (tokens/s)"),
    ("mfu", "speed", "mfu", 100, "%", "utilisation (MFU, %)"),
    ("data_wait", "speed", "data_wait_share", 100, "%", "time waiting for data (%)"),
    ("fill", "train", "fill", 100, "%", "real tokens in a slot (%)"),
    ("grad_norm", "train", "grad_norm", 1, "", "gradient norm (L2)"),
)
"""Name, curve, key, factor, unit and label of the plots beside the loss."""
