"""The architecture, held by the source itself: imports point one way, every setting is read. (What must never be
called: tests/security/test_lint.py.)

Everything here reads syntax trees; nothing of bertpipe but `bertpipe.config` is imported.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bertpipe.config import Config, Section

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bertpipe"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# A layer may import those before it. Layers in one tuple are strangers to each other.
ORDER = [
    ("errors", "troubleshooting"),
    ("config_parts",),
    ("config", "artifact", "floors", "home", "redaction"),
    ("reach",),
    ("outside",),
    ("config_files",),
    ("data", "model"),
    ("train",),
    ("downstream",),
    ("pipeline",),
    ("commands",),
    ("completion", "setting_help"),
    ("cli",),
]
# The same inside downstream/, by folder.
DOWNSTREAM = ["tasks", "finetuning", "reporting", "publishing", "using"]
RANK = {layer: rank for rank, layers in enumerate(ORDER) for layer in layers}

# Never imported when a module loads: they take seconds, or only some users need them.
HEAVY = {
    "gradio",
    "onnxruntime",
    "datasets",
    "wandb",
    "tensorboard",
    "trackio",
    "evaluate",
    "sklearn",
    "plotly",
    "pyarrow",
    "tokenizers",
    "pandas",
    "scipy",
    "sentencex",
}
# A class that derives from evaluate.Metric needs evaluate to load; so this module counts as heavy itself.
HEAVY_MODULE = "bertpipe.downstream.tasks.metrics"
# Names that hold a section's fields: train.optim.Recipe is filled with `**cfg.optim.model_dump()`.
ALIASES = {"recipe": "optim"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 90


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path, on_load: bool = False) -> Iterator[str]:
    """Dotted names that a module imports: all, or only those imported when it loads."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if on_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if on_load and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)


def layer_of(name: str) -> str | None:
    """The layer of a dotted name; None outside bertpipe, and for bertpipe itself (`__version__`)."""
    root, _, rest = name.partition(".")
    layer = rest.partition(".")[0]
    return layer if root == "bertpipe" and layer in RANK else None


def test_every_module_has_a_layer():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path):
    mine = layer_of(dotted(path))
    for name in imported(path):
        theirs = layer_of(name)
        if theirs and theirs != mine:
            assert RANK[theirs] < RANK[mine], f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if "downstream" in path.parts], ids=dotted)
def test_imports_in_downstream_point_one_way(path):
    mine = path.relative_to(PACKAGE / "downstream").parts[0]
    for name in imported(path):
        if name.startswith("bertpipe.downstream."):
            assert DOWNSTREAM.index(name.split(".")[2]) <= DOWNSTREAM.index(mine), f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_torch_stays_out_of_the_data_layer(path):
    if path.parent.name != "data" or path.name == "batches.py":
        return
    for name in imported(path):
        assert name.partition(".")[0] not in ("torch", "accelerate"), f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_heavy_is_imported_on_load(path):
    if dotted(path) == HEAVY_MODULE:
        return
    banned = HEAVY.copy()
    if path.parent == PACKAGE:  # loaded by every command, `bertpipe --help` too
        banned |= {"torch", "transformers", "accelerate", "numpy"}
    if path.parent.name == "data":
        banned |= {"transformers"}
    for name in imported(path, on_load=True):
        assert name.partition(".")[0] not in banned, f"{dotted(path)} imports {name} when it loads"
        assert not f"{name}.".startswith(f"{HEAVY_MODULE}."), f"{dotted(path)} imports {name} when it loads"


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def sections_named(scope: ast.AST) -> dict[str, str]:
    """Names that hold a section in a function or class: `settings: TrainConfig`, `settings = cfg.train`."""
    classes = {field.annotation.__name__: name for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    named = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            target = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            for section in classes.keys() & set(re.findall(r"\w+", ast.unparse(node.annotation))):
                named[target] = classes[section]
        elif isinstance(node, ast.Assign):
            targets, values = node.targets[0], node.value
            pairs = (
                zip(targets.elts, values.elts, strict=False)
                if hasattr(values, "elts") and hasattr(targets, "elts")
                else [(targets, values)]
            )
            for target, value in pairs:
                if isinstance(value, ast.Attribute) and value.attr in Config.model_fields:
                    named[ast.unparse(target).removeprefix("self.")] = value.attr
    return named


@cache
def attributes_read() -> set[tuple[str, str]]:
    """(section, field) of every `X.field` in the package where X is a section."""
    found = set()
    for path in MODULES:
        for scope in ast.walk(tree(path)):
            if not isinstance(scope, ast.Module | ast.FunctionDef | ast.ClassDef):
                continue
            named = ALIASES | {name: name for name in Config.model_fields}
            if not isinstance(scope, ast.Module):
                named |= sections_named(scope)
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute):
                    owner = getattr(node.value, "attr", getattr(node.value, "id", None))
                    if owner in named:
                        found.add((named[owner], node.attr))
    return found


@pytest.mark.parametrize("key", list(fields()))
def test_every_setting_is_read(key):
    assert tuple(key.split(".")) in attributes_read(), f"no code reads {key}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{dotted(path)} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{dotted(path)}.{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path)), f"{dotted(path)} has no docstring"


def readme_tree() -> list[str]:
    """Paths named by the README's tree of the project: the fenced block below the line '## What is where'."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## What is where")[2].partition("```")[2].partition("```")[0]
    folders: list[str] = []
    paths = []
    for line in block.strip("\n").splitlines()[1:]:  # the first line is the project's folder
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        for name in re.split(r" {2,}", line.strip())[0].split():
            folders[depth:] = [name.rstrip("/")]
            paths.append("/".join(folders[: depth + 1]))
    return paths


def test_readme_tree_names_real_files():
    paths = readme_tree()
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_tree_names_every_module():
    assert {str(path.relative_to(ROOT)) for path in MODULES} - set(readme_tree()) == set()
