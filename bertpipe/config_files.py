"""Settings from YAML files and flags, checked: unknown keys are refused with the nearest right name.

Precedence: the defaults of config.py < YAML file(s) given with `--config` < `--section.key value` flags.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from bertpipe.config import Config
from bertpipe.errors import ConfigError
from bertpipe.redaction import refuse


def read_config(files: Sequence[Path], flags: Sequence[tuple[str, str]]) -> Config:
    """Resolve the tree: defaults < `files` in order < `flags`, ("section.key", text) pairs.

    Raises ConfigError naming the file or flag, the key and, for an unknown key, the nearest right one.
    """
    from jsonargparse import ArgumentError

    trees = {path: _read_yaml(path) for path in files}
    for path, tree in trees.items():
        check_keys(tree, str(path))
    for name, _ in flags:
        section, _, key = name.partition(".")
        if section in Config.model_fields and not key:
            raise ConfigError(f"--{name} is a section of settings; give one as --{name}.KEY VALUE")
        check_keys({section: {key: None}} if key else {section: None}, f"--{name}")
    argv = [part for path in files if trees[path] for part in ("--config", str(path))]
    argv += [part for name, text in flags for part in (f"--{name}", text)]
    try:
        resolved = parser(Config.model_fields).parse_args(argv).as_dict()
        resolved.pop("config")
        refuse(resolved)
        return Config(**resolved)
    except ArgumentError as error:
        raise ConfigError(_plainly(str(error))) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        key, reason = ".".join(map(str, place)), first["msg"]
        if len(place) > 2 and isinstance(place[2], str):  # pydantic's word on the first of several types
            section, name = str(place[0]), str(place[1])
            key, reason = f"{section}.{name}", allowed(section, name)
        raise ConfigError(f"{key}: {reason}, got {first['input']!r}") from None


def _plainly(message: str) -> str:
    """jsonargparse's message as `key: what is wrong, got value`, in one line."""
    text = " ".join(message.split())
    found = re.match(r'Parser key "(?P<key>[^"]+)": (?P<reason>Does not .*) Given value: (?P<value>.*)', text)
    found = found or re.match(r'Parser key "(?P<key>[^"]+)": (?P<reason>.*?)\.? Got value: (?P<value>.*)', text)
    inner = re.search(
        r'"(?P<key>[^"]+)": (Problem .*: )?Parser key "(?P<part>[^"]+)": .* Given value: (?P<value>.*)', text
    )
    if inner:
        return f"{inner['key']}: {inner['part']} can't be {inner['value']}"
    if not found:
        return re.sub(r"""^Parser key "([^"]+)": (Problem with given class_path '[^']+': )?""", r"\1: ", text)
    key, reason = found["key"], found["reason"]
    if limit := re.search(r"Input should be .*?(?= \[type=)", reason):
        reason = limit[0]
    elif reason.startswith(("Expected a ", "Does not validate against any", "Not a valid subclass")):
        reason = allowed(*key.split(".")[:2])
    return f"{key}: {reason}, got {found['value'].partition(' Subclass types')[0]}"


def allowed(section: str, key: str) -> str:
    """What a setting may be, in words: `must be true, false or auto`."""
    fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    *others, last = dict.fromkeys(_kinds(fields[key].annotation))
    return f"must be {', '.join(others)} or {last}" if others else f"must be {last}"


def _kinds(annotation: Any) -> list[str]:
    """The values or kinds of value of a type, as YAML has them."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inside[0])
    if origin in (Union, UnionType):
        return [kind for one in inside for kind in _kinds(one)]
    if origin is Literal:
        return [str(value) for value in inside]
    if origin in (list, tuple):
        number = f"{len(inside)} " if origin is tuple else ""
        within = get_args(inside[0])[0] if get_origin(inside[0]) is Annotated else inside[0]
        return [f"a list of {number}{SEVERAL.get(within, 'mappings')}"]
    return KINDS.get(origin or annotation, ["something else"])


KINDS = {
    bool: ["true", "false"],
    int: ["a whole number"],
    float: ["a number"],
    str: ["text"],
    dict: ["a mapping"],
    type(None): ["null"],
}
SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def parser(sections: Sequence[str] | dict[str, Any], **options: Any) -> Any:
    """A jsonargparse parser of `--config` and the flags of some sections, with their docs as help."""
    from jsonargparse import ArgumentParser

    made = ArgumentParser(exit_on_error=False, print_config=None, **options)
    made.add_argument("--config", action="config", help="YAML file with settings; may be given several times")
    for name in sections:
        made.add_class_arguments(Config.model_fields[name].annotation, name)
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
        fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        for key, value in (settings or {}).items():
            _known(f"{section}.{key}", {f"{section}.{name}": None for name in fields}, "setting", origin)
            if isinstance(value, bool) and "bool" not in str(fields[key].annotation):  # Python would take it for 0 or 1
                raise ConfigError(f"{origin}: {section}.{key} is no yes/no setting, got {str(value).lower()}")


def _known(name: str, names: Any, kind: str, origin: str) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 1, 0.5)
    every = {f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields}  # type: ignore
    elsewhere = [other for other in sorted(every) if other.split(".")[1] == name.split(".")[-1]]
    best = (elsewhere if elsewhere and not near else near or sorted(names)[:1])[0]
    raise ConfigError(f"{origin}: unknown {kind} {name!r}; did you mean {best!r}?")


class _OnceLoader(yaml.SafeLoader):
    """Plain YAML, in which a key given twice is an error rather than a silent last word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return _OnceLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None


def preset_folder() -> Path:
    """configs/model/, beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parent
    inside = package / "configs" / "model"
    return inside if inside.is_dir() else package.parent / "configs" / "model"


def read_preset(name: str) -> dict[str, Any]:
    """Fields of a model preset; ConfigError with the choices when there is none of that name."""
    path = preset_folder() / f"{name}.yaml"
    choices = sorted(p.stem for p in preset_folder().glob("*.yaml"))
    if name not in choices:
        raise ConfigError(f"model.preset: {name!r} is not one of {', '.join(choices)}")
    return _read_yaml(path)
