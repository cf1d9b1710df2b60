"""Which tasks there are, and their data: texts and labels, checked once, at the door.

A task is one row of `TASKS`. Rows with source `glue` are read from a folder laid out as the Hub's nyu-mll/glue,
`<data>/<task>/{train,validation,test}.parquet`, or from the Hub itself; `docs` is made from the installed packages'
documentation (docs_task.py) and needs no data at all. GLUE: Wang et al. 2019, https://gluebenchmark.com.

    splits = load("mrpc", data="glue")
    splits["train"].texts[0], splits["train"].labels[0]
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bertpipe.artifact import identify_files
from bertpipe.config import listed
from bertpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "nyu-mll/glue"
SPLITS = ("train", "validation", "test")
ALL = "all"
UNLABELLED = -1
"""GLUE's code for a label that is kept secret: every label of a test split."""


@dataclass(frozen=True)
class Task:
    """One row of the task table."""

    name: str
    kind: Literal["classification", "regression"]
    text: tuple[str, ...]
    """The column of the sentence, or of both sentences of a pair."""
    label: str
    """The column of the label: an integer code (classification) or a number (regression)."""
    labels: tuple[str, ...] | None
    """The name of each code, in order. Empty: the data decides (`Split.label_names`). None: regression."""
    metric: str
    """Key into metrics.METRICS."""
    headline: str
    """The one number of that metric to show first."""
    source: str
    """Key into SOURCES: where the data comes from."""


@dataclass(frozen=True)
class Split:
    """The examples of one split, in the file's order."""

    texts: list[tuple[str, ...]]
    """One text, or the two of a pair, for each example. May be empty strings (`num_empty`)."""
    labels: np.ndarray | None
    """[examples] int64 codes or float32 numbers; None where the labels are secret: predictions only, no score."""
    ids: list[int] | list[str]
    """What each example is called: the column `idx`, or else the row number; for `docs` package:file#paragraph."""
    label_names: tuple[str, ...] | None
    """The name of each code; None for regression."""
    num_empty: int
    """Examples with an empty text; they are kept, because the official scores count them."""

    def __len__(self) -> int:
        return len(self.texts)


def get(name: str) -> Task:
    """The row called `name`; ConfigError lists the choices."""
    if name not in TASKS:
        raise ConfigError(f"finetune.tasks: no task called {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def chosen(names: str | list[str], data: str | None) -> list[str]:
    """The tasks that `finetune.tasks` names: the entries themselves, or with `all` those that can be had.

    Of a folder, those that it holds; of the Hub, those of GLUE. Raises DataError for a folder that holds none.
    """
    entries = listed(names)
    if ALL not in entries:
        return entries
    if len(entries) > 1:
        raise ConfigError(f"finetune.tasks: {ALL!r} stands alone, got {', '.join(entries)}")
    found = available(data) if data is not None else [name for name, task in TASKS.items() if task.source == "glue"]
    if not found:
        raise DataError(f"{data}: no task there; finetune.data needs <task>/{{train,validation,test}}.parquet")
    return found


def available(data: str) -> list[str]:
    """Tasks that the folder `data` holds: those with a train.parquet."""
    return [name for name in TASKS if (Path(data) / name / "train.parquet").is_file()]


def load(name: str, data: str | None = None) -> dict[str, Split]:
    """Read and check the splits of a task: train, validation and, where there is one, test.

    `data` is a folder of `<task>/<split>.parquet`; None loads nyu-mll/glue from the Hub (or from its cache).
    Raises ConfigError for an unknown task, and DataError, naming file, column and row, for data that can't be used.
    """
    task = get(name)
    return SOURCES[task.source].load(task, data)


def identify(names: Iterable[str], data: str | None = None, cache: Path | None = None) -> dict[str, Any]:
    """Content identity of the raw inputs of these tasks, for the fingerprint of what is made from them."""
    return {task.name: SOURCES[task.source].identify(task, data, cache) for task in map(get, names)}


# --- a folder ---------------------------------------------------------------------------------------------------------


def _paths(task: Task, data: str) -> dict[str, Path]:
    """The parquet file of each split that is there; DataError if train or validation is not."""
    folder = Path(data) / task.name
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; finetune.data needs <task>/{{train,validation,test}}.parquet "
            f"(tasks found in {data}: {', '.join(available(data)) or 'none'})"
        )
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    for split in ("train", "validation"):
        if not paths[split].is_file():
            raise DataError(f"{paths[split]}: no such file; the task {task.name} needs train and validation")
    return {split: path for split, path in paths.items() if path.is_file()}


def _load_folder(task: Task, data: str) -> dict[str, Split]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits = {}
    for split, path in _paths(task, data).items():
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as parquet ({_first_line(error)}); replace the file") from None
        splits[split] = _split(table, task, split, str(path))
    return splits


# --- the Hub ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hub_errors(task: Task):
    """One clear line when the Hub can't be reached, or has no such data."""
    import httpx2

    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise DataError(
            f"{HUB} ({task.name}): can't be loaded from the Hub ({_first_line(error)}); "
            f"without a network give finetune.data a folder with {task.name}/train.parquet and validation.parquet"
        ) from None


def _load_hub(task: Task) -> dict[str, Split]:
    import datasets

    with _hub_errors(task):
        loaded = datasets.load_dataset(HUB, task.name)
    tables = {split: loaded[split].with_format("arrow")[:] for split in SPLITS if split in loaded}
    for split in ("train", "validation"):
        if split not in tables:
            raise DataError(f"{HUB} ({task.name}): no split {split!r}; it has {', '.join(loaded)}")
    return {
        split: _split(table, task, split, f"{HUB} ({task.name}, {split})", _feature_names(loaded[split].features, task))
        for split, table in tables.items()
    }


def _identify_hub(task: Task) -> dict[str, str]:
    """The commit that the Hub (or, offline, the cache) serves; nothing is downloaded for it but the file list."""
    import datasets

    with _hub_errors(task):
        builder = datasets.load_dataset_builder(HUB, task.name)
    return {"hub": HUB, "revision": str(builder.hash)}


# --- checks, the same for both ----------------------------------------------------------------------------------------


def _split(table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None = None) -> Split:
    """Check one table against the task's row. `where` names it in errors; `names` are the label names it declares."""
    if table.num_rows == 0:
        raise DataError(f"{where}: no rows")
    required = task.text if split == "test" else (*task.text, task.label)
    for column in required:
        if column not in table.column_names:
            raise DataError(
                f"{where}: no column {column!r}; it has {', '.join(table.column_names)}; "
                f"the task {task.name} needs {', '.join((*task.text, task.label))}"
            )
    names = names or _declared_names(table, task)
    if task.labels and names and names != task.labels:
        raise DataError(f"{where}: column {task.label!r} names its codes {names}, the task {task.name} {task.labels}")
    texts = list(zip(*(_strings(table, column, where) for column in task.text), strict=True))
    has_ids = "idx" in table.column_names
    return Split(
        texts=texts,
        labels=_labels(table, task, split, where) if task.label in table.column_names else None,
        ids=table["idx"].to_pylist() if has_ids else list(range(table.num_rows)),
        label_names=task.labels,
        num_empty=sum(not all(text.strip() for text in example) for example in texts),
    )


def _strings(table: pa.Table, column: str, where: str) -> list[str]:
    import pyarrow as pa

    kind = table.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} holds {kind}, not text")
    try:
        values = table[column].to_pylist()
    except UnicodeDecodeError:
        row = next(
            row for row, value in enumerate(table[column].cast(pa.large_binary())) if not _is_utf8(value.as_py())
        )
        raise DataError(f"{where}: row {row}: column {column!r} is not UTF-8; write the file again as UTF-8") from None
    if None in values:
        raise DataError(f"{where}: row {values.index(None)}: column {column!r} is null; remove the row or fill it in")
    return values


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _labels(table: pa.Table, task: Task, split: str, where: str) -> np.ndarray | None:
    """[rows] int64 codes or float32 numbers, or None for a test split without labels (all -1 or null)."""
    import pyarrow as pa

    column = table[task.label]
    kind = column.type
    classify = task.kind == "classification"
    fits = pa.types.is_integer(kind) or (not classify and pa.types.is_floating(kind)) or pa.types.is_null(kind)
    if not fits:
        wanted = f"the integer codes {_codes(task)}" if classify else "numbers"
        raise DataError(f"{where}: column {task.label!r} holds {kind}, the task {task.name} needs {wanted}")
    values = column.cast(pa.float64(), safe=False).fill_null(UNLABELLED).to_numpy()
    missing = (values == UNLABELLED) | np.isnan(values)
    if split == "test" and missing.all():
        return None
    if missing.any():
        row = int(missing.argmax())
        raise DataError(f"{where}: row {row}: column {task.label!r} is -1 or null; label the row or remove it")
    if not classify:
        outside = ~np.isfinite(values)
    else:
        assert task.labels
        outside = (values < 0) | (values >= len(task.labels))
    if outside.any():
        row = int(outside.argmax())
        wanted = f"one of {_codes(task)}" if classify else "a finite number"
        raise DataError(f"{where}: row {row}: column {task.label!r} is {values[row]:g}, not {wanted}")
    return values.astype(np.int64 if classify else np.float32)


def _codes(task: Task) -> str:
    """`0 (negative), 1 (positive)`"""
    return ", ".join(f"{code} ({name})" for code, name in enumerate(task.labels or ()))


def _declared_names(table: pa.Table, task: Task) -> tuple[str, ...] | None:
    """The label names in the metadata that `datasets` writes into parquet files, if there are any."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        return tuple(json.loads(raw)["info"]["features"][task.label]["names"])
    except (ValueError, KeyError, TypeError):
        return None


def _feature_names(features: Any, task: Task) -> tuple[str, ...] | None:
    """The same from a loaded data set's features."""
    names = getattr(features.get(task.label), "names", None)
    return tuple(names) if names else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a task's data comes from: how to load it, and how to tell whether it changed."""

    load: Callable[[Task, str | None], dict[str, Split]]
    identify: Callable[[Task, str | None, Path | None], Any]


def _load_glue(task: Task, data: str | None) -> dict[str, Split]:
    return _load_hub(task) if data is None else _load_folder(task, data)


def _identify_glue(task: Task, data: str | None, cache: Path | None) -> Any:
    return _identify_hub(task) if data is None else identify_files(_paths(task, data).values(), cache)


def _load_docs(task: Task, data: str | None) -> dict[str, Split]:
    from bertpipe.downstream import docs_task

    return docs_task.load()


def _identify_docs(task: Task, data: str | None, cache: Path | None) -> Any:
    from bertpipe.downstream import docs_task

    return docs_task.identify()


SOURCES: dict[str, Source] = {
    "glue": Source(_load_glue, _identify_glue),
    "docs": Source(_load_docs, _identify_docs),
}

_ONE, _PAIR = ("sentence",), ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "classification", _ONE, "label", ("unacceptable", "acceptable"),
             "matthews_correlation", "matthews_correlation", "glue"),
        Task("sst2", "classification", _ONE, "label", ("negative", "positive"), "accuracy", "accuracy", "glue"),
        Task("mrpc", "classification", _PAIR, "label", ("not_equivalent", "equivalent"),
             "accuracy_and_f1", "f1", "glue"),
        Task("qqp", "classification", ("question1", "question2"), "label", ("not_duplicate", "duplicate"),
             "accuracy_and_f1", "f1", "glue"),
        Task("stsb", "regression", _PAIR, "label", None, "pearson_and_spearman", "spearman", "glue"),
        Task("qnli", "classification", ("question", "sentence"), "label", ("entailment", "not_entailment"),
             "accuracy", "accuracy", "glue"),
        Task("rte", "classification", _PAIR, "label", ("entailment", "not_entailment"), "accuracy", "accuracy", "glue"),
        Task("wnli", "classification", _PAIR, "label", ("not_entailment", "entailment"),
             "accuracy", "accuracy", "glue"),
        Task("docs", "classification", ("text",), "label", (), "accuracy_and_macro_f1", "accuracy", "docs"),
    )
}  # fmt: skip
