"""Stage corpus: text sources -> cleaned, deduplicated documents in zstd parquet, and a ledger of every document.

    {train,holdout}/part-00000.parquet    columns id (hash of the text, 32 hex digits), source, text
    ledger.json                           documents in = out + skipped by reason, per source and in all

Three passes over units of work (an input file, or small ones together), each over all cores, each continued by a
rerun, with memory bounded by one unit's row group whatever the input's size:

    units/00000/      cleaned documents, split, and their hashes
    duplicates/       which of them were seen before (duplicates.py); the first in source order stays
    kept/00000/       a unit that had duplicates, written again without them

Then the parts are moved to their final places. The bytes are the same for any number of workers.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bertpipe.artifact import LOCK, committing, discard, is_complete, read_manifest, write_json, writing
from bertpipe.config import Config, CorpusConfig
from bertpipe.data import npy
from bertpipe.data.cleaning import clean, content_hash, in_holdout
from bertpipe.data.duplicates import HashWriter, duplicates_of, find_duplicates, list_ranges
from bertpipe.data.engine import map_units
from bertpipe.data.readers import Bad, Document
from bertpipe.data.sources import Unit, list_specs, list_units, source_of
from bertpipe.errors import ArtifactError, DataError

SPLITS = ("train", "holdout")
LEDGER = "ledger.json"
GROUP_BYTES = 4 << 20
"""Text of one row group in bytes: what a reader holds at once."""
GROUP_ROWS = 1 << 16
"""Rows of one row group, at most."""
NUM_PROBLEMS = 10
"""Messages about bad records that the ledger keeps of each source."""


# --- the format: writer and reader ------------------------------------------------------------------------------------


class PartWriter:
    """Writes documents to `folder`/part-00000.parquet and on, at most `shard_bytes` of text a part."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.counts: dict[str, int] = {"documents": 0, "characters": 0, "bytes": 0}
        self.num_parts = 0
        self._rows: list[tuple[str, str, str]] = []
        self._group_bytes = self._part_bytes = 0
        self._file: Any = None

    def add(self, identity: str, source: str, text: str, num_bytes: int) -> None:
        """Append a document; `num_bytes` is its text's length in UTF-8."""
        if self._part_bytes and self._part_bytes + num_bytes > self.shard_bytes:
            self.close()
        self._rows.append((identity, source, text))
        self._group_bytes += num_bytes
        self._part_bytes += num_bytes
        self.counts["documents"] += 1
        self.counts["characters"] += len(text)
        self.counts["bytes"] += num_bytes
        if self._group_bytes >= GROUP_BYTES or len(self._rows) >= GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.string()) for name in ("id", "source", "text")])
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(
                self.folder / part_name(self.num_parts),
                schema,
                compression="zstd",
                use_dictionary=["source"],
                write_statistics=False,
                write_page_checksum=True,
            )
            self.num_parts += 1
        columns = [pa.array(column, pa.string()) for column in zip(*self._rows, strict=True)]
        with writing(self.folder / part_name(self.num_parts - 1), self._group_bytes):
            self._file.write_table(pa.table(columns, schema=schema))
        self._rows.clear()
        self._group_bytes = 0

    def close(self) -> None:
        """Finish the part at hand, if there is one."""
        if self._rows:
            self._write_group()
        if self._file is not None:
            with writing(self.folder / part_name(self.num_parts - 1)):
                self._file.close()
        self._file, self._part_bytes = None, 0


def part_name(index: int) -> str:
    """File name of a split's part."""
    return f"part-{index:05d}.parquet"


def list_parts(folder: Path, split: str) -> list[Path]:
    """A split's parquet files in document order; `folder` is a corpus artifact, `split` train or holdout."""
    assert split in SPLITS, split
    return sorted((folder / split).glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))


def read_documents(folder: Path, split: str, columns: Sequence[str] = ("text",)) -> Iterator[Any]:
    """Documents of a split in order: the strings of the one column asked for, or a tuple of several.

    Holds one row group (about GROUP_BYTES of text). Raises ArtifactError for a part that can't be read.
    """
    for path in list_parts(folder, split):
        for rows in _read_groups(path, columns):
            yield from rows if len(columns) > 1 else (row[0] for row in rows)


def _read_groups(path: Path, columns: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
                yield list(zip(*(table[name].to_pylist() for name in columns), strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); delete the artifact and run `bertpipe corpus`") from None


def list_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """The ledger's rows of a corpus artifact: one for each entry of `corpus.sources`, in order."""
    try:
        return json.loads((folder / LEDGER).read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{folder / LEDGER}: not readable ({error!r}); delete the folder and run `bertpipe corpus`"
        ) from None


def count_documents(folder: Path, split: str) -> int:
    """Documents of a split, from the parts' footers alone."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in list_parts(folder, split))


# --- pass 1: read, clean, split ---------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """A unit, its number, and the stage's scratch folder."""

    unit: Unit
    number: int
    out: Path

    def __str__(self) -> str:
        return str(self.unit)

    @property
    def cleaned(self) -> Path:
        return self.out / "units" / f"{self.number:05d}"

    @property
    def kept(self) -> Path:
        return self.out / "kept" / f"{self.number:05d}"


def _clean_unit(config: CorpusConfig, task: _Task) -> int:
    """Write a unit's cleaned documents and hashes; returns how many. DataError on a bad record, unless skipped."""
    if is_complete(task.cleaned):
        if read_manifest(task.cleaned)["unit"] == str(task.unit):
            return _documents(read_manifest(task.cleaned)["counts"])
        discard(task.cleaned)
    with committing(task.cleaned, unit=str(task.unit)) as (scratch, counts):
        _clear(scratch)
        writers = {split: PartWriter(scratch / split, config.shard_bytes) for split in SPLITS}
        hashes = HashWriter(scratch / "hashes")
        skipped: Counter[str] = Counter()
        problems: list[str] = []
        for item in _read_unit(task.unit, config):
            if isinstance(item, Bad):
                if config.on_error == "raise" and not source_of(task.unit.spec).lenient:
                    raise DataError(item.message)
                skipped["unreadable"] += item.records
                problems += [item.message] * (len(problems) < NUM_PROBLEMS)
                continue
            text = clean(item.text)
            reason = _reason_to_skip(text, config)
            if reason:
                skipped[reason] += 1
                continue
            data = text.encode()
            digest = content_hash(data)
            decisive = digest if item.group is None else content_hash(item.group.encode())
            holdout = in_holdout(decisive, config.holdout)
            writer = writers[SPLITS[holdout]]
            if config.deduplicate:
                hashes.add(digest, writer.counts["documents"], holdout)
            writer.add(digest.hex(), item.source, text, len(data))
        hashes.flush()
        for split, writer in writers.items():
            writer.close()
            counts[split] = writer.counts
        counts.update(skipped=dict(sorted(skipped.items())), problems=problems)
    return _documents(counts)


def _read_unit(unit: Unit, config: CorpusConfig) -> Iterator[Document | Bad]:
    for part in unit.parts:
        yield from source_of(unit.spec).read(part.place, config)


def _reason_to_skip(text: str, config: CorpusConfig) -> str | None:
    if not text:
        return "empty"
    if len(text) < config.min_chars:
        return "too_short"
    return "too_long" if len(text) > config.max_chars else None


def _documents(counts: dict) -> int:
    return sum(counts[split]["documents"] for split in SPLITS)


def _clear(scratch: Path) -> None:
    """Empty an interrupted unit's scratch folder, all but the lock we hold."""
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


# --- passes 2 and 3: duplicates ---------------------------------------------------------------------------------------


def _write_duplicates(folder: Path, tasks: list[_Task], num_documents: int, cfg: Config) -> None:
    """Find every duplicate; one .npy a range of hashes."""
    if is_complete(folder):
        return
    ranges = list_ranges(num_documents, [task.cleaned / "hashes" for task in tasks])
    with committing(folder) as (scratch, counts):
        _clear(scratch)
        found = _map(find_duplicates, ranges, "finding duplicates", cfg)
        for search, rows in zip(ranges, found, strict=True):
            npy.save(scratch / f"{search.first:03d}.npy", rows)
        counts["ranges"] = len(ranges)


def _drop_duplicates(config: CorpusConfig, task: _Task) -> None:
    """Write a unit that has duplicates again without them, then give back the disk space of its first version."""
    if not is_complete(task.kept):
        dropped = duplicates_of(task.number, sorted((task.out / "duplicates").glob("*.npy")))
        if not len(dropped):
            return
        with committing(task.kept) as (scratch, counts):
            _clear(scratch)
            for holdout, split in enumerate(SPLITS):
                rows = frozenset(dropped["row"][dropped["holdout"] == holdout].tolist())
                writer = PartWriter(scratch / split, config.shard_bytes)
                documents = read_documents(task.cleaned, split, ("id", "source", "text"))
                for row, (identity, source, text) in enumerate(documents):
                    if row not in rows:
                        writer.add(identity, source, text, len(text.encode()))
                writer.close()
                counts[split] = writer.counts
            counts["duplicate"] = len(dropped)
    for split in SPLITS:
        discard(task.cleaned / split)


# --- the stage --------------------------------------------------------------------------------------------------------


def identify(config: CorpusConfig, cache: Path | None) -> dict[str, Any]:
    """Content identity of the sources, for the fingerprint; `cache` (a JSON file) remembers file hashes.

    Raises DataError when a source has nothing to read.
    """
    return {"sources": [source_of(spec).identify(spec, cache) for spec in list_specs(config)]}


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Make the corpus artifact in `out`; `inputs` is empty, as this is the first stage. `counts`: the ledger's total.

    Raises DataError for input that can't be read (with file and place), and when no document is left.
    """
    ledger_path = out / LEDGER
    if not ledger_path.is_file():
        config = cfg.corpus
        tasks = [_Task(unit, number, out) for number, unit in enumerate(list_units(config))]
        num_documents = sum(_map(functools.partial(_clean_unit, config), tasks, "reading text", cfg))
        if config.deduplicate and num_documents:
            _write_duplicates(out / "duplicates", tasks, num_documents, cfg)
            list(_map(functools.partial(_drop_duplicates, config), tasks, "dropping duplicates", cfg))
        ledger = _make_ledger(config, tasks)
        _check(ledger["total"], config)
        _move_parts(tasks, out)
        write_json(ledger_path, ledger)
    for name in ("units", "duplicates", "kept"):
        discard(out / name)
    counts.update(json.loads(ledger_path.read_text(encoding="utf-8"))["total"])


def _map(function: Any, units: Sequence, description: str, cfg: Config) -> Iterator:
    runtime = cfg.runtime
    return map_units(function, units, workers=runtime.workers, description=description, progress=runtime.progress)


def _make_ledger(config: CorpusConfig, tasks: list[_Task]) -> dict[str, Any]:
    """Per source (in order) and in all: documents in and out, skipped by reason, characters and bytes."""
    names = _distinct(list_specs(config))
    rows = {name: _empty_row() for name in names}
    for task in tasks:
        first = read_manifest(task.cleaned)["counts"]
        last = read_manifest(task.kept)["counts"] if is_complete(task.kept) else first
        skipped = Counter(first["skipped"]) + Counter(duplicate=last.get("duplicate", 0))
        row = rows[names[task.unit.source]]
        row["documents_in"] += _documents(first) + sum(first["skipped"].values())
        row["skipped"] = dict(sorted((Counter(row["skipped"]) + skipped).items()))
        for split in SPLITS:
            row[f"{split}_documents"] += last[split]["documents"]
            row["documents_out"] += last[split]["documents"]
            row["characters"] += last[split]["characters"]
            row["bytes"] += last[split]["bytes"]
        row["problems"] = (row["problems"] + first["problems"])[:NUM_PROBLEMS]
        folder = task.kept if is_complete(task.kept) else task.cleaned
        for split in SPLITS:
            row["parts"][split] += len(_parts_of(folder, split))
    total = _empty_row()
    for row in rows.values():
        assert row["documents_in"] == row["documents_out"] + sum(row["skipped"].values()), row
        for key, value in row.items():
            if isinstance(value, int):
                total[key] += value
        total["skipped"] = dict(sorted((Counter(total["skipped"]) + Counter(row["skipped"])).items()))
    del total["problems"], total["parts"]
    return {"total": total, "sources": rows}


def _empty_row() -> dict[str, Any]:
    numbers = ("documents_in", "documents_out", "train_documents", "holdout_documents", "characters", "bytes")
    return {**dict.fromkeys(numbers, 0), "skipped": {}, "problems": [], "parts": dict.fromkeys(SPLITS, 0)}


def _parts_of(folder: Path, split: str) -> list[str]:
    """The parts of a split of a unit, in order."""
    names = [name for name in read_manifest(folder)["files"] if Path(name).parent.name == split]
    return sorted(names, key=lambda name: (len(name), name))


def _distinct(specs: list[str]) -> list[str]:
    """The specs, repeated ones numbered: ledger keys."""
    seen: Counter[str] = Counter()
    names = []
    for spec in specs:
        seen[spec] += 1
        names.append(spec if seen[spec] == 1 else f"{spec} ({seen[spec]})")
    return names


def _check(total: dict[str, Any], config: CorpusConfig) -> None:
    """Refuse a corpus that nothing can be trained or evaluated on."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in total["skipped"].items()) or "none skipped"
    if not total["documents_out"]:
        raise DataError(f"corpus.sources: no document is left of {total['documents_in']} ({skipped})")
    empty = next((split for split in SPLITS if not total[f"{split}_documents"]), None)
    if empty and (empty == "train" or config.holdout > 0):
        raise DataError(
            f"corpus.holdout: at {config.holdout}, none of the {total['documents_out']} documents is in {empty}; "
            "give more text, set another share, or corpus.txt_documents: line if each line is a document"
        )


def _move_parts(tasks: list[_Task], out: Path) -> None:
    """Number the units' parts through and move them to their final places; what an interrupted run moved stays."""
    for split in SPLITS:
        index = 0
        (out / split).mkdir(exist_ok=True)
        for task in tasks:
            folder = task.kept if is_complete(task.kept) else task.cleaned
            for name in _parts_of(folder, split):
                target = out / split / part_name(index)
                if (folder / name).exists():
                    (folder / name).replace(target)
                assert target.is_file(), target
                index += 1
