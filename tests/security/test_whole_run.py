"""The whole tiny pipeline, with credentials all around it: none is written; what it wrote is loaded as data alone."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bertpipe import artifact, cli
from bertpipe.errors import ConfigError
from bertpipe.redaction import HIDDEN, redact, refuse
from bertpipe.train.boards import TRACKERS
from tests.runs import bertpipe, only, prepare
from tests.security.payloads import SUFFIXES, Touch, plant

ROOT = Path(__file__).parents[2]
STAGES = ("corpus", "tokenizer", "shards", "pretrain", "finetune", "report", "publish")
CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryHuggingFace" * 2,
    "WANDB_API_KEY": "ca4a12" * 6 + "abcd",
    "AWS_SECRET_ACCESS_KEY": "CanaryAws/Secret+Key0123456789abcdefghij",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0123",
    "MY_SERVICE_PASSWORD": "canary-of-a-service",
}
NETRC = "canary-in-netrc-0123"
LOGIN = "hf_" + "CanaryOfTheLogin" * 2
IN_URL = "canary-user:canary-pass"
SECRETS = (*CANARIES.values(), NETRC, LOGIN, "canary-pass")


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory) -> dict[str, str | None]:
    """Environment variables of a machine with logins of every kind."""
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text(
        f"machine api.wandb.ai login user password {NETRC}\nmachine huggingface.co login me password {NETRC}\n"
    )
    (home / ".netrc").chmod(0o600)
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(LOGIN)
    return CANARIES | {
        "HOME": str(home),
        "NETRC": None,
        "HF_HOME": None,
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def lived_in(surroundings, monkeypatch) -> None:
    """This process in those surroundings."""
    for name, value in surroundings.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def made(tmp_path_factory, surroundings) -> tuple[Path, list[str], str]:
    """Every stage made, every tracker on: the folder, the arguments, what was printed."""
    folder = tmp_path_factory.mktemp("canary")
    config = prepare(folder, 80)
    for split in ("train", "validation"):
        target = folder / "glue" / "sst2" / f"{split}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"sentence": ["the cat sees", "a dog hears"] * 4, "label": [1, 0] * 4}), target)
    arguments = ["--config", str(config), "--finetune.tasks", "sst2", "--finetune.data", str(folder / "glue")]
    arguments += ["--finetune.seeds", "1", "--finetune.epochs", "1", "--train.steps", "6", "--runtime.workers", "1"]
    done = bertpipe("all", *arguments, "--runtime.trackers", *TRACKERS, **surroundings)
    return folder, arguments, done.stdout + done.stderr


def leaks(folder: Path) -> list[str]:
    """Every file that holds a canary, as it is or in base64."""
    forms = {form: secret for secret in SECRETS for form in (secret.encode(), base64.b64encode(secret.encode())[:-4])}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f"{path}: {forms[form]}" for path in files for form in forms if form in path.read_bytes()]


def test_no_credential_is_in_any_byte_written(made, surroundings):
    folder, _, printed = made
    assert leaks(folder) == []
    assert not [secret for secret in SECRETS if secret in printed]
    written = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".wandb", ".db", ".log", ".safetensors", ".html", ".md", ".jsonl", ".npy", ".parquet", ".yaml"} <= written
    assert list(folder.glob("runs/tensorboard/*/events.out.tfevents.*"))
    home = Path(str(surroundings["HOME"]))
    assert {line.partition(": ")[0] for line in leaks(home)} == {
        str(home / ".netrc"),
        str(home / ".cache" / "huggingface" / "token"),
    }, "the search finds what is there, and nothing was added"


def test_names_of_tokens_are_no_secrets(made):
    folder, _, _ = made
    for model in (only(folder / "runs", "pretrain") / "model", only(folder / "runs", "publish") / "model"):
        settings = json.loads((model / "tokenizer_config.json").read_text())
        assert (settings["cls_token"], settings["mask_token"]) == ("[CLS]", "[MASK]")
    tree = {"cls_token": "[CLS]", "mask_token": "[MASK]", "num_memory_tokens": 4, "text_key": "text", "max_tokens": "9"}
    refuse(tree)
    assert redact(json.dumps(tree)) == json.dumps(tree)
    for harmless in (
        "hub:owner/name@v1.0",
        "me@example.org",
        "https://host/a@b",
        "hub:/name@main",
        "hf_short",
        "a key: value",
    ):
        assert redact(harmless) == harmless


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--corpus.sources", f"https://{IN_URL}@host/x"], "corpus.sources: holds a credential ('https://***@h"),
        (["plan", "--runtime.project", CANARIES["WANDB_API_KEY"]], "runtime.project: holds a credential ('***')"),
        (["plan", "--report.title", f"by {CANARIES['MY_SERVICE_PASSWORD']}"], "report.title: holds a credential ('by "),
        (["plan", CANARIES["HF_TOKEN"]], "unexpected argument '***'"),
        (["plan", "--train.steps", CANARIES["AWS_SECRET_ACCESS_KEY"]], "train.steps: must be a whole number, got ***"),
        ([NETRC], "unknown command '***'"),
        (["verify", f"s3://{IN_URL}@bucket/x"], "no manifest.json here"),
    ],
)  # fmt: skip
def test_a_credential_given_as_an_argument_is_refused_and_not_repeated(arguments, said, lived_in, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1, printed
    assert not [secret for secret in SECRETS if secret in printed.out + printed.err]


def test_one_in_a_file_is_refused(tmp_path, lived_in, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{overrides: {{note: {LOGIN}}}}}\n")
    assert cli.main(["plan", "--config", str(config)]) == 2
    printed = capsys.readouterr().err
    assert "model.overrides.note: holds a credential" in printed and LOGIN not in printed


CRASH = """
import os, sys
from bertpipe import cli

def crash(*_, **__):
    raise RuntimeError(f"401 for https://{in_url}@host/x with {{os.environ['HF_TOKEN']}} and {netrc}")

if sys.argv[1] == "plan":
    cli._plan = crash
else:
    from bertpipe.train import loop
    loop._backward = crash
raise SystemExit(cli.main(sys.argv[1:]))
"""


def crash(arguments: list[str], surroundings: dict[str, str | None]) -> str:
    environment = {k: v for k, v in (os.environ | surroundings | {"PYTHONPATH": str(ROOT)}).items() if v is not None}
    command = [sys.executable, "-c", textwrap.dedent(CRASH.format(in_url=IN_URL, netrc=NETRC)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert f"RuntimeError: 401 for https://{HIDDEN}@host/x with {HIDDEN} and {HIDDEN}" in done.stderr
    return done.stdout + done.stderr


def test_a_traceback_is_whole_but_for_credentials(surroundings):
    printed = crash(["plan"], surroundings)
    assert not [secret for secret in SECRETS if secret in printed]


@pytest.mark.slow
def test_a_crash_in_training_writes_none_either(made, surroundings, tmp_path):
    """Through wandb's own hooks too."""
    folder, arguments, _ = made
    for stage in ("corpus", "tokenizer", "shards"):
        shutil.copytree(only(folder / "runs", stage), tmp_path / "runs" / only(folder / "runs", stage).name)
    more = ["--runtime.root", str(tmp_path / "runs"), "--runtime.trackers", *TRACKERS]
    printed = crash(["pretrain", *arguments, *more], surroundings)
    assert not [secret for secret in SECRETS if secret in printed]
    assert leaks(tmp_path) == [] and list(tmp_path.rglob("*.wandb"))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_payloads_work(tmp_path):
    """They do run where they are unpickled or imported, or the next test would prove nothing."""
    marker = tmp_path / "marker"
    for name in ("evil.pkl", "pytorch_model.bin", "tokenization_evil.py"):
        plant(tmp_path, marker)
        if name == "evil.pkl":
            pickle.loads((tmp_path / name).read_bytes())
        elif name.endswith(".bin"):
            torch.load(tmp_path / name, weights_only=False)
        else:
            exec((tmp_path / name).read_text())
        assert marker.exists(), name
        marker.unlink()


def watch(clean: Path, planted: Path, data: Path) -> dict:
    """What load_everything saw."""
    command = [sys.executable, "-m", "tests.security.load_everything", *map(str, (clean, planted, data))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_every_kind_of_artifact_runs_nothing(made, tmp_path):
    folder, _, _ = made
    marker = tmp_path / "marker"
    shutil.copytree(folder / "runs", tmp_path / "clean")
    shutil.copytree(folder / "runs", tmp_path / "planted")
    folders = [path for path in (tmp_path / "planted").rglob("*") if path.is_dir() and "wandb" not in str(path)]
    planted = [file for path in folders for file in plant(path, marker)]
    seen = watch(tmp_path / "clean", tmp_path / "planted", folder / "glue")
    assert not marker.exists()
    assert seen["events"] == []
    assert isinstance(seen["loaded"], dict) and all(seen["loaded"][k] > 0 for k in ("documents", "tokens", "step")), (
        seen
    )
    for stage in STAGES:
        found = only(tmp_path / "planted", stage)
        problems = artifact.verify(found)
        mine = [file for file in planted if file.is_relative_to(found)]
        assert {f"{file}: not in the manifest" for file in mine} <= set(problems), "and the next stage refuses it"


def test_a_stage_refuses_an_input_with_a_foreign_file(made, surroundings, tmp_path):
    folder, arguments, _ = made
    marker = tmp_path / "marker"
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.rmtree(only(tmp_path / "runs", "tokenizer"))
    plant(only(tmp_path / "runs", "corpus"), marker)
    done = bertpipe("tokenizer", *arguments, "--runtime.root", tmp_path / "runs", check=False, **surroundings)
    assert done.returncode == 2 and "not in the manifest; delete" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not marker.exists()


def test_an_array_of_pickled_objects_is_refused(made, tmp_path):
    """A .npy may hold a pickle; both readers of arrays say no."""
    import numpy as np

    from bertpipe.data.shards import TokenShards

    shards, marker = shutil.copytree(only(made[0] / "runs", "shards"), tmp_path / "shards"), tmp_path / "marker"
    for path in shards.rglob("*.npy"):
        np.save(path, np.array([Touch(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(Exception, match=r"\.npy|[Oo]bject arrays|mapped"):
        TokenShards(shards, "train")
    assert not marker.exists()


def test_settings_are_refused_by_key():
    with pytest.raises(ConfigError, match=r"^a\.b: holds a credential \('https://\*\*\*@host'\)"):
        refuse({"a": {"b": ["x", "https://u:p@ss@host"]}})


def test_payload_files_are_of_every_kind(tmp_path):
    assert {path.suffix for path in plant(tmp_path, tmp_path / "m")} == {*SUFFIXES, ""}
