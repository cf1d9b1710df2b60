"""What runs wrote, read back: JSON, lines of JSON, and the record of a run, of which a broken line is left out."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, TypeGuard

from bertpipe.errors import ArtifactError

MAX_POINTS = 1_200  # points of a curve; longer logs are averaged over blocks of steps
COUNTED = ("step", "tokens", "seconds")
"""Counted from the start of a run on."""


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float, and no larger than one; not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file, ArtifactError when it can't be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not readable as JSON ({error}); delete the artifact and rerun its stage"
        ) from None
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one a line; empty when there is no such file, ArtifactError naming a broken line."""
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ArtifactError(f"{path}:{number}: not readable as JSON ({error}); rerun its stage") from None
    return rows


def read_record(path: Path, broken: list[str], growing: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or speed.jsonl that can be read; empty when there is no such file.

    The others are left out, and named in `broken`: file, number of the line and what is wrong with it. The last line
    of a record that is `growing` may be half written: that is none.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, *([last] if last else [])], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not (growing and number > len(lines)):
                broken.append(f"{path}:{number}: not readable as JSON ({error})")
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        else:
            broken.append(f"{path}:{number}: no line of a record: it has no step")
    return rows


def broken_lines(broken: list[str], most: int = 3) -> list[str]:
    """What to say of the lines that `read_record` left out: how many, and the first of them."""
    if not broken:
        return []
    left = len(broken) - most
    said = [f"lines of the record that can't be read and are left out: {len(broken):,}", *broken[:most]]
    return said + ([f"and {left:,} more"] if left > 0 else [])


def block_size(num_rows: int, most: int = MAX_POINTS) -> int:
    """Rows averaged into one point of a curve of at most `most`."""
    return max(1, math.ceil(num_rows / most))


def columns(rows: list[dict[str, Any]], keys: tuple[str, ...], most: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """Rows to columns, averaged over blocks; what is COUNTED is the last of its block, gaps are None, unknown keys left
    out."""
    size = block_size(len(rows), most)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    out: dict[str, list[float | None]] = {}
    for key in keys:
        if any(key in row for row in rows):
            out[key] = [_number(block[-1].get(key)) if key in COUNTED else mean(block, key) for block in blocks]
    return out


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Over the rows that have a number there; None where none has."""
    values = [row[key] for row in rows if is_number(row.get(key))]
    return statistics.fmean(values) if values else None


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    """Over the rows that have a number there; None where none has."""
    values = [row[key] for row in rows if is_number(row.get(key))]
    return statistics.median(values) if values else None
