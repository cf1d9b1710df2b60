"""Columns of a table as Python or NumPy values, checked at the door: a DataError names file, row, column and remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bertpipe.downstream.tasks.kind import UNLABELLED, counted
from bertpipe.downstream.tasks.task_sources import near
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from bertpipe.downstream.tasks.kind import Task

LONGEST_TYPE = 60
"""Characters of a column's type that a message shows."""


def texts(table: pa.Table, task: Task, where: str) -> list[tuple[str, ...]]:
    """The texts of each example: the task's columns of text, or what its templates make of them."""
    columns = {column: strings(table, column, where) for column in task.text}
    for column, phrases in task.phrases.items():
        unknown = next((row for row, value in enumerate(columns[column]) if value not in phrases), None)
        if unknown is not None:
            raise DataError(
                f"{where}: row {unknown}: column {column!r} is {columns[column][unknown]!r}, "
                f"not one of {', '.join(phrases)}"
            )
        columns[column] = [phrases[value] for value in columns[column]]
    rows = zip(*columns.values(), strict=True)
    if not task.templates:
        return list(rows)
    named = (dict(zip(columns, row, strict=True)) for row in rows)
    return [tuple(template.format_map(row) for template in task.templates) for row in named]


def type_name(kind: pa.DataType) -> str:
    """A type in few words; that of an object names all its keys."""
    text = str(kind)
    return text if len(text) <= LONGEST_TYPE else f"{text[:LONGEST_TYPE]} ..."


def strings(table: pa.Table, column: str, where: str) -> list[str]:
    """A column of text, no value missing."""
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} holds {type_name(kind)}, not text")
    values = _decoded(table, column, where)
    if None in values:
        raise DataError(f"{where}: row {values.index(None)}: column {column!r} is null; remove the row or fill it in")
    return values


def lists(table: pa.Table, column: str, where: str) -> list[list[Any]]:
    """A column of lists, none of them missing or empty, no value of them missing."""
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{where}: column {column!r} holds {type_name(kind)}, not lists")
    rows = _decoded(table, column, where)
    for row, values in enumerate(rows):
        if not values or None in values:
            fault = "is null" if values is None else "holds a null" if values else "is an empty list"
            raise DataError(f"{where}: row {row}: column {column!r} {fault}; remove the row or fill it in")
    return rows


def _decoded(table: pa.Table, column: str, where: str) -> list[Any]:
    """The values; DataError names the row of text that is not UTF-8."""
    try:
        return table[column].to_pylist()
    except UnicodeDecodeError:
        row = next(row for row, value in enumerate(table[column]) if not _is_utf8(value))
        raise DataError(f"{where}: row {row}: column {column!r} is not UTF-8; write the file again as UTF-8") from None


def _is_utf8(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def identifiers(table: pa.Table) -> list[int] | list[str]:
    """The column `idx` or `id` where it has no nulls, or else the row numbers; what is no whole number as text."""
    import pyarrow as pa

    for column in ("idx", "id"):
        if column in table.column_names and table[column].null_count == 0:
            values = _decoded(table, column, column)
            return values if pa.types.is_integer(table.schema.field(column).type) else list(map(str, values))
    return list(range(table.num_rows))


def empty(texts: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """For `Split.counts` the examples with a text of white space alone, kept because the official scores count them."""
    return counted(with_an_empty_text=sum(not all(text.strip() for text in example) for example in texts))


def class_names(table: pa.Table, column: str, where: str) -> list[Any]:
    """A column of classes by name, or of lists of them: texts as they are, whole numbers and booleans as JSON has them.

    None: no label, which a null, an empty text and -1 mean. DataError for what is no name.
    """
    values = _decoded(table, column, where)
    return [_class_name(value, f"{where}: row {row}: column {column!r}") for row, value in enumerate(values)]


def _class_name(value: Any, place: str) -> Any:
    if isinstance(value, list):
        names = [_class_name(one, place) for one in value]
        if None in names:
            raise DataError(f"{place} has an empty text, a null or -1 in its list; leave it out")
        return names
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or value == UNLABELLED or (isinstance(value, str) and value.strip() in ("", str(UNLABELLED))):
        return None
    if not isinstance(value, bool | int | str):
        raise DataError(f"{place} is {str(value)[:60]}, not a class (a text or a whole number)")
    return value if isinstance(value, str) else json.dumps(value)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, sorted: by value where all are whole numbers, else as text."""
    each = set(names)
    numbers = all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in each)
    return tuple(sorted(each, key=(lambda name: (int(name), name)) if numbers else None))


def codes_of(values: Sequence[str], rows: Iterable[int], names: tuple[str, ...], column: str, where: str) -> list[int]:
    """The place of each value in `names`; DataError for one that isn't there, which stands in its row of `rows`."""
    codes = {name: code for code, name in enumerate(names)}
    for row, value in zip(rows, values, strict=True):
        if value not in codes:
            few = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise DataError(
                f"{where}: row {row}: column {column!r} has the label {value!r}, which no training row has; they have "
                f"{few}{near(value, names)}"
            )
    return [codes[value] for value in values]
