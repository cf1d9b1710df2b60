"""Token classification: a tag for each word of a sentence, as in named-entity recognition.

`Split.texts`: the words of each sentence; `Split.labels`: for each int64 codes [words]. A word's label is predicted at
its first piece. A sentence that is longer than the model's input goes into overlapping windows, each an item of the
Examples, and each of its words belongs to one of them: no label is lost, none counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks import conll_files, entities, windows
from bertpipe.downstream.tasks.bootstrap import Weighted, f1_of
from bertpipe.downstream.tasks.encode import encode_words, special_tokens
from bertpipe.downstream.tasks.kind import UNLABELLED, Encoded, Kind, Outputs, Split, Task, counted, name_fields
from bertpipe.downstream.tasks.kinds.columns import empty, identifiers, lists
from bertpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from bertpipe.config import FinetuneConfig


@dataclass(frozen=True)
class Places:
    """Which words the items of the Examples answer for."""

    sentence: np.ndarray
    """int64 [items]"""
    word: np.ndarray
    """int64 [items]: the first one of the sentence; as many follow as the item has positions."""
    first: np.ndarray
    """int64 [sentences + 1]: the first row of the logits of each sentence, whose words follow one another."""


class Tokens(Kind):
    """See the module."""

    head = "token"
    pipeline = "token-classification"

    def read(self, table: pa.Table, task: Task, split: str, where: str, names: tuple[str, ...] | None) -> Split:
        """Words, and tags as text or as codes of `names`; see Kind.

        Without `names` they are O, and each type of entity with B- and I-, and E- and S- if those occur.
        """
        words = lists(table, task.text[0], where)
        _check_text(table, task.text[0], where)
        tags = _tags(table, task, split, where, words, names)
        for name in {tag for row in tags or [] for tag in row} | set(names or ()):
            if not entities.is_tag(name):
                raise DataError(
                    f"{where}: {_place(tags or [], name)}column {task.label!r}: {name!r} is neither "
                    f"{entities.OUTSIDE} nor {', '.join(f'{x}-' for x in entities.PREFIXES)} with a type; rename it"
                )
        names = names or _collect(tags or [])
        code = {name: number for number, name in enumerate(names)}
        for row in tags or []:
            if unknown := next((tag for tag in row if tag not in code), None):
                raise DataError(
                    f"{where}: {_place(tags or [], unknown)}column {task.label!r}: the tag {unknown!r} is not among "
                    f"those of the training data ({', '.join(names)}); rename it, or move examples of it there"
                )
        unbegun = sum(map(entities.num_unbegun, tags or []))
        return Split(
            texts=[tuple(row) for row in words],
            labels=None if tags is None else [np.array([code[tag] for tag in row], np.int64) for row in tags],
            ids=identifiers(table),
            label_names=names,
            counts=empty(("".join(row),) for row in words) | counted(entities_that_begin_with_I=unbegun),
        )

    def encode(self, split: Split, tokenizer: Any, settings: FinetuneConfig) -> Encoded:
        """[CLS] pieces [SEP]: a sentence, or windows of at most `finetune.max_length` tokens of it."""
        pieces = encode_words((word for words in split.texts for word in words), tokenizer)
        before, behind = special_tokens(tokenizer)
        room = settings.max_length - len(before) - len(behind)
        shared = windows.shared(settings.stride, settings.max_length, room)
        silent = {word for word, ids in pieces.items() if not len(ids)}
        pieces |= dict.fromkeys(silent, np.array([_unknown_id(tokenizer)]))
        rows, positions, labels, sentence, word = [], [], [], [], []
        num_long = 0
        for number, words in enumerate(split.texts):
            parts = [pieces[w] for w in words]
            ids, end = np.concatenate(parts), np.cumsum([len(part) for part in parts])
            first = np.append(0, end[:-1])
            begins = windows.starts(len(ids), room, shared)
            num_long += len(begins) > 1
            owner = windows.best(begins, room, first, end)
            for mine in np.split(np.arange(len(words)), np.flatnonzero(np.diff(owner)) + 1):
                begin = begins[owner[mine[0]]]
                rows.append(np.concatenate([before, ids[begin : begin + room], behind]))
                positions.append(first[mine] - begin + len(before))
                if split.labels is not None:
                    labels.append(split.labels[number][mine])
                sentence.append(number)
                word.append(mine[0])
        counts = counted(
            words_without_pieces=sum(w in silent for words in split.texts for w in words) if silent else 0,
            sentences_in_windows=num_long,
            windows=len(rows) - len(split) + num_long,
        )
        first = np.append(0, np.cumsum([len(words) for words in split.texts]))
        return Encoded(
            Examples(rows, [np.zeros_like(r) for r in rows], None if split.labels is None else labels, positions),
            counts,
            notes=Places(np.array(sentence), np.array(word), first),
        )

    def model_fields(self, split: Split) -> dict[str, Any]:
        """The tags' names."""
        return name_fields(split.label_names)

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> list[np.ndarray]:
        """The likeliest codes of each sentence, int64 [words]."""
        return np.split(outputs.logits.argmax(-1), encoded.notes.first[1:-1])

    def score(self, task: Task, split: Split, predicted: Any) -> dict[str, float]:
        """By the task's metric, over all types of entities."""
        from bertpipe.downstream.tasks.metrics import compute  # imports `evaluate`

        return compute(task.metric, _named(split, predicted), _named(split, split.labels))

    def weighted(self, task: Task, split: Split, predicted: Any) -> Weighted | None:
        """F1 from the sums of what each sentence has right, predicted and in gold."""
        if task.headline != "f1":
            return None
        rows = zip(_named(split, predicted), _named(split, split.labels), strict=True)
        return f1_of(np.array([entities.total(entities.count([ours], [gold])) for ours, gold in rows]))

    def details(self, split: Split, predicted: Any) -> dict[str, Any]:
        """`per_type`: precision, recall, F1 and the numbers of entities of each type."""
        counts = entities.count(_named(split, predicted), _named(split, split.labels))
        return {
            "per_type": {
                kind: entities.rates(right, ours, gold) | {"num_right": right, "num_predicted": ours, "num_gold": gold}
                for kind, (right, ours, gold) in counts.items()
            }
        }

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """Tags, and the probabilities of the predicted and of the gold ones."""
        assert split.label_names
        first = encoded.notes.first
        logits = outputs.logits[first[row] : first[row + 1]].astype(np.float64)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        line: dict[str, Any] = {}
        for side, likely, codes in (
            ("prediction", "probability", predicted[row]),
            ("label", "label_probability", None if split.labels is None else split.labels[row]),
        ):
            if codes is not None:
                line[side] = [split.label_names[code] for code in codes]
                line[likely] = [round(float(share), 5) for share in shares[np.arange(len(codes)), codes]]
        return line

    def parse(self, lines: Sequence[Mapping[str, Any]], names: tuple[str, ...] | None) -> tuple[Split, Any]:
        """Codes in place of tags, int64 [words] for each sentence."""
        split, predicted = super().parse(lines, names)
        code = {name: number for number, name in enumerate(names or ())}
        coded = [[np.array([code[tag] for tag in row], np.int64) for row in side] for side in (split.labels, predicted)]
        return replace(split, labels=coded[0]), coded[1]

    def files(self, split: Split, predicted: Any) -> dict[str, str]:
        """conll: the columns that conlleval reads, `word gold predicted`, or without gold tags `word predicted`."""
        sides = [_named(split, side) for side in (split.labels, predicted) if side is not None]
        return {"conll": conll_files.written(split.texts, *sides)}


def _check_text(table: pa.Table, column: str, where: str) -> None:
    import pyarrow as pa

    kind = table.schema.field(column).type.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {column!r} holds lists of {kind}, not of text (one word each)")


def _tags(
    table: pa.Table, task: Task, split: str, where: str, words: list[list[str]], names: tuple[str, ...] | None
) -> list[list[str]] | None:
    """The tags of each sentence; None for a split other than train without labels (all null or -1)."""
    import pyarrow as pa

    column = task.label
    if column not in table.column_names:
        return None
    if split != "train" and _are_secret(table[column].to_pylist()):
        return None
    rows = lists(table, column, where)
    for row, (tags, sentence) in enumerate(zip(rows, words, strict=True)):
        if len(tags) != len(sentence):
            raise DataError(
                f"{where}: row {row}: column {column!r} has {len(tags)} tags for {len(sentence)} words; give each one"
            )
    kind = table.schema.field(column).type.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return rows
    if not pa.types.is_integer(kind):
        raise DataError(f"{where}: column {column!r} holds lists of {kind}, not of tags")
    if names is None:
        raise DataError(
            f"{where}: column {column!r} holds codes and doesn't say of which tags; "
            f"write the tags themselves (O, B-PER, ...), or declare them as a datasets.ClassLabel"
        )
    for row, codes in enumerate(rows):
        if outside := [code for code in codes if not 0 <= code < len(names)]:
            fault = "is -1: label the word" if outside[0] == UNLABELLED else f"is not one of 0 .. {len(names) - 1}"
            raise DataError(f"{where}: row {row}: column {column!r}: the code {outside[0]} {fault}")
    return [[names[code] for code in codes] for codes in rows]


def _are_secret(rows: list[list[Any] | None]) -> bool:
    return all(value is None or value == UNLABELLED for row in rows for value in row or ())


def _collect(tags: list[list[str]]) -> tuple[str, ...]:
    """O, and every type with every prefix of the scheme, so that no split has a tag more; in the alphabet's order."""
    found = {tag for row in tags for tag in row} - {entities.OUTSIDE}
    prefixes, types = {"B", "I"} | {tag[0] for tag in found}, {tag[2:] for tag in found}
    return (entities.OUTSIDE, *sorted(f"{prefix}-{kind}" for prefix in prefixes for kind in types))


def _place(tags: list[list[str]], wanted: str) -> str:
    """`row 3, word 5: `, where `wanted` first occurs."""
    for row, sentence in enumerate(tags):
        if wanted in sentence:
            return f"row {row}, word {sentence.index(wanted)}: "
    return ""


def _named(split: Split, codes: Any) -> list[list[str]]:
    assert split.label_names
    return [[split.label_names[code] for code in row] for row in codes]


def _unknown_id(tokenizer: Any) -> int:
    """What stands for a word that has no pieces."""
    ids = (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
    return next(number for number in ids if number is not None)
