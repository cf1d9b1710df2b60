"""Test predictions of the best models, as the benchmarks' scorers want them.

GLUE: a table of `index` and `prediction` for each task, tab-separated; the inference tasks by the names of their
labels, the others by number (https://gluebenchmark.com/faq, and what nyu-mll/jiant writes). SuperGLUE: a JSON line
`{"idx": 0, "label": ...}` for each example (https://super.gluebenchmark.com/faq).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe.downstream.finetuning.grid import MODEL

FOLDER = "submission"


@dataclass(frozen=True)
class File:
    """What a scorer reads of one split."""

    name: str
    answer: Callable[[Any, list[str]], Any]
    """(prediction as predictions-*.jsonl has it, label names) -> what stands in the file."""


def write(out: Path, tables: dict[str, Any]) -> list[str]:
    """Write `out/submission/` from the tasks' parts of scores.json and the predictions beside them.

    Returns what to tell people: the files, the tasks without test data, what GLUE's scorer wants besides. No lines
    where no task is of these benchmarks.
    """
    names, missing = [], []
    for (task, split), file in FILES.items():
        if task in tables:
            source = _predictions(out, tables[task], split)
            if source is None:
                missing.append(f"{task} ({split})")
                continue
            (out / FOLDER).mkdir(exist_ok=True)
            _write(source, out / FOLDER / file.name, file, tables[task]["labels"] or [])
            names.append(file.name)
    lines = [f"{FOLDER}/: {', '.join(names)}"] if names else []
    if missing:
        lines.append(f"nothing to submit, as there are no predictions: {', '.join(missing)}")
    glue = [file.name for file in FILES.values() if file.name.endswith(".tsv")]
    if {*names} & {*glue} and (absent := [name for name in glue if name not in names]):
        lines.append(f"GLUE's scorer also wants {', '.join(absent)}")
    return lines


def _predictions(out: Path, table: dict[str, Any], split: str) -> Path | None:
    """The best run's predictions of a split, where there are any."""
    for run in table["runs"]:
        path = out / run["folder"] / f"predictions-{split}.jsonl"
        if run["init"] == MODEL and run["seed"] == table["model_seed"] and path.is_file():
            return path
    return None


def _write(source: Path, target: Path, file: File, labels: list[str]) -> None:
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers = [file.answer(row["prediction"], labels) for row in rows]
    numbers = [row["id"] for row in rows]
    if sorted(map(str, numbers)) != sorted(map(str, range(len(rows)))):  # the file's own order, where `idx` is not one
        numbers = list(range(len(rows)))
    pairs = sorted(zip(map(int, numbers), answers, strict=True))
    if target.suffix == ".tsv":
        text = "index\tprediction\n" + "".join(f"{number}\t{answer}\n" for number, answer in pairs)
    else:
        text = "".join(json.dumps({"idx": number, "label": answer}) + "\n" for number, answer in pairs)
    target.write_text(text, encoding="utf-8")


def _name(prediction: str, labels: list[str]) -> str:
    return prediction


def _word(prediction: str, labels: list[str]) -> str:
    """`true` or `false`."""
    return prediction.lower()


def _code(prediction: str, labels: list[str]) -> int:
    return labels.index(prediction)


def _choice(prediction: int, labels: list[str]) -> int:
    """The number of the choice, from 0."""
    return prediction


def _similarity(prediction: float, labels: list[str]) -> str:
    """From 0 to 5, as the gold scores are."""
    return f"{min(5.0, max(0.0, prediction)):.3f}"


FILES: dict[tuple[str, str], File] = {
    ("cola", "test"): File("CoLA.tsv", _code),
    ("sst2", "test"): File("SST-2.tsv", _code),
    ("mrpc", "test"): File("MRPC.tsv", _code),
    ("stsb", "test"): File("STS-B.tsv", _similarity),
    ("qqp", "test"): File("QQP.tsv", _code),
    ("mnli", "test_matched"): File("MNLI-m.tsv", _name),
    ("mnli", "test_mismatched"): File("MNLI-mm.tsv", _name),
    ("qnli", "test"): File("QNLI.tsv", _name),
    ("rte", "test"): File("RTE.tsv", _name),
    ("wnli", "test"): File("WNLI.tsv", _code),
    ("mnli", "ax"): File("AX.tsv", _name),
    ("boolq", "test"): File("BoolQ.jsonl", _word),
    ("cb", "test"): File("CB.jsonl", _name),
    ("copa", "test"): File("COPA.jsonl", _choice),
    ("wic", "test"): File("WiC.jsonl", _word),
}
"""By task and split."""
