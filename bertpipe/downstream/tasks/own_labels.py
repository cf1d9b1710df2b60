"""The labels of a user's table, brought from the forms people keep them in into the one that their kind reads.

One column: names or numbers, or for multi_label lists of names. Nulls are rows without a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bertpipe.downstream.tasks.kind import UNLABELLED, Task
from bertpipe.downstream.tasks.task_sources import declared_names
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")
"""What the column of a single label says, in lower case."""
BLANK = ("", "nan", "-1", "-1.0")


def settle(table: pa.Table, task: Task, labels: Sequence[str], separator: str | None, where: str) -> pa.Table:
    """The table with ids in `idx`, if it has none those of `id` or row numbers, and the labels in column `task.label`.

    `labels` are the columns that hold them, perhaps none of them there; `separator` stands between those of a text.
    """
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # as pandas writes categories
            table = table.set_column(number, field.name, table[field.name].cast(field.type.value_type))
    if "idx" not in table.column_names:
        whole = "id" in table.column_names and table["id"].null_count == 0
        table = table.append_column("idx", table["id"] if whole else pa.array(range(table.num_rows)))
    if len(labels) > 1 and labels[0] in table.column_names:
        return table.append_column(task.label, _ticked(table, labels, where))
    if task.label not in table.column_names:
        return table
    values = table[task.label].to_pylist()
    kind = table.schema.field(task.label).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = [value if value and value.strip() else None for value in values]
        if separator is not None:
            values = [[part.strip() for part in (value or "").split(separator) if part.strip()] for value in values]
            changed = pa.array(values if any(values) else [None] * len(values), pa.list_(pa.string()))
        elif task.kind == "answers":
            raise DataError(f"{where}: column {task.label!r} holds text; answers need a .json, .jsonl or .parquet file")
        elif task.labels != ():
            changed = pa.array(_numbers(values, task, where))
        else:
            changed = pa.array(values, pa.string())
    elif names := declared_names(table, task):
        places = (f"{where}: row {row}: column {task.label!r}" for row in range(len(values)))
        changed = pa.array([_named(value, names, place) for value, place in zip(values, places, strict=True)])
    else:
        return table
    return table.set_column(table.column_names.index(task.label), task.label, changed)


def _numbers(values: Sequence[str | None], task: Task, where: str) -> list[float | None]:
    """Numbers, or codes where the task has some."""
    numbers: list[float | None] = []
    for row, value in enumerate(values):
        try:
            numbers.append(None if value is None else int(value) if task.labels else float(value))
        except ValueError:
            raise DataError(f"{where}: row {row}: column {task.label!r} is {value!r}, not a number") from None
    return numbers


def _named(value: Any, names: tuple[str, ...], place: str) -> Any:
    """The names of the codes that a data set's metadata names."""
    if isinstance(value, list):
        return [_named(one, names, place) for one in value]
    if value is None or value == UNLABELLED:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise DataError(f"{place} is {value}, not one of the {len(names)} codes that the file's metadata names")
    return names[value]


def _ticked(table: pa.Table, labels: Sequence[str], where: str) -> pa.Array:
    """Lists of the labels whose columns say yes."""
    import pyarrow as pa

    rows: list[list[str] | None] = [[] for _ in range(table.num_rows)]
    blank: list[list[str]] = [[] for _ in rows]
    for label in labels:
        for row, value in enumerate(table[label].to_pylist()):
            text = "" if value is None else str(value).lower().strip()
            if text in BLANK:
                blank[row].append(label)
            elif text in YES:
                rows[row].append(label)  # type: ignore[union-attr]
            elif text not in NO:
                raise DataError(f"{where}: row {row}: column {label!r} is {value!r}, neither 0 nor 1")
    for row, missing in enumerate(blank):
        if 0 < len(missing) < len(labels):
            raise DataError(
                f"{where}: row {row}: column {missing[0]!r} is empty, null or -1, other labels of the row not"
            )
        rows[row] = None if missing else rows[row]
    return pa.array(rows, pa.list_(pa.string()))
