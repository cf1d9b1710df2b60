"""The column files of CoNLL's shared tasks: a word a line with its tags behind it, a blank line between sentences.

CoNLL-2003 has four columns with a space between them, of which the last is the entities'; WNUT-17 two with a tab.
conlleval reads the gold and the predicted tag from the last two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertpipe.errors import DataError

WORDS, TAGS = "tokens", "ner_tags"
"""What the first and the last column are called, as on the Hub; those between are 2, 3, ..."""
DOCUMENT = "-DOCSTART-"
"""The one word of a line that begins a document of CoNLL-2003, and is no sentence."""


def written(texts: Sequence[Sequence[str]], *tags: Sequence[Sequence[str]]) -> str:
    """The file of these sentences: their words, and for each of `tags` a column."""
    sentences = (
        "".join(f"{' '.join((_one(word), *row))}\n" for word, *row in zip(*columns, strict=True))
        for columns in zip(texts, *tags, strict=True)
    )
    return "\n".join(sentences)


def _one(word: str) -> str:
    """A word in a column: white space would begin another."""
    return "".join("_" if character.isspace() else character for character in word) or "_"


def columns(path: Path, text: str, delimiter: str | None = None) -> dict[str, Sequence[Any]]:
    """Of each column of a file its lists, one a sentence; DataError for a line with more or fewer fields.

    Between fields stands `delimiter`, or else a tab where there is one in the line, or else spaces.
    """
    found: list[list[list[str]]] = []
    num, begun = 0, 0
    for line, fields in _fields(text, delimiter):
        if not fields:
            begun = 0
            continue
        if not num:
            num, found = len(fields), [[] for _ in fields]
        if len(fields) != num or not all(fields):
            raise DataError(
                f"{path}: line {line}: {sum(map(bool, fields))} fields where the first line has {num}; "
                f"give each word its tags, and sentences a blank line between them"
            )
        for column, field in zip(found, fields, strict=True):
            if not begun:
                column.append([])
            column[-1].append(field)
        begun = line
    names = [WORDS, *(str(number) for number in range(2, num)), TAGS][: max(1, num)]
    return dict(zip(names, found or [[]], strict=True))


def _fields(text: str, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """Each line's number, from 1, and its fields; none between sentences."""
    for line, row in enumerate(text.split("\n"), start=1):
        row = row.rstrip("\r")
        if between := delimiter or ("\t" if "\t" in row else None):
            fields = row.split(between)
        else:
            fields = [field for field in row.split(" ") if field]
        yield line, [] if fields[:1] == [DOCUMENT] or not row.strip() else fields
