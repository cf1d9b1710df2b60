"""Decompress files in pieces of at most a few MiB: truncation is an error, and so is a bomb.

`CODECS[""]`, `["gz"]` and `["zst"]` take an open file and yield its uncompressed bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO

CHUNK = 1 << 20
"""Bytes asked of a file or a decoder at once."""
ZSTD_FEED = 1 << 8
"""Compressed bytes given to zstd at once: a block of 4 bytes can hold 128 KiB, so this bounds a bomb to 8 MiB."""
ZSTD_WINDOW = 1 << 27
"""Largest window a zstd frame may ask for, in bytes (zstd's own default limit)."""
MAX_RATIO = 200
"""Uncompressed bytes a compressed one may stand for, text being near 4 ..."""
FREE_BYTES = 256 << 20
"""... beyond so many."""
MAGIC = {b"\x1f\x8b": "gzip-compressed", b"\x28\xb5\x2f\xfd": "zstd-compressed"}

Codec = Callable[[IO[bytes]], Iterator[bytes]]


class DamagedError(Exception):
    """The compressed data end early, are corrupt or a bomb; the text says where, and what to do."""

    def __init__(self, problem: str, advice: str = "get the file again"):
        super().__init__(f"{problem}; {advice}")


def magic_of(head: bytes) -> str | None:
    """How a file that begins with these bytes is compressed, in words; None where it isn't."""
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def plain(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes as they are."""
    while piece := file.read(CHUNK):
        yield piece


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """Every member of a gzip file, its checksums tested."""
    decoder = None
    while data := file.read(CHUNK):
        piece = b""
        while data or len(piece) == CHUNK:
            if decoder is None:
                data = data.lstrip(b"\0")  # padding behind a member, as gzip itself allows
                if not data:
                    break
                decoder = zlib.decompressobj(wbits=31)
            try:
                piece = decoder.decompress(data, CHUNK)
            except zlib.error as error:
                raise DamagedError(f"gzip data corrupt before byte {file.tell()} ({error})") from None
            data = decoder.unconsumed_tail
            if decoder.eof:
                data, decoder = decoder.unused_data, None
            yield piece
    if decoder is not None:
        raise DamagedError(f"gzip data end early, at byte {file.tell()}")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Every frame of a zstd file. (`stream_reader` would take a truncated frame for a whole one.)"""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    decoder, begun = None, False
    while data := file.read(ZSTD_FEED):
        begun = True
        while data:
            decoder = decoder or context.decompressobj()
            try:
                piece = decoder.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedError(
                    f"zstd data corrupt or over the limits before byte {file.tell()} ({error})"
                ) from None
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
            yield piece
    if decoder is not None or not begun:
        raise DamagedError(f"zstd data end early, at byte {file.tell()}")


def _checked(decode: Codec) -> Codec:
    """`decode`, refusing what expands beyond all text, or is compressed once more inside."""

    def pieces(file: IO[bytes]) -> Iterator[bytes]:
        total, head = 0, b""
        for piece in decode(file):
            if len(head) < 4:
                head += piece[:4]
                if again := magic_of(head):
                    raise DamagedError(f"{again} once more inside, from byte 0 of the unpacked data", "unpack it once")
            total += len(piece)
            if total > FREE_BYTES + MAX_RATIO * file.tell():
                raise DamagedError(
                    f"the data before byte {file.tell()} expand more than {MAX_RATIO} times",
                    "remove the file, or unpack it yourself if it is sound",
                )
            yield piece

    return pieces


CODECS: dict[str, Codec] = {"": plain, "gz": _checked(_gunzip), "zst": _checked(_unzstd)}
