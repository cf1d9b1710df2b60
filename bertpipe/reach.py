"""Whether the Hub can be reached, before a library asks for each file of a model six times, two minutes in all."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
import urllib.request
from urllib.parse import urlsplit

from bertpipe.errors import ConfigError
from bertpipe.redaction import redact

SECONDS = 10.0
"""That it may take to accept a connection, its name looked up and all its addresses tried."""
AGAIN = 2.0
"""Seconds after which it is tried once more."""
TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check(name: str, setting: str, revision: str | None, weights: bool) -> None:
    """ConfigError for a Hub id that is not in the cache while the Hub can't be reached; one that is gets a note.

    `weights`: whether weights are wanted, or a tokenizer alone.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    endpoint = constants.ENDPOINT
    why = "" if constants.HF_HUB_OFFLINE else _fault(endpoint, int(time.monotonic() // 60))
    if not why:
        return
    try:
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in (WEIGHTS if weights else TOKENIZER)]
    except ValueError:  # no such id: who loads it has the better words
        return
    if not any(isinstance(path, str) for path in cached):
        raise ConfigError(
            f"{setting}: {name!r} is no folder and not in this machine's cache of the Hub, and {endpoint} can't be "
            f"reached ({why}); name a folder"
        )
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        _say_once(
            f"note: {endpoint} can't be reached ({why}), so {name} comes from the cache; quicker: HF_HUB_OFFLINE=1"
        )


@functools.cache
def _say_once(note: str) -> None:
    print(redact(note), file=sys.stderr, flush=True)


@functools.lru_cache(maxsize=1)
def _fault(endpoint: str, minute: int) -> str:
    """Why nothing listens there, also when asked again; empty where something does. An answer holds for a `minute`."""
    try:
        address = urlsplit(endpoint)
        host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    except ValueError as error:  # no port: the library has words for it
        return str(error)
    proxies = urllib.request.getproxies()
    if {address.scheme, "all"} & proxies.keys() and not urllib.request.proxy_bypass(host):
        return ""
    if not connect(host, port):
        return ""
    time.sleep(AGAIN)
    return connect(host, port)


def connect(host: str, port: int) -> str:
    """Why no connection comes about within SECONDS, whatever the number of addresses; empty where one does."""
    found: list[str] = []

    def attempt() -> None:
        try:
            socket.create_connection((host, port), SECONDS).close()
            found.append("")
        except (OSError, ValueError) as error:  # ValueError: no name that can be
            found.append(getattr(error, "strerror", None) or str(error))

    attempting = threading.Thread(target=attempt, daemon=True)  # looking a name up has no time limit of its own
    attempting.start()
    attempting.join(SECONDS)
    return found[0] if found else f"no answer in {SECONDS:g} s"
