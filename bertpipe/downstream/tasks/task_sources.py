"""Where the data of tasks comes from: how to load it, and how to tell whether it changed. SOURCES is the table.

`glue`: a folder laid out as the Hub's nyu-mll/glue, `<data>/<task>/<split>.parquet`, or the Hub itself; so too other
data sets, which must be parquet files on the Hub, because `datasets` runs no scripts any more. `squad` and `squad_v2`:
also the official JSON, in such a folder, in `<data>`, or as the one file `<data>` (squad_files.py). `docs` is made from
the installed packages' documentation (docs_task.py) and needs no data at all.
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
from bertpipe.downstream.tasks import squad_files
from bertpipe.downstream.tasks.kind import Split, Task
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


WHOLE = "(all)"
"""Of a data set on the Hub that has no configurations."""


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

    def configuration(self, task: Task) -> str | None:
        """What of `repo` the task is; None for all of it."""
        return None


class FolderOrHub(Source):
    """`<data>/<task>/<split>.parquet`, or without `finetune.data` a data set of the Hub: its configuration `config`, of
    one that holds several tasks that which is called like the task, of one without configurations (WHOLE) all of it."""

    gathered = True

    def __init__(self, title: str, repo: str, config: str | None = None):
        self.title, self.repo, self.config = title, repo, config

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source."""
        if data is None:
            return self._load_hub(task)
        splits: dict[str, Split] = {}
        for split, path in self.paths(task, data).items():
            splits[split] = read(read_table(path), task, split, str(path), known=_known(splits))
        return splits

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """See Source; of the Hub the commit that it (or, offline, its cache) serves, and nothing is downloaded."""
        if data is not None:
            return identify_files(self.paths(task, data).values(), cache)
        import datasets

        with self._hub_errors(task):
            builder = datasets.load_dataset_builder(self.repo, self.configuration(task))
        return {"hub": self.repo, "revision": str(builder.hash)}

    def paths(self, task: Task, data: str) -> dict[str, Path]:
        """The file of each split that is there; DataError if one that must be is not."""
        return _paths(task, data)

    def _load_hub(self, task: Task) -> dict[str, Split]:
        import datasets

        with self._hub_errors(task):
            loaded = datasets.load_dataset(self.repo, self.configuration(task))
            for split in task.diagnostic:
                loaded[split] = datasets.load_dataset(self.repo, split, split="test")
        for split in task.required:
            if split not in loaded:
                raise DataError(f"{self.repo} ({task.name}): no split {split!r}; it has {', '.join(loaded)}")
        splits: dict[str, Split] = {}
        for split in task.splits:
            if split in loaded:
                table, where = loaded[split].with_format("arrow")[:], f"{self.repo} ({task.name}, {split})"
                names = _feature_names(loaded[split].features, task)
                splits[split] = read(table, task, split, where, names, _known(splits))
        return splits

    def configuration(self, task: Task) -> str | None:
        """See Source."""
        return None if self.config == WHOLE else self.config or task.name

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


class Questions(FolderOrHub):
    """SQuAD and what is laid out like it: parquet as the Hub's, or the official JSON; see squad_files.py."""

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source."""
        if data is None:
            return self._load_hub(task)
        paths = self.paths(task, data)
        tables = {path: self._table(path) for path in paths.values()}
        if task.trained and paths["train"] == paths[task.validation]:
            path, table = next(iter(tables.items()))
            return squad_files.divide(read(table, task, "train", str(path)), table, task, path)
        return {split: read(tables[path], task, split, str(path)) for split, path in paths.items()}

    def paths(self, task: Task, data: str) -> dict[str, Path]:
        """As FolderOrHub; of one file alone, that file for each of the splits that must be there."""
        return squad_files.paths(task, data)

    def _table(self, path: Path) -> pa.Table:
        return squad_files.read_json(path) if path.suffix == ".json" else read_table(path)


class Docs(Source):
    """The documentation of the installed packages."""

    title = "Documentation of installed Python packages"

    def load(self, task: Task, data: str | None) -> dict[str, Split]:
        """See Source."""
        from bertpipe.downstream.tasks import docs_task

        return docs_task.load()

    def identify(self, task: Task, data: str | None, cache: Path | None) -> Any:
        """See Source."""
        from bertpipe.downstream.tasks import docs_task

        return docs_task.identify()


# --- tables -----------------------------------------------------------------------------------------------------------


def is_there(task: Task, data: str) -> bool:
    """Whether the folder `data` holds the task."""
    folder = Path(data) / task.name
    return (folder / "train.parquet").is_file() or (task.kind == "answers" and any(folder.glob("train*.json")))


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


def read(
    table: pa.Table,
    task: Task,
    split: str,
    where: str,
    names: tuple[str, ...] | None = None,
    known: tuple[str, ...] | None = None,
) -> Split:
    """Check one table against the task's row. `where` names it in errors; `names` are the label names it declares,
    `known` those of the training data."""
    from bertpipe.downstream.tasks.kinds import KINDS

    if task.other_text and set(task.other_text) <= set(table.column_names):
        task = replace(task, text=task.other_text)
    kind = KINDS[task.kind]
    if table.num_rows == 0:
        raise DataError(f"{where}: no rows")
    columns = kind.columns(task)
    require(columns[:-1] if split in task.predicted else columns, table, where, task)
    names = names or declared_names(table, task)
    if task.labels == () and known:
        if names and names != known:
            raise DataError(f"{where}: column {task.label!r} names its codes {names}, the training data {known}")
        names = known
    return kind.read(table, task, split, where, names)


def require(columns: Sequence[str], table: pa.Table, where: str, task: Task) -> None:
    """DataError for the first column that the table hasn't got."""
    for column in columns:
        if column not in table.column_names:
            raise DataError(
                f"{where}: no column {column!r}; it has {', '.join(table.column_names)}; "
                f"the task {task.name} needs {', '.join(columns)}{near(column, table.column_names)}"
            )


def _known(splits: dict[str, Split]) -> tuple[str, ...] | None:
    """The label names of the training data, which is read first."""
    return splits["train"].label_names if "train" in splits else None


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
        return tuple(feature.get("feature", feature)["names"])  # of the codes, or of lists of codes
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
    "conll2003": FolderOrHub("CoNLL-2003", "lhoestq/conll2003", WHOLE),
    "wnut17": FolderOrHub("WNUT-17", "flaitenberger/wnut_17", WHOLE),
    "squad": Questions("SQuAD", "rajpurkar/squad", WHOLE),
    "squad_v2": Questions("SQuAD 2.0", "rajpurkar/squad_v2", WHOLE),
    "docs": Docs(),
}
