"""The command line from raw text to a publishable folder, in processes of its own, on small real input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertpipe.config import Config
from bertpipe.downstream.finetuning import training
from tests.runs import NEW, bertpipe, losses, only, prepare, sentence

STAGES = ("corpus", "tokenizer", "shards", "pretrain", "finetune", "report", "publish")


def write_task(folder: Path) -> Path:
    """sst2 in GLUE's layout: whether a sentence is about a cat."""
    rng = random.Random(1)
    for split, size in (("train", 64), ("validation", 32)):
        texts = [sentence(rng) for _ in range(size)]
        target = folder / "glue" / "sst2" / f"{split}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"sentence": texts, "label": [int("cat" in t) for t in texts]}), target)
    return folder / "glue"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str], str]:
    """Everything made once: the folder, the arguments and what was printed."""
    folder = tmp_path_factory.mktemp("all")
    config = prepare(folder)
    arguments = ["--config", str(config), "--finetune.tasks", "sst2", "--finetune.data", str(write_task(folder))]
    arguments += ["--finetune.baselines", "majority", "scratch", "tfidf"]
    return folder, arguments, bertpipe("all", *arguments, **NEW).stdout


def test_all_stages_are_made_and_verify(made):
    folder, _, printed = made
    for stage in STAGES:
        artifact = only(folder / "runs", stage)
        assert f"{stage}: made {artifact}" in printed
        assert "files match the manifest" in bertpipe("verify", artifact).stdout
    assert str(only(folder / "runs", "report") / "report.html") in printed


def test_a_second_run_does_nothing_and_says_so(made):
    folder, arguments, _ = made
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*")}
    printed = bertpipe("all", *arguments).stdout
    assert all(f"{stage}: done already," in printed for stage in STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*")}
    printed = bertpipe("pretrain", *arguments, "--runtime.trackers", "tensorboard").stdout
    assert "note: runtime.trackers hear of a run while it trains, so nothing of this one is sent" in printed


def test_verify_looks_at_all_folders(made, tmp_path):
    corpus, tokenizer = (only(made[0] / "runs", stage) for stage in ("corpus", "tokenizer"))
    damaged = shutil.copytree(corpus, tmp_path / corpus.name)
    (damaged / "ledger.json").write_text("{}")
    done = bertpipe("verify", damaged, tokenizer, check=False)
    assert done.returncode == 2 and f"{tokenizer}: " in done.stdout and str(damaged) not in done.stdout
    assert f"{damaged / 'ledger.json'}: " in done.stderr and f"delete {damaged}" in done.stderr


def test_plan_says_done_stale_and_missing(made):
    _, arguments, _ = made
    lines = bertpipe("plan", *arguments).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[stage, "done"] for stage in STAGES]
    states = {line.split()[0]: line for line in bertpipe("plan", *arguments, "--train.steps", "31").stdout.splitlines()}
    assert states["shards"].split()[1] == "done"
    assert "stale" in states["pretrain"] and "train.steps: was 30, is 31" in states["pretrain"]
    assert "stale" in states["finetune"] and "made from another pretrain" in states["finetune"]
    changed = ["--masking.probability", "0.2", "--optim.lr", "1e-3", "--train.steps", "31", "--train.seed", "5"]
    (line,) = [x for x in bertpipe("plan", *arguments, *changed).stdout.splitlines() if x.startswith("pretrain")]
    assert line.endswith(
        "masking.probability: was 0.15, is 0.2; optim.lr: was 0.002, is 0.001; train.steps: was 30, is 31; 1 more"
    )
    nowhere = bertpipe("plan", *arguments, "--runtime.root", str(made[0] / "elsewhere")).stdout
    assert nowhere.count("missing") == len(STAGES)


def test_scores_and_predictions(made):
    folder = only(made[0] / "runs", "finetune")
    scores = json.loads((folder / "scores.json").read_text())["tasks"]["sst2"]
    assert {(r["init"], r["seed"]) for r in scores["runs"]} == {
        ("model", 1), ("model", 2), ("scratch", 1), ("scratch", 2), ("majority", 1), ("tfidf", 1)
    }  # fmt: skip
    assert scores["summary"]["tfidf"]["median"] == 1.0
    lines = [
        json.loads(x) for x in (folder / "sst2/runs/model-seed-1/predictions-validation.jsonl").read_text().splitlines()
    ]
    right = sum(line["prediction"] == line["label"] for line in lines)
    run = next(r for r in scores["runs"] if (r["init"], r["seed"]) == ("model", 1))
    assert len(lines) == 32 and right / 32 == pytest.approx(run["scores"]["accuracy"])


ELSEWHERE = """
import importlib.abc, json, os, sys

class Refuse(importlib.abc.MetaPathFinder):  # this process has no bertpipe
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "bertpipe":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
import torch

pretrained, tuned, task = sys.argv[1:4]
config = json.load(open(os.path.join(pretrained, "config.json")))
assert "bertpipe" not in json.dumps(config), config
tokenizer = AutoTokenizer.from_pretrained(pretrained)
assert tokenizer.model_max_length == 64
model, info = AutoModelForMaskedLM.from_pretrained(pretrained, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
best = pipeline("fill-mask", model=pretrained)("the [MASK] sees the house .")[0]
answers = pipeline("text-classification", model=tuned)(["the cat sees the house .", "a dog hears this tree ."])
assert {a["label"] for a in answers} <= {"negative", "positive"}, answers
from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer(pretrained, device="cpu").encode(["a cat", "a dog"])
assert vectors.shape == (2, 32)
first = json.loads(open(task).readline())
print(json.dumps({"best": best["token_str"], "first": first, "tuned": tuned}))
"""


def test_it_loads_where_there_is_no_bertpipe(made, tmp_path):
    root = made[0] / "runs"
    pretrained, tuned = only(root, "pretrain") / "model", only(root, "finetune") / "sst2" / "model"
    predictions = only(root, "finetune") / "sst2/runs/model-seed-1/predictions-validation.jsonl"
    command = [sys.executable, "-c", ELSEWHERE, str(pretrained), str(tuned), str(predictions)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr


def test_saved_classifier_gives_the_packed_logits(made):
    """The stock folder, run stock, agrees with the predictions that were written from packed rows."""
    folder = only(made[0] / "runs", "finetune") / "sst2"
    seed = json.loads((folder / "scores.json").read_text())["model_seed"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = pq.read_table(made[0] / "glue/sst2/validation.parquet")["sentence"].to_pylist()
    lines = (folder / f"runs/model-seed-{seed}/predictions-validation.jsonl").read_text().splitlines()
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    packed = torch.tensor([json.loads(line)["logits"] for line in lines])
    torch.testing.assert_close(packed, logits, atol=3e-5, rtol=0)


def test_go_on_from_a_checkpoint(made, tmp_path):
    """model.init takes a finished run's folder; its loss starts where that run ended."""
    folder, arguments, _ = made
    first = only(folder / "runs", "pretrain")
    for stage in ("corpus", "tokenizer", "shards"):
        made_before = only(folder / "runs", stage)
        shutil.copytree(made_before, tmp_path / "runs" / made_before.name)
    more = ["--model.init", str(first / "model"), "--train.steps", "4", "--runtime.root", str(tmp_path / "runs")]
    bertpipe("pretrain", *arguments, *more)
    second = only(tmp_path / "runs", "pretrain")
    ended = json.loads((first / "manifest.json").read_text())["counts"]["eval_loss"]
    started = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert started < ended + 0.5
    manifest = json.loads((second / "manifest.json").read_text())
    assert manifest["raw"]["init"], "the checkpoint's content is part of the recipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["pretrian"], "did you mean 'pretrain'?"),
        (["corpus", "--corpus.sorces", "x"], "did you mean 'corpus.sources'?"),
        (["corpus", "x"], "unexpected argument 'x'"),
        (["corpus", "--config"], "--config needs a value"),
        (["plan", "--train.steps", "many"], "train.steps"),
        (["pretrain", "--train.objective", "clm"], "train.objective: 'clm' is not one of mlm"),
        (["pretrain", "--optim.name", "sgd"], "optim.name: 'sgd' is not one of adamw, muon"),
        (["pretrain", "--optim.schedule", "wavy"], "optim.schedule: 'wavy' is not one of"),
        (["pretrain", "--masking.strategy", "vowels"], "masking.strategy: 'vowels' is not one of"),
        (["pretrain", "--model.preset", "bert-huge"], "model.preset: 'bert-huge' is not one of albert-base, bert-base"),
        (["pretrain", "--model.init", "/nowhere/at/all"], "model.init: there is no folder /nowhere/at/all"),
        (
            ["pretrain", "--model.overrides", "{hidden_sizee: 3}"],
            "model.overrides: 'hidden_sizee' can't be set on a bert",
        ),
        (["pretrain", "--model.overrides", "{vocab_size: 7}"], "model.overrides: 'vocab_size' can't be set"),
        (["pretrain", "--model.overrides", "{hidden_size: abc}"], "make no bert model"),
        (["pretrain", "--model.overrides", "{hidden_act: gelux}"], "make no bert model"),
        (["pretrain", "--optim.lr", "1e9", "--optim.muon_lr", "1e9"], "diverged; lower the learning rate"),
        (["pretrain", "--optim.betas", "[0.9, 1.5]"], "optim.betas"),
        (["pretrain", "--train.seed", "-1"], "train.seed"),
        (["finetune", "--finetune.seeds", "[1, 1]"], "finetune.seeds: [1, 1] must be at least one seed, each once"),
        (["all", "--publish.task", "rte"], "publish.task: 'rte' is not among finetune.tasks: sst2"),
        (["all", "--publish.repo", "a b"], "publish.repo"),
        (["all", "--runtime.root", "/dev/null"], "/dev/null"),
        (["verify", "/dev/null"], "no manifest.json here"),
        (["pretrain", "--train.slot_tokens", "16"], "train.slot_tokens: 16 is less than train.sequence_length 32"),
        (["pretrain", "--train.sequence_length", "96"], "train.sequence_length: 96 exceeds the model's 64 positions"),
        (["finetune", "--finetune.tasks", "colla"], "no task called 'colla'"),
        (["finetune", "--finetune.baselines", "oracle"], "finetune.baselines: 'oracle' is not one of"),
        (["finetune", "--finetune.data", "/nowhere"], "/nowhere"),
        (["finetune", "--finetune.model", "a", "b"], "--finetune.model takes one value, got 2: a, b"),
        (["verify", "/nowhere"], "no manifest.json here"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(made, arguments, message):
    command, *rest = arguments
    given = made[1] if command in ("pretrain", "finetune", "all") else []
    done = bertpipe(command, *given, *rest, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((made[0] / "runs").glob("*.partial/manifest.json"))


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path):
    config = prepare(tmp_path)
    done = bertpipe("shards", "--config", config, check=False)
    assert done.returncode == 2 and "first run `bertpipe corpus` with the same settings" in done.stderr


def test_a_flipped_byte_in_an_input_is_refused(tmp_path):
    config = prepare(tmp_path)
    bertpipe("corpus", "--config", config)
    part = next(only(tmp_path / "runs", "corpus").rglob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    for command in (["tokenizer", "--config", config], ["verify", only(tmp_path / "runs", "corpus")]):
        done = bertpipe(*command, check=False)
        assert done.returncode == 2 and f"{part}: content differs" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_vocabulary_larger_than_the_models_is_refused(made, tmp_path):
    """Going on from a checkpoint with another, larger tokenizer."""
    folder, arguments, _ = made
    first = shutil.copytree(only(folder / "runs", "pretrain") / "model", tmp_path / "first")
    (tmp_path / "bigger.txt").write_text((first / "vocab.txt").read_text() + "".join(f"more{i}\n" for i in range(9)))
    bigger = [*arguments, "--tokenizer.adopt", str(tmp_path / "bigger.txt"), "--runtime.root", str(tmp_path / "runs")]
    for stage in ("corpus", "tokenizer", "shards"):
        bertpipe(stage, *bigger)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):  # else the tokenizers are compared first
        (first / name).unlink()
    done = bertpipe("pretrain", *bigger, "--model.init", first, check=False)
    assert done.returncode == 2
    assert "rows; adopt the model's own tokenizer" in done.stderr


def test_help_imports_no_torch():
    code = "import sys; from bertpipe.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: bertpipe COMMAND" in done.stdout


def test_a_hub_that_cannot_be_reached_is_no_obstacle_to_planning(tmp_path):
    """A port nobody listens on: the connection is really refused, and the tokenizer's commit stays unknown."""
    flags = ("--tokenizer.adopt", "google-bert/bert-base-uncased", "--runtime.root", tmp_path)
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None, "HF_HOME": str(tmp_path / "cache")}
    planned = bertpipe("plan", "--config", prepare(tmp_path), *flags, **away)
    assert planned.stdout.splitlines()[1].split()[:2] == ["tokenizer", "missing"]


def test_a_closed_stdout_is_no_error(tmp_path):
    command = f"{sys.executable} -m bertpipe.cli plan --config {prepare(tmp_path)} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_command_explains_its_settings():
    printed = bertpipe("pretrain", "--help").stdout
    for name in ("--optim.lr", "--masking.probability", "--train.steps", "--runtime.checkpoint_every", "Peak learning"):
        assert name in printed
    assert "--corpus.sources" not in printed


def test_help_names_types_and_limits_in_words():
    printed = " ".join(bertpipe("finetune", "--help").stdout.split())
    assert printed.startswith("usage: bertpipe finetune [--config FILE ...] [--SECTION.KEY VALUE ...] Fine-tune")
    for shown in (
        "(type: a number or a list of numbers, above 0, default: 5e-05)",
        "(type: a whole number or null, at least 1, default: null)",
        "(type: random or identity, default: random)",
    ):
        assert shown in printed, shown
    assert not any(sign in printed for sign in ("Annotated", "Optional", "Union", "Literal", "something else"))
    assert "--finetune.tasks TASKS Rows of the task table" in printed
    assert "+ TASKS" not in printed and "--finetune CONFIG" not in printed  # refused by the command
    assert "Path to a configuration file" not in printed
    pretrain = " ".join(bertpipe("pretrain", "--help").stdout.split())
    assert "--train.phases [ITEM,...] " in pretrain and ".help" not in pretrain


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_any_stage_leaves_nothing_half_and_a_rerun_makes_it(made, tmp_path, stage):
    folder, arguments, _ = made
    for before in STAGES[: STAGES.index(stage)]:
        artifact = only(folder / "runs", before)
        shutil.copytree(artifact, tmp_path / "runs" / artifact.name)
    arguments = [*arguments, "--runtime.root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "bertpipe.cli", stage, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "runs").glob(f"{stage}-*.partial")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "bertpipe: interrupted; the same command goes on from here"
    assert "Traceback" not in errors
    assert not [p for p in (tmp_path / "runs").glob(f"{stage}-*") if not p.name.endswith(".partial")]
    bertpipe(stage, *arguments)
    assert "files match" in bertpipe("verify", only(tmp_path / "runs", stage)).stdout


def test_wandb_without_a_key_records_offline_and_says_how_to_upload(made, tmp_path):
    """No prompt, no network; metrics.jsonl stays the record."""
    folder, arguments, _ = made
    for before in ("corpus", "tokenizer", "shards"):
        artifact = only(folder / "runs", before)
        shutil.copytree(artifact, tmp_path / "runs" / artifact.name)
    more = ["--runtime.root", str(tmp_path / "runs"), "--runtime.trackers", "wandb", "--train.steps", "6"]
    environment = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = bertpipe("pretrain", *arguments, *more, **environment)
    assert "wandb: no key, so offline; upload later with: wandb sync" in done.stdout
    (record,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0
    assert len(losses(only(tmp_path / "runs", "pretrain"))) == 6


ONE_OF_TWO = """
import atexit, os, sys
from bertpipe import cli

atexit.register(print, "the interpreter's own end")
if sys.argv[1] == "broken":
    cli._plan = lambda pipeline: 1 / 0
raise SystemExit(cli.main(sys.argv[1:] if sys.argv[1] != "broken" else ["plan"]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "printed", "said"),
    [
        (["--version"], 0, "bertpipe ", ""),
        (["corpus"], 2, "", "bertpipe: corpus runs in one process; launch several for pretrain and finetune only"),
        (["broken"], 1, "", "ZeroDivisionError"),
    ],
)
def test_one_of_several_processes_ends_at_once_with_all_said(tmp_path, arguments, code, printed, said):
    """Output flushed, the exit code kept, and nothing of the interpreter's end, which races with gloo's threads."""
    for world, tidied in (("1", True), ("2", False)):
        if world == "1" and code == 2:
            continue  # the mistake is to launch several
        done = subprocess.run(
            [sys.executable, "-c", ONE_OF_TWO, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"WORLD_SIZE": world, "RANK": "0", "PYTHONPATH": str(Path(__file__).parents[1])},
            timeout=60,
        )
        assert done.returncode == code and printed in done.stdout and said in done.stderr, done
        assert ("the interpreter's own end" in done.stdout) == tidied


def test_finetuning_needs_a_tokenizer_beside_the_checkpoint(made, tmp_path):
    """transformers makes an empty tokenizer where there is none, and every word would be unknown."""
    folder, arguments, _ = made
    for name in ("config.json", "model.safetensors"):
        shutil.copy(only(folder / "runs", "pretrain") / "model" / name, tmp_path)
    done = bertpipe("finetune", *arguments, "--finetune.model", tmp_path, check=False)
    assert done.returncode == 2 and "holds no tokenizer" in done.stderr


def test_another_vocabulary_than_the_checkpoints_is_refused(made, tmp_path):
    folder, arguments, _ = made
    first = only(folder / "runs", "pretrain") / "model"
    smaller = [*arguments, "--tokenizer.vocab_size", "60", "--runtime.root", str(tmp_path / "runs")]
    for stage in ("corpus", "tokenizer", "shards"):
        bertpipe(stage, *smaller)
    done = bertpipe("pretrain", *smaller, "--model.init", first, check=False)
    assert done.returncode == 2 and "has another vocabulary than this run's tokenizer" in done.stderr


def test_random_weights_are_fp32_whatever_the_checkpoint_says(made, tmp_path):
    """The `scratch` baseline must differ from the model in nothing but its weights."""
    folder = made[0]
    copied = shutil.copytree(only(folder / "runs", "pretrain") / "model", tmp_path / "model")
    settings = json.loads((copied / "config.json").read_text()) | {"dtype": "float16"}
    (copied / "config.json").write_text(json.dumps(settings))
    cfg = Config(finetune={"tasks": "sst2", "data": str(folder / "glue"), "max_length": 32})
    job = training.prepare("sst2", cfg.finetune, str(copied))
    for init in ("model", "scratch"):
        model = training.build(job, cfg.finetune, init, seed=1)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
