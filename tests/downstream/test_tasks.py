"""The task table and its data: what is read from real files, and one clear line for each way they can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertpipe.downstream.tasks import metrics, tasks
from bertpipe.errors import ConfigError, DataError

SST2 = {"sentence": ["a fine film", "", "dull ."], "label": [1, 0, 0], "idx": [7, 8, 9]}
STSB = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0.0, 2.5, 5.0], "idx": [0, 1, 2]}
REAL_ROWS = {
    "cola": {"train": 8551, "validation": 1043, "test": 1063},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 3668, "validation": 408, "test": 1725},
    "stsb": {"train": 5749, "validation": 1500},
    "rte": {"train": 2490, "validation": 277, "test": 3000},
}


def write(folder: Path, task: str, **splits: dict | pa.Table) -> Path:
    """<folder>/<task>/<split>.parquet for each split; returns the folder."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(rows), folder / task / f"{split}.parquet")
    return folder


def failure(folder: Path, task: str = "sst2") -> str:
    """The one line that loading the task fails with."""
    with pytest.raises(DataError) as caught:
        tasks.load(task, str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


GLUE = {  # columns and names of the codes in nyu-mll/glue
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "wnli": (("sentence1", "sentence2"), ["not_entailment", "entailment"]),
}


@pytest.mark.parametrize("name", GLUE)
def test_a_folder_that_is_dropped_beside_the_others_is_found_and_read(tmp_path, name):
    """Written as `datasets` writes GLUE: with the codes' names in the metadata, secret test labels."""
    columns, names = GLUE[name]
    rows = {column: [f"{column} {row}" for row in range(4)] for column in columns}
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table(rows | {"label": [0, 1, 1, 0], "idx": [0, 1, 2, 3]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    write(tmp_path, "sst2", train=SST2, validation=SST2)
    write(tmp_path, name, train=table, validation=table, test=rows | {"label": [-1] * 4, "idx": [0, 1, 2, 3]})
    assert tasks.chosen("all", str(tmp_path)) == [task for task in tasks.TASKS if task in ("sst2", name)]
    splits = tasks.load(name, str(tmp_path))
    assert splits["train"].label_names == tuple(names) and splits["train"].labels.tolist() == [0, 1, 1, 0]
    assert splits["validation"].texts[2] == tuple(f"{column} 2" for column in columns)
    assert splits["test"].labels is None


def test_without_training_the_training_file_is_not_wanted(tmp_path):
    folder = write(tmp_path, "sst2", validation=SST2)
    assert list(tasks.load("sst2", str(folder), train=False)) == ["validation"]
    assert len(tasks.identify(["sst2"], str(folder), train=False)["sst2"]) == 1


def test_all_is_what_can_be_had(tmp_path):
    assert tasks.chosen("all", None) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert tasks.chosen(["mrpc", "docs"], str(tmp_path)) == ["mrpc", "docs"] and tasks.chosen([], None) == []
    with pytest.raises(DataError, match=r"no task there; finetune\.data needs"):
        tasks.chosen("all", str(tmp_path))
    with pytest.raises(ConfigError, match="'all' stands alone, got all, mrpc"):
        tasks.chosen(["all", "mrpc"], None)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=tasks.TASKS)
def test_row_is_whole(task):
    assert tasks.TASKS[task.name] is task
    assert task.source in tasks.SOURCES
    assert len(task.templates or task.text) == {"choices": len(task.labels or ()) + 1}.get(
        task.kind, len(task.text[-2:])
    )
    assert (task.labels is None) == (task.kind in ("regression", "answers"))
    if task.kind != "answers":  # tests/downstream/test_squad_metric.py
        answers = [["O", "B-x"]] if task.kind == "tokens" else [0, 1, 1]
        assert task.headline in metrics.compute(task.metric, answers, answers)


def test_unknown_task_lists_the_choices():
    choices = "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, boolq, cb, wic, copa, swag, conll2003, wnut17, "
    choices += "squad, squad_v2, docs"
    with pytest.raises(ConfigError, match=f"no task called 'sts-b'; choose from {choices}"):
        tasks.load("sts-b", "anywhere")


# --- good data --------------------------------------------------------------------------------------------------------


def test_single_texts(tmp_path):
    splits = tasks.load("sst2", str(write(tmp_path, "sst2", train=SST2, validation=SST2)))
    assert list(splits) == ["train", "validation"]
    train = splits["train"]
    assert train.texts == [("a fine film",), ("",), ("dull .",)]
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [1, 0, 0]
    assert train.ids == [7, 8, 9]
    assert train.label_names == ("negative", "positive")
    assert train.counts == {"with_an_empty_text": 1} and len(train) == 3


def test_pairs_with_numbers(tmp_path):
    splits = tasks.load("stsb", str(write(tmp_path, "stsb", train=STSB, validation=STSB)))
    assert splits["train"].texts == [("a", "d"), ("b", "e"), ("c", "f")]
    assert splits["train"].labels.dtype == np.float32 and splits["train"].labels.tolist() == [0.0, 2.5, 5.0]
    assert splits["train"].label_names is None


@pytest.mark.parametrize("labels", [pa.array([-1, -1, -1]), pa.nulls(3), pa.array([None] * 3, pa.int64()), None])
def test_secret_test_labels_give_no_labels(tmp_path, labels):
    columns = {"sentence": pa.array(SST2["sentence"])} | ({} if labels is None else {"label": labels})
    splits = tasks.load("sst2", str(write(tmp_path, "sst2", train=SST2, validation=SST2, test=pa.table(columns))))
    assert splits["test"].labels is None and len(splits["test"]) == 3
    assert splits["test"].ids == [0, 1, 2], "without idx, the row number"


def test_secret_test_numbers_give_no_labels(tmp_path):
    secret = STSB | {"label": [-1.0, -1.0, -1.0]}
    splits = tasks.load("stsb", str(write(tmp_path, "stsb", train=STSB, validation=STSB, test=secret)))
    assert splits["test"].labels is None


@pytest.mark.parametrize("labels", [[-1, -1, -1], pa.nulls(3)])
def test_a_validation_split_without_any_label_is_kept(tmp_path, labels):
    """It can be predicted, not scored."""
    splits = tasks.load("sst2", str(write(tmp_path, "sst2", train=SST2, validation=SST2 | {"label": labels})))
    assert splits["validation"].labels is None and len(splits["validation"]) == 3


def test_known_test_labels_are_kept(tmp_path):
    splits = tasks.load("sst2", str(write(tmp_path, "sst2", train=SST2, validation=SST2, test=SST2)))
    assert splits["test"].labels.tolist() == [1, 0, 0]


def test_available(tmp_path):
    write(tmp_path, "stsb", train=STSB)
    write(tmp_path, "sst2", validation=SST2)
    assert tasks.available(str(tmp_path)) == ["stsb"]


def test_identity_follows_the_content_not_the_place(tmp_path):
    one = write(tmp_path / "one", "sst2", train=SST2, validation=SST2)
    two = write(tmp_path / "two", "sst2", train=SST2, validation=SST2)
    cache = tmp_path / "cache" / "hashes.json"
    before = tasks.identify(["sst2"], str(one), cache)
    assert before == tasks.identify(["sst2"], str(two), cache)
    write(two, "sst2", validation=SST2 | {"label": [1, 1, 0]})
    assert before != tasks.identify(["sst2"], str(two), cache)
    write(one, "sst2", test=SST2)
    assert before != tasks.identify(["sst2"], str(one), cache)
    json.dumps(before)


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_data(name, real_data):
    splits = tasks.load(name, str(real_data / "glue"))
    task = tasks.TASKS[name]
    assert {split: len(rows) for split, rows in splits.items()} == REAL_ROWS[name]
    assert all(len(texts) == len(task.text) for split in splits.values() for texts in split.texts)
    for split in ("train", "validation"):
        if task.labels:
            assert set(splits[split].labels.tolist()) == set(range(len(task.labels)))
        else:
            assert splits[split].labels.min() == 0 and splits[split].labels.max() == 5
    if name in ("cola", "rte"):
        assert splits["test"].labels is None


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    write(tmp_path, "stsb", train=STSB)
    message = failure(tmp_path)
    assert f"{tmp_path}/sst2: no such folder" in message and "stsb" in message


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_missing_file(tmp_path, missing):
    write(tmp_path, "sst2", **{split: SST2 for split in ("train", "validation") if split != missing})
    assert f"{tmp_path}/sst2/{missing}.parquet: no such file" in failure(tmp_path)


@pytest.mark.parametrize("content", [b"", b"idx,sentence\n", None])
def test_damaged_file(tmp_path, content):
    write(tmp_path, "sst2", train=SST2, validation=SST2)
    path = tmp_path / "sst2" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert f"{path}: not readable as parquet" in failure(tmp_path)


def test_missing_text_column(tmp_path):
    write(tmp_path, "sst2", train={"text": ["a"], "label": [0]}, validation=SST2)
    message = failure(tmp_path)
    assert "sst2/train.parquet: no column 'sentence'; it has text, label" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_missing_label_column(tmp_path, split):
    write(tmp_path, "sst2", **({"train": SST2, "validation": SST2} | {split: {"sentence": ["a"]}}))
    assert f"sst2/{split}.parquet: no column 'label'; it has sentence" in failure(tmp_path)


def test_column_twice(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([0])], names=["sentence", "sentence", "label"])
    write(tmp_path, "sst2", train=table, validation=SST2)
    message = failure(tmp_path)
    assert "train.parquet: not readable as parquet" in message and "sentence" in message


def test_no_rows(tmp_path):
    write(tmp_path, "sst2", train=pa.table(SST2).slice(0, 0), validation=SST2)
    assert "train.parquet: no rows" in failure(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("labels", [[1, 0, -1], [0, 1, None]])
def test_unlabelled_row(tmp_path, split, labels):
    write(tmp_path, "sst2", **({"train": SST2, "validation": SST2} | {split: SST2 | {"label": labels}}))
    assert f"sst2/{split}.parquet: row 2: column 'label' is -1 or null" in failure(tmp_path)


def test_training_labels_all_secret(tmp_path):
    write(tmp_path, "sst2", train=SST2 | {"label": [-1, -1, -1]}, validation=SST2)
    assert "train.parquet: row 0: column 'label' is -1 or null" in failure(tmp_path)


def test_test_labels_partly_secret(tmp_path):
    write(tmp_path, "sst2", train=SST2, validation=SST2, test=SST2 | {"label": [0, -1, 1]})
    assert "test.parquet: row 1: column 'label' is -1 or null" in failure(tmp_path)


@pytest.mark.parametrize("label", [-1.0, None, float("nan")])
def test_unlabelled_number(tmp_path, label):
    write(tmp_path, "stsb", train=STSB | {"label": [1.0, label, 2.0]}, validation=STSB)
    assert "train.parquet: row 1: column 'label' is -1 or null" in failure(tmp_path, "stsb")


@pytest.mark.parametrize("label", [2, -2, 2**62])
def test_label_outside_the_set(tmp_path, label):
    write(tmp_path, "sst2", train=SST2 | {"label": [0, label, 1]}, validation=SST2)
    message = failure(tmp_path)
    assert "train.parquet: row 1: column 'label' is" in message and "0 (negative), 1 (positive)" in message


def test_infinite_number(tmp_path):
    write(tmp_path, "stsb", train=STSB | {"label": [1.0, 2.0, float("inf")]}, validation=STSB)
    assert "train.parquet: row 2: column 'label' is inf" in failure(tmp_path, "stsb")


@pytest.mark.parametrize("labels", [["positive", "negative", "negative"], [0.5, 1.0, 0.0], [True, False, False]])
def test_labels_of_the_wrong_type(tmp_path, labels):
    write(tmp_path, "sst2", train=SST2 | {"label": labels}, validation=SST2)
    assert "needs the integer codes 0 (negative), 1 (positive)" in failure(tmp_path)


def test_texts_of_the_wrong_type(tmp_path):
    write(tmp_path, "sst2", train=SST2 | {"sentence": [1, 2, 3]}, validation=SST2)
    assert "train.parquet: column 'sentence' holds int64, not text" in failure(tmp_path)


def test_null_text(tmp_path):
    write(tmp_path, "sst2", train=SST2 | {"sentence": ["a", None, "b"]}, validation=SST2)
    assert "train.parquet: row 1: column 'sentence' is null" in failure(tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    words = pa.array([b"good", b"caf\xe9", b"bad"]).view(pa.string())
    write(tmp_path, "sst2", train=pa.table(SST2).set_column(0, "sentence", words), validation=SST2)
    assert "train.parquet: row 1: column 'sentence' is not UTF-8" in failure(tmp_path)


def test_label_names_in_another_order(tmp_path):
    """A file whose metadata names its codes otherwise would be scored upside down."""
    feature = {"names": ["positive", "negative"], "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()}
    write(tmp_path, "sst2", train=pa.table(SST2).replace_schema_metadata(metadata), validation=SST2)
    assert "column 'label' names its codes ('positive', 'negative')" in failure(tmp_path)


@pytest.mark.parametrize("call", ["load('cola')", "identify(['cola'])"])
def test_without_network_the_hub_gives_one_line(tmp_path, call):
    code = (
        f"from bertpipe.downstream.tasks import tasks\ntry: tasks.{call}\nexcept tasks.DataError as error: print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "nyu-mll/glue (cola)" in done.stdout and "give finetune.data a folder" in done.stdout


def test_table_is_read_without_heavy_imports():
    """`bertpipe --help` and `plan` may look at the table: no torch, pyarrow or datasets for it."""
    code = "import sys; from bertpipe.downstream.tasks import tasks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert not {"torch", "pyarrow", "datasets", "evaluate", "sklearn"} & set(done.stdout.split())
