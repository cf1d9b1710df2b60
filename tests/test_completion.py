"""Completion by the shell: bash itself is asked what it would offer, after the script as the command prints it."""

import shutil
import subprocess

import pytest

from bertpipe import cli, completion
from bertpipe.config_files import parser
from tests.runs import bertpipe

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_bertpipe bertpipe "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "bertpipe"
    path.write_text(bertpipe("completion", "bash").stdout)
    return path


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pretr", ["pretrain"]),
        ("pretrain --train.st", ["--train.steps"]),
        ("pretrain --config my-run.yaml --train.reduction e", ["exact"]),
        ("finetune --finetune.task.k", ["--finetune.task.kind"]),
        ("all --runtime.compile ", ["true", "false", "auto"]),
        ("all --model.dropout ", []),
        ("estimate --mea", ["--measure"]),
        ("all --model.preset modernbert-m", ["modernbert-mini"]),
        ("all --optim.name mu", ["muon"]),
        ("finetune --finetune.tasks squ", ["squad", "squad_v2"]),
        ("pretrain --runtime.trackers ", ["wandb", "tensorboard", "trackio"]),
        ("embed --pooling ", ["mean", "cls"]),
        ("completion f", ["fish"]),
        ("report --ou", ["--out"]),
    ],
)
def test_bash_offers(script, typed, offered):
    words = ["bertpipe", *typed.split(" ")]
    asked = subprocess.run(["bash", "-c", ASK, "bash", script, *words], capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0 and not asked.stderr, asked.stderr
    assert asked.stdout.split() == offered


def test_named_values_are_of_settings_that_are_there():
    assert set(completion.names()) <= {path for path, _, _ in completion.settings()}
    assert all(completion.names().values())


def test_settings_are_those_of_the_help():
    """No setting is missing that `--help` lists, and none is there that a command would refuse."""
    paths = [path for path, _, _ in completion.settings()]
    listed = parser(tuple(cli.Config.model_fields), True)._option_string_actions
    single = {name.removeprefix("--") for name in listed if "." in name and not name.endswith(("+", ".help"))}
    assert len(set(paths)) == len(paths)
    assert set(paths) == single - {"finetune.task"}  # a mapping, whose settings stand one by one


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh", "powershell"])
def test_other_shells_have_every_command(shell):
    text = completion.script(shell, cli.COMMANDS, cli.SWITCHES)
    assert [name for name in cli.COMMANDS if name not in text] == []


@pytest.mark.parametrize("shell", ["dos", ""])
def test_a_shell_that_is_not_known(shell, capsys):
    assert cli.main(["completion", shell]) == 2
    assert f"completion: {shell!r} is not one of bash" in capsys.readouterr().err
