"""A user's table, of the forms of FORMS or .parquet, as an Arrow table; what is wrong in it is said in one line.

Files of text may be compressed (.gz, .zst) and in any encoding that is named; they are read whole.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertpipe.config import TaskConfig
from bertpipe.data.codecs import CODECS, DamagedError, magic_of
from bertpipe.downstream.tasks import conll_files
from bertpipe.downstream.tasks.task_sources import read_table
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def form_of(path: Path) -> tuple[str, str] | None:
    """(form, codec) by the file's name, ("csv", "gz") of x.csv.gz; None for a name that says no form."""
    parts = path.name.lower().split(".")
    codec = parts.pop() if len(parts) > 2 and parts[-1] in CODECS else ""
    form = parts[-1] if len(parts) > 1 else ""
    return (form, codec) if f".{form}" in ENDINGS and not (codec and form == "parquet") else None


def read_file(path: Path, settings: TaskConfig, wanted: Sequence[str]) -> pa.Table:
    """The columns `wanted`, those that there are; all others stand in the table by name alone, as nulls.

    Of csv and tsv every value is text; of json and jsonl an absent key is null. The file is one with a form. DataError
    names it, with line or row.
    """
    import pyarrow as pa

    found = form_of(path)
    assert found is not None, path
    form, codec = found
    if form == "parquet":
        return read_table(path)
    columns = FORMS[form](path, _text(path, codec, settings.encoding), settings)
    length = len(next(iter(columns.values()), []))
    return pa.table(
        {name: _array(path, name, values) if name in wanted else pa.nulls(length) for name, values in columns.items()}
    )


def _text(path: Path, codec: str, encoding: str) -> str:
    """A whole file, decoded."""
    try:
        with path.open("rb") as file:
            data = b"".join(CODECS[codec](file))
    except DamagedError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    if compressed := magic_of(data[:4]):
        raise DataError(f"{path}: {compressed}, but not named so; rename it to end in .gz or .zst")
    wide = data.startswith(WIDE_BOMS)
    try:
        text = data.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeError as error:
        at = error.start if isinstance(error, UnicodeDecodeError) else 0
        line, guess = 1 + data.count(b"\n", 0, at), "utf-16" if wide else "cp1252"
        raise DataError(
            f"{path}: line {line}: not {encoding.upper()} at byte {at}; say what it is, e.g. "
            f"finetune.task.encoding: {guess}, or write it anew: iconv -f {guess.upper()} -t UTF-8 {path.name}"
        ) from None
    if (at := text.find("\0")) >= 0:
        line = 1 + text.count("\n", 0, at)
        raise DataError(
            f"{path}: line {line}: a NUL character; if the file is UTF-16 set finetune.task.encoding: utf-16"
        )
    return text


# --- csv, tsv ---------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, text: str, settings: TaskConfig, usual: str = ",") -> dict[str, Sequence[str]]:
    """RFC 4180: a header, quotes doubled within quotes, line ends within quotes. Blank lines stand at the end alone."""
    delimiter = settings.delimiter or usual
    rows = _records(path, text, delimiter, settings.quotes)
    _, header = next(rows, (0, []))
    if not header:
        raise DataError(f"{path}: no header; its first line must name the columns")
    if double := next((name for name in header if header.count(name) > 1), None):
        raise DataError(f"{path}: two columns are called {double!r}; rename one of them")
    kept, blank = [], 0
    for line, row in rows:
        if not row and len(header) > 1:
            blank = blank or line
            continue
        if blank:
            raise DataError(f"{path}: line {blank}: blank; remove it")
        if len(row or [""]) != len(header):
            raise DataError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(header)}; quote a field that holds "
                f"{delimiter!r}, or set finetune.task.delimiter"
            )
        kept.append(row or [""])
    return dict(zip(header, zip(*kept, strict=True) if kept else itertools.repeat(()), strict=False))


def _records(path: Path, text: str, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """Each record's first line, from 1, and its fields."""
    limit = csv.field_size_limit(len(text) + 1)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: line {line}: its quotes don't close ({error}); double a quote within quotes, or, if quotes mean "
            "nothing in this file, set finetune.task.quotes: false"
        ) from None
    finally:
        csv.field_size_limit(limit)


# --- json, jsonl ------------------------------------------------------------------------------------------------------


def _read_json(path: Path, text: str, settings: TaskConfig) -> dict[str, Sequence[Any]]:
    """A list of objects; or, as many tools write .json, an object a line."""
    if text.lstrip()[:1] != "[":
        if "\n" in text.strip() and _is_one_object(text):
            raise DataError(f"{path}: one object; write a list of objects {{column: value, ...}}, or one a line")
        return _read_jsonl(path, text, settings)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: broken JSON at column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: JSON that can't be read ({str(error)[:100]})") from None
    return _columns(path, ((f"row {number}", row) for number, row in enumerate(rows)))


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False


def _read_jsonl(path: Path, text: str, settings: TaskConfig) -> dict[str, Sequence[Any]]:
    return _columns(path, _lines(path, text))


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = text.rstrip().split("\n")
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        where = f"line {number}"
        if not line.strip():
            raise DataError(f"{path}: {where}: blank; remove it")
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: {where}: broken JSON at column {error.colno} ({error.msg})") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}: {where}: JSON that can't be read ({str(error)[:100]})") from None


def _columns(path: Path, rows: Iterable[tuple[str, Any]]) -> dict[str, Sequence[Any]]:
    """Objects as columns."""
    columns: dict[str, list[Any]] = {}
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: {where}: not an object {{column: value, ...}} but {json.dumps(row)[:60]}")
        for name in row:
            columns.setdefault(name, [None] * number)
        for name, values in columns.items():
            values.append(row.get(name))
    return dict(columns)


def _read_conll(path: Path, text: str, settings: TaskConfig) -> dict[str, Sequence[Any]]:
    """Lists of words and of their tags."""
    return conll_files.columns(path, text, settings.delimiter)


def _array(path: Path, name: str, values: Sequence[Any]) -> pa.Array:
    """One column; DataError names the first row that doesn't go with those before."""
    import pyarrow as pa

    unfit = (pa.ArrowException, TypeError, ValueError, OverflowError)  # half characters are a ValueError
    try:
        return pa.array(values)
    except unfit:
        pass
    first = next(value for value in values if value is not None)
    for row, value in enumerate(values):
        try:
            pa.array([value]), pa.array([first, value])
        except unfit:
            shown = json.dumps(value)[:60]
            raise DataError(
                f"{path}: row {row}: column {name!r} holds {shown}, which can't stand with {json.dumps(first)[:60]} "
                "above; give the whole column one type"
            ) from None
    raise DataError(f"{path}: column {name!r} holds values of several types; give the whole column one type")


FORMS: dict[str, Callable[[Path, str, TaskConfig], dict[str, Sequence[Any]]]] = {
    "csv": _read_csv,
    "tsv": functools.partial(_read_csv, usual="\t"),
    "json": _read_json,
    "jsonl": _read_jsonl,
    "conll": _read_conll,
}
ENDINGS = tuple(f".{form}" for form in (*FORMS, "parquet"))
