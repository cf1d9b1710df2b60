"""Nothing in the source unpickles, evaluates, runs a shell, unpacks archives or waits for a network without an end."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for place in ("bertpipe", "benchmarks", "launch", "pretrain.py", "finetune.py")
    for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
)

IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pickletools"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("pandas.read_pickle", "pd.read_pickle", "np.fromregex"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("yaml.Loader", "os.system", "os.popen", "tempfile.mktemp", "builtins.eval", "builtins.exec"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "code.interact", "runpy.run_path", "runpy.run_module"),
    *("importlib.reload", "shutil.unpack_archive"),
}
METHODS = {
    *("extractall", "extract", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("save_state", "load_state_dict_from_url", "unpack_archive", "spec_from_file_location", "exec_module"),
}
"""Whatever they are called on."""
SENDERS = {"requests", "httpx", "httpx2", "urllib", "request", "HfApi", "session", "aiohttp"}
"""What their names begin with; a call that goes out must say how long it waits."""
VERBS = {"get", "post", "put", "patch", "delete", "head", "request", "urlopen", "model_info", "dataset_info", "whoami"}
CLIENTS = {"httpx.Client", "httpx2.Client", "httpx.AsyncClient", "httpx2.AsyncClient", "HTTPConnection"}


def named(node: ast.AST) -> str:
    """`a.b.c` of such a chain, calls within it left out: `HfApi.model_info` of `HfApi().model_info`."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return named(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def origins(tree: ast.Module) -> dict[str, str]:
    """What imported names stand for: `run` -> `subprocess.run`, `np` -> `numpy`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def unsafe(tree: ast.Module) -> list[str]:
    """One line for each unsafe thing in a module."""
    known = origins(tree)
    return [f"line {node.lineno}: {what}" for node in ast.walk(tree) if (what := wrong(node, known))]  # type: ignore[attr-defined]


def wrong(node: ast.AST, known: dict[str, str]) -> str | None:
    """What is unsafe about a node, if anything."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return next((f"import {name}" for name in names if name.partition(".")[0] in IMPORTS), None)
    if isinstance(node, ast.Name | ast.Attribute):
        name = named(node)
        first, dot, rest = name.partition(".")
        full = known.get(first, first) + dot + rest
        if {name, full} & CALLS or (isinstance(node, ast.Attribute) and node.attr in METHODS):
            return name
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.Dict):  # {"trust_remote_code": True}, config.x = True
        return _assigned(node)
    return _called(node, known) if isinstance(node, ast.Call) else None


def _assigned(node: ast.Assign | ast.AnnAssign | ast.Dict) -> str | None:
    if isinstance(node, ast.Dict):
        pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if _is_text(key)]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(named(target).rpartition(".")[2], node.value) for target in targets]
    values = [value.value for key, value in pairs if key == "trust_remote_code" and isinstance(value, ast.Constant)]
    return "trust_remote_code" if any(value and not isinstance(value, str) for value in values) else None


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _called(node: ast.Call, known: dict[str, str]) -> str | None:
    name = named(node.func)
    first, dot, rest = name.partition(".")
    full = known.get(first, first) + dot + rest
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in BUILTINS:
        return f"{name}()"
    for key in ("shell", "trust_remote_code", "allow_pickle"):
        if key in given and not is_false(given[key]):
            return f"{key}={ast.unparse(given[key])}"
    if full in ("numpy.load", "np.load") and "allow_pickle" not in given:
        return f"{name} without allow_pickle=False"
    goes_out = full.partition(".")[0] in SENDERS and full.rpartition(".")[2] in VERBS and "." in full
    goes_out = goes_out or "HfApi." in full or full in CLIENTS or full.endswith(("urlopen", ".HTTPConnection"))
    if goes_out and not full.endswith((".Request", ".HfApi")) and "timeout" not in given:
        return f"{name} without timeout"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_called(path):
    assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_source_is_there():
    assert len(SOURCES) > 70


SEEDED = """
import pickle
from dill import loads
import marshal as m
from joblib import load
import shelve
model = torch.load(path, weights_only=True)
torch.save(state, path)
from torch import load as read; read(path)
rows = np.load(path)
rows = np.load(path, mmap_mode="r", allow_pickle=True)
import numpy; numpy.load(path, allow_pickle=flag)
yaml.load(text, Loader=yaml.SafeLoader)
yaml.unsafe_load(text)
value = eval(text)
exec(text)
code = compile(text, "x", "exec")
run = __import__(name)
AutoModel.from_pretrained(name, trust_remote_code=True)
AutoModel.from_pretrained(name, trust_remote_code=flag)
options = {"trust_remote_code": True}
subprocess.run(command, shell=True)
from os import system; system(command)
tarfile.open(path).extractall(folder)
shutil.unpack_archive(path)
name = tempfile.mktemp()
dist.all_gather_object(seen, value)
from torch.distributed import broadcast_object_list; torch.distributed.broadcast_object_list(values)
accelerator.save_state(folder)
requests.get(address)
urllib.request.urlopen(address)
from urllib.request import urlopen; urlopen(address)
HfApi().model_info(name)
with httpx.Client() as client: pass
importlib.util.spec_from_file_location(name, path)
""".strip().splitlines()


@pytest.mark.parametrize("line", SEEDED)
def test_a_planted_violation_is_caught(line):
    source = f"def f():\n    {line}" if "import" not in line.partition(";")[0] else line
    assert unsafe(ast.parse(source)), line


def test_a_bare_except_is_caught():
    assert unsafe(ast.parse("try:\n  pass\nexcept:\n  pass")) == ["line 3: bare except"]


HARMLESS = """
model.eval()
objective.compile()
yaml.safe_load(text)
re.compile(text)
subprocess.run(command, shell=False)
rows = np.load(path, allow_pickle=False)
AutoModel.from_pretrained(name, trust_remote_code=False)
reasons = {"trust_remote_code": "asks for code to be run"}
settings.get(key)
HfApi().model_info(name, timeout=10)
optimizer.load_state(load_file(path))
""".strip().splitlines()


@pytest.mark.parametrize("line", HARMLESS)
def test_harmless_lines_pass(line):
    assert unsafe(ast.parse(line)) == []
