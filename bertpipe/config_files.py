"""Settings from YAML files and flags, checked: unknown keys are refused with the nearest right name.

Precedence: the defaults of config.py < YAML file(s) given with `--config` < `--section.key value` flags.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from bertpipe.config import Config, Section
from bertpipe.errors import ConfigError
from bertpipe.home import at_home
from bertpipe.redaction import refuse


def read_config(files: Sequence[Path], flags: Sequence[tuple[str, str]]) -> Config:
    """Resolve the tree: defaults < `files` in order < `flags`, ("section.key", text) pairs.

    Raises ConfigError naming the file or flag, the key and, for an unknown key, the nearest right one.
    """
    from jsonargparse import ArgumentError

    trees = {path: _read_yaml(path) for path in files}
    for path, tree in trees.items():
        check_keys(tree, str(path))
    for name, text in flags:
        section, _, key = name.partition(".")
        if section in Config.model_fields and not key:
            raise ConfigError(f"--{name} is a section of settings; give one as --{name}.KEY VALUE")
        check_keys(_flag_tree(name, text), f"--{name}")
    arguments = [(str(path), ["--config", str(path)]) for path in files if trees[path]]
    arguments += [(f"--{name}", [f"--{name}={text}"]) for name, text in flags]
    for origin, value in [*((str(path), tree) for path, tree in trees.items()), *((f"--{n}", t) for n, t in flags)]:
        _check_texts(value, origin)
    try:
        words = [word for _, some in arguments for word in some]
        resolved = _whole_parser().parse_args(words, defaults=False).as_dict()  # Config has them, and sooner
        resolved.pop("config", None)
        refuse(resolved)
        return Config(**at_home(resolved))
    except ArgumentError as error:
        message = _plainly(str(error))
        origin = "" if re.match(r"[\w.]+: ", message) else f"{_culprit(arguments)}: "
        raise ConfigError(origin + message) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        key, reason = ".".join(map(str, place)), first["msg"]
        depth = 3 if section_in(*map(str, place[:2])) else 2
        if len(place) > depth and isinstance(place[depth], str):  # pydantic's word on the first of several types
            setting = [str(part) for part in place[:depth]]
            key, reason = ".".join(setting), allowed(*setting)
        raise ConfigError(f"{key}: {reason}, got {_clip(repr(first['input']))}") from None
    except UNREADABLE as error:
        raise ConfigError(f"{_culprit(arguments)}: a value can't be read ({_clip(repr(error))})") from None


def _flag_tree(name: str, text: str) -> dict[str, Any]:
    """A flag as a tree of keys; of its value only what may hold keys too is read."""
    *outer, key = name.split(".")
    try:
        value = _OnceLoader(text).get_single_data() if section_in(*outer, key) else None
    except yaml.YAMLError:
        value = text
    tree = {key: value}
    for part in reversed(outer):
        tree = {part: tree}
    return tree


def _culprit(arguments: list[tuple[str, list[str]]]) -> str:
    """The first file or flag that can't be parsed by itself; all of them if it takes several."""
    from jsonargparse import ArgumentError

    for origin, words in arguments:
        try:
            _whole_parser().parse_args(words)
        except (ArgumentError, *UNREADABLE):
            return origin
    return ", ".join(origin for origin, _ in arguments)


def _check_texts(value: Any, origin: str) -> None:
    """ConfigError for a text that jsonargparse, which reads texts as YAML again, would blow up or choke on."""
    if isinstance(value, dict):
        if "class_path" in value:
            raise ConfigError(f"{origin}: class_path is no setting, as nothing here is a class to choose; remove it")
        for inner in value.values():
            _check_texts(inner, origin)
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner, origin)
    elif isinstance(value, str) and SURROGATE.search(value):
        raise ConfigError(f"{origin}: {_clip(ascii(value))} holds half a character (lone surrogate)")
    elif isinstance(value, str) and len(value) < MAX_TEXT and TELLING.search(value):
        try:
            loaded = _OnceLoader(value).get_single_data()
        except ValueRefusedError as error:
            raise ConfigError(f"{origin}: {_clip(repr(value))} can't be read: {error.problem}") from None
        except RecursionError:
            raise ConfigError(f"{origin}: {_clip(repr(value))} is nested too deep") from None
        except yaml.YAMLError:
            return  # so it is taken as a plain text
        if not isinstance(loaded, str):
            _check_texts(loaded, origin)


@functools.cache
def _whole_parser() -> Any:
    return parser(Config.model_fields)


def _plainly(message: str) -> str:
    """jsonargparse's message as `key: what is wrong, got value`, in one line."""
    text = " ".join(message.split())
    within = re.match(
        r"""Parser key "(?P<key>[^"]+)": .*?given class_path '[^']+': (?P<rest>.*?)( - Expected a <class 'None.*)?$""",
        text,
    )
    if within and "." in within["key"] and get_origin(_type_of(*within["key"].split("."))) in (Union, UnionType):
        key, rest = within["key"], within["rest"]
        if missing := re.match(r"the following arguments are required: ([\w, ]+)", rest):
            return f"{key}: needs {missing[1]} too"
        return _plainly(re.sub(r'^Parser key "', f'Parser key "{key}.', rest))
    found = re.match(r'Parser key "(?P<key>[^"]+)": (?P<reason>Does not .*) Given value: (?P<value>.*)', text)
    found = found or re.match(r'Parser key "(?P<key>[^"]+)": (?P<reason>.*?)\.? Got value: (?P<value>.*)', text)
    inner = re.search(
        r'"(?P<key>[^"]+)": (Problem .*: )?Parser key "(?P<part>[^"]+)": .* Given value: (?P<value>.*)', text
    )
    if inner:
        return f"{inner['key']}: {inner['part']} can't be {_clip(inner['value'])}"
    if not found:
        return _clip(re.sub(r"""^Parser key "([^"]+)": (Problem with given class_path '[^']+': )?""", r"\1: ", text))
    key, reason = found["key"], found["reason"]
    limits = re.findall(r"Input should be (?!a valid ).*?(?= \[type=)", reason)
    if limits:  # of the last type that the value could be; a limit that the value equals is left out of the text
        reason = limits[-1] + (f" {found['value']}" if limits[-1].endswith(("than", "to")) else "")
    elif re.match("Expected a |Does not validate against any|Not a valid subclass|.*Input should be a valid", reason):
        reason = allowed(*key.split(".")[: 3 if section_in(*key.split(".")[:2]) else 2])
    return f"{key}: {_clip(reason)}, got {_clip(found['value'].partition(' Subclass types')[0])}"


def allowed(*path: str) -> str:
    """What a setting may be, in words: `must be true, false or auto` of ("runtime", "compile")."""
    return f"must be {in_words(_type_of(*path))}"


def in_words(annotation: Any) -> str:
    """A type: `true, false or auto` of bool | Literal["auto"]."""
    *others, last = dict.fromkeys(_kinds(annotation))
    return f"{', '.join(others)} or {last}" if others else last


def takes_several(*path: str) -> bool:
    """Whether a setting may be a list; also of one that isn't there, about which others complain."""
    kind = _type_of(*path)
    return kind is None or any(word.startswith("a list") for word in _kinds(kind))


def _kinds(annotation: Any) -> list[str]:
    """The values or kinds of value of a type, as YAML has them."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inside[0])
    if origin in (Union, UnionType):
        return [kind for one in inside for kind in _kinds(one)]
    if origin is Literal:
        return [str(value) for value in inside]
    if origin is None and _section_of(annotation):
        return KINDS[dict]
    if origin in (list, tuple):
        number = f"{len(inside)} " if origin is tuple else ""
        within = get_args(inside[0])[0] if get_origin(inside[0]) is Annotated else inside[0]
        return [f"a list of {number}{SEVERAL.get(within, 'mappings')}"]
    return KINDS.get(origin or annotation, ["something else"])


UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises, besides its own errors, over `!!int x`, a thirteenth month and the like."""
MAX_NODES = 10_000
"""Values of a settings file, its aliases written out."""
MAX_TEXT = 100_000
"""A longer text is never read as YAML."""
TELLING = re.compile(r"[&*!{\[]|class_path")
"""What a text holds that is more than a scalar."""
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SHOWN = 200
"""Characters of a wrong value that a message shows."""
KINDS = {
    bool: ["true", "false"],
    int: ["a whole number"],
    float: ["a number"],
    str: ["text"],
    dict: ["a mapping"],
    type(None): ["null"],
}
SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def parser(sections: Sequence[str] | dict[str, Any], in_full: bool = False, **options: Any) -> Any:
    """A jsonargparse parser of `--config` and the flags of some sections, with their docs as help.

    `in_full`: with the settings of sections in sections one by one, for the help alone.
    """
    from jsonargparse import ArgumentParser

    made = ArgumentParser(exit_on_error=False, print_config=None, **options)
    made.add_argument("--config", action="config", help="YAML file with settings; may be given several times")
    for name in sections:
        section: Any = Config.model_fields[name].annotation
        kinds = {key: field.annotation for key, field in section.model_fields.items() if in_full}
        inner = {key: _section_of(kind) for key, kind in kinds.items() if get_origin(kind) is not list}
        made.add_class_arguments(section, name, skip={key for key, found in inner.items() if found})
        for key, found in inner.items():
            if found:
                made.add_class_arguments(found, f"{name}.{key}")
    return made


def check_keys(tree: Any, origin: str) -> None:
    """ConfigError unless `tree` is {section: {key: ...}} with known names."""
    if tree is None:
        return
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected sections with settings, found {type(tree).__name__}")
    for section, settings in tree.items():
        _known(str(section), Config.model_fields, "section", origin)
        if settings is None and not origin.startswith("--"):
            raise ConfigError(f"{origin}: section {section} is empty; give it settings or remove it")
        if settings is not None and not isinstance(settings, dict):
            raise ConfigError(f"{origin}: {section} is a section; write its settings as {section}: {{key: value}}")
        _check_settings(settings or {}, section, Config.model_fields[section].annotation, origin)


def _check_settings(settings: dict, place: str, section: Any, origin: str) -> None:
    """The same of one section, and of those that stand in its settings."""
    for key, value in settings.items():
        name = f"{place}.{key}"
        _known(name, {f"{place}.{known}": None for known in section.model_fields}, "setting", origin)
        kind = section.model_fields[key].annotation
        if isinstance(value, bool) and "bool" not in str(kind):  # Python would take it for 0 or 1
            raise ConfigError(f"{origin}: {name} is no yes/no setting, got {str(value).lower()}")
        inner = _section_of(kind)
        for one in (value if isinstance(value, list) else [value]) if inner else []:
            if isinstance(one, dict):
                _check_settings(one, name, inner, origin)
            elif isinstance(one, str):  # which jsonargparse would take for the name of a class, and import
                raise ConfigError(f"{origin}: {name} {allowed(*name.split('.'))}, got {_clip(repr(one))}")


def section_in(*path: str) -> type[Section] | None:
    """The section that a setting holds, or holds a list of: `section_in("finetune", "task")`."""
    return _section_of(_type_of(*path))


def _type_of(*path: str) -> Any:
    """The type of a setting or section; None where there is no such."""
    kind: Any = Config
    for key in path:
        section = _section_of(kind)
        kind = section.model_fields[key].annotation if section and key in section.model_fields else None
    return kind


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _known(name: str, names: Any, kind: str, origin: str) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 1, 0.5)
    every = {f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields}  # type: ignore
    elsewhere = [other for other in sorted(every) if other.split(".")[1] == name.split(".")[-1]]
    best = (elsewhere if elsewhere and not near else near or sorted(names)[:1])[0]
    raise ConfigError(f"{origin}: unknown {kind} {_clip(name)!r}; did you mean {best!r}?")


class ValueRefusedError(yaml.constructor.ConstructorError):
    """A value that is well-formed YAML and yet can't be had."""


class _OnceLoader(yaml.SafeLoader):
    """Plain YAML, in which a key given twice is an error rather than a silent last word."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except UNREADABLE:
            problem = f"{_clip(str(node.value))!r} is no {node.tag.rpartition(':')[2]}"
            raise ValueRefusedError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Nodes of a tree whose aliases are written out; an error for one that never ends, or has more than MAX_NODES."""
    if node in known:
        if known[node]:
            return known[node]
        raise ValueRefusedError(None, None, "it contains itself", node.start_mark)
    known[node] = 0  # at it
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[node] = 1 + sum(_count_nodes(part, known) for part in parts)
    if known[node] > MAX_NODES:
        problem = f"more than {MAX_NODES} values, its aliases (*) written out"
        raise ValueRefusedError(None, None, problem, node.start_mark)
    return known[node]


def _clip(text: str) -> str:
    """The beginning of a text that may be of any length."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _read_yaml(path: Path) -> Any:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return _OnceLoader(text).get_single_data()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML (nested too deep)") from None
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{at}: not valid YAML (unacceptable character #x{error.character:04x})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML ({_clip(str(getattr(error, 'problem', error)))})") from None


def preset_folder() -> Path:
    """configs/model/, beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parent
    inside = package / "configs" / "model"
    return inside if inside.is_dir() else package.parent / "configs" / "model"


def read_preset(name: str) -> dict[str, Any]:
    """Fields of a model preset; ConfigError with the choices when there is none of that name."""
    if name not in (choices := presets()):
        raise ConfigError(f"model.preset: {name!r} is not one of {', '.join(choices)}")
    return _read_yaml(preset_folder() / f"{name}.yaml")


def presets() -> list[str]:
    """Names of the model presets."""
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def constraints_file() -> Path:
    """constraints.txt, the versions that were tested: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / "constraints.txt"
    return inside if inside.is_file() else Path(__file__).parents[1] / "constraints.txt"
