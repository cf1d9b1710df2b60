"""Tasks with more than a train and a validation set: MNLI with both of its own and the diagnostic set; SuperGLUE's."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertConfig, BertForMaskedLM

from bertpipe.downstream.tasks import task_sources, tasks
from bertpipe.downstream.tasks.metrics import compute
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.downstream.test_tasks import failure, write
from tests.launch import launch
from tests.runs import only

NAMES = ["entailment", "neutral", "contradiction"]
SIZES = {"train": 30, "validation_matched": 12, "validation_mismatched": 14, "test_matched": 5, "test_mismatched": 6}


def pairs(size: int, secret: bool = False, seed: int = 0) -> dict[str, list]:
    """Rows in MNLI's columns; the words say nothing of the label."""
    rng, words = np.random.default_rng(seed), TEXT.split()
    texts = [[" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(size)] for _ in range(2)]
    labels = [-1] * size if secret else rng.integers(0, 3, size).tolist()
    return {"premise": texts[0], "hypothesis": texts[1], "label": labels, "idx": list(range(100, 100 + size))}


def write_mnli(folder, ax=None, **changed):
    splits = {split: pairs(size, split.startswith("test"), seed=size) for split, size in SIZES.items()}
    write(folder, "mnli", **(splits | changed))
    if ax is not None:
        write(folder, "ax", test=ax)
    return folder


# --- MNLI -------------------------------------------------------------------------------------------------------------


def test_a_folder_mnli_is_found_and_all_its_splits_are_read(tmp_path):
    folder = str(write_mnli(tmp_path, pairs(4, secret=True)))
    assert tasks.chosen("all", folder) == ["mnli"]
    splits = tasks.load("mnli", folder)
    assert {split: len(rows) for split, rows in splits.items()} == SIZES | {"ax": 4}
    assert splits["train"].label_names == tuple(NAMES)
    assert splits["validation_mismatched"].labels is not None
    assert splits["test_matched"].labels is splits["ax"].labels is None
    before = tasks.identify(["mnli"], folder)
    write(tmp_path, "ax", test=pairs(5, secret=True))
    assert tasks.identify(["mnli"], folder) != before, "the diagnostic set is part of what a run is made from"


def test_tests_and_the_diagnostic_set_may_be_missing(tmp_path):
    (write_mnli(tmp_path) / "mnli" / "test_matched.parquet").unlink()
    assert list(tasks.load("mnli", str(tmp_path))) == [split for split in SIZES if split != "test_matched"]


def test_both_validation_sets_must_be_there(tmp_path):
    (write_mnli(tmp_path) / "mnli" / "validation_mismatched.parquet").unlink()
    message = "the task mnli needs train and validation_matched and validation_mismatched"
    assert message in failure(tmp_path, "mnli")


@pytest.mark.parametrize(
    ("split", "labels", "message"),
    [
        (
            "validation_mismatched",
            [-1, 1, 2, -1],
            "mnli/validation_mismatched.parquet: row 0: column 'label' is -1 or null",
        ),
        (
            "train",
            [0, 1, 2, 3],
            "mnli/train.parquet: row 3: column 'label' is 3, not one of 0 (entailment), 1 (neutral)",
        ),
        ("ax", [0, 1, -1, 2], "ax/test.parquet: row 2: column 'label' is -1 or null"),
    ],
)
def test_bad_labels(tmp_path, split, labels, message):
    rows = pairs(4) | {"label": labels}
    write_mnli(tmp_path, rows) if split == "ax" else write_mnli(tmp_path, **{split: rows})
    assert message in failure(tmp_path, "mnli")


def test_a_diagnostic_set_without_its_columns(tmp_path):
    write_mnli(tmp_path, {"sentence1": ["a"], "sentence2": ["b"]})
    assert "ax/test.parquet: no column 'premise'; it has sentence1, sentence2" in failure(tmp_path, "mnli")


def test_of_the_hub_the_diagnostic_set_is_a_config_of_its_own(tmp_path, monkeypatch):
    """A data set of the Hub, as a folder: configs in its card, parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = []
    for config, sizes in {"mnli": SIZES, "ax": {"test": 3}}.items():
        files = []
        for split, size in sizes.items():
            path = tmp_path / "hub" / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(pairs(size, split.startswith("test"))), path)
            files.append({"split": split, "path": f"{config}/{split}.parquet"})
        configs.append({"config_name": config, "data_files": files})
    card = f"---\n{json.dumps({'configs': configs})}\n---\n"
    (tmp_path / "hub" / "README.md").write_text(card)
    hub = task_sources.FolderOrHub("GLUE", str(tmp_path / "hub"))
    splits = hub.load(tasks.TASKS["mnli"], None)
    assert {split: len(rows) for split, rows in splits.items()} == SIZES | {"ax": 3}
    assert splits["ax"].labels is None and splits["ax"].ids == [100, 101, 102]
    one = task_sources.FolderOrHub("SWAG", str(tmp_path / "hub"), "mnli")
    assert (
        one.identify(tasks.TASKS["swag"], None, None)["revision"]
        == hub.identify(tasks.TASKS["mnli"], None, None)["revision"]
    )


def test_a_run_scores_both_validation_sets_and_the_diagnostic_one(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "start")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)
    BertForMaskedLM(config).save_pretrained(tmp_path / "start")
    write_mnli(tmp_path / "data", pairs(9, seed=3))
    command = ["finetune", "--finetune.tasks", "all", "--finetune.data", tmp_path / "data", "--finetune.model"]
    command += [tmp_path / "start", "--finetune.seeds", "2", "--finetune.epochs", "1", "--finetune.precision", "fp32"]
    command += ["--finetune.baselines", "[majority, tfidf]", "--runtime.root", tmp_path / "runs"]
    printed = launch(1, *command, "--runtime.progress", "false").done()

    folder = only(tmp_path / "runs", "finetune") / "mnli"
    scores, splits = json.loads((folder / "scores.json").read_text()), tasks.load("mnli", str(tmp_path / "data"))
    assert scores["num_validation"] == SIZES["validation_matched"] and scores["metric"] == "accuracy"
    run = scores["runs"][0]["scores"]
    assert list(run) == ["accuracy", "mismatched_accuracy", "ax_matthews_correlation"]
    for split, (name, metric) in {
        "validation_matched": ("accuracy", lambda a, b: np.mean(np.array(a) == b)),
        "validation_mismatched": ("mismatched_accuracy", lambda a, b: np.mean(np.array(a) == b)),
        "ax": ("ax_matthews_correlation", matthews_corrcoef),
    }.items():
        lines = [json.loads(x) for x in (folder / f"runs/model-seed-1/predictions-{split}.jsonl").open()]
        predicted = [NAMES.index(line["prediction"]) for line in lines]
        assert [line["id"] for line in lines] == splits[split].ids
        assert run[name] == pytest.approx(metric(splits[split].labels, predicted))
    assert {path.name for path in (folder / "runs/model-seed-1").glob("predictions-test*")} == {
        "predictions-test_matched.jsonl",
        "predictions-test_mismatched.jsonl",
    }
    assert {run["init"] for run in scores["runs"] if "mismatched_accuracy" in run["scores"]} == {
        "model",
        "majority",
        "tfidf",
    }
    further = [np.median([r["scores"][name] for r in scores["runs"][:2]]) for name in list(run)[1:]]
    assert [scores["further"][name] for name in list(run)[1:]] == pytest.approx(further)
    assert f"\nmnli mismatched accuracy: median {further[0]:.3f}\n" in printed
    assert f"\nmnli ax matthews correlation: median {further[1]:.3f}\n" in printed
    best = folder / f"runs/model-seed-{scores['model_seed']}/predictions-ax.jsonl"
    submitted = [line.split("\t") for line in (folder.parent / "submission/AX.tsv").read_text().splitlines()[1:]]
    assert [answer for _, answer in submitted] == [json.loads(line)["prediction"] for line in best.open()]


# --- SuperGLUE --------------------------------------------------------------------------------------------------------

WIC = {
    "word": ["bank", "run"],
    "sentence1": ["The bank was steep.", "We run."],
    "sentence2": ["A bank lends.", "A long run."],
    **{name: [0, 0] for name in ("start1", "start2", "end1", "end2")},
    "idx": [0, 1],
    "label": [0, 1],
}


def test_wic_says_the_word_before_the_first_sentence(tmp_path):
    split = tasks.load("wic", str(write(tmp_path, "wic", train=WIC, validation=WIC)))["train"]
    assert split.texts == [("bank: The bank was steep.", "A bank lends."), ("run: We run.", "A long run.")]
    assert split.label_names == ("False", "True") and split.labels.tolist() == [0, 1]


def test_boolq_asks_the_question_first(tmp_path):
    rows = {"question": ["is it"], "passage": ["It is."], "idx": [0], "label": [1]}
    split = tasks.load("boolq", str(write(tmp_path, "boolq", train=rows, validation=rows, test=rows | {"label": [-1]})))
    assert split["train"].texts == [("is it", "It is.")] and split["test"].labels is None


def test_cb_has_names_in_its_own_order(tmp_path):
    names = ["entailment", "contradiction", "neutral"]
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table(pairs(4)).replace_schema_metadata({"huggingface": json.dumps(info)})
    assert tasks.load("cb", str(write(tmp_path, "cb", train=table, validation=table)))["train"].label_names == tuple(
        names
    )
    write_mnli(tmp_path, train=table)
    assert "mnli/train.parquet: column 'label' names its codes ('entailment', 'contradiction'" in failure(
        tmp_path, "mnli"
    )


def test_rte_is_read_under_superglues_column_names_too(tmp_path):
    rows = {"premise": ["a b"], "hypothesis": ["c"], "idx": [0], "label": [1]}
    glue = {"sentence1": ["a b"], "sentence2": ["c"], "idx": [0], "label": [1]}
    splits = tasks.load("rte", str(write(tmp_path, "rte", train=rows, validation=glue)))
    assert splits["train"].texts == splits["validation"].texts == [("a b", "c")]
    write(tmp_path, "rte", train={"premise": ["a"], "label": [0]})
    assert "train.parquet: no column 'sentence1'; it has premise, label" in failure(tmp_path, "rte")


def test_cb_is_scored_by_the_mean_of_accuracy_and_unweighted_f1():
    predicted, true = [0, 0, 1, 1, 2, 0, 1], [0, 1, 1, 1, 2, 2, 0]
    accuracy, f1 = 4 / 7, f1_score(true, predicted, average="macro")
    assert f1 == pytest.approx((2 * 1 / 5 + 2 * 2 / 6 + 2 * 1 / 3) / 3), "2 TP / (predicted + true)"
    expected = {"accuracy": accuracy, "f1": f1, "combined": (accuracy + f1) / 2}
    assert compute("accuracy_and_mean_f1", predicted, true) == {k: pytest.approx(v) for k, v in expected.items()}
