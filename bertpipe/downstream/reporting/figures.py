"""The report's plots, as plotly figures.

A trace names its role (`meta: {"role": ...}`) instead of a colour: the page colours it to suit light or dark.
Roles: accent, faint (accent, see-through), ink, muted.
"""

from __future__ import annotations

import html
import math
from typing import Any

from bertpipe.downstream.reporting.record import is_number
from bertpipe.downstream.reporting.task_figures import Figure, task_figures

INIT_NAMES = {
    "model": "pretrained",
    "scratch": "random weights",
    "tfidf": "TF-IDF + logistic regression",
    "majority": "majority class",
}
INIT_ROLES = {"model": "accent", "scratch": "ink"}
INIT_SYMBOLS = {"model": "circle", "scratch": "square", "tfidf": "diamond", "majority": "x"}


def make_figures(facts: dict[str, Any]) -> dict[str, Figure]:
    """Every figure these facts allow, by name: plotly JSON ({"data": [...], "layout": {...}}), safe to serialise."""
    curves, figures = facts.get("curves", {}), dict[str, Figure]()
    if curves.get("train", {}).get("step"):
        figures |= _training(curves, facts.get("config", {}))
    if curves.get("speed", {}).get("step"):
        figures |= _speed(curves["speed"])
    _mark_phases(figures, facts.get("phases", []))
    for name, (x, y, unit) in HISTOGRAMS.items():
        if counts := facts.get("tokenizer", {}).get(name):
            figures[name] = _histogram(counts, x, y, unit)
    if any(task.get("runs") for task in facts.get("finetune", {}).values()):
        figures["scores"] = _scores(facts["finetune"])
    for number, task in enumerate(facts.get("understanding", {}).values()):  # a task's name may be anything
        figures |= {f"task{number}_{name}": figure for name, figure in task_figures(task).items()}
    return {name: validated(figure) for name, figure in figures.items()}


def _mark_phases(figures: dict[str, Figure], rows: list[dict[str, Any]]) -> None:
    """A line where each phase but the first begins, and the lengths of all above the plot, in figures over steps."""
    for figure in figures.values():
        for row in rows:
            at = row["first"] - 1
            if at:
                line = {"type": "line", "xref": "x", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1}
                figure["layout"].setdefault("shapes", []).append(line)
            note = {"x": at, "y": 1, "xref": "x", "yref": "paper", "xanchor": "left", "yanchor": "top"}
            text = {"text": f"{row['sequence_length']} tokens", "showarrow": False}
            figure["layout"].setdefault("annotations", []).append(note | text)


def validated(figure: Figure) -> Figure:
    """Let plotly check every property name and value; the colours of its own template are dropped."""
    import plotly.graph_objects as go

    checked = go.Figure(figure).to_plotly_json()
    checked["layout"].pop("template", None)
    return checked


def _axes(x: str, y: str, **layout: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **layout}


def _line(x: list, y: list, name: str, role: str, hover: str, **extra: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "name": name,
        "meta": {"role": role},
        "hovertemplate": hover,
        "line": {"width": 1.8},
        **extra,
    }


def _percent(values: list[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def smooth(values: list[float | None]) -> list[float | None]:
    """Centred moving average over 4 % of the points, narrower at the ends so that it lags nowhere; gaps are skipped."""
    reach = max(1, len(values) // 50)
    out: list[float | None] = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = [value for value in values[index - near : index + near + 1] if value is not None]
        out.append(sum(window) / len(window) if window else None)
    return out


def _training(curves: dict[str, Any], config: dict[str, Any]) -> dict[str, Figure]:
    train, held = curves["train"], curves.get("eval", {})
    steps = train["step"]
    span = {"range": [0, steps[-1]]}  # markers would widen some plots' axes beyond their neighbours'
    figures: dict[str, Figure] = {}
    if "loss" in train:
        # of several parts `loss` is the sum, and the hold-out's is the masked-LM part alone
        data = _noisy(steps, train.get("mlm_loss", train["loss"]), ":.3f", "nats")
        data += _held_out(held, "eval_loss", held.get("eval_loss", []), ":.3f", "nats")
        floor = [value for value in held.get("eval_unigram_cross_entropy", []) if value is not None]
        if floor:
            name, hover = "unigram cross-entropy", "%{y:.3f} nats"
            line = _line([steps[0], steps[-1]], [floor[-1]] * 2, name, "muted", hover)
            data.append(line | {"line": {"width": 1.6, "dash": "dash"}})
        figures["loss"] = {"data": data, "layout": _axes("optimizer step", "loss (nats per predicted token)")}
    if "accuracy" in train:
        data = _noisy(steps, _percent(train["accuracy"]), ":.1f", "%")
        data += _held_out(held, "eval_accuracy", _percent(held.get("eval_accuracy", [])), ":.1f", "%")
        figures["accuracy"] = {"data": data, "layout": _axes("optimizer step", "masked tokens right (%)")}
    if pair := curves.get("pair"):
        figures |= _pairs(train, held, pair)
    if "lr" in train:
        data = [_line(steps, train["lr"], "learning rate", "accent", "%{y:.3g}")]
        figures["lr"] = {"data": data, "layout": _axes("optimizer step", "learning rate", showlegend=False)}
    if "grad_norm" in train:
        data = _noisy(steps, train["grad_norm"], ":.3g", "")
        limit = config.get("optim", {}).get("max_grad_norm")
        if is_number(limit):
            line = _line([steps[0], steps[-1]], [limit] * 2, "clipped above", "muted", "%{y}")
            data.append(line | {"line": {"width": 1.6, "dash": "dash"}})
        figures["grad_norm"] = {"data": data, "layout": _axes("optimizer step", "gradient norm (L2)")}
    if "fill" in train:
        data = _noisy(steps, _percent(train["fill"]), ":.2f", "%")
        layout = _axes("optimizer step", "real tokens in a slot (%)", showlegend=False)
        figures["fill"] = {"data": data, "layout": layout}
    for figure in figures.values():
        figure["layout"]["xaxis"] |= span
    return figures


def _pairs(train: dict[str, Any], held: dict[str, Any], pair: str) -> dict[str, Figure]:
    """Loss and accuracy of the second part of an objective on sentence pairs, beside what a coin would get."""
    steps, wide = train["step"], {"width": 1.6, "dash": "dash"}
    data = _noisy(steps, train[f"{pair}_loss"], ":.3f", "nats")
    data += _held_out(held, f"eval_{pair}_loss", held.get(f"eval_{pair}_loss", []), ":.3f", "nats")
    data.append(_line([steps[0], steps[-1]], [math.log(2)] * 2, "a coin", "muted", "%{y:.3f} nats", line=wide))
    loss = {"data": data, "layout": _axes("optimizer step", "loss (nats per pair)")}
    data = _noisy(steps, _percent(train[f"{pair}_accuracy"]), ":.1f", "%")
    right = _percent(held.get(f"eval_{pair}_accuracy", []))
    data += _held_out(held, f"eval_{pair}_accuracy", right, ":.1f", "%")
    data.append(_line([steps[0], steps[-1]], [50.0] * 2, "a coin", "muted", "%{y:.0f} %", line=wide))
    return {"pair_loss": loss, "pair_accuracy": {"data": data, "layout": _axes("optimizer step", "pairs right (%)")}}


def _noisy(steps: list, values: list[float | None], digits: str, unit: str) -> list[dict[str, Any]]:
    """A noisy curve: as measured, see-through, under its moving average."""
    hover = f"%{{y{digits}}} {unit}"
    if len(values) < 30:  # an average of so few would only hide them
        return [_line(steps, values, "training", "accent", hover)]
    raw = _line(steps, values, "training, as measured", "faint", hover, hoverinfo="skip", showlegend=False)
    raw.pop("hovertemplate")
    raw["line"] = {"width": 1}
    return [raw, _line(steps, smooth(values), "training", "accent", hover)]


def _held_out(held: dict, key: str, values: list, digits: str, unit: str) -> list[dict[str, Any]]:
    if not held.get(key):
        return []
    trace = _line(held["step"], values, "hold-out", "ink", f"%{{y{digits}}} {unit}")
    return [trace | {"mode": "lines+markers", "marker": {"size": 6}}]


def _speed(speed: dict[str, Any]) -> dict[str, Figure]:
    steps, figures = speed["step"], {}
    if "tokens_per_second" in speed:
        data = [_line(steps, speed["tokens_per_second"], "throughput", "accent", "%{y:,.0f} tokens/s")]
        layout = _axes("optimizer step", "throughput (tokens/s)", showlegend=False)
        layout["yaxis"]["rangemode"] = "tozero"
        figures["throughput"] = {"data": data, "layout": layout}
    if "data_wait_share" in speed:
        data = [_line(steps, _percent(speed["data_wait_share"]), "waiting", "accent", "%{y:.2f} %")]
        layout = _axes("optimizer step", "time waiting for data (%)", showlegend=False)
        layout["yaxis"]["rangemode"] = "tozero"
        figures["data_wait"] = {"data": data, "layout": layout}
    if any(is_number(value) for value in speed.get("mfu", [])):
        data = [_line(steps, _percent(speed["mfu"]), "utilisation", "accent", "%{y:.1f} %")]
        layout = _axes("optimizer step", "utilisation (MFU, %)", showlegend=False)
        layout["yaxis"]["rangemode"] = "tozero"
        figures["mfu"] = {"data": data, "layout": layout}
    return figures


def _histogram(counts: dict[str, int], x: str, y: str, unit: str) -> Figure:
    """Shares in percent of bins named by numbers (JSON keys); bins that double get bars of equal width."""
    bins = sorted(map(int, counts))
    doubling = len(bins) > 1 and all(value & (value - 1) == 0 for value in bins)
    total = sum(counts.values()) or 1
    bar = {
        "type": "bar",
        "x": [f"{value:,}" for value in bins] if doubling else bins,
        "y": [100 * counts[str(value)] / total for value in bins],
        "customdata": [counts[str(value)] for value in bins],
        "meta": {"role": "accent"},
        "hovertemplate": "%{y:.2f} % (%{customdata:,}) of " + unit,
        "name": "",
    }
    layout = _axes(x, y, showlegend=False, bargap=0.25)
    if doubling:
        layout["xaxis"]["type"] = "category"
    return {"data": [bar], "layout": layout}


def _scores(tasks: dict[str, Any]) -> Figure:
    """Tasks down the side; a dot for each run, a stroke at a median; a task's kinds of initialisation side by side."""
    tasks = {name: task for name, task in tasks.items() if task.get("runs")}
    inits = list(dict.fromkeys(run["init"] for task in tasks.values() for run in task["runs"]))
    data = [trace for init in inits for trace in _score_traces(tasks, init)]
    layout = _axes("score (each task in its own metric)", "", height=110 + 74 * len(tasks))
    layout["yaxis"] = {
        "tickvals": list(range(len(tasks))),
        "ticktext": [
            f"{html.escape(name)}<br>{html.escape(task.get('metric', '').replace('_', ' '))}"
            for name, task in tasks.items()
        ],
        "range": [len(tasks) - 0.5, -0.5],
    }
    return {"data": data, "layout": layout | {"hovermode": "closest"}}


def _score_traces(tasks: dict[str, Any], init: str) -> list[dict[str, Any]]:
    """The dots and the median strokes of one kind of initialisation."""
    dots: dict[str, list] = {"x": [], "y": [], "text": []}
    strokes: dict[str, list] = {"x": [], "y": []}
    for row, (name, task) in enumerate(tasks.items()):
        present = list(dict.fromkeys(run["init"] for run in task["runs"]))
        if init not in present:
            continue
        height = row + (present.index(init) - (len(present) - 1) / 2) * 0.18
        for run in task["runs"]:
            score = run.get("scores", {}).get(task.get("metric"))
            if run["init"] == init and is_number(score):
                dots["x"].append(score)
                dots["y"].append(height)
                dots["text"].append(f"{html.escape(name)}, seed {run.get('seed')}")
        summary = task.get("summary", {}).get(init, {})
        if summary.get("num_runs", 1) > 1 and is_number(summary.get("median")):
            strokes["x"].append(summary["median"])
            strokes["y"].append(height)
    shared = {
        "type": "scatter",
        "mode": "markers",
        "name": INIT_NAMES.get(init, init),
        "legendgroup": init,
        "meta": {"role": INIT_ROLES.get(init, "muted")},
    }
    dot = {"size": 9, "symbol": INIT_SYMBOLS.get(init, "circle"), "opacity": 0.75}
    stroke = {"symbol": "line-ns", "size": 18, "line": {"width": 2.4}}
    hover = "%{text}: %{x:.4f}<extra>%{fullData.name}</extra>"
    return [
        {**shared, **dots, "marker": dot, "hovertemplate": hover},
        {**shared, **strokes, "marker": stroke, "showlegend": False, "hoverinfo": "skip"},
    ]


HISTOGRAMS = {
    "word_tokens": ("tokens of a word", "words (%)", "words"),
    "word_characters": ("characters of a word", "words (%)", "words"),
    "document_tokens": ("tokens of a document, at most", "documents (%)", "documents"),
}
"""Of the tokenizer's report: x and y label, and what is counted."""
