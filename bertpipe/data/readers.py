"""Read one input file into documents: .txt, .jsonl or .parquet, plain or with .gz or .zst behind it.

Strict: what can't be read exactly becomes a `Bad` record with its exact place, and never a guess. The caller decides
whether that stops the run or is counted; here reading goes on with the next record. Memory stays bounded whatever
the file holds: text is decompressed and split in pieces, and a record longer than `record_limit` is given up.

A UTF-8 byte-order mark and CRLF line ends are text files' own ways and accepted; NUL bytes, UTF-16 and a compressed
file under an uncompressed name are not.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from bertpipe.artifact import writing
from bertpipe.config import CorpusConfig
from bertpipe.data.codecs import CHUNK, CODECS, FREE_BYTES, MAX_RATIO, Codec, DamagedError, magic_of, plain
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 128
"""Rows of a parquet file held as Python strings at once."""
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A document as it was read: its text, not yet cleaned."""

    text: str
    source: str
    """Name of the file or data set it comes from."""
    group: str | None = None
    """Documents of one group go to the same side of the hold-out split; None: the text decides."""


class Bad(NamedTuple):
    """A record (or as many as are lost together) that can't be read."""

    message: str
    """One line: file, place, what is wrong and what to do."""
    records: int = 1


def record_limit(config: CorpusConfig) -> int:
    """Longest record in bytes: the longest document allowed, fully escaped as JSON, and room for its other fields."""
    return (16 << 20) + 6 * config.max_chars


def read_file(path: Path, config: CorpusConfig) -> Iterator[Document | Bad]:
    """Documents and bad records of one file, in order. Raises DataError for a name that `split_name` refuses."""
    form, codec = split_name(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
            problem = _wrong_name(head, codec)
            if problem:
                yield Bad(f"{path}: byte 0: {problem}")
                return
            file.seek(0)
            yield from FORMATS[form](path, file, CODECS[codec], config)
    except OSError as error:
        yield Bad(f"{path}: {error.strerror or error}")


def split_name(path: Path) -> tuple[str, str]:
    """(format, codec) by the file's name: ("jsonl", "zst") of x.jsonl.zst; codec is "" for a plain file."""
    parts = path.name.lower().split(".")
    codec = parts.pop() if parts[-1] in CODECS and len(parts) > 1 else ""
    if len(parts) > 1 and parts[-1] in FORMATS:
        return parts[-1], codec
    endings = ", ".join(f".{form}" for form in FORMATS)
    raise DataError(f"{path}: not a kind of file that corpus.sources reads ({endings}, each plain or with .gz or .zst)")


def _wrong_name(head: bytes, codec: str) -> str | None:
    found = magic_of(head)
    if found and not codec:
        return f"{found}, but not named so; rename it to end in .{'gz' if found.startswith('gzip') else 'zst'}"
    if codec == "gz" and not head.startswith(b"\x1f\x8b"):
        return "not a gzip file though it is named .gz; rename or remove it"
    return None


# --- text -------------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int
    """From 1."""
    offset: int
    """Of its first byte in the (uncompressed) text."""
    data: bytes | None
    """Without the line end; None when it is longer than the limit."""


def _lines(pieces: Iterator[bytes], limit: int) -> Iterator[_Line]:
    """Split at "\\n" alone, in bounded memory. A line that the damage cut off is not given out.

    One that is too long is told of at once, so that nobody has to read to its end to refuse it.
    """
    kept: list[bytes] = []
    number, offset, length = 1, 0, 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for part in whole:
            if length <= limit:
                fits = length + len(part) <= limit
                yield _Line(number, offset, b"".join((*kept, part)) if fits else None)
            number, offset, length = number + 1, offset + length + len(part) + 1, 0
            kept.clear()
        if length <= limit:
            kept.append(rest)
            if length + len(rest) > limit:
                kept.clear()
                yield _Line(number, offset, None)
        length += len(rest)
    if 0 < length <= limit:
        yield _Line(number, offset, b"".join(kept))


def _decoded_lines(
    path: Path, file: IO[bytes], codec: Codec, config: CorpusConfig
) -> Iterator[tuple[_Line, str] | Bad]:
    """Each line with its text, or what is wrong with it."""
    within = "" if codec is plain else " of the uncompressed text"
    limit = record_limit(config)
    try:
        for line in _lines(codec(file), limit):
            if line.data is None:
                yield Bad(
                    f"{path}: line {line.number}: longer than {limit} bytes (it starts at byte {line.offset}{within}); "
                    "split it, or raise corpus.max_chars"
                )
                continue
            skip = len(BOM) if line.number == 1 and line.data.startswith(BOM) else 0
            text, wrong = _decode(line.data[skip:], line.offset + skip)
            if wrong:
                yield Bad(f"{path}: line {line.number}: {wrong}{within}; {_MEND}")
            else:
                yield line._replace(offset=line.offset + skip), text
    except DamagedError as error:
        yield Bad(f"{path}: {error}")


_MEND = "mend the file, or set corpus.on_error: skip"


def _decode(data: bytes, offset: int) -> tuple[str, str]:
    """(text, "") or ("", what is wrong and at which byte)."""
    at = data.find(b"\0")
    if at >= 0:
        return "", f"a NUL byte (binary or UTF-16?) at byte {offset + at}"
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {offset + error.start}"


def _read_txt(path: Path, file: IO[bytes], codec: Codec, config: CorpusConfig) -> Iterator[Document | Bad]:
    if config.txt_documents == "line":
        for line in _decoded_lines(path, file, codec, config):
            yield line if isinstance(line, Bad) else Document(line[1], path.name)
        return
    whole, limit = bytearray(), record_limit(config)
    try:
        for piece in codec(file):
            whole += piece
            if len(whole) > limit:
                yield Bad(
                    f"{path}: one document of more than {limit} bytes; if each line is a document, "
                    "set corpus.txt_documents: line"
                )
                return
    except DamagedError as error:
        yield Bad(f"{path}: {error}")
        return
    skip = len(BOM) if whole.startswith(BOM) else 0
    text, wrong = _decode(bytes(whole[skip:]), skip)
    within = "" if codec is plain else " of the uncompressed text"
    yield Bad(f"{path}: {wrong}{within}; {_MEND}") if wrong else Document(text, path.name)


def _read_jsonl(path: Path, file: IO[bytes], codec: Codec, config: CorpusConfig) -> Iterator[Document | Bad]:
    for item in _decoded_lines(path, file, codec, config):
        if isinstance(item, Bad):
            yield item
            continue
        line, text = item
        if not text.strip():
            yield Document("", path.name)  # a blank line is an empty record
            continue
        value, wrong = _text_of(text, line.offset, config.text_key)
        yield Bad(f"{path}: line {line.number}: {wrong}; {_MEND}") if wrong else Document(value, path.name)


def _text_of(line: str, offset: int, key: str) -> tuple[str, str]:
    """(the text under `key`, "") or ("", what is wrong with the JSON line)."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return "", f"broken JSON at byte {offset + len(line[: error.pos].encode())} ({error.msg})"
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        return "", f"JSON that can't be read, from byte {offset} ({error})"
    if not isinstance(record, dict):
        return "", f"not a JSON object but {_json_type(record)}, at byte {offset}"
    if key not in record:
        return "", f"no key {key!r} (corpus.text_key) in the record at byte {offset}; it has {_shorten(list(record))}"
    value = record[key]
    if not isinstance(value, str):
        return "", f"the text under {key!r} is {_json_type(value)}, not a string, in the record at byte {offset}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "", f"an escape for half a character (lone surrogate) in the record at byte {offset}"
    return value, ""


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:8])
    return (shown or "none") + (", ..." if len(names) > 8 else "")


# --- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, file: IO[bytes], codec: Codec, config: CorpusConfig) -> Iterator[Document | Bad]:
    """Row group by row group; one that can't be read is lost alone. A compressed file is unpacked to the disk first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = Path(tempfile.gettempdir())
    with writing(place), tempfile.TemporaryFile() as unpacked:
        try:
            if codec is not plain:
                for piece in codec(file):
                    with writing(place, len(piece)):  # a full disk is not the file's fault
                        unpacked.write(piece)
                        unpacked.flush()
                unpacked.seek(0)
                file = unpacked
            # Buffered column reads keep one page in memory instead of a whole column of the row group; read as a
            # dictionary, a text that stands in many rows is in memory once.
            open_as = functools.partial(
                pq.ParquetFile, file, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True
            )
            size = file.seek(0, os.SEEK_END)
            table = open_as()
            wrong = _wrong_column(table.schema_arrow, config.text_key)
            if not wrong:
                table = open_as(metadata=table.metadata, read_dictionary=[config.text_key])
        except DamagedError as error:
            wrong = str(error)
        except (pa.ArrowException, OSError, ValueError) as error:
            wrong = f"not readable as parquet ({_first_line(error)}); get the file again"
        if wrong:
            yield Bad(f"{path}: {wrong}")
            return
        first = 0
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)  # of its columns pyarrow may abort on, where the file is damaged
            if facts.total_byte_size > FREE_BYTES + MAX_RATIO * size:
                what = f"{size} bytes that expand to {facts.total_byte_size}, more than {MAX_RATIO} times"
                yield _lost(path, group, first, first + facts.num_rows, what)
            else:
                yield from _read_row_group(path, table, group, first, facts.num_rows, config)
            first += facts.num_rows


def _read_row_group(
    path: Path, table: Any, group: int, first: int, rows: int, config: CorpusConfig
) -> Iterator[Document | Bad]:
    import pyarrow as pa

    row, wrong, key = first, "fewer rows than its metadata says", config.text_key
    try:
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[key], use_threads=False):
            for value in batch.column(0):
                item = _value(path, row, value, config)
                row += 1
                yield item
    except (pa.ArrowException, OSError, ValueError) as error:
        wrong = _first_line(error)
    if row < first + rows:
        yield _lost(path, group, row, first + rows, wrong)


def _lost(path: Path, group: int, first: int, last: int, wrong: str) -> Bad:
    """Rows `first` to `last` - 1."""
    place = f"{path}: row group {group}: rows {first} to {last - 1}"
    return Bad(f"{place} can't be read ({wrong}); get the file again", last - first)


def _value(path: Path, row: int, value: pa.DictionaryScalar, config: CorpusConfig) -> Document | Bad:
    key, stored, limit = config.text_key, value.value, record_limit(config)
    if stored.is_valid and (size := stored.as_buffer().size) > limit:
        return Bad(f"{path}: row {row}: longer than {limit} bytes ({size}); split it, or raise corpus.max_chars")
    try:
        text = stored.as_py()
    except UnicodeDecodeError as error:
        return Bad(f"{path}: row {row}: not UTF-8 at byte {error.start} of {key!r}; {_MEND}")
    if text is None:
        return Bad(f"{path}: row {row}: the text under {key!r} is null; {_MEND}")
    return Document(text, path.name)


def _wrong_column(schema: pa.Schema, key: str) -> str | None:
    import pyarrow as pa

    if key not in schema.names:
        return f"no column {key!r} (corpus.text_key); it has {_shorten(schema.names)}"
    kind = schema.field(key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        return f"column {key!r} (corpus.text_key) holds {kind}, not strings; name another column"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


FORMATS: dict[str, Callable[[Path, IO[bytes], Codec, CorpusConfig], Iterator[Document | Bad]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
