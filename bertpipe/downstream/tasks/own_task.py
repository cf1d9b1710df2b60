"""A task of the user's own, from `finetune.task`: a row like those of the task table, and its data from any table.

    finetune:
      task: {kind: classification, data: my.csv, text: [title, body], label: topic}

Labels come in the forms people keep them in, and are brought into the one that the task's kind reads (kinds/).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.artifact import identify_files
from bertpipe.config import TaskConfig, listed
from bertpipe.downstream.tasks.kind import OWN, Split, Task
from bertpipe.downstream.tasks.own_labels import settle
from bertpipe.downstream.tasks.tables import ENDINGS, form_of, read_file
from bertpipe.downstream.tasks.task_sources import Source, near, read, require
from bertpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

METRICS_OF = {"classification": ("accuracy_and_macro_f1", "accuracy"), "multi_label": ("micro_and_macro_f1", "f1")}
"""Metric and headline of a kind; of others those of its first row in the task table."""
TEXTS_OF = {
    **dict.fromkeys(
        ("classification", "multi_label", "regression"),
        (1, 2, "one column, or the two of a pair; join others in the file"),
    ),
    "choices": (3, 100, "the column of the first text and those of the choices"),
}
"""Least and most columns of the text, in words; of other kinds as many as the first row of the task table has."""
SPLITS = ("train", "validation", "test")
MAX_NAME = 100
KEY = b"bertpipe: held out for validation"


def name_of(own: TaskConfig) -> str:
    """What the task is called: `name`, or its file or folder, made fit for a folder's name."""
    if own.name is not None:
        return own.name
    path = Path(own.data if isinstance(own.data, str) else own.data.get("train", ""))
    stem = path.name.split(".")[0]
    stem = path.resolve().parent.name if stem in SPLITS else stem
    return re.sub(r"[^\w-]+", "-", stem).strip("-_")[:MAX_NAME] or "own"


def row(own: TaskConfig, table: dict[str, Task]) -> Task:
    """The task as a row of the task `table`; ConfigError for what can't be one."""
    name, kind = name_of(own), own.kind
    if name in table or name == "all" or not re.fullmatch(r"\w[\w.-]{0,99}", name):
        reason = "is a task of the table" if name in table else "can't be the name of a folder"
        raise ConfigError(f"finetune.task.name: {name!r} {reason}; give the task a name of its own")
    like = {task.kind: task for task in reversed(table.values())}
    if kind not in (*METRICS_OF, *like):
        kinds = dict.fromkeys((*METRICS_OF, *like))
        raise ConfigError(f"finetune.task.kind: {kind!r} is not one of {', '.join(kinds)}{near(kind, kinds)}")
    _check_file(own)
    metric, headline = METRICS_OF[kind] if kind in METRICS_OF else (like[kind].metric, like[kind].headline)
    names: tuple[str, ...] | None = ()
    if kind == "choices":
        names = tuple(map(str, range(len(_listed(own.text)) - 1)))  # those behind the first text
    elif kind in like and like[kind].labels is None:
        names = None
    text, label = _text(own, like.get(kind)), ", ".join(_labels(own))
    return Task(name, kind, text, label, names, metric, headline, OWN)


def _text(own: TaskConfig, like: Task | None) -> tuple[str, ...]:
    """The columns of the text."""
    text = _listed(own.text)
    if own.kind in TEXTS_OF:
        fewest, most, wanted = TEXTS_OF[own.kind]
    else:
        assert like is not None
        fewest = most = len(like.text)
        wanted = f"{most} columns, as {', '.join(like.text)} of the task {like.name}"
    if not fewest <= len(text) <= most or not all(text) or len(set(text)) < len(text):
        raise ConfigError(f"finetune.task.text: {own.text} must be {wanted}")
    return text


def _labels(own: TaskConfig) -> tuple[str, ...]:
    """The columns of the label."""
    labels = _listed(own.label)
    if not labels or not all(labels) or set(labels) & set(_listed(own.text)) or len(set(labels)) < len(labels):
        raise ConfigError(f"finetune.task.label: {own.label} must be columns beside the text, each once")
    if own.kind != "multi_label" and (len(labels) > 1 or own.label_separator is not None):
        key = "label_separator" if len(labels) == 1 else "label"
        raise ConfigError(f"finetune.task.{key}: several labels a row need finetune.task.kind: multi_label")
    if own.label_separator is not None and (len(labels) > 1 or not own.label_separator):
        raise ConfigError("finetune.task.label_separator: needs characters that stand between labels in one column")
    return labels


def _check_file(own: TaskConfig) -> None:
    """ConfigError for settings that no file can be read by."""
    if own.delimiter is not None and (len(own.delimiter) != 1 or own.delimiter in '"\r\n'):
        raise ConfigError(f"finetune.task.delimiter: {own.delimiter!r} must be one character, e.g. ';'")
    try:
        "".encode(own.encoding)
    except (LookupError, ValueError):
        raise ConfigError(
            f"finetune.task.encoding: no text encoding is called {own.encoding!r}; utf-8 is one"
        ) from None


def _listed(columns: str | list[str]) -> tuple[str, ...]:
    return tuple(listed(columns))


class OwnTable(Source):
    """The files of `finetune.task`."""

    title = "Own data"

    def __init__(self, own: TaskConfig):
        self.own = own

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source. Without validation data a part of train is held out for it."""
        paths = self._paths(task)
        tables = {split: self._table(path, task, split) for split, path in paths.items()}
        splits: dict[str, Split] = {}
        names, held_out = self._columns, dict[str, int]()
        if "train" in tables:
            where, table = str(paths["train"]), tables["train"]
            splits["train"] = read(table, task, "train", where, names)
            names = splits["train"].label_names
            if "validation" not in tables:
                held = _held_out(splits["train"].texts, self.own.validation_share, where)
                if task.labels == ():
                    _check_held_out(splits["train"], held, where)
                splits["train"] = read(table.filter(~held), task, "train", where, names)
                tables["validation"], paths["validation"] = table.filter(held), paths["train"]
                held_out["held_out_of_train"] = int(held.sum())
        for split in ("validation", "test"):
            if split in tables:
                splits[split] = read(tables[split], task, split, str(paths[split]), names)
                names = names or splits[split].label_names
        splits["validation"] = replace(splits["validation"], counts=splits["validation"].counts | held_out)
        return splits if task.trained else {split: data for split, data in splits.items() if split != "train"}

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """See Source: what is in the files and what is made of it, under neither names nor places."""
        paths = self._paths(task)
        files = zip(paths, identify_files(paths.values(), cache), strict=True)
        content = {split: {key: facts[key] for key in ("bytes", "sha256")} for split, facts in files}
        return {"files": content, "recipe": self.own.model_dump(mode="json", exclude={"data", "name"})}

    @property
    def _columns(self) -> tuple[str, ...] | None:
        """The label names where each has a column of its own."""
        labels = _listed(self.own.label)
        return labels if len(labels) > 1 else None

    def _paths(self, task: Task) -> dict[str, Path]:
        """The file of each split that there is; train among them, or if that isn't wanted validation."""
        data = self.own.data
        if isinstance(data, dict):
            if unknown := next((split for split in data if split not in SPLITS), None):
                hint = near(unknown, SPLITS)
                raise ConfigError(f"finetune.task.data: {unknown!r} is not one of {', '.join(SPLITS)}{hint}")
            paths = {split: Path(data[split]) for split in SPLITS if split in data}
        elif Path(data).is_dir():
            paths = _files_in(Path(data))
        else:
            paths = {"train": Path(data)}
        if "train" not in paths and (task.trained or "validation" not in paths):
            raise DataError(f"finetune.task.data: {data} has no train; give it a file to train on")
        for path in paths.values():
            if not path.is_file():
                raise DataError(f"{path}: no such file; finetune.task.data names it")
            if form_of(path) is None:
                endings = f"{', '.join(ENDINGS)}; text also with .gz or .zst behind it"
                raise DataError(f"{path}: finetune.task.data takes tables of the kinds {endings}")
        return paths

    def _table(self, path: Path, task: Task, split: str) -> pa.Table:
        """One file, its labels as the kind reads them."""
        import pyarrow as pa

        from bertpipe.downstream.tasks.kinds import KINDS  # imports torch

        labels = self._columns or (task.label,)
        table = read_file(path, self.own, (*task.text, *labels, "idx", "id"))
        if table.num_rows == 0:
            raise DataError(f"{path}: no rows")
        found = set(labels) & set(table.column_names)
        require((*task.text, *(labels if found or split not in task.predicted else ())), table, str(path), task)
        wanted = {"id"} if "id" in KINDS[task.kind].columns(task) else {"idx", "id"}
        if not wanted & set(table.column_names):  # the row of the file, which a held-out example keeps
            table = table.append_column("id", pa.array(range(table.num_rows)))
        return settle(table, task, labels, self.own.label_separator, str(path))


def _files_in(folder: Path) -> dict[str, Path]:
    """The tables of a folder that are called as the splits."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = path.name.split(".")[0]
        if split not in SPLITS or form_of(path) is None:
            continue
        if split in paths:
            raise DataError(f"{folder}: {paths[split].name} and {path.name} are both {split}; keep one of them")
        paths[split] = path
    if not paths:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10])
        raise DataError(f"{folder}: no train.csv (or {', '.join(ENDINGS[1:])}) there; it has {found or 'nothing'}")
    return paths


def _held_out(texts: Sequence[tuple[str, ...]], share: float, where: str) -> np.ndarray:
    """bool [examples], which are for validation: `share` of the different texts, those whose keyed hashes are least.

    So equal texts fall on one side, and neither the order of the rows nor the machine matters.
    """
    marks = [hashlib.blake2b(json.dumps(text).encode(), key=KEY, digest_size=16).digest() for text in texts]
    different = sorted(set(marks))
    if len(different) < 2:
        raise DataError(f"{where}: all rows have the same text; there is nothing to hold out for validation")
    chosen = set(different[: min(max(1, round(share * len(different))), len(different) - 1)])
    return np.array([mark in chosen for mark in marks])


def _check_held_out(whole: Split, held: np.ndarray, where: str) -> None:
    """DataError for a label of which no row is left to train on; `held` is bool [examples]."""
    labels, names = whole.labels, whole.label_names or ()
    if not isinstance(labels, np.ndarray):  # of words, say
        return
    has = labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(len(names))
    lost = has.any(0) & ~has[~held].any(0)
    if lost.any():
        raise DataError(
            f"{where}: every row with the label {names[int(lost.argmax())]!r} was held out for validation; add rows "
            "of it or take them out, or name a validation file in finetune.task.data"
        )
