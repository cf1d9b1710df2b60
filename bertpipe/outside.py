"""Models and tokenizers from outside: what could run code is refused before a library looks at it.

`check` reads the JSON files of a folder or Hub id itself. A stock class, its settings and safetensors are all that is
ever loaded; `trust_remote_code` is off everywhere, and this makes sure that no file turns it on, points at code or at
another configuration, or puts a value where the library keeps its own state (CVE-2026-4372 and CVE-2026-5241 were
such). A published config carries many keys of older versions: one that the stock class doesn't know is harmless as
long as it is a plain value, so only those are let through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bertpipe import reach
from bertpipe.errors import ConfigError

FORBIDDEN = {
    "auto_map": "names Python code to run",
    "custom_pipelines": "names Python code to run",
    "trust_remote_code": "asks for code of the repository to be run",
    "_attn_implementation_internal": "sets the library's inner state",
    "_experts_implementation_internal": "sets the library's inner state",
    "configuration_files": "points at another configuration",
    "quantization_config": "asks for quantised weights, which aren't trained here",
}
"""At any depth. A false or empty one asks for nothing."""
PRIVATE = {"_name_or_path", "_commit_hash", "_num_labels", "_attn_implementation_autoset", "_from_model_config"}
"""Keys with an underscore that older versions of transformers wrote."""
KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
"""Their values may name a kernel of the Hub (`owner/name`), which is code."""
MAPPINGS = {"task_specific_params", "pruned_heads", "id2label", "label2id", "rope_scaling", "rope_parameters"}
"""Mappings that published configs have, whether or not a class lists them."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
INDEX = "model.safetensors.index.json"


def check(name: str, setting: str, revision: str | None = None, weights: bool = True) -> None:
    """ConfigError, naming file and key, when the folder or Hub id `name` asks for more than stock classes.

    A folder that isn't there is told of, and a Hub that can't be reached; what else can't be fetched is left to whoever
    loads it. `weights`: whether weights will be loaded.
    """
    if not Path(name).is_dir():
        if name.startswith(("/", ".")):
            raise ConfigError(f"{setting}: there is no folder {name}")
        reach.check(name, setting, revision, weights)
    path, config = _read(name, "config.json", setting, revision)
    for key, reason in (*_complaints(config), *_tokenizer_class(config)):
        raise ConfigError(f"{setting}: {path}: {key} {reason}; remove it from a copy of the folder if you trust it")
    path, settings = _read(name, "tokenizer_config.json", setting, revision)
    for key, reason in (*_forbidden(settings), *_tokenizer_class(settings)):
        raise ConfigError(f"{setting}: {path}: {key} {reason}; remove it from a copy of the folder if you trust it")
    if not weights:
        return
    path, adapter = _read(name, "adapter_config.json", setting, revision)
    if adapter:
        raise ConfigError(f"{setting}: {path}: an adapter, which stands on another model; merge it and save it whole")
    if Path(name).is_dir():
        _check_weights(Path(name), setting)


def _read(name: str, file: str, setting: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """(where the file is, for messages; its JSON object), empty when there is none."""
    shown, value = read_json(name, file, setting, revision)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{setting}: {shown}: not a JSON object")
    return shown, value or {}


def read_json(name: str, file: str, setting: str, revision: str | None = None) -> tuple[str, Any]:
    """(where a file of the folder or Hub id `name` is, for messages; what it holds), None when there is none."""
    from transformers.utils import cached_file

    folder = Path(name)
    if folder.is_dir():
        path, shown = folder / file, str(folder / file)
    else:
        optional = ("missing_entries", "gated_repo", "connection_errors")
        lenient = {f"_raise_exceptions_for_{kind}": False for kind in optional}
        try:
            found = cached_file(name, file, revision=revision, **lenient)
        except (OSError, ValueError):  # no such id: the loader has the better words
            found = None
        if found is None:
            return "", None
        path, shown = Path(found), f"{name}: {file}"
    try:
        return shown, json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return shown, None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {shown}: not readable as JSON ({error})") from None


def _forbidden(tree: Any) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) anywhere in a tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in FORBIDDEN and value:
                yield key, FORBIDDEN[key]
            elif key in KERNELS and not (value is None or (isinstance(value, str) and value.isidentifier())):
                yield key, f"names a kernel, {value!r}, to be fetched and run"
            yield from _forbidden(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _forbidden(value)


def _complaints(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of a model's config.json."""
    from transformers import CONFIG_MAPPING

    yield from _forbidden(config)
    kind = config.get("model_type")
    stock = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    known = set(stock().to_dict()) if stock is not None else set()
    for key, value in config.items():
        if key in known or key in KERNELS or key in PRIVATE:
            continue
        if key.startswith("_"):
            yield key, "sets the library's inner state"
        elif callable(getattr(stock, key, None)):
            yield key, "would take the place of a method"
        elif isinstance(value, dict) and value and key not in MAPPINGS:
            yield key, f"is no setting of a {kind} model"


def _tokenizer_class(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named = settings.get("tokenizer_class")
    if named is None:
        return
    known = isinstance(named, str) and any(map(tokenizer_class_from_name, (named, f"{named}Fast")))
    if not known:
        yield "tokenizer_class", f"names {named!r}, which is no class of transformers"


def _check_weights(folder: Path, setting: str) -> None:
    """ConfigError for a folder with pickled weights alone, or an index of shards that points out of it."""
    if not any(folder.glob("*.safetensors")):
        for pattern in PICKLED:
            for path in sorted(folder.glob(pattern)):
                raise ConfigError(
                    f"{setting}: {path}: pickled weights can run code and are never read; convert them to safetensors"
                )
    _, index = _read(str(folder), INDEX, setting, None)
    shards = index.get("weight_map", {})
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"{setting}: {folder / INDEX}: {shard!r} is no file of this folder")
