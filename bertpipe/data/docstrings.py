"""The embedded default corpus: the documentation of the Python packages installed on this machine.

Docstrings are read with `ast`, never imported, from the standard library (package "python") and from everything in
site-packages, so real English prose is at hand without a network. bertpipe itself is left out, and so are folders
named test or tests: a fifth of the code, a fiftieth of the text.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

STDLIB = "python"
"""Package name given to the standard library."""

_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "bertpipe"})
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class SourceFile(NamedTuple):
    """One .py file: its top-level package, its name in the corpus (`package/path/in/package.py`), place and bytes."""

    package: str
    name: str
    path: Path
    bytes: int

    def __str__(self) -> str:
        return self.name


class Docstring(NamedTuple):
    """One docstring: package and file (as in SourceFile) and its text, cleaned of the code's indentation."""

    package: str
    file: str
    text: str


def list_files() -> list[SourceFile]:
    """Every .py file that is read, sorted by name; a stat each, well under a second."""
    paths = sysconfig.get_paths()
    files = [SourceFile(STDLIB, f"{STDLIB}/{name}", path, size) for name, path, size in _walk(Path(paths["stdlib"]))]
    for root in sorted({paths["purelib"], paths["platlib"]}):
        for name, path, size in _walk(Path(root)):
            package = name.split("/", 1)[0].removesuffix(".py")
            files.append(SourceFile(package, name, path, size))
    return sorted(files)


def _walk(root: Path) -> Iterator[tuple[str, Path, int]]:
    """(path relative to root with "/", path, bytes) of each .py file below `root`, in no promised order."""
    stack, above = [str(root)], len(str(root)) + 1
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _SKIPPED_FOLDERS:
                        stack.append(entry.path)
                elif entry.name.endswith(".py") and entry.is_file():
                    yield entry.path[above:].replace(os.sep, "/"), Path(entry.path), entry.stat().st_size


def list_packages() -> dict[str, int]:
    """Top-level packages and the bytes of their .py files, by name."""
    packages: dict[str, int] = {}
    for file in list_files():
        packages[file.package] = packages.get(file.package, 0) + file.bytes
    return packages


def identify() -> dict:
    """What the docstrings are a function of, without reading them: Python, distributions, names and sizes of files."""
    return {
        "python": platform.python_version(),
        "distributions": sorted({f"{found.name}=={found.version}" for found in metadata.distributions()}),
        "files": [[file.name, file.bytes] for file in list_files()],
    }


def read_docstrings(packages: Iterable[str] | None = None) -> Iterator[Docstring]:
    """Every docstring of `packages` (all when None), in the order of file names and of lines; always the same.

    A file that can't be parsed (templates, other versions' syntax) has none.
    """
    wanted = None if packages is None else frozenset(packages)
    for file in list_files():
        if wanted is None or file.package in wanted:
            for text in parse_file(file.path) or ():
                yield Docstring(file.package, file.name, text)


def parse_file(path: Path) -> list[str] | None:
    """The docstrings of one file, in the order they stand there; None when it can't be read or parsed."""
    enabled = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects without cycles: collecting costs 10 to 20 % of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in other people's code
            tree = ast.parse(path.read_bytes())
        return list(_docstrings(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None
    finally:
        if enabled:
            gc.enable()


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, class or function and of those defined in it, however deep in ifs, tries and loops."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)):
        text = _docstring(node)
        if text:
            yield text
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        block = getattr(node, field, ())
        if isinstance(block, list):  # a lambda's or a conditional expression's body is no list
            for child in block:
                yield from _docstrings(child)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return inspect.cleandoc(first.value.value)
    return None
