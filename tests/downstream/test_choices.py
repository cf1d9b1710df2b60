"""Multiple choice: what is read from tables laid out as SWAG's and COPA's, and a whole run on them."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer, BertConfig, BertForMaskedLM

from bertpipe.config import FinetuneConfig, TaskConfig
from bertpipe.downstream.finetuning.baselines import majority, tfidf_of_choices
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.downstream.tasks.kinds import KINDS
from tests.downstream.conftest import write_tokenizer
from tests.downstream.test_tasks import failure, write
from tests.launch import launch
from tests.runs import only

SCENES = [
    ("A man opens the door of an old shed.", "He", "lifts a ladder from the hook and carries it out."),
    ("Two girls stand at the edge of a frozen lake.", "They", "lace their skates and step onto the ice."),
    ("A cook cracks three eggs into a bowl.", "The cook", "beats them with a fork until they are smooth."),
    ("The band waits behind the curtain.", "The drummer", "counts to four and the others begin to play."),
    ("A boy ties a string to a paper kite.", "The boy", "runs down the hill and lets the wind take it."),
    ("A woman kneels beside a flat tyre.", "She", "turns the nuts with a wrench and pulls the wheel off."),
]
WRONG = ["eats the moon with a spoon of sand.", "folds the river into a letter.", "sings to the bricks of the sea."]


def scenes(size: int, secret: bool = False) -> dict[str, list]:
    """Rows in the columns of allenai/swag, config regular; the right ending stands everywhere in turn."""
    rows: dict[str, list] = {name: [] for name in tasks.TASKS["swag"].text}
    for row in range(size):
        first, start, ending = SCENES[row % len(SCENES)]
        endings = [*WRONG]
        endings.insert(row % 4, ending)
        for name, text in zip(rows, (first, start, *endings), strict=True):
            rows[name].append(text)
    more = {"video-id": [f"v{row}" for row in range(size)], "fold-ind": ["0"] * size, "gold-source": ["gold"] * size}
    starts = [f"{a} {b}" for a, b in zip(rows["sent1"], rows["sent2"], strict=True)]
    return more | {"startphrase": starts} | rows | {"label": [-1 if secret else row % 4 for row in range(size)]}


COPA = {
    "premise": ["My body cast a shadow.", "The vase fell."],
    "choice1": ["The sun was rising.", "It broke."],
    "choice2": ["The grass was cut.", "It flew."],
    "question": ["cause", "effect"],
    "idx": [4, 5],
    "label": [0, 0],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_swag_is_read_as_a_first_text_and_four_endings(tmp_path):
    splits = tasks.load(
        "swag", str(write(tmp_path, "swag", train=scenes(6), validation=scenes(3), test=scenes(2, True)))
    )
    assert splits["train"].texts[1] == (SCENES[1][0], f"They {WRONG[0]}", f"They {SCENES[1][2]}", *[
        f"They {wrong}" for wrong in WRONG[1:]
    ])  # fmt: skip
    assert splits["train"].labels.tolist() == [0, 1, 2, 3, 0, 1] and splits["train"].ids == [0, 1, 2, 3, 4, 5]
    assert splits["test"].labels is None and len(splits["test"]) == 2


def test_copa_asks_its_question_in_words(tmp_path):
    splits = tasks.load("copa", str(write(tmp_path, "copa", train=COPA, validation=COPA)))
    assert splits["train"].texts == [
        ("My body cast a shadow. What was the cause of this?", "The sun was rising.", "The grass was cut."),
        ("The vase fell. What happened as a result?", "It broke.", "It flew."),
    ]
    assert splits["train"].ids == [4, 5] and splits["train"].label_names == ("choice1", "choice2")


def test_a_table_of_ones_own_has_as_many_choices_as_columns(tmp_path):
    (tmp_path / "quiz.csv").write_text("q,a,b,c,right\nWhat is red?,snow,blood,ink,1\nWhat is cold?,ice,fire,tea,0\n")
    own = TaskConfig(
        kind="choices",
        data={split: str(tmp_path / "quiz.csv") for split in ("train", "validation")},
        text=["q", "a", "b", "c"],
        label="right",
    )
    split = tasks.load("quiz", None, own)["train"]
    assert split.texts[0] == ("What is red?", "snow", "blood", "ink") and split.labels.tolist() == [1, 0]
    assert split.label_names == ("0", "1", "2")


def test_braces_in_a_text_are_text(tmp_path):
    rows = COPA | {"premise": ["{choice1} {0}", "}{"]}
    splits = tasks.load("copa", str(write(tmp_path, "copa", train=rows, validation=COPA)))
    assert splits["train"].texts[0][0] == "{choice1} {0} What was the cause of this?"


BAD = {
    "no column": (lambda t: t.drop_columns("ending2"), "no column 'ending2'; it has video-id"),
    "null choice": (lambda t: put(t, "ending3", pa.array(["a", None, "c"])), "row 1: column 'ending3' is null"),
    "not text": (lambda t: put(t, "sent2", pa.array([1, 2, 3])), "column 'sent2' holds int64, not text"),
    "unknown label": (lambda t: put(t, "label", pa.array([0, 4, 1])), "row 1: column 'label' is 4, not one of 0, 1, 2"),
    "null label": (lambda t: put(t, "label", pa.array([0, 1, None])), "row 2: column 'label' is -1 or null"),
    "secret": (lambda t: put(t, "label", pa.array([-1, 2, -1])), "row 0: column 'label' is -1 or null"),
    "named": (lambda t: put(t, "label", pa.array(["0", "1", "2"])), "holds string, the task swag needs the integer"),
}  # fmt: skip


def put(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, values)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_tables_are_one_line(tmp_path, bad, split):
    change, message = BAD[bad]
    tables = {"train": pa.table(scenes(3)), "validation": pa.table(scenes(3))}
    write(tmp_path, "swag", **(tables | {split: change(tables[split])}))
    found = failure(tmp_path, "swag")
    assert f"swag/{split}.parquet: " in found and message in found


def test_a_validation_set_without_labels_is_for_predictions_alone_and_training_is_refused(tmp_path):
    write(tmp_path, "swag", train=scenes(3), validation=scenes(3, True))
    validation = tasks.load("swag", str(tmp_path))["validation"]
    assert validation.labels is None and len(validation) > 0
    write(tmp_path, "swag", train=scenes(3, True))
    assert "swag/train.parquet: row 0: column 'label' is -1 or null" in failure(tmp_path, "swag")


def test_an_unknown_question_is_named(tmp_path):
    write(tmp_path, "copa", train=COPA, validation=COPA | {"question": ["cause", "why"]})
    assert "validation.parquet: row 1: column 'question' is 'why', not one of cause, effect" in failure(
        tmp_path, "copa"
    )


def test_choices_named_otherwise_in_one_split_are_refused(tmp_path):
    info = {"info": {"features": {"label": {"names": ["choice2", "choice1"], "_type": "ClassLabel"}}}}
    table = pa.table(COPA).replace_schema_metadata({"huggingface": json.dumps(info)})
    write(tmp_path, "copa", train=COPA, validation=table)
    assert "validation.parquet: column 'label' names its codes ('choice2', 'choice1')" in failure(tmp_path, "copa")


# --- encoding and deciding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [128, 24])
def test_each_choice_is_encoded_as_a_pair_and_cut_examples_count_once(tmp_path, tokenizer, max_length):
    split = tasks.load("swag", str(write(tmp_path, "swag", train=scenes(5), validation=scenes(1))))["train"]
    encoded = KINDS["choices"].encode(split, tokenizer, FinetuneConfig(max_length=max_length))
    examples = encoded.examples
    assert len(examples) == 5 and examples.choices == 4 and len(examples.input_ids) == 20
    for row, (first, *choices) in enumerate(split.texts):
        stock = tokenizer([first] * 4, choices, truncation="longest_first", max_length=max_length)
        for choice in range(4):
            assert examples.input_ids[4 * row + choice].tolist() == stock["input_ids"][choice]
            assert examples.token_type_ids[4 * row + choice].tolist() == stock["token_type_ids"][choice]
    assert encoded.num_truncated == (5 if max_length == 24 else 0)


def test_the_highest_logit_of_an_example_wins(tmp_path, tokenizer):
    split = tasks.load("swag", str(write(tmp_path, "swag", train=scenes(2), validation=scenes(1))))["train"]
    kind = KINDS["choices"]
    encoded = kind.encode(split, tokenizer, FinetuneConfig())
    outputs = Outputs(np.array([[0.5], [-1], [3], [2], [-4], [-1], [-2], [-3]], np.float32), np.array([0, 4, 8]))
    predicted = kind.decide(split, encoded, outputs)
    assert predicted.tolist() == [2, 1]
    lines = [kind.line(split, encoded, outputs, predicted, row) for row in (0, 1)]
    assert lines == [
        {"prediction": 2, "label": 0, "logits": [0.5, -1, 3, 2]},
        {"prediction": 1, "label": 1, "logits": [-4, -1, -2, -3]},
    ]
    assert kind.score(tasks.TASKS["swag"], split, predicted) == {"accuracy": 0.5}


def test_baselines(tmp_path):
    splits = tasks.load("swag", str(write(tmp_path, "swag", train=scenes(13), validation=scenes(6))))
    assert majority(splits).tolist() == [0] * 6
    assert tfidf_of_choices(splits).tolist() == splits["validation"].labels.tolist(), (
        "the wrong endings are always those"
    )
    blank = {name: [" "] * 4 for name in tasks.TASKS["swag"].text} | {"label": [3, 3, 0, 1]}
    splits = tasks.load("swag", str(write(tmp_path, "swag", train=blank, validation=scenes(2))))
    assert tfidf_of_choices(splits).tolist() == [3, 3]


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_scores_and_its_model_is_stock(tmp_path, world):
    """Two gloo processes share examples, never the choices of one, and predict what the saved stock model does."""
    tokenizer = write_tokenizer(tmp_path / "start")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)
    BertForMaskedLM(config).save_pretrained(tmp_path / "start")
    write(tmp_path / "data", "swag", train=scenes(21), validation=scenes(10), test=scenes(5, True))
    write(tmp_path / "data", "copa", train=COPA, validation=COPA, test=COPA | {"label": [-1, -1], "idx": [1, 0]})
    command = ["finetune", "--finetune.tasks", "all", "--finetune.data", tmp_path / "data", "--finetune.model"]
    command += [tmp_path / "start", "--finetune.seeds", "1", "--finetune.epochs", "2", "--finetune.slots_per_step", "2"]
    command += ["--finetune.batch_size", "5", "--finetune.baselines", "tfidf", "--finetune.precision", "fp32"]
    command += ["--runtime.root", tmp_path / "runs", "--runtime.progress", "false", "--finetune.max_length", "48"]
    printed = launch(world, *command).done()
    assert "swag tfidf seed 1: accuracy 1.000" in printed and "swag model" in printed and "copa model" in printed

    made = only(tmp_path / "runs", "finetune")
    copa = [json.loads(x) for x in (made / "copa/runs/model-seed-1/predictions-test.jsonl").open()]
    submitted = [json.loads(x) for x in (made / "submission/COPA.jsonl").open()]
    assert submitted == [{"idx": n, "label": copa[1 - n]["prediction"]} for n in (0, 1)]
    folder = made / "swag"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["kind"] == "choices" and scores["num_train"] == 21 and scores["truncated"] > 0
    model = AutoModelForMultipleChoice.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    splits = tasks.load("swag", str(tmp_path / "data"))
    for split in ("validation", "test"):
        lines = [json.loads(x) for x in (folder / f"runs/model-seed-1/predictions-{split}.jsonl").open()]
        assert [line["id"] for line in lines] == splits[split].ids
        for line, (first, *choices) in zip(lines, splits[split].texts, strict=True):
            batch = tokenizer([first] * 4, choices, truncation="longest_first", max_length=48, padding=True)
            with torch.no_grad():
                logits = model(**{name: torch.tensor([rows]) for name, rows in batch.items()}).logits[0]
            assert line["logits"] == pytest.approx(logits.tolist(), abs=2e-5)
            assert line["prediction"] == int(np.argmax(line["logits"])) and ("label" in line) == (split == "validation")
        right = [line["prediction"] == line.get("label") for line in lines]
        assert split == "test" or sum(right) / 10 == scores["runs"][0]["scores"]["accuracy"]
