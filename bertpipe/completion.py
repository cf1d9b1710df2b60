"""`bertpipe completion bash`: a script that has the shell complete commands, settings and the values that are words.

bertpipe completion bash > ~/.local/share/bash-completion/completions/bertpipe
bertpipe completion zsh > FOLDER_OF_FPATH/_bertpipe
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bertpipe.commands import ARGUMENTS
from bertpipe.config import Config, Section
from bertpipe.config_files import presets, section_in
from bertpipe.errors import ConfigError


def script(shell: str, commands: Mapping[str, str], switches: Mapping[str, str]) -> str:
    """The script for a shell; `commands` with what each does, `switches` the flags without a value that some have.

    Raises ConfigError with the choices for a shell that isn't one of them.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(f"completion: {shell!r} is not one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    named = names()
    whole = argparse.ArgumentParser(prog="bertpipe")
    every = whole.add_subparsers()
    for name, text in commands.items():
        own = [ARGUMENTS[name]()] if name in ARGUMENTS else []
        one = every.add_parser(name, help=_plain(text), parents=own, add_help=not own)
        if name in switches:
            one.add_argument(switches[name], action="store_true")
        if name == "completion":
            one.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
        elif name == "verify":
            one.add_argument("folder").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif not own:
            one.add_argument("--config", help="YAML file with settings").complete = shtab.FILE  # type: ignore[attr-defined]
            for path, kind, doc in settings():
                one.add_argument(f"--{path}", choices=named.get(path, words(kind)), help=_plain(doc))
            if name == "report":
                one.add_argument("runs", nargs="*").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
                one.add_argument("--out", type=Path, help="the page of the runs")
        for action in one._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


def settings(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path, type, what it says) of every setting, those of sections in sections too."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner = section_in(*path.split("."))
        if inner is None or get_origin(field.annotation) is list:
            yield path, field.annotation, field.description or ""
        else:
            yield from settings(inner, f"{path}.")


def names() -> dict[str, list[str]]:
    """The values of settings that name a row of a table."""
    from bertpipe.data.masking import MASKINGS, RATES
    from bertpipe.downstream.finetuning.baselines import BASELINES
    from bertpipe.downstream.finetuning.grid import SCRATCH
    from bertpipe.downstream.tasks.kinds import KINDS
    from bertpipe.downstream.tasks.tasks import TASKS
    from bertpipe.model.objectives import OBJECTIVES
    from bertpipe.train.boards import TRACKERS
    from bertpipe.train.optim import OPTIMIZERS, SCHEDULES

    tables = {
        "model.preset": presets(),
        "masking.strategy": MASKINGS,
        "masking.schedule": RATES,
        "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES,
        "train.objective": OBJECTIVES,
        "finetune.tasks": [*TASKS, "all"],
        "finetune.task.kind": KINDS,
        "finetune.baselines": [*BASELINES, SCRATCH],
        "finetune.warm_start": ["mnli"],
        "runtime.trackers": TRACKERS,
    }
    return {setting: list(table) for setting, table in tables.items()}


def words(kind: Any) -> list[str] | None:
    """The values of a type that are words, such as true and false; None where there are others."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    found = [words(one) for one in get_args(kind) if one is not type(None)] if get_origin(kind) is not list else []
    return [word for one in found for word in one or ()] if found and all(found) else None


def _plain(text: str) -> str:
    """The first sentence, in one line; what argparse would fill in is escaped."""
    return " ".join(text.split()).split(". ")[0].replace("%", "%%")
