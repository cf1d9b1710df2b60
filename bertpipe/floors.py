"""The oldest versions that are safe to read others' files with; older ones are refused before a stage begins.

pip's ranges in pyproject.toml say the same, but a `--no-deps` install or another project's pins can undo them.
Standard library only: nothing of what is checked is imported.
"""

from __future__ import annotations

import re
from importlib import metadata

from bertpipe.errors import ConfigError

FLOORS = {
    "torch": ("2.10", "CVE-2026-24747, CVE-2025-32434: loading weights ran code"),
    "transformers": ("5.3", "CVE-2026-4372, CVE-2026-5241: a config.json ran code"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: a parquet file ran code"),
    "pyyaml": ("5.4", "CVE-2020-14343: a YAML file ran code"),
}
"""Package: the oldest version allowed, and why."""


def check() -> None:
    """ConfigError naming the first package that is older than its floor, or not there."""
    for name, (floor, reason) in FLOORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed; pip install '{name}>={floor}'") from None
        if numbers(found) < numbers(floor):
            raise ConfigError(f"{name} {found} is installed, {floor} is the oldest that is safe ({reason}); upgrade it")


def numbers(version: str) -> tuple[int, ...]:
    """(2, 10, 0) of 2.10, 2.10.0a1 or 2.10+cpu: for order alone, so a pre-release counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else [0]
    return tuple(parts + [0] * (3 - len(parts)))
