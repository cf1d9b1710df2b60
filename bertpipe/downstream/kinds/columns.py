"""Columns of a table as Python or NumPy values, checked at the door: a DataError names file, row, column and remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from bertpipe.downstream.kind import Task


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


def strings(table: pa.Table, column: str, where: str) -> list[str]:
    """A column of text, no value missing."""
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} holds {kind}, not text")
    values = _decoded(table, column, where)
    if None in values:
        raise DataError(f"{where}: row {values.index(None)}: column {column!r} is null; remove the row or fill it in")
    return values


def lists(table: pa.Table, column: str, where: str) -> list[list[Any]]:
    """A column of lists, none of them missing or empty, no value of them missing."""
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{where}: column {column!r} holds {kind}, not lists")
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
    """The column `idx` or `id`, or else the row numbers."""
    for column in ("idx", "id"):
        if column in table.column_names:
            return table[column].to_pylist()
    return list(range(table.num_rows))


def num_empty(texts: list[tuple[str, ...]]) -> int:
    """How many examples have a text of white space alone."""
    return sum(not all(text.strip() for text in example) for example in texts)
