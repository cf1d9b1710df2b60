"""How `bertpipe COMMAND --help` shows settings: one line of usage, types in words, limits in numbers."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types

from bertpipe.config_files import parser
from bertpipe.config_files import words_of as kinds

LIMITS = {
    annotated_types.Ge: ("at least", "ge"),
    annotated_types.Gt: ("above", "gt"),
    annotated_types.Le: ("at most", "le"),
    annotated_types.Lt: ("below", "lt"),
}


def text(command: str, sections: tuple[str, ...], description: str) -> str:
    """The help of a command that reads the settings of these sections."""
    from jsonargparse import DefaultHelpFormatter

    class InWords(DefaultHelpFormatter):
        def _get_type_str(self, action: Any) -> str | None:
            annotation = getattr(action, "_typehint", None)
            return super()._get_type_str(action) if annotation is None else in_words(annotation)

    usage = f"bertpipe {command} [--config FILE ...] [--SECTION.KEY VALUE ...]"
    made = parser(sections, True, prog=f"bertpipe {command}", usage=usage, description=description)
    made.formatter_class = InWords
    return made.format_help()


def in_words(annotation: Any) -> str:
    """A setting's type: `a whole number, at least 0` of Annotated[int, Ge(ge=0)]."""
    *others, last = dict.fromkeys(kinds(annotation))
    named = f"{', '.join(others)} or {last}" if others else last
    return ", ".join([named, *limits(annotation)])


def limits(annotation: Any) -> list[str]:
    """What its numbers are bounded by."""
    if get_origin(annotation) in (Union, UnionType):
        return [limit for inside in get_args(annotation) for limit in limits(inside)]
    if get_origin(annotation) is not Annotated:
        return []
    base, *notes = get_args(annotation)
    found = [
        f"{said} {getattr(note, name):g}"
        for note in notes
        for kind, (said, name) in LIMITS.items()
        if isinstance(note, kind)
    ]
    return [*limits(base), *found]
