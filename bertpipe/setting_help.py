"""How `bertpipe COMMAND --help` shows settings: one line of usage, types in words, limits in numbers."""

from __future__ import annotations

import copy
from typing import Any, get_args

import annotated_types
from pydantic.fields import FieldInfo

from bertpipe.config_files import in_words, parser, section_in

LIMITS = {
    annotated_types.Ge: ("at least", "ge"),
    annotated_types.Gt: ("above", "gt"),
    annotated_types.Le: ("at most", "le"),
    annotated_types.Lt: ("below", "lt"),
}
"""What bounds a number, and where the bound stands in it."""


def text(command: str, sections: tuple[str, ...], description: str) -> str:
    """The help of a command that reads the settings of these sections."""
    from jsonargparse import DefaultHelpFormatter

    class InWords(DefaultHelpFormatter):
        def _get_type_str(self, action: Any) -> str | None:
            annotation = getattr(action, "_typehint", None)
            return super()._get_type_str(action) if annotation is None else described(annotation)

        def _format_action(self, action: Any) -> str:
            paths = [option.lstrip("-").split(".") for option in action.option_strings]
            own_file = any(section_in(*path) for path in paths) and not hasattr(action, "_typehint")  # --model FILE
            own_help = any(path[1:] and path[-1] == "help" for path in paths)  # --train.phases.help
            return "" if own_file or own_help else super()._format_action(action)  # the library's ways, refused here

        def _format_action_invocation(self, action: Any) -> str:
            shown = copy.copy(action)  # --section.key+ VALUE, which appends, is refused too
            shown.option_strings = [option for option in action.option_strings if not option.endswith("+")]
            return super()._format_action_invocation(shown)

    usage = f"bertpipe {command} [--config FILE ...] [--SECTION.KEY VALUE ...]"
    made = parser(sections, True, prog=f"bertpipe {command}", usage=usage, description=description)
    made.formatter_class = InWords
    return made.format_help()


def described(annotation: Any) -> str:
    """A setting's type: `a whole number, at least 0` of Annotated[int, Ge(ge=0)]."""
    return ", ".join(dict.fromkeys([in_words(annotation), *limits(annotation)]))


def limits(annotation: Any) -> list[str]:
    """What its numbers are bounded by, wherever they stand in it."""
    notes = getattr(annotation, "__metadata__", ())
    notes = [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    own = [
        f"{said} {getattr(note, name)}" for note in notes for kind, (said, name) in LIMITS.items() if type(note) is kind
    ]
    inside = [inner for inner in get_args(annotation) if inner not in notes]
    return [*own, *(limit for inner in inside for limit in limits(inner))]
