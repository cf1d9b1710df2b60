"""Exact duplicates over a corpus of any size, in bounded memory.

Each unit of the corpus writes the 128-bit hashes of its documents as *runs*: at most RUN documents, grouped by the
hash's first byte, with the bounds of the 256 groups beside them. Equal texts meet in one group, so a range of first
bytes can be searched on its own, reading only its slice of every run. The first in source order stays; what is found
does not depend on how the ranges are cut or on how many workers search them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bertpipe.data import npy

RUN = 1 << 17
"""Documents of one run: 2.6 MiB on disk, 20 MiB while it is collected."""
RANGE = 1 << 20
"""Documents that one search holds, about, while the corpus has less than 256 times as many."""
HASH = np.dtype([("high", ">u8"), ("low", ">u8"), ("row", "<u4"), ("holdout", "u1")])
"""A document: its hash as two big-endian numbers, its row in its unit's split, and which split that is."""
ROW = np.dtype([("unit", "<u4"), ("holdout", "u1"), ("row", "<u4")])
"""A duplicate to leave out."""


class HashWriter:
    """Collects the hashes of one unit's documents, in order, into runs under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: list[tuple[bytes, int, bool]] = []
        self.num_runs = 0

    def add(self, digest: bytes, row: int, holdout: bool) -> None:
        self.pending.append((digest, row, holdout))
        if len(self.pending) == RUN:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one run."""
        if not self.pending:
            return
        rows = np.empty(len(self.pending), HASH)
        digests = np.frombuffer(b"".join(digest for digest, _, _ in self.pending), ">u8").reshape(-1, 2)
        rows["high"], rows["low"] = digests[:, 0], digests[:, 1]
        rows["row"] = [row for _, row, _ in self.pending]
        rows["holdout"] = [holdout for _, _, holdout in self.pending]
        first_bytes = (rows["high"] >> np.uint64(56)).astype(np.uint8)
        order = np.argsort(first_bytes, kind="stable")  # stable: documents of a group stay in source order
        self.folder.mkdir(parents=True, exist_ok=True)
        npy.save(self.folder / f"hashes-{self.num_runs:05d}.npy", rows[order])
        npy.save(self.folder / f"bounds-{self.num_runs:05d}.npy", np.searchsorted(first_bytes[order], np.arange(257)))
        self.num_runs += 1
        self.pending.clear()


class Range(NamedTuple):
    """First bytes [first, last) of the hashes to search, in the runs of these folders (one a unit, in order)."""

    first: int
    last: int
    folders: tuple[Path, ...]

    def __str__(self) -> str:
        return f"hashes {self.first:02x}-{self.last - 1:02x}"


def list_ranges(num_documents: int, folders: list[Path]) -> list[Range]:
    """Cut the 256 groups into as many ranges as keep each near RANGE documents."""
    count = 1
    while count < 256 and num_documents > count * RANGE:
        count *= 2
    step = 256 // count
    return [Range(first, first + step, tuple(folders)) for first in range(0, 256, step)]


def find_duplicates(search: Range) -> np.ndarray:
    """The duplicates among a range's documents: ROW [D], sorted by unit, split and row."""
    slices, units = [np.empty(0, HASH)], [np.empty(0, np.uint32)]
    for unit, folder in enumerate(search.folders):
        for path in sorted(folder.glob("hashes-*.npy")):
            bounds = np.load(path.with_name(path.name.replace("hashes", "bounds")), allow_pickle=False)
            rows = np.load(path, mmap_mode="r", allow_pickle=False)[bounds[search.first] : bounds[search.last]]
            slices.append(np.array(rows))
            units.append(np.full(len(rows), unit, np.uint32))
    hashes, unit_of = np.concatenate(slices), np.concatenate(units)
    # Stable, and documents of equal hash lie in one group of each run: they keep the order of the sources.
    order = np.lexsort((hashes["low"], hashes["high"]))
    hashes, unit_of = hashes[order], unit_of[order]
    repeated = (hashes["high"][1:] == hashes["high"][:-1]) & (hashes["low"][1:] == hashes["low"][:-1])
    found = np.empty(int(repeated.sum()), ROW)
    found["unit"] = unit_of[1:][repeated]
    found["holdout"], found["row"] = hashes["holdout"][1:][repeated], hashes["row"][1:][repeated]
    return np.sort(found, order=("unit", "holdout", "row"))


def duplicates_of(unit: int, paths: list[Path]) -> np.ndarray:
    """One unit's duplicates out of saved results of `find_duplicates`: ROW [D], sorted by split and row."""
    slices = [np.empty(0, ROW)]
    for path in paths:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        first, last = np.searchsorted(rows["unit"], [unit, unit + 1])
        slices.append(np.array(rows[first:last]))
    return np.sort(np.concatenate(slices), order=("holdout", "row"))
