"""Credentials stay where they are: found by what they look like and by what the environment holds, never written.

    redact(text)        the same text with every credential as ***
    refuse(settings)    ConfigError for a setting that holds one

They belong in the environment (HF_TOKEN, WANDB_API_KEY, ...) or in the files of the tools they are for. Settings are
written into every artifact, into the report and to trackers, so none may hold one; messages and tracebacks quote what
was asked for, so they pass through `redact`. Names such as `cls_token` are nobody's secret: keys are never looked at,
values alone. Standard library only.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bertpipe.errors import ConfigError

HIDDEN = "***"
SHORTEST = 8
"""Shorter values of variables are not taken for credentials: they would also stand in harmless text."""
VARIABLE = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY_ID)$", re.IGNORECASE)
"""Names of environment variables that hold one."""
IN_URL = re.compile(r"(://|:/(?=[^\s/'\"@:]+:))[^\s/'\"]+@")
"""`user:password` or a token before the @ of an address; also as a path, which has one slash for two."""
SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|wandb_v1_[A-Za-z0-9_]{20,}"
    r"|(AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"
)


def redact(text: str) -> str:
    """`text` with the credentials known here, and all that look like one, as ***."""
    for value in known():
        text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, IN_URL.sub(rf"\1{HIDDEN}@", text))


def refuse(settings: Any, place: str = "") -> None:
    """ConfigError naming the first setting of a tree that holds a credential, or a NUL, which no path can have."""
    for key, text in _texts(settings, place):
        if redact(text) != text:
            raise ConfigError(
                f"{key}: holds a credential ({redact(text)!r}), and settings are written into every artifact; "
                "leave it to the environment (HF_TOKEN, WANDB_API_KEY, ...)"
            )
        if "\0" in text:
            raise ConfigError(f"{key}: holds a NUL character: {text!r}")


def _texts(tree: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value, place)
    elif isinstance(tree, str):
        yield place, tree


def known() -> list[str]:
    """Credentials of this process's surroundings, the longest first: of its environment, netrc and the Hub's login."""
    values = {value for name, value in os.environ.items() if VARIABLE.search(name)}
    names = ("NETRC", "HF_TOKEN_PATH", "HF_HOME", "HOME")
    values |= _in_files(*(os.environ.get(name) for name in names))
    return sorted((value for value in values if len(value) >= SHORTEST), key=lambda value: (-len(value), value))


@cache
def _in_files(netrc_file: str | None, login: str | None, hub_home: str | None, home: str | None) -> frozenset[str]:
    """The same from files; what can't be read holds nothing that we could give away."""
    values = set()
    try:
        hosts = netrc.netrc(netrc_file).hosts.values()
        values |= {password for _, _, password in hosts if password}
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        pass
    try:
        hub = Path(hub_home) if hub_home else Path(home or "~").expanduser() / ".cache" / "huggingface"
        values.add((Path(login) if login else hub / "token").read_text(encoding="utf-8").strip())
    except (OSError, RuntimeError, UnicodeDecodeError):
        pass
    return frozenset(values)
