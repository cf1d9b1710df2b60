"""Bring a document's text into one form, so that equal texts have equal hashes."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
"""Control characters (Unicode category Cc) that are no white space, and the byte-order mark."""


def clean(text: str) -> str:
    """Remove control characters, compose (Unicode NFC), normalise white space. Idempotent.

    Runs of white space within a line become one space; lines stay lines, however they were ended, and one blank line
    is kept where there were any: paragraphs. Joiners and other format characters stay, since Indic scripts, Persian
    and emoji need them.
    """
    text = _CONTROL.sub("", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    lines: list[str] = []
    for line in text.splitlines():
        line = " ".join(line.split())
        if line or (lines and lines[-1]):
            lines.append(line)
    if lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines)


def content_hash(data: bytes) -> bytes:
    """16 bytes that stand for a cleaned text (UTF-8): its identity, and what decides its side of the hold-out."""
    return hashlib.blake2b(data, digest_size=16).digest()


def in_holdout(digest: bytes, share: float) -> bool:
    """Whether a text of this hash is held out: a function of the text alone, so it stays when the corpus grows."""
    # Bytes 8-15: the first ones sort the hashes into partitions (duplicates.py).
    return int.from_bytes(digest[8:], "little") < share * 2.0**64
