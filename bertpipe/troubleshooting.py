"""Where docs/troubleshooting.md says more about an error: its entries begin with the errors' own lines.

Standard library only, and read when there is an error alone.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

PAGE = "docs/troubleshooting.md"
HEADING = re.compile(r"## (.+)")
ENTRY = re.compile(r"\*\*`(.+?)`\*\*")
LEAST = 12
"""Letters of an entry, without its `...`, that say enough to be recognized by."""


def page_file() -> Path:
    """The page: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / PAGE
    return inside if inside.is_file() else Path(__file__).parents[1] / PAGE


def more_about(message: str) -> str | None:
    """The page and its section, where it has an entry for this error: the one with the most words of it."""
    try:
        lines = page_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    section, found, most = "", None, LEAST - 1
    for line in lines:
        if heading := HEADING.fullmatch(line):
            section = heading[1]
        elif entry := ENTRY.match(line):
            parts = entry[1].split("...")
            known = sum(map(len, parts))
            if known > most and _has(message, parts):
                found, most = section, known
    return None if found is None else f"{_shown(page_file())}#{_anchor(found)}"


def _has(message: str, parts: list[str]) -> bool:
    """Whether they stand in it, one after the other; in time linear in a message, which may hold a long text."""
    at = 0
    for part in parts:
        at = message.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def _shown(path: Path) -> str:
    """Relative where that is below the current folder, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
