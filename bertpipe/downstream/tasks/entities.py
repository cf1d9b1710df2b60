"""Entities in tagged sentences: where they are, and how many of them are found.

A tag is O or B-, I-, E- or S- with a type (IOB1, IOB2, IOBES). Tags that don't follow their scheme are read as the
official scorer conlleval reads them, and seqeval by default: an entity begins at every B- and S-, and wherever the type
changes or nothing that could be continued goes before. (Tjong Kim Sang and De Meulder 2003, section 3; Nakayama 2018.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
PREFIXES = "BIES"

Entity = tuple[str, int, int]
"""Type, its first word, one behind its last."""


def is_tag(tag: str) -> bool:
    """Whether `tag` is O or B-, I-, E- or S- with a type."""
    return tag == OUTSIDE or (len(tag) > 2 and tag[0] in PREFIXES and tag[1] == "-")


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, from left to right."""
    found: list[Entity] = []
    before = OUTSIDE
    for place, tag in enumerate(tags):
        if _continues(before, tag):
            found[-1] = (*found[-1][:2], place + 1)
        elif tag != OUTSIDE:
            found.append((tag[2:], place, place + 1))
        before = tag
    return found


def num_unbegun(tags: Sequence[str]) -> int:
    """Entities that begin with I- or E-: as IOB1 has it, or errors of IOB2 and IOBES."""
    return sum(tags[first][0] in "IE" for _, first, _ in entities(tags))


def _continues(before: str, tag: str) -> bool:
    return tag[0] in "IE" and before[0] in "BI" and before[2:] == tag[2:]


def count(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """(right, predicted, gold) entities of each type, in the alphabet's order; right are those of the same extent."""
    right: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for guess, truth in zip(predicted, gold, strict=True):
        mine, real = entities(guess), entities(truth)
        right.update(kind for kind, *_ in set(mine) & set(real))
        ours.update(kind for kind, *_ in mine)
        theirs.update(kind for kind, *_ in real)
    return {kind: (right[kind], ours[kind], theirs[kind]) for kind in sorted(ours | theirs)}


def total(counts: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    """The same of all types together."""
    right, predicted, gold = map(sum, zip((0, 0, 0), *counts.values(), strict=True))
    return right, predicted, gold


def rates(right: int, predicted: int, gold: int) -> dict[str, float]:
    """Precision, recall and F1; 0 where they are undefined."""
    precision, recall = right / max(1, predicted), right / max(1, gold)
    return {"precision": precision, "recall": recall, "f1": 2 * right / max(1, predicted + gold)}
