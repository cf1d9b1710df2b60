"""Fine-tuning launched as several processes: each scores its part, and what comes out is one process's."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from bertpipe.config import Config, RuntimeConfig
from bertpipe.downstream.finetuning import training
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels
from bertpipe.model.labelled import SequenceLabel
from bertpipe.train.place import Place
from tests import faults
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.launch import launch
from tests.runs import only

SIZES = {"train": 40, "validation": 61, "test": 23}
ROW_TOKENS = 64  # of a packed row in these tests, so that there are several


def count_rows(rank: int) -> None:
    """Have each packed row of examples that is scored written into the folder COUNTED_IN, a file a rank."""
    training.PREDICT_TOKENS, pack = ROW_TOKENS, training.pack_examples

    def counting(examples, chosen, pad_id, labelled):
        with (Path(os.environ["COUNTED_IN"]) / str(rank)).open("a") as file:
            file.write(" ".join(map(str, chosen)) + "\n")
        return pack(examples, chosen, pad_id, labelled)

    training.pack_examples = counting


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a checkpoint, model/, and sst2 with unlabelled test data, glue/."""
    folder, draw = tmp_path_factory.mktemp("start"), random.Random(0)
    tokenizer = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.3}  # so that examples get logits of their own
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    for split, size in SIZES.items():
        texts = [" ".join(draw.choices(TEXT.split(), k=draw.randint(1, 20))) for _ in range(size)]
        labels = [-1 if split == "test" else int("the" in text.split()) for text in texts]
        target = folder / "glue" / "sst2" / f"{split}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"sentence": texts, "label": labels}), target)
    return folder


def predict(start: Path, model: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Ids and logits of a split by one process with one thread."""
    settings = Config(finetune={"tasks": "sst2", "data": str(start / "glue"), "max_length": 32}).finetune
    place = Place(RuntimeConfig(threads=1, device="cpu"), "fp32")
    job = training.prepare("sst2", settings, str(model))
    classifier = training.build(job, settings, "model", seed=0)
    encoders.make_packed(classifier, False, kernels.choose(classifier.config, place.device, "fp32").name)
    return job.splits[split].ids, training.predict(SequenceLabel(classifier, "fp32"), job, split, place).logits


def test_two_processes_share_the_scoring_and_predict_as_one(start, tmp_path, monkeypatch):
    """Each example is scored once an evaluation, by one of them."""
    (tmp_path / "rows").mkdir()
    command = ["finetune", "--finetune.tasks", "sst2", "--finetune.max_length", "32"]
    command += ["--finetune.data", start / "glue", "--finetune.model", start / "model", "--finetune.seeds", "1"]
    command += ["--finetune.epochs", "2", "--finetune.slots_per_step", "2", "--finetune.precision", "fp32"]
    command += ["--finetune.lr", "1e-3", "--runtime.root", tmp_path / "runs", "--runtime.progress", "false"]
    launch(2, *command, hook=count_rows, COUNTED_IN=str(tmp_path / "rows")).done()

    rows = [(tmp_path / "rows" / rank).read_text().splitlines() for rank in ("0", "1")]
    assert abs(len(rows[0]) - len(rows[1])) <= 3, "a row more for the first, three times"
    scored = sorted(int(example) for part in rows for row in part for example in row.split())
    assert scored == sorted([*range(SIZES["validation"])] * 2 + [*range(SIZES["test"])])

    monkeypatch.setattr(training, "PREDICT_TOKENS", ROW_TOKENS)
    folder = only(tmp_path / "runs", "finetune") / "sst2"
    for split in ("validation", "test"):
        lines = [json.loads(x) for x in (folder / f"runs/model-seed-1/predictions-{split}.jsonl").open()]
        ids, logits = predict(start, folder / "model", split)
        assert [line["id"] for line in lines] == list(ids)
        assert [line["logits"] for line in lines] == [[round(float(x), 5) for x in row] for row in logits]
        assert len({tuple(line["logits"]) for line in lines}) > SIZES[split] // 2, "examples differ"


def test_without_epochs_a_classifier_must_know_the_labels_in_this_order(start, tmp_path):
    """Otherwise its codes would be scored as other classes; names that say nothing are taken as they come."""
    settings = Config(finetune={"data": str(start / "glue"), "max_length": 32, "epochs": 0}).finetune
    write_tokenizer(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for names in (["LABEL_0", "LABEL_1"], ["NEGATIVE", "Positive"], ["positive", "negative"]):
        config = BertConfig(vocab_size=200, id2label=dict(enumerate(names)), **sizes)
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        job = training.prepare("sst2", settings, str(tmp_path))
        assert "train" not in job.splits
        if names[0] != "positive":
            assert training.build(job, settings, "model", 0).config.id2label == {0: "negative", 1: "positive"}
    with pytest.raises(ConfigError, match="are positive, negative, those of the task negative, positive"):
        training.build(job, settings, "model", 0)


def test_a_signal_to_one_process_before_the_first_step_stops_both_and_a_rerun_finishes(start, tmp_path):
    command = ["finetune", "--finetune.tasks", "all", "--finetune.data", start / "glue", "--finetune.model"]
    command += [start / "model", "--finetune.seeds", "1", "--finetune.epochs", "1", "--finetune.slots_per_step", "2"]
    command += ["--runtime.root", tmp_path / "runs", "--runtime.progress", "false", "--finetune.precision", "fp32"]
    started = launch(2, *command, hook=faults.terminate_finetune)
    assert started.wait() == [130, 130], started.text()
    assert "interrupted" in started.text()
    launch(2, *command).done()
    assert list(json.loads((only(tmp_path / "runs", "finetune") / "scores.json").read_text())["tasks"]) == ["sst2"]
