"""The task that needs no download: which package does this paragraph of documentation come from?

Classes are the six installed packages with the most source code that have paragraphs of prose enough (never the
standard library, never bertpipe), in equal numbers. It is made hard on purpose: the packages' names are blanked out,
paragraphs of one source file are never on both sides, and each file gives a few only, so that what is left to go by
is vocabulary, style and subject. The same environment gives the same examples; another one gives another task, so
scores compare within one environment. Pretraining on the embedded corpus has seen the text of these paragraphs, those
for validation included, but no label.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from bertpipe.artifact import digest
from bertpipe.data import docstrings
from bertpipe.data.docstrings import SourceFile
from bertpipe.downstream.tasks.kind import Split
from bertpipe.errors import DataError

NUM_CLASSES = 6
TRAIN, VALIDATION = 300, 150
"""Examples a class, at most: small enough that fine-tuning a small encoder takes seconds."""
PER_FILE = 5
"""Paragraphs one source file may give, so that no large file makes up a class."""
ENOUGH = 600
"""Paragraphs to read of a package, all different; a surplus, for some of them turn out to be another package's too."""
MIN_CHARS, MAX_CHARS, MIN_WORDS = 60, 600, 10
BLANK = "library"
"""What a package's name is replaced with."""

_NO_CLASS = frozenset({docstrings.STDLIB, "bertpipe"})


class Paragraph(NamedTuple):
    """One example to be."""

    package: str
    file: str
    """Name of the source file: what the split goes by."""
    number: int
    """Position among the file's paragraphs of prose."""
    text: str


class Package(NamedTuple):
    """What was read of one package."""

    paragraphs: list[Paragraph]
    aliases: set[str]
    """Pairs "numpy np": the names that its documentation imports packages under."""


def load() -> dict[str, Split]:
    """The splits `train` and `validation`, made from the packages installed here."""
    return build(read(docstrings.list_files()))


def identify() -> dict[str, str]:
    """Identity of what the task is made from: the installed packages' source files."""
    return {"docstrings": digest(docstrings.identify())}


def read(files: Iterable[SourceFile]) -> dict[str, Package]:
    """Paragraphs of the NUM_CLASSES packages with the most bytes of source and enough to read, by name.

    Files are taken in a fixed shuffled order, and no more of them than needed: the documentation of everything
    installed takes minutes to parse, this takes seconds. Where no six packages have enough, those with the most.
    """
    by_package: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        if file.package not in _NO_CLASS:
            by_package[file.package].append(file)
    ranked = sorted(by_package, key=lambda name: (-sum(file.bytes for file in by_package[name]), name))
    found: dict[str, Package] = {}
    for name in ranked:
        found[name] = _read_package(by_package[name])
        if sum(len(package.paragraphs) >= ENOUGH for package in found.values()) == NUM_CLASSES:
            break
    best = sorted(found, key=lambda name: -len(found[name].paragraphs))[:NUM_CLASSES]
    return {name: found[name] for name in sorted(best) if found[name].paragraphs}


def build(packages: dict[str, Package]) -> dict[str, Split]:
    """Blank out names, drop duplicates, split by file and balance.

    Raises DataError when fewer than two packages have paragraphs for both sides.
    """
    blank = blanker(packages)
    rows = [row._replace(text=blank(row.text)) for package in packages.values() for row in package.paragraphs]
    of_package: dict[str, list[Paragraph]] = {name: [] for name in packages}
    for row in _without_duplicates(rows):
        of_package[row.package].append(row)
    sides = [_sides(rows) for rows in of_package.values()]
    smallest = [min((len(side[part]) for side in sides), default=0) for part in (0, 1)]
    if len(sides) < 2 or 0 in smallest:
        raise DataError(
            "finetune.tasks docs: needs two or more installed packages with prose in several files "
            f"(found: {', '.join(packages) or 'none'}); install packages with documentation or choose another task"
        )
    return {
        name: _split([row for side in sides for row in side[part][: smallest[part]]], tuple(packages))
        for part, name in enumerate(("train", "validation"))
    }


# --- which paragraphs -------------------------------------------------------------------------------------------------


def _read_package(files: list[SourceFile]) -> Package:
    paragraphs: list[Paragraph] = []
    aliases: set[str] = set()
    seen: set[str] = set()
    for file in sorted(files, key=lambda file: _order(file.name)):
        documentation = docstrings.parse_file(file.path) or ()
        for text in documentation:
            aliases.update(f"{name} {alias}" for name, alias in _IMPORT_AS.findall(text))
        blocks = (block for text in documentation for block in re.split(r"\n\s*\n", text))
        texts = [text for text in map(prose, blocks) if text is not None]
        rows = [Paragraph(file.package, file.name, number, text) for number, text in enumerate(texts)]
        fresh = {_gist(row.text): row for row in rows if _gist(row.text) not in seen}
        kept = sorted(fresh.values(), key=_row_order)[:PER_FILE]
        seen.update(_gist(row.text) for row in kept)
        paragraphs += kept
        if len(paragraphs) >= ENOUGH:
            break
    return Package(paragraphs, aliases)


_IMPORT_AS = re.compile(r"\bimport (\w+)(?:\.\w+)* as (\w{2,})\b")
_NOT_PROSE = re.compile(r"\s*([-=~^*#+|.:@>]|\w+\s*(\([^)]*\))?\s*:)")
"""How a line of a table, list, heading, directive, doctest or of parameters begins."""


def prose(block: str) -> str | None:
    """The block's lines joined into one, or None: not sentences, or not of the wanted length."""
    text = " ".join(block.split())
    if not MIN_CHARS <= len(text) <= MAX_CHARS or len(text.split()) < MIN_WORDS:
        return None
    if not text[0].isupper() or text[-1] not in ".!?" or ">>>" in text or "::" in text:
        return None
    lines = block.strip("\n").splitlines()
    indents = {len(line) - len(line.lstrip()) for line in lines}
    if len(indents) > 1 or any(map(_NOT_PROSE.match, lines)):
        return None
    letters = sum(character.isalpha() or character == " " for character in text)
    return text if letters >= 0.85 * len(text) else None


def _order(*key: Any) -> bytes:
    """A fixed, arbitrary order: sorting by it shuffles without a random generator."""
    return hashlib.sha256("\0".join(map(str, key)).encode()).digest()


def _row_order(row: Paragraph) -> bytes:
    return _order(row.file, row.number)


def _gist(text: str) -> str:
    """What makes two texts the same: their words, whatever the case, digits and punctuation."""
    return re.sub(r"[\W\d_]+", " ", text.casefold())


def _without_duplicates(rows: list[Paragraph]) -> list[Paragraph]:
    """Each text once; what several packages share has no right answer, so all its copies go."""
    keys = [_gist(row.text) for row in rows]
    packages: dict[str, set[str]] = defaultdict(set)
    for key, row in zip(keys, rows, strict=True):
        packages[key].add(row.package)
    first = dict(zip(reversed(keys), reversed(rows), strict=True))
    return [row for key, row in zip(keys, rows, strict=True) if first[key] is row and len(packages[key]) == 1]


def _sides(rows: list[Paragraph]) -> tuple[list[Paragraph], list[Paragraph]]:
    """(train, validation) of one package, each in shuffled order, split by file."""
    files: dict[str, list[Paragraph]] = defaultdict(list)
    for row in rows:
        files[row.file].append(row)
    wanted = min(VALIDATION, len(rows) * VALIDATION // (TRAIN + VALIDATION))
    train: list[Paragraph] = []
    validation: list[Paragraph] = []
    for paragraphs in files.values():  # in the order they were read, which is a shuffled one
        (validation if len(validation) < wanted else train).extend(paragraphs)
    return sorted(train, key=_row_order)[:TRAIN], sorted(validation, key=_row_order)[:VALIDATION]


def _split(rows: list[Paragraph], names: tuple[str, ...]) -> Split:
    rows = sorted(rows, key=_row_order)
    return Split(
        texts=[(row.text,) for row in rows],
        labels=np.array([names.index(row.package) for row in rows], dtype=np.int64),
        ids=[f"{row.file}#{row.number}" for row in rows],
        label_names=names,
    )


# --- blanking ---------------------------------------------------------------------------------------------------------


@functools.cache
def _distributions() -> dict[str, list[str]]:
    """Import name -> names of the distributions that install it (sklearn -> scikit-learn)."""
    from importlib import metadata

    return {package: sorted(set(names)) for package, names in metadata.packages_distributions().items()}


def blanker(packages: dict[str, Package]) -> Callable[[str], str]:
    """A function that replaces every name of these packages in a text with BLANK.

    A name is the import name or the distribution's, in any case, with -, _, space or nothing between its parts, inside
    a longer word too (PyTorch, torchvision) and without its plural s; and an alias before a dot (np.array), where the
    documentation itself says which those are (`import numpy as np`).
    """
    inside: set[str] = set()
    alone: set[str] = set()
    for package in packages:
        for name in {package, *_distributions().get(package, [])}:
            spelling = r"[-_ ]?".join(map(re.escape, re.split(r"[-_.]", name.lower().removesuffix("s"))))
            (inside if len(name) > 3 else alone).add(spelling)  # a short one is part of too many words
    pairs = (pair.split() for package in packages.values() for pair in package.aliases)
    aliases = {alias for name, alias in pairs if name in packages}
    patterns = [
        rf"(?i:\w*(?:{_any_of(inside)})\w*)",
        rf"(?i:\b(?:{_any_of(alone)})\b)",
        rf"\b(?:{_any_of(aliases)})(?=\.\w)",
    ]
    pattern = re.compile("|".join(one for one, names in zip(patterns, (inside, alone, aliases), strict=True) if names))
    return lambda text: pattern.sub(BLANK, text)


def _any_of(spellings: set[str]) -> str:
    return "|".join(sorted(spellings, key=lambda spelling: (-len(spelling), spelling)))
