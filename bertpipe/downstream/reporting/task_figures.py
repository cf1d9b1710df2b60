"""The plots of one fine-tuned task, from what understanding.py says of it; as figures.py, whose roles they use."""

from __future__ import annotations

import html
from typing import Any

Figure = dict[str, Any]

WRITTEN_CLASSES = 12  # of a confusion matrix with its counts written in


def task_figures(facts: dict[str, Any]) -> dict[str, Figure]:
    """Every figure that these facts of a task allow, by name."""
    figures: dict[str, Figure] = {}
    if facts.get("confusion"):
        figures["confusion"] = _confusion(**facts["confusion"])
    if facts.get("scatter"):
        figures["scatter"] = _scatter(**facts["scatter"])
    if facts.get("by_length"):
        figures["length"] = _length(facts["by_length"], facts["metric"], facts.get("score"))
    runs = facts.get("curves", [])
    if any(run.get("loss") for run in runs):
        figures["loss"] = _curves(runs, "step", "loss", "optimizer step", "training loss", "step %{x}: %{y:.3f}")
    if any(len(run.get("scores", [])) > 1 for run in runs):
        runs = [run | {"epochs": list(range(1, len(run["scores"]) + 1))} for run in runs]
        label = f"{_words(facts['metric'])} on {_words(facts['split'])}"
        figures["epochs"] = _curves(runs, "epochs", "scores", "epoch", label, "epoch %{x}: %{y:.4f}")
        figures["epochs"]["layout"]["xaxis"]["dtick"] = 1 if len(runs[0]["epochs"]) <= 12 else None
    return figures


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))  # plotly takes some tags for its own


def _confusion(classes: list[str], counts: list[list[int]]) -> Figure:
    """Rows by label, columns by prediction, coloured by the share of the label's examples."""
    names, ticks = [html.escape(name) for name in classes], list(range(len(classes)))
    heat: dict[str, Any] = {
        "type": "heatmap",
        "z": [[round(100 * n / max(1, sum(row)), 2) for n in row] for row in counts],
        "customdata": counts,
        "zmin": 0,
        "zmax": 100,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "meta": {"role": "accent"},
        "hovertemplate": "labelled %{y}, predicted %{x}: %{customdata:,} (%{z:.1f} % of the label)<extra></extra>",
        "x": names,
        "y": names,
    }
    if len(classes) <= WRITTEN_CLASSES:
        heat |= {"text": counts, "texttemplate": "%{text:,}"}
    short = [html.escape(name if len(name) <= 24 else f"{name[:23]}…") for name in classes]
    axis = {"tickvals": ticks, "ticktext": short, "type": "category"}
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "prediction"}, **axis},
        "yaxis": {"title": {"text": "label"}, **axis, "autorange": "reversed"},
        "hovermode": "closest",
    }
    if len(classes) > 6:
        layout["height"] = 190 + 22 * len(classes)
    return {"data": [heat], "layout": layout}


def _scatter(gold: list[float], predicted: list[float]) -> Figure:
    ends = [min(gold + predicted), max(gold + predicted)]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": gold,
        "y": predicted,
        "name": "examples",
        "meta": {"role": "accent"},
        "marker": {"size": 5, "opacity": 0.45},
        "hovertemplate": "label %{x:.3g}, predicted %{y:.3g}<extra></extra>",
    }
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "name": "as labelled",
        "meta": {"role": "muted"},
        "line": {"width": 1.6, "dash": "dash"},
        "hoverinfo": "skip",
    }
    layout = {"xaxis": {"title": {"text": "label"}}, "yaxis": {"title": {"text": "prediction"}}}
    return {"data": [dots, line], "layout": layout | {"hovermode": "closest", "showlegend": False}}


def _length(by_length: dict[str, Any], metric: str, overall: float | None) -> Figure:
    bins = by_length["bins"]
    same = [b["shortest"] == b["longest"] for b in bins]
    names = [
        f"{b['shortest']}" if one else f"{b['shortest']}–{b['longest']}" for b, one in zip(bins, same, strict=True)
    ]
    dots: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": names,
        "y": [b["score"] for b in bins],
        "customdata": [b["num"] for b in bins],
        "name": "",
        "meta": {"role": "accent"},
        "line": {"width": 1.8},
        "marker": {"size": 8},
        "hovertemplate": "%{y:.4f} of %{customdata:,} examples<extra></extra>",
    }
    if all("lowest" in b for b in bins):
        dots["error_y"] = {
            "type": "data",
            "array": [max(0.0, b["highest"] - b["score"]) for b in bins],
            "arrayminus": [max(0.0, b["score"] - b["lowest"]) for b in bins],
            "thickness": 1.2,
            "width": 4,
        }
    data = [dots]
    if overall is not None:
        flat = {"type": "scatter", "mode": "lines", "x": names, "y": [overall] * len(bins), "name": "all"}
        data.append(flat | {"meta": {"role": "muted"}, "line": {"width": 1.4, "dash": "dash"}, "hoverinfo": "skip"})
    axis = {"title": {"text": f"length ({by_length['unit']})"}, "type": "category"}
    layout = {"xaxis": axis, "yaxis": {"title": {"text": _words(metric)}}, "showlegend": False}
    return {"data": data, "layout": layout | {"hovermode": "closest"}}


def _curves(runs: list[dict[str, Any]], x: str, y: str, x_label: str, y_label: str, hover: str) -> Figure:
    """A line a run, the best one in front."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if x == "epochs" else "lines",
            "x": run[x],
            "y": run[y],
            "name": f"seed {run['seed']}" + (", the best" if run["best"] else ""),
            "meta": {"role": "accent" if run["best"] else "muted"},
            "line": {"width": 2.2 if run["best"] else 1},
            "marker": {"size": 6 if run["best"] else 4},
            "hovertemplate": f"{hover}<extra>seed {run['seed']}</extra>",
        }
        for run in sorted(runs, key=lambda run: run["best"])
        if run.get(y)
    ]
    layout = {"xaxis": {"title": {"text": x_label}}, "yaxis": {"title": {"text": y_label}}}
    return {"data": data, "layout": layout | {"hovermode": "closest", "showlegend": False}}
