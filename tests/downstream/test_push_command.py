"""The real command against a Hub of our own, and what it pushed loaded back by stock code in another process."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from bertpipe import artifact
from bertpipe.cli import main
from bertpipe.config import Config
from bertpipe.downstream.publishing import publish, push
from tests.hub import OWNER, TOKEN, Fault, Hub, contents, serve
from tests.runs import bertpipe, only, prepare

REPO = f"{OWNER}/tiny"


@pytest.fixture(scope="module")
def server():
    with serve(Hub()) as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory, server) -> tuple[Path, list[str], str]:
    """`bertpipe all` that ends in a push, with checkpoints: the folder, the arguments, what was printed."""
    folder = tmp_path_factory.mktemp("pushed")
    arguments = ["--config", str(prepare(folder, 200)), "--publish.repo", REPO, "--publish.revisions", "true"]
    return folder, arguments, bertpipe("all", *arguments, "--push", **server.environment).stdout


def load(server: Hub, folder: Path, script: str) -> str:
    """Run a script of stock code, with an empty cache and the Hub's address; returns what it printed."""
    environment = os.environ | server.environment | {"HF_HOME": str(folder / "cache"), "PYTHONPATH": ""}
    environment = {name: value for name, value in environment.items() if value is not None}
    script += "\nimport sys; assert not any(name.startswith('bertpipe') for name in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet(readme: bytes | str) -> str:
    text = readme if isinstance(readme, str) else readme.decode()
    (code,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    assert len(code.splitlines()) == 3
    return code


def test_all_ends_in_one_commit_and_its_checkpoints(made, server):
    folder, _, printed = made
    repo = server.repositories[REPO]
    built = only(folder / "runs", "publish")
    assert f"pushed to {server.url}/{REPO} (private)" in printed and "step-0, step-25, step-30" in printed
    assert "nothing was uploaded" not in printed and TOKEN not in printed
    assert len(repo.history("main")) == 2 and set(repo.tags) == {"step-0", "step-25", "step-30"}
    assert {**contents(built / "model")} == {name: data for name, data in repo.files().items() if name[:4] != ".git"}
    for name in repo.tags:
        found = {path: data for path, data in repo.files(name).items() if path[:4] != ".git"}
        assert found == contents(built / "revisions" / name)
    assert repo.files("step-30")["model.safetensors"] == repo.files()["model.safetensors"]
    assert str(folder).encode() not in server.seen


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    """The command in this process, which `online` points at a server; its exit code, output and errors."""
    capsys.readouterr()
    code = main([*map(str, arguments)])
    return code, *capsys.readouterr()


def test_what_was_pushed_loads_by_stock_code(made, server, finished_run, tmp_path, online):
    """Every revision, a tokenizer alone and fine-tuned models; the three lines of each card are run as they stand."""
    online(server)
    for name, settings in {"words": {"tokenizer": True}, "docs": {"task": "docs"}, "stsb": {"task": "stsb"}}.items():
        cfg = Config.model_validate({"publish": {"repo": f"{OWNER}/{name}", **settings}})
        with artifact.committing(tmp_path / f"publish-{name}", stage="publish") as (out, counts):
            publish.run(cfg, finished_run, out, counts)
        push.push(cfg, tmp_path / f"publish-{name}", [])
    built = only(made[0] / "runs", "publish")
    script = f"""
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
for name, folder in (("main", "model"), *((f"step-{{n}}", f"revisions/step-{{n}}") for n in (0, 25, 30))):
    model = AutoModelForMaskedLM.from_pretrained({REPO!r}, revision=name)
    for key, tensor in load_file({str(built)!r} + f"/{{folder}}/model.safetensors").items():
        assert (model.state_dict()[key] == tensor).all(), key
    fill = pipeline("fill-mask", model={REPO!r}, revision=name)
    print(name, fill("the [MASK] sees the house .")[0]["score"])
"""
    cards = [server.repositories[REPO].files(revision)["README.md"].decode() for revision in ("main", "step-0")]
    cards += [
        server.repositories[f"{OWNER}/{name}"].files()["README.md"].decode() for name in ("words", "docs", "stsb")
    ]
    printed = load(server, tmp_path, "\n".join([script, *map(snippet, cards)])).strip().splitlines()
    scores = dict(line.split() for line in printed[:4])
    assert scores["main"] == scores["step-30"] != scores["step-0"]
    filled, initial, tokens, docs, stsb = printed[4:]
    assert "token_str" in filled and "token_str" in initial and "[MASK]" in tokens
    assert any(label in docs for label in ("numpy", "scipy", "torch")) and "similarity" in stsb
    assert 'revision="step-0"' in cards[1] and "The initial weights, before the first of 30 steps" in cards[1]
    words = server.repositories[f"{OWNER}/words"].files()
    assert set(words) == {".gitattributes", "README.md", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert "tokens per word | 1.31" in cards[2] and "1,230 documents in" in cards[2]
    assert f"| tokenizer.json | `{hashlib.sha256(words['tokenizer.json']).hexdigest()}` |" in cards[2]


def test_step_0_is_what_the_run_began_with(made, capsys):
    """A step too small to change a weight leaves those that training began with."""
    folder, arguments, _ = made
    still = ["--train.steps", "1", "--optim.name", "adamw", "--optim.lr", "1e-300", "--optim.weight_decay", "0"]
    still += ["--optim.warmup_steps", "0", "--publish.repo", "tester/still"]
    bertpipe("pretrain", *arguments, *still)
    assert command(capsys, "publish", *arguments, *still)[0] == 0
    (built,) = (path.parents[1] for path in (folder / "runs").glob("publish-*/revisions/step-1"))
    one, zero = contents(built / "revisions/step-1"), contents(built / "revisions/step-0")
    assert one.keys() == zero.keys()
    assert {name for name in one if one[name] != zero[name]} == {"README.md"}
    assert one["model.safetensors"] == contents(built / "model")["model.safetensors"]


def test_the_lines_of_the_readme_upload_nothing_and_then_push_once(made, server, online, capsys):
    """And a dry run is one whatever else is said."""
    online(server)
    _, arguments, _ = made
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    dry, pushing = (line.split("#")[0].split()[1:] for line in text.splitlines() if "bertpipe publish " in line)
    before, asked = dict(server.repositories[REPO].branches), len(server.requests)
    assert dry[1:3] == pushing[1:3] == ["--config", "my-run.yaml"]
    for flags in (dry, [*pushing, "--dry-run"]):
        code, printed, _ = command(capsys, flags[0], *flags[3:], *arguments)
        assert code == 0 and "publish: done already," in printed and printed.count("\n") == 1
    assert len(server.requests) == asked
    code, printed, _ = command(capsys, pushing[0], *pushing[3:], *arguments)
    assert code == 0 and "publish: nothing to push" in printed and server.repositories[REPO].branches == before


def test_a_push_that_fails_takes_nothing_away_and_the_next_one_pushes_only(made, online, capsys):
    folder, arguments, _ = made
    before = contents(folder / "runs")
    with serve(Hub()) as server:
        server.fault = Fault(3, 500, times=10_000)  # after the check at the start
        failed = bertpipe("all", *arguments, "--push", "--runtime.hub_patience", "1", check=False, **server.environment)
        assert failed.returncode == 2 and "report: " in failed.stdout
        (line,) = failed.stderr.splitlines()
        assert line.startswith(f"bertpipe: {server.url}: 500: it fails") and "(tried 2 times)" in line
        assert contents(folder / "runs") == before and not server.repositories
        server.fault = None
        online(server)
        code, printed, _ = command(capsys, "publish", *arguments, "--push")
        assert code == 0 and "publish: done already," in printed and "pushed to" in printed
        assert len(server.repositories[REPO].history("main")) == 2 and contents(folder / "runs") == before


@pytest.mark.parametrize(("surroundings", "repo", "words"), [
    ({}, REPO, "may not write to tester/tiny"),
    ({}, "someone/tiny", "publish.repo: 'someone/tiny' isn't yours"),
    ({"HF_TOKEN": "hf_" + "expired" * 6}, REPO, "401: the token is not accepted"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, REPO, "can't be reached"),
])  # fmt: skip
def test_what_would_be_refused_is_refused_before_anything_is_made(
    tmp_path, online, monkeypatch, capsys, surroundings, repo, words
):
    arguments = ["--config", str(prepare(tmp_path, 20)), "--push", "--runtime.hub_patience", "0"]
    with serve(Hub("read")) as server:
        online(server)
        monkeypatch.setattr(constants, "ENDPOINT", surroundings.get("HF_ENDPOINT", server.url))
        monkeypatch.setenv("HF_TOKEN", surroundings.get("HF_TOKEN", TOKEN))
        code, printed, line = command(capsys, "all", *arguments, "--publish.repo", repo)
    assert (code, printed) == (2, "") and words in line and line.count("\n") == 1 and "expired" * 2 not in line
    assert not list((tmp_path / "runs").glob("*-*"))


def test_training_without_a_network_says_so_and_goes_on(made, online, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, printed, _ = command(capsys, "pretrain", *made[1], "--push", "--runtime.hub_patience", "0")
    assert "whether the push at the end will be accepted is not known: http://127.0.0.1:9: can't be" in printed
    assert code == 0 and "pretrain: done already," in printed


@pytest.mark.parametrize(("more", "words"), [
    (["--publish.tokenizer", "true"], "publish.revisions: they are those of the pretrained model, so publish.tok"),
    (["--publish.repo", "a/b/c"], "publish.repo: "),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_said(made, capsys, more, words):
    code, _, line = command(capsys, "publish", *made[1], *more)
    assert code == 2 and words in line and line.count("\n") == 1
