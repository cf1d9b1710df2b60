"""Where the data of tasks comes from: how to load it, and how to tell whether it changed. SOURCES is the table.

`glue`: a folder laid out as the Hub's nyu-mll/glue, `<data>/<task>/<split>.parquet`, or the Hub itself. `docs` is made
from the installed packages' documentation (docs_task.py) and needs no data at all.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bertpipe.artifact import identify_files
from bertpipe.downstream.kind import Split, Task
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class Source:
    """Base: a place that data comes from."""

    gathered: ClassVar[bool] = False
    """Whether `finetune.tasks: all` means its tasks."""
    title: str
    """What people call the data."""
    repo: str | None = None
    """The data set on the Hub, if it is one."""

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """Every split that there is, checked; `data` is `finetune.data`. DataError names what can't be used."""
        raise NotImplementedError

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """Content identity of the same, for fingerprints; `cache` remembers hashes."""
        raise NotImplementedError


class FolderOrHub(Source):
    """`<data>/<task>/<split>.parquet`, or without `finetune.data` a data set of the Hub."""

    gathered = True

    def __init__(self, title: str, repo: str, config: str | None = None):
        self.title, self.repo, self.config = title, repo, config

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source."""
        if data is None:
            return self._load_hub(task)
        return {s: read(read_table(path), task, s, str(path)) for s, path in _paths(task, data).items()}

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """See Source; of the Hub the commit that it (or, offline, its cache) serves, and nothing is downloaded."""
        if data is not None:
            return identify_files(_paths(task, data).values(), cache)
        import datasets

        with self._hub_errors(task):
            builder = datasets.load_dataset_builder(self.repo, self.config or task.name)
        return {"hub": self.repo, "revision": str(builder.hash)}

    def _load_hub(self, task: Task) -> dict[str, Split]:
        import datasets

        with self._hub_errors(task):
            loaded = datasets.load_dataset(self.repo, self.config or task.name)
            for split in task.diagnostic:
                loaded[split] = datasets.load_dataset(self.repo, split, split="test")
        for split in task.required:
            if split not in loaded:
                raise DataError(f"{self.repo} ({task.name}): no split {split!r}; it has {', '.join(loaded)}")
        splits = {}
        for split in task.splits:
            if split in loaded:
                table, where = loaded[split].with_format("arrow")[:], f"{self.repo} ({task.name}, {split})"
                splits[split] = read(table, task, split, where, _feature_names(loaded[split].features, task))
        return splits

    @contextlib.contextmanager
    def _hub_errors(self, task: Task):
        """One clear line when the Hub can't be reached, or has no such data."""
        import httpx2

        try:
            yield
        except (OSError, ValueError, httpx2.HTTPError) as error:
            files = " and ".join(f"{split}.parquet" for split in task.required)
            raise DataError(
                f"{self.repo} ({task.name}): can't be loaded from the Hub ({_first_line(error)}); "
                f"without a network give finetune.data a folder with {task.name}/{files}"
            ) from None


class Docs(Source):
    """The documentation of the installed packages."""

    title = "Documentation of installed Python packages"

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source."""
        from bertpipe.downstream import docs_task

        return docs_task.load()

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """See Source."""
        from bertpipe.downstream import docs_task

        return docs_task.identify()


# --- tables -----------------------------------------------------------------------------------------------------------


def is_there(task: Task, data: str) -> bool:
    """Whether the folder `data` holds the task."""
    return (Path(data) / task.name / "train.parquet").is_file()


def _paths(task: Task, data: str) -> dict[str, Path]:
    """The parquet file of each split that is there; DataError if one that must be is not."""
    folder = Path(data) / task.name
    if not folder.is_dir():
        found = sorted(path.parent.name for path in Path(data).glob("*/train.parquet"))
        raise DataError(
            f"{folder}: no such folder; finetune.data needs <task>/{{{','.join(task.splits)}}}.parquet "
            f"(tasks found in {data}: {', '.join(found) or 'none'})"
        )
    paths = {split: folder / f"{split}.parquet" for split in task.splits}
    paths |= {split: Path(data) / split / "test.parquet" for split in task.diagnostic}
    for split in task.required:
        if not paths[split].is_file():
            wanted = " and ".join(task.required)
            raise DataError(f"{paths[split]}: no such file; the task {task.name} needs {wanted}")
    return {split: path for split, path in paths.items() if path.is_file()}


def read_table(path: Path) -> pa.Table:
    """A parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet ({_first_line(error)}); replace the file") from None


def read(table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None = None) -> Split:
    """Check one table against the task's row. `where` names it in errors; `names` are the label names it declares."""
    from bertpipe.downstream.kinds import KINDS

    if task.other_text and set(task.other_text) <= set(table.column_names):
        task = replace(task, text=task.other_text)
    kind = KINDS[task.kind]
    if table.num_rows == 0:
        raise DataError(f"{where}: no rows")
    columns = kind.columns(task)
    require(columns[:-1] if split in task.predicted else columns, table, where, task)
    return kind.read(table, task, split, where, names or declared_names(table, task))


def require(columns: Sequence[str], table: pa.Table, where: str, task: Task) -> None:
    """DataError for the first column that the table hasn't got."""
    for column in columns:
        if column not in table.column_names:
            raise DataError(
                f"{where}: no column {column!r}; it has {', '.join(table.column_names)}; "
                f"the task {task.name} needs {', '.join(columns)}{near(column, table.column_names)}"
            )


def near(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'title'?`, or nothing where none of `names` is near."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), lower, 1)
    return f"; did you mean {lower[found[0]]!r}?" if found else ""


def declared_names(table: pa.Table, task: Task) -> tuple[str, ...] | None:
    """The label names in the metadata that `datasets` writes into parquet files, if there are any."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        feature = json.loads(raw)["info"]["features"][task.label]
        return tuple(feature.get("feature", feature)["names"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _feature_names(features: Any, task: Task) -> tuple[str, ...] | None:
    """The same from a loaded data set's features."""
    names = getattr(features.get(task.label), "names", None)
    return tuple(names) if names else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


SOURCES: dict[str, Source] = {
    "glue": FolderOrHub("GLUE", "nyu-mll/glue"),
    "superglue": FolderOrHub("SuperGLUE", "aps/super_glue"),
    "swag": FolderOrHub("SWAG", "allenai/swag", "regular"),
    "docs": Docs(),
}
