"""Extractive question answering: the answer is a piece of the context (Rajpurkar et al. 2016), or there is none (2018).

`Split.texts`: (question, context). `Split.labels`: of each example its gold answers, list[Gold]; empty: unanswerable.
`Split.ids`: SQuAD's ids. Items of Examples are windows (spans.py), and their labels int64 [2], the tokens that an
answer starts and ends with; both are 0, [CLS], where a window shows none.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks import squad_metric
from bertpipe.downstream.tasks.bootstrap import Weighted, mean_of
from bertpipe.downstream.tasks.kind import Encoded, Kind, Outputs, Split, Task, counted
from bertpipe.downstream.tasks.kinds.columns import empty, strings
from bertpipe.downstream.tasks.spans import Answer, decode, make_windows, place_labels
from bertpipe.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa

    from bertpipe.config import FinetuneConfig

NEARBY = 32
"""Characters that an answer may stand from where it is said to, if its text occurs more than once."""


class Gold(NamedTuple):
    """A gold answer: its text as it is given, and its characters in the context."""

    text: str
    start: int
    end: int


class Answers(Kind):
    """A span of the context; for tasks with the metric `squad_v2` perhaps none."""

    head = "span"
    pipeline = "question-answering"

    def read(self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None) -> Split:
        """Texts and answers; see Kind. An answer that stands elsewhere than it is said to is moved there."""
        questions, contexts = (strings(table, column, where) for column in task.text)
        texts: list[tuple[str, ...]] = list(zip(questions, contexts, strict=True))
        ids = _ids(table, where)
        result = Split(texts, None, ids, None, empty(texts))
        if task.label not in table.column_names:
            return result
        given = _given(table[task.label], where, task.label)
        secret = not any(given) if split in task.predicted else split != "train" and all(x is None for x in given)
        if secret:
            return result
        labels: list[list[Gold]] = []
        for (_, context), name, answers in zip(texts, ids, given, strict=True):
            if not answers and (answers is None or task.metric == "squad"):
                raise DataError(f"{where}: question {name!r} has no answer; remove it, or take the task squad_v2")
            labels.append([_find(context, *answer, f"{where}: question {name!r}") for answer in answers])
        num_moved = sum(
            gold.start != start
            for golds, answers in zip(labels, given, strict=True)
            for gold, (_, start) in zip(golds, answers or [], strict=True)
        )
        moved = counted(answers_moved_to_where_their_text_is=num_moved)
        return replace(result, labels=labels, counts=result.counts | moved)

    def encode(self, split: Split, tokenizer: Any, settings: FinetuneConfig) -> Encoded:
        """Windows; of several gold answers the first is the label."""
        windows = make_windows(split.texts, tokenizer, settings)
        labels, num_unseen = None, 0
        if split.labels is not None:
            spans = [golds[0][1:] if golds else None for golds in split.labels]
            labels, num_unseen = place_labels(windows, spans)
        counts = counted(
            questions_cut=windows.num_cut,
            windows=len(windows.input_ids),
            answers_in_no_window_as_a_whole=num_unseen,
        )
        return Encoded(Examples(windows.input_ids, windows.token_type_ids, labels), counts, windows)

    def model_fields(self, split: Split) -> dict[str, Any]:
        """Two outputs, of the start and the end."""
        return {"num_labels": 2}

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> list[Answer]:
        """Of each example the best answer, and the odds that there is none."""
        return decode(encoded.notes, outputs, [context for _, context in split.texts])

    def score(self, task: Task, split: Split, predicted: list[Answer]) -> dict[str, float]:
        """Official exact match and F1, and for 2.0 the best thresholds, differences of logits.

        Of answers that `final` has not been over, exact match and F1 are at the threshold that is best here.
        """
        texts, golds = [answer.text for answer in predicted], [[gold.text for gold in row] for row in split.labels]
        if task.metric == "squad":
            return squad_metric.squad(texts, golds)
        withheld = [answer.withheld for answer in predicted if answer.withheld is not None]
        return squad_metric.squad_v2(texts, [answer.odds for answer in predicted], golds, withheld or None)

    def weighted(self, task: Task, split: Split, predicted: list[Answer]) -> Weighted | None:
        """The mean of what each question alone scores; for 2.0 of answers that `final` has been over, since a resample
        has no threshold of its own."""
        undecided = task.metric != "squad" and any(answer.withheld is None for answer in predicted)
        if task.headline not in ("exact", "f1") or undecided:
            return None
        alone = (replace(split, labels=[golds]) for golds in split.labels)
        scores = [self.score(task, own, [answer]) for own, answer in zip(alone, predicted, strict=True)]
        return mean_of(np.array([row[task.headline] for row in scores]))

    def final(self, task: Task, predicted: list[Answer], scores: Mapping[str, float]) -> list[Answer]:
        """For 2.0, no answer where the odds say so: by the threshold that is best on validation; 0 where that has no
        labels."""
        if task.metric == "squad":
            return predicted
        threshold = scores.get("best_f1_thresh", 0.0)
        return [replace(answer, withheld=answer.odds > threshold) for answer in predicted]

    def files(self, split: Split, predicted: list[Answer]) -> dict[str, str]:
        """json: what evaluate-v1.1.py and evaluate-v2.0.py read; null_odds.json: the latter's --na-prob-file."""
        answers = dict(zip(map(str, split.ids), predicted, strict=True))
        files: dict[str, Any] = {"json": {name: answer.given for name, answer in answers.items()}}
        if any(answer.withheld is not None for answer in predicted):
            files["null_odds.json"] = {name: answer.odds for name, answer in answers.items()}
        return {ending: json.dumps(content, ensure_ascii=False) + "\n" for ending, content in files.items()}

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """The answer that is given and the best one, the next best ones, and how it compares with the gold ones."""
        answer: Answer = predicted[row]
        line: dict[str, Any] = {"prediction": answer.given, "answer": answer.text, "score": answer.score}
        line |= {"null_odds": answer.odds, "others": answer.others}
        if answer.withheld is not None:
            line["withheld"] = answer.withheld
        if split.labels is None:
            return line
        golds = [gold.text for gold in split.labels[row]]
        line["label"] = golds
        for name, measure in (("exact", squad_metric.exact), ("f1", squad_metric.f1_or_none)):
            line[name] = squad_metric.best(measure, answer.given, golds or squad_metric.NO_ANSWER)
        return line

    def parse(self, lines: Sequence[Mapping[str, Any]], names: tuple[str, ...] | None) -> tuple[Split, list[Answer]]:
        """See Kind."""
        split, _ = super().parse(lines, names)
        labels = [[Gold(text, 0, 0) for text in line["label"]] for line in lines]
        answers = [Answer(x["answer"], x["score"], x["null_odds"], withheld=x.get("withheld")) for x in lines]
        return replace(split, labels=labels), answers


def _ids(table: pa.Table, where: str) -> list[str] | list[int]:
    import pyarrow as pa

    if "id" not in table.column_names:
        return list(range(table.num_rows))
    ids = table["id"].to_pylist() if pa.types.is_integer(table.schema.field("id").type) else strings(table, "id", where)
    seen: set[Any] = set()
    for row, name in enumerate(ids):
        if name is None or name in seen:
            raise DataError(f"{where}: row {row}: column 'id' is {name!r}, not an id of this question alone")
        seen.add(name)
    return ids


def _given(column: pa.ChunkedArray, where: str, name: str) -> list[list[tuple[str, int]] | None]:
    """Of each row its answers and where they are said to start; None for null."""
    import pyarrow as pa

    kind = column.type
    fields = (
        {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if pa.types.is_struct(kind) else {}
    )
    if pa.types.is_null(kind):
        return [None] * len(column)
    lists = [fields[part] for part in ("text", "answer_start") if part in fields]
    if len(lists) < 2 or not all(pa.types.is_list(part) or pa.types.is_large_list(part) for part in lists):
        raise DataError(f"{where}: column {name!r} holds {kind}, not the lists text and answer_start")
    rows: list[list[tuple[str, int]] | None] = []
    for row, value in enumerate(column.to_pylist()):
        texts, starts = (None, None) if value is None else (value["text"], value["answer_start"])
        if texts is None:
            rows.append(None)
        elif starts is None or [type(x) for x in (*texts, *starts)] != [str] * len(texts) + [int] * len(texts):
            raise DataError(f"{where}: row {row}: column {name!r} needs a whole number in answer_start for each text")
        else:
            rows.append(list(zip(texts, starts, strict=True)))
    return rows


def _find(context: str, text: str, start: int, where: str) -> Gold:
    """The answer in its context: at its start, or else nearby, or where it occurs alone; white space counts alike."""
    if not text.strip():
        raise DataError(f"{where}: an answer is empty; leave answers empty where there is none")
    if start >= 0 and context.startswith(text, start):
        return Gold(text, start, start + len(text))
    found = [match.span() for match in re.finditer(r"\s+".join(map(re.escape, text.split())), context)]
    if not found:
        raise DataError(f"{where}: its answer {text[:80]!r} is not in the context; correct or remove it")
    nearest = min(found, key=lambda span: abs(span[0] - start))
    if len(found) > 1 and abs(nearest[0] - start) > NEARBY:
        raise DataError(
            f"{where}: its answer {text[:80]!r} is {len(found)} times in the context, nowhere near answer_start "
            f"{start}; correct that"
        )
    return Gold(text, *nearest)
