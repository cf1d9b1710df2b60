""".npy files, written at once or in pieces; a full disk is a StorageError that names the file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bertpipe.artifact import replacing, writing


def save(path: Path, *arrays: np.ndarray, flush: bool = False) -> None:
    """Write arrays of any shape one behind the other, so that `path` holds them whole or is not there.

    With `flush` they are on the disk before they have the name, so that this holds after a power cut, too.
    """
    size = sum(array.nbytes for array in arrays)
    with writing(path, size), replacing(path) as temporary, temporary.open("wb") as file:
        for array in arrays:
            np.save(_Stream(file), array, allow_pickle=False)
        if flush:
            file.flush()
            os.fsync(file.fileno())


class _Stream:
    """What `np.save` takes for no real file: its way of writing those forgets why it failed."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


class GrowingNpy:
    """A .npy file of rows to come, each of shape `row`: NumPy pads its header so that the length can be set at the
    end."""

    def __init__(self, path: Path, dtype: np.dtype, row: tuple[int, ...] = ()):
        self.path, self.dtype, self.row, self.length = path, dtype, row, 0
        self._file = path.open("wb", buffering=0)  # what a buffer could not write would fail again when it is dropped
        self._header()
        self._start = self._file.tell()

    def _header(self) -> None:
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, description | {"shape": (self.length, *self.row)})
        self._write(header.getbuffer())

    def _write(self, data: Any) -> None:
        rest = memoryview(data).cast("B")
        with writing(self.path, len(rest)):
            while len(rest):
                rest = rest[self._file.write(rest) :]

    def append(self, values: np.ndarray) -> None:
        """Add `values`, converted to the file's dtype."""
        if len(values):
            self._write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Set the length and close the file."""
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._start, "the header grew over the first values"
        self._file.close()
