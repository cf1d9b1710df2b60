"""The files of SQuAD and of what is laid out like it: which there are, the official JSON, one file for two splits.

The JSON (https://rajpurkar.github.io/SQuAD-explorer) becomes a table with the columns of the Hub's parquet:

    {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "answers": [{"text": ..., "answer_start": ...}], "is_impossible": false}]}]}]}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertpipe.downstream.tasks.kind import Split, Task
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUT = (
    "SQuAD's layout is data[].paragraphs[] with a context and qas[], each with id, question and answers[] "
    "of text and answer_start"
)


NAMES = {"train": ("train*",), "validation": ("dev*", "validation*"), "test": ("test*",)}
SUFFIXES = (".json", ".parquet")


def paths(task: Task, data: str) -> dict[str, Path]:
    """The file of each split, in `<data>/<task>`, in `<data>`, or `<data>` itself.

    One file alone stands for each of the splits that must be there. DataError where one is missing, or two could be
    meant.
    """
    folder = Path(data) / task.name if (Path(data) / task.name).is_dir() else Path(data)
    if not folder.exists():
        raise DataError(f"{folder}: no such file or folder; finetune.data needs SQuAD's JSON or parquet files")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES] if folder.is_dir() else [folder]
    if len(files) == 1:
        return dict.fromkeys(task.required, files[0])
    chosen: dict[str, Path] = {}
    for split in task.splits:
        found = [path for path in files if any(path.match(name) for name in NAMES[split])]
        if len(found) > 1:
            raise DataError(f"{folder}: {found[0].name} and {found[1].name} both look like {split}; keep one of them")
        if not found and split in task.required:
            wanted = " or ".join(NAMES[split])
            raise DataError(f"{folder}: no file {wanted} (.json or .parquet), which {task.name} needs for {split}")
        if found:
            chosen[split] = found[0]
    return chosen


def divide(whole: Split, table: pa.Table, task: Task, path: Path) -> dict[str, Split]:
    """Training and validation out of the one file there is, always alike, and no article or paragraph in both.

    Validation is a fifth of the articles (`title`), or of the paragraphs where there are fewer than five articles. What
    is odd in the file is counted with training.
    """
    from bertpipe.downstream.tasks.kinds.columns import empty  # kinds import torch

    groups = table["title"].to_pylist() if "title" in table.column_names else []
    by = "articles"
    if len(set(groups)) < 5:
        by, groups = "paragraphs", [context for _, context in whole.texts]
    order = sorted(set(groups), key=lambda group: hashlib.sha256(str(group).encode()).digest())
    if len(order) < 2:
        raise DataError(f"{path}: one paragraph can't be for training and for validation; add another file, dev*")
    held = set(order[: -(-len(order) // 5)])
    others = {reason: number for reason, number in whole.counts.items() if reason not in empty(whole.texts)}
    rows = {split: [i for i, g in enumerate(groups) if (g in held) is (split != "train")] for split in task.required}
    splits = {}
    for split, chosen in rows.items():
        texts, labels = ([values[i] for i in chosen] for values in (whole.texts, whole.labels))
        ids: Any = [whole.ids[i] for i in chosen]
        counts = others if split == "train" else {f"{by}_held_out_of_the_only_file": len(held)}
        splits[split] = replace(whole, texts=texts, labels=labels, ids=ids, counts=empty(texts) | counts)
    return splits


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> pa.Table:
    """A row a question: id, title, context, question, answers {text [], answer_start []}; null where it has no answers.

    DataError names the file and the place in it.
    """
    import pyarrow as pa

    rows = []
    for a, article in enumerate(_part(_parse(path), "data", list, str(path))):
        where = f"{path}: data[{a}]"
        title = article.get("title") if isinstance(article, dict) else None
        for p, paragraph in enumerate(_part(article, "paragraphs", list, where)):
            here = f"{where}.paragraphs[{p}]"
            context = _part(paragraph, "context", str, here)
            for q, question in enumerate(_part(paragraph, "qas", list, here)):
                rows.append(_row(question, f"{here}.qas[{q}]") | {"title": str(title or ""), "context": context})
    spans = pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int64())})
    types = {"id": pa.string(), "title": pa.string(), "context": pa.string(), "question": pa.string(), "answers": spans}
    return pa.Table.from_pylist(rows, pa.schema(types))


def _row(question: Any, where: str) -> dict[str, Any]:
    row = {"id": _part(question, "id", str, where), "question": _part(question, "question", str, where)}
    if "answers" not in question:
        return row | {"answers": None}
    answers = [] if question.get("is_impossible") else _part(question, "answers", list, where)
    places = [f"{where}.answers[{n}]" for n in range(len(answers))]
    return row | {
        "answers": {
            "text": [_part(answer, "text", str, place) for answer, place in zip(answers, places, strict=True)],
            "answer_start": [_part(x, "answer_start", int, place) for x, place in zip(answers, places, strict=True)],
        }
    }


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; write the file again as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} (character {error.pos}): {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: not readable ({error.strerror})") from None


KINDS = {list: "list", str: "text", int: "whole number"}


def _part(value: Any, key: str, kind: type, where: str) -> Any:
    """`value[key]`, which must be of that kind."""
    part = value.get(key) if isinstance(value, dict) else None
    if not isinstance(part, kind) or isinstance(part, bool):
        raise DataError(f"{where}: no {KINDS[kind]} {key!r}; {LAYOUT}")
    if isinstance(part, str):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {key!r} holds half a character at {error.start}; write it whole") from None
    elif isinstance(part, int) and abs(part) >= 2**63:
        raise DataError(f"{where}: {key!r} is {str(part)[:20]}..., which is no place in a text")
    return part
