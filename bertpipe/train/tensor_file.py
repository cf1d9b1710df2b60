"""A safetensors file, written at half the price: past the page cache, hashed on the way.

The bytes are those of `safetensors.torch.save_file`, which also reads them back. That one goes through the page cache,
where each page must be found and filled: up to 3 s of the processor for the 1.3 GB of a checkpoint of BERT-base, beside
0.1 s here (0.3 s where the pages are at hand), and then the file is read again for its sha256. Nor does a checkpoint
push the shards out of the cache.
Format: 8 bytes, the header's length; the header, JSON padded with spaces to a multiple of 8; the tensors' own bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch

# Widest first: the order of the tensors in a file, which keeps each one aligned.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BUFFER = 1 << 20  # bytes; direct writes want memory, position and length in whole blocks of the disk, 4096 as a rule
DIRECT = getattr(os, "O_DIRECT", 0)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write CPU tensors to a file, flushed to the disk and readable by the group; returns its sha256 (hex).

    OSError from the disk; KeyError for a dtype that isn't one of DTYPES.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    sha256 = hashlib.sha256()
    buffer, held = memoryview(mmap.mmap(-1, BUFFER)), 0  # begins at a page
    with path.open("wb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o644)
        with contextlib.suppress(OSError):  # a file system that has no direct writes
            _set_direct(file, True)
        for name in (None, *names):
            rest = memoryview(_header(names, tensors, metadata)) if name is None else _bytes(tensors[name])
            while rest:
                part, rest = rest[: BUFFER - held], rest[BUFFER - held :]
                sha256.update(part)
                buffer[held : held + len(part)] = part
                held += len(part)
                if held == BUFFER:
                    _write(file, buffer)
                    held = 0
        _set_direct(file, False)
        _write(file, buffer[:held])
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _header(names: list[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's own memory; of one that isn't contiguous, of a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _set_direct(file: io.FileIO, wanted: bool) -> None:
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | DIRECT if wanted else flags & ~DIRECT)


def _write(file: io.FileIO, data: memoryview) -> None:
    """All of `data`; through the page cache where the disk's blocks are larger or a write ended within one."""
    while data:
        try:
            data = data[file.write(data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & DIRECT:
                raise
            _set_direct(file, False)
