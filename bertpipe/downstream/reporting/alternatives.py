"""What a plot shows, in words: for those who can't see it, and for pages without JavaScript."""

from __future__ import annotations

import html
import re
from typing import Any

from bertpipe.downstream.reporting.record import is_number

MAX_BARS = 12
MAX_TRACES = 12


def alternative(figure: dict[str, Any]) -> str:
    """A plotly figure in words: its axes, and where each curve begins, is lowest or highest, and ends."""
    layout, data = figure["layout"], figure["data"]
    x, y = (_plain(layout.get(axis, {}).get("title", {}).get("text") or "") for axis in ("xaxis", "yaxis"))
    if data and data[0]["type"] == "heatmap":
        return f"Heat map of {y} by {x}, {len(data[0]['y'])} rows and {len(data[0]['x'])} columns."
    named = [trace for trace in data if trace.get("hoverinfo") != "skip"]
    said = [text for trace in named[:MAX_TRACES] if (text := _trace(trace))]
    more = [f"{len(named) - MAX_TRACES} more"] if len(named) > MAX_TRACES else []
    marks = [_plain(note["text"]) for note in layout.get("annotations", [])]
    if marks:
        more.append(f"marked: {', '.join(marks)}")
    return f"{y or 'scores'} by {x}. " + "; ".join(said + more) + "."


def _trace(trace: dict[str, Any]) -> str:
    name = _plain(trace.get("name") or "")
    if trace["type"] == "bar":
        bars = [f"{x}: {_number(y)}" for x, y in zip(trace["x"], trace["y"], strict=True)]
        return ", ".join(bars[:MAX_BARS]) + (f", and {len(bars) - MAX_BARS} more" if len(bars) > MAX_BARS else "")
    points = [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if is_number(y)]
    if not points:
        return ""
    if trace["mode"] == "markers" and (texts := trace.get("text")):
        return f"{name}: " + ", ".join(
            f"{_plain(text)} {_number(x)}" for text, x in zip(texts, trace["x"], strict=True)
        )
    (first, start), (last, end) = points[0], points[-1]
    values = {value for _, value in points}
    if len(values) == 1:
        return f"{name}: {_number(start)} throughout"
    text = f"{name}: from {_number(start)} at {_number(first)} to {_number(end)} at {_number(last)}"
    low, high = min(values), max(values)
    outside = [
        f"{word} {_number(value)}" for word, value in (("lowest", low), ("highest", high)) if value not in (start, end)
    ]
    return f"{text} ({', '.join(outside)})" if outside else text


def _number(value: Any) -> str:
    """As people read it: thousands apart, four digits else."""
    if not is_number(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(text: str) -> str:
    """Without plotly's own markup."""
    return html.unescape(re.sub(r"<br>", ", ", text))
