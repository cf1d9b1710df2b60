"""Duplicates by hash: the first stays, however the work is cut."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.data import duplicates
from bertpipe.data.duplicates import HashWriter, duplicates_of, find_duplicates, list_ranges


def expected(units: list[list[tuple[int, bool]]]) -> list[set[tuple[bool, int]]]:
    """Per unit, (holdout, row in that split) of every document seen before."""
    seen, found = set(), []
    for unit in units:
        rows, dropped = [0, 0], set()
        for text, holdout in unit:
            if text in seen:
                dropped.add((holdout, rows[holdout]))
            seen.add(text)
            rows[holdout] += 1
        found.append(dropped)
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40), min_size=1, max_size=4),
    st.sampled_from([1, duplicates.RANGE + 1, 256 * duplicates.RANGE]),
    st.sampled_from([0, 7]),
)
def test_every_document_but_the_first_is_found(units, num_documents, flush_every):
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(units))]
        for folder, unit in zip(folders, units, strict=True):
            writer, rows = HashWriter(folder), [0, 0]
            for number, (text, holdout) in enumerate(unit):
                writer.add(hashlib.md5(bytes([text])).digest(), rows[holdout], holdout)
                rows[holdout] += 1
                if flush_every and number % flush_every == 0:
                    writer.flush()  # as a unit of more than RUN documents does
            writer.flush()
        saved = []
        for search in list_ranges(num_documents, folders):
            saved.append(Path(name) / f"{search.first}.npy")
            np.save(saved[-1], find_duplicates(search))
        found = [
            {(bool(row["holdout"]), int(row["row"])) for row in duplicates_of(number, saved)}
            for number in range(len(units))
        ]
    assert found == expected(units)


def test_ranges_cover_every_hash_once_and_grow_in_number():
    for num_documents, count in ((1, 1), (3 * duplicates.RANGE, 4), (10**12, 256)):
        ranges = list_ranges(num_documents, [])
        assert len(ranges) == count
        assert [byte for search in ranges for byte in range(search.first, search.last)] == list(range(256))
