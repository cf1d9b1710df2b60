"""A run on pairs, by the command: stopped and resumed, or on two processes, it is the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import NEW, bertpipe, only, prepare

MASKING = "masking: {strategy: span, schedule: linear, probability: 0.3, final_probability: 0.15}"
COMPARED = ("model/model.safetensors", "metrics.jsonl", "checkpoints/step-00000030/optimizer.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with config, shards and a finished run."""
    folder = tmp_path_factory.mktemp("pairs")
    config = prepare(folder)
    config.write_text(config.read_text().replace("train: {", "train: {objective: mlm_nsp, ") + MASKING + "\n")
    for stage in ("corpus", "tokenizer", "shards"):
        bertpipe(stage, "--config", config)
    bertpipe("pretrain", "--config", config, **NEW)
    return folder


def copy(made: Path, folder: Path) -> Path:
    """What pretraining needs, under a root of its own."""
    for stage in ("corpus", "tokenizer", "shards"):
        shutil.copytree(only(made / "runs", stage), folder / only(made / "runs", stage).name)
    return folder


def read_metrics(root: Path) -> list[dict]:
    return [json.loads(line) for line in (only(root, "pretrain") / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_stopped_and_resumed_is_never_stopped(made, tmp_path):
    root = copy(made, tmp_path)
    command = [sys.executable, "-m", "bertpipe.cli", "pretrain", "--config", made / "tiny.yaml", "--runtime.root", root]
    process = subprocess.Popen([str(part) for part in command])
    while process.poll() is None and not list(root.glob("pretrain-*/checkpoints/step-00000005")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 130
    done = bertpipe("pretrain", "--config", made / "tiny.yaml", "--runtime.root", root)
    assert "resuming after step" in done.stdout
    for name in COMPARED:
        whole, resumed = only(made / "runs", "pretrain") / name, only(root, "pretrain") / name
        assert whole.read_bytes() == resumed.read_bytes(), name


@pytest.mark.slow
def test_two_processes_see_one_processs_pairs(made, tmp_path):
    root = copy(made, tmp_path)
    script = Path(__file__).parents[2] / "pretrain.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    arguments = ["--config", str(made / "tiny.yaml"), "--runtime.root", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for one, two in zip(read_metrics(made / "runs"), read_metrics(root), strict=True):
        assert one.keys() == two.keys() and one.get("sequences") == two.get("sequences")
        for key in ("loss", "mlm_loss", "nsp_loss", "eval_loss", "eval_nsp_loss", "grad_norm"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), abs=1e-4)


@pytest.mark.slow
def test_the_published_folder_is_stock_and_evaluated(made):
    """The record has the accuracy of pairs beside the masked-LM loss, which falls with the rate and the training."""
    metrics, folder = read_metrics(made / "runs"), only(made / "runs", "pretrain") / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    evaluations = [line for line in metrics if "eval_loss" in line]
    assert all(0 <= line["eval_nsp_accuracy"] <= 1 and line["eval_nsp_loss"] > 0 for line in evaluations)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    for stage in ("report", "publish"):
        bertpipe(stage, "--config", made / "tiny.yaml")
