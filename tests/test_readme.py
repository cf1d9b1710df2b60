"""The README's commands do what it says: run as they stand there, on a little text and for a few steps."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pages
from tests.runs import only

COMMANDS = pages.commands(pages.README)
ELSEWHERE = {
    " compare ": "tests/downstream/test_compare.py",
    " embed ": "tests/downstream/test_embed.py",
    " attention ": "tests/downstream/test_attention_page.py",
    " demo ": "tests/downstream/test_demo_page.py",
    " export ": "tests/downstream/test_export.py",
    " --runtime.trackers ": "tests/train/test_boards.py",
    " dashboard ": "tests/train/test_boards.py",
    " publish ": "tests/downstream/test_push_command.py",
    "accelerate-gpus.yaml": "tests/test_project.py",  # with two processes on the CPU; the line itself needs eight GPUs
}
"""Commands that are not run from here, by what stands in them, and where such ones are."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with texts/, glue/mrpc/ and my.csv of the reader's."""
    return pages.reader(tmp_path_factory.mktemp("readme"))


def run(line: str, place: Path, root: str, *more: str) -> str:
    """Run a README line in a shell at the project's root, scaled down by flags behind its own; returns its output."""
    line = line.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    line = line.replace("texts/*.txt", f"{place}/texts/*.txt")
    flags = shlex.join(["--runtime.root", str(place / root), *more])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        f"{line} {pages.SMALL} {flags}",
        shell=True,
        cwd=pages.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def own_text(place) -> Path:
    """The checkpoint of "Pretrain on your own text"."""
    (line,) = [c for c in COMMANDS if "bertpipe all" in c and "--tokenizer.vocab_size" in c]
    printed = run(line, place, "own")
    assert "report.html" in printed and "the [MASK] of the city is old." in printed
    return only(place / "own", "pretrain") / "model"


def test_pretrain_on_your_own_text(own_text):
    assert (own_text / "model.safetensors").is_file() and (own_text / "vocab.txt").is_file()


def test_go_on_from_a_checkpoint(place, own_text):
    """A local folder stands in for the Hub id."""
    (line,) = [c for c in COMMANDS if "--model.init" in c and "add_tokens" not in c]
    run(line.replace("google-bert/bert-base-uncased", str(own_text)), place, "further")
    assert (only(place / "further", "publish") / "model" / "README.md").is_file()


def test_go_on_in_another_domain(place, own_text):
    """Words the checkpoint split are one token now, and long texts go in, by stock classes alone."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    (place / "physics").mkdir()
    texts = ["the neutron sees the tensor .", "a child finds the neutron .", "one tensor likes a king ."]
    for number in range(40):
        (place / "physics" / f"{number}.txt").write_text(" ".join(texts[number % 3 :] * 3) + f" {number}")
    (line,) = [c for c in COMMANDS if "--model.init" in c and "add_tokens" in c]
    line = line.replace("google-bert/bert-base-uncased", str(own_text))
    run(line, place, "domain", "--corpus.sources", str(place / "physics" / "*.txt"))
    before, folder = AutoTokenizer.from_pretrained(own_text), only(place / "domain", "publish") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    assert len(before.tokenize("neutron")) > 1 and tokenizer.tokenize("neutron tensor") == ["neutron", "tensor"]
    assert tokenizer.model_max_length == 2048 and model.config.vocab_size == len(tokenizer) > len(before)
    long = tokenizer("the neutron sees the tensor . " * 400, truncation=True, return_tensors="pt")
    assert long.input_ids.shape == (1, 2048)
    assert model(**long).logits.shape == (1, 2048, len(tokenizer))


def test_fine_tune_on_a_glue_task(place, own_text):
    (line,) = [c for c in COMMANDS if "--finetune.tasks mrpc" in c]
    line = line.replace("google-bert/bert-base-uncased", str(own_text))
    assert "mrpc  f1 " in run(line, place, "tuned", "--finetune.data", str(place / "glue"))
    assert (only(place / "tuned", "finetune") / "mrpc" / "model" / "config.json").is_file()


def test_answer_questions(place, own_text):
    qas = [{"id": str(n), "question": "who sees ?", "answers": [{"text": "king", "answer_start": 4}]} for n in range(9)]
    paragraphs = [{"context": f"the king sees {n} trees .", "qas": [qas[n]]} for n in range(9)]
    (place / "qa.json").write_text(json.dumps({"data": [{"title": "kings", "paragraphs": paragraphs}]}))
    (line,) = [c for c in COMMANDS if "configs/squad.yaml" in c]
    line = line.replace("google-bert/bert-base-uncased", str(own_text)).replace("FOLDER", str(place / "qa.json"))
    assert "squad" in run(line, place, "asked")
    folder = only(place / "asked", "finetune") / "squad"
    assert len(json.loads((folder / "runs/model-seed-1/predictions-validation.json").read_text())) == 2


def test_fine_tune_on_your_own_table(place, own_text):
    (line,) = [c for c in COMMANDS if "--finetune.task.kind" in c]
    line = line.replace("google-bert/bert-base-uncased", str(own_text)).replace("my.csv", str(place / "my.csv"))
    assert "my validation: 4 examples, 4 held out of train\n" in run(line, place, "table")
    assert (only(place / "table", "finetune") / "my" / "model" / "config.json").is_file()


def test_run_on_several_devices(place):
    """Data by one process, then torchrun and accelerate with two; the line for eight GPUs needs eight GPUs."""
    lines = [c for c in COMMANDS if "configs/demo.yaml" in c]
    assert len(lines) == 5 and all("bertpipe " in c for c in lines[:3])
    demo = ["--corpus.sources", str(place / "texts" / "*.txt"), "--train.steps", "4"]
    for line in lines[:3]:
        run(line, place, "demo", *demo)
    for number, line in enumerate(lines[3:]):
        assert "2 process(es) x 1 thread(s), cpu" in run(line, place, "demo", *demo, "--train.seed", str(number))


def test_every_command_is_run():
    """Here, by a line that a test above picks, or where ELSEWHERE says."""
    here = ["--tokenizer.vocab_size", "--model.init", "tasks mrpc", "squad.yaml", "--finetune.task.kind", "demo.yaml"]
    for line in COMMANDS:
        elsewhere = [test for part, test in ELSEWHERE.items() if part in line]
        assert elsewhere or any(part in line for part in here), f"{line} is run nowhere"
        assert all((pages.ROOT / test).is_file() for test in elsewhere)
