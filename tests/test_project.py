"""The project files: make targets, the two launch scripts, the pinned versions, a command line that answers at once."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from bertpipe.cli import COMMANDS
from bertpipe.cli import _split as split
from bertpipe.commands import ARGUMENTS
from bertpipe.config_files import read_config

ROOT = Path(__file__).parents[1]
TARGETS = ["help", "setup", "demo", "test", "test-slow", "torture", "check", "audit", "bench", "bench-long", "clean"]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_make_help_lists_every_target():
    listed = run("make", "--no-print-directory", "help").stdout
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\w", listed, re.M), f"no {target} in:\n{listed}"
    assert len(listed.splitlines()) == len(TARGETS)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "help"])
def test_make_target_can_be_built(target):
    dry = run("make", "--dry-run", target)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.strip()


def test_demo_and_test_share_one_setup():
    """Whatever either installs is in the corpus of the demo, so neither may install anything of its own."""
    rules = run("make", "--dry-run", "--always-make", "demo").stdout, run("make", "--dry-run", "-B", "test").stdout
    installs = [[line for line in rule.splitlines() if "pip install" in line] for rule in rules]
    assert installs[0] == installs[1]
    assert len(installs[0]) == 1
    assert "-c constraints.txt" in installs[0][0]


@pytest.mark.parametrize("python", ["no-such-python", "old-python"])
def test_setup_says_which_python_it_needs(python, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase $1 in -V) echo "Python 3.8.1";; *) exit 1;; esac\n')
    old.chmod(0o755)
    command = python if python == "no-such-python" else str(old)
    failed = subprocess.run(["make", "demo", f"PYTHON={command}"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "bertpipe needs Python 3.11 or newer" in failed.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_launch_script_is_a_docstring_and_one_call(stage):
    tree = ast.parse((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    for launcher in ("python ", "torchrun ", "accelerate launch ", "bertpipe "):
        assert f"{launcher}" in docstring
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Import, ast.ImportFrom, ast.If]
    [call] = tree.body[-1].body
    assert ast.unparse(call) == f"raise SystemExit(main(['{stage}', *sys.argv[1:]]))"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_launch_script_is_the_command(stage):
    """The same mistake gives the same line and exit code, which only the real command line can produce."""
    wrong = ("--no_such_section.key", "1")
    script = run(sys.executable, f"{stage}.py", *wrong)
    command = run(sys.executable, "-m", "bertpipe.cli", stage, *wrong)
    assert script.returncode == command.returncode == 2
    assert script.stderr == command.stderr != ""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [line for line in project["dependencies"] + extras if not line.startswith("bertpipe[")]


@pytest.mark.parametrize("requirement", requirements())
def test_direct_dependency_is_pinned_within_its_range(requirement):
    packaging = pytest.importorskip("packaging.requirements", reason="pytest brings packaging")
    parsed = packaging.Requirement(requirement)
    version = {normal(name): version for name, version in pins().items()}.get(normal(parsed.name))
    assert version is not None, f"{parsed.name} is not in constraints.txt"
    assert parsed.specifier.contains(version), f"constraints.txt pins {version}, pyproject.toml says {requirement}"


def test_constraints_are_exact_sorted_and_public():
    names = list(pins())
    assert names == sorted(names, key=str.lower)
    assert "bertpipe" not in names
    for version in pins().values():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{version}: no local version, marker or address here"


def test_help_imports_nothing_heavy():
    code = (
        "import json, sys; from bertpipe.cli import main; code = main(['--help']);"
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    shown = run(sys.executable, "-c", code)
    assert shown.returncode == 0, shown.stderr
    *text, last = shown.stdout.splitlines()
    code, loaded = json.loads(last)
    assert code == 0
    assert any("pretrain" in line for line in text)
    assert not {"torch", "transformers", "datasets", "tokenizers", "pyarrow", "numpy", "accelerate"} & set(loaded)


PRESETS = {  # layers, hidden size, parameters with the masked-LM head at vocabulary 30,522
    "bert-tiny": (2, 128, 4_416_698),
    "bert-mini": (4, 256, 11_201_594),
    "bert-small": (4, 512, 28_795_194),
    "bert-medium": (8, 512, 41_404_730),
    "bert-base": (12, 768, 109_514_298),
    "bert-large": (24, 1024, 335_174_458),
}


def test_every_preset_is_known_here():
    assert {path.stem for path in (ROOT / "configs" / "model").glob("bert-*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_published_size(name):
    import torch
    from transformers import BertConfig, BertForMaskedLM

    text = (ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    layers, hidden, parameters = PRESETS[name]
    assert settings.pop("model_type") == "bert"
    stock = BertConfig(vocab_size=30_522, **settings)
    assert (stock.num_hidden_layers, stock.hidden_size, stock.num_attention_heads) == (layers, hidden, hidden // 64)
    assert stock.intermediate_size == 4 * hidden
    with torch.device("meta"):
        model = BertForMaskedLM(stock)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{parameters:,} parameters" in text


def test_no_preset_field_is_unknown_to_transformers():
    from transformers import BertConfig

    known = set(BertConfig().to_dict())
    for path in (ROOT / "configs" / "model").glob("bert-*.yaml"):
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= known, path.name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_can_be_trained_with(path):
    """Every run of configs/ is read whole, and its settings go together."""
    from bertpipe.train import pretrain

    pretrain.check(read_config([path], []))


@pytest.mark.parametrize("name", ["bert-base", "bert-large"])
def test_the_published_recipe(name):
    """Devlin et al. 2019, A.2, in its own numbers."""
    from bertpipe.data import phases

    cfg = read_config([ROOT / "configs" / f"{name}.yaml"], [])
    assert (cfg.model.preset, cfg.model.dropout, cfg.train.steps) == (name, 0.1, 1_000_000)
    assert cfg.train.objective == "mlm_nsp"
    assert [(p.last - p.first, p.sequence_length) for p in phases.parts(cfg.train)] == [(900_000, 128), (100_000, 512)]
    assert phases.total_tokens(cfg.train) == 1_000_000 * 256 * 512
    optim = cfg.optim
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0.01)
    assert (optim.schedule, optim.warmup_steps, cfg.masking.probability) == ("linear", 10_000, 0.15)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_file_starts_more_than_one_process(path, tmp_path):
    """`accelerate launch` believes the file: two processes that see one another (with MULTI_CPU there would be one)."""
    script = tmp_path / "count.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "seen = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(seen, dist.get_rank())\n"
        f"open(f'{tmp_path}/rank{{dist.get_rank()}}', 'w').write(str(seen))\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    launcher = "from accelerate.commands.launch import main; main()"
    options = ("--config_file", str(path), "--num_processes", "2", str(script))
    launched = run(sys.executable, "-c", launcher, *options)
    assert launched.returncode == 0, launched.stderr
    assert {p.name: p.read_text() for p in tmp_path.glob("rank*")} == {"rank0": "[0, 1]", "rank1": "[0, 1]"}


@pytest.mark.parametrize("path", ["launch/slurm.sbatch", "launch/local-two-processes.sh", ".ci/run"])
def test_shell_script_parses(path):
    assert run("bash", "-n", path).returncode == 0
    assert "set -euo pipefail" in (ROOT / path).read_text(encoding="utf-8")


def readme_commands() -> list[list[str]]:
    """Every command of the README's code blocks that ends in a stage and its settings: [stage, flags...]."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if line.startswith("    ") and "bin/" in line else []
        for number, word in enumerate(words):
            if word in (".venv/bin/bertpipe", "pretrain.py"):
                commands.append(
                    words[number + 1 :] if word.endswith("bertpipe") else ["pretrain", *words[number + 1 :]]
                )
    return commands


def test_readme_has_commands():
    assert len(readme_commands()) >= 7


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_command_is_understood(command):
    """Known command, known settings of the right type; the paths that stand for the reader's own are left out."""
    stage, *flags = command
    assert stage in COMMANDS
    if stage in ARGUMENTS:
        ARGUMENTS[stage]().parse_args(flags)
        return
    files, settings = split(flags)
    read_config([ROOT / file for file in files if file.name != "my-run.yaml"], settings)


def test_readme_names_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|launch|docs|benchmarks)/[\w./-]*\w", text))
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []
