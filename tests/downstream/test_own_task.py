"""A task from the user's own table: labels in every form, splits, and one clear line for each way it can be wrong."""

import csv
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import Config, FinetuneConfig, TaskConfig, named_tasks
from bertpipe.config_files import read_config
from bertpipe.downstream.finetuning import cells, grid
from bertpipe.downstream.tasks import own_task, tasks
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.errors import ConfigError, DataError

TOPICS = [{"title": f"title {i}", "body": f"body {i // 2}", "topic": "sport" if i % 3 else "music"} for i in range(40)]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def own(data, **more) -> TaskConfig:
    data = {split: str(path) for split, path in data.items()} if isinstance(data, dict) else str(data)
    given = {"kind": "classification", "data": data, "text": ["title", "body"], "label": "topic"} | more
    return TaskConfig(**given)


def load(data, **more):
    settings = own(data, **more)
    return tasks.load(own_task.name_of(settings), None, settings)


def labelled(folder: Path, labels: list, **more):
    """The splits of rows with these labels in JSON, train and validation alike."""
    rows = [{"title": str(i), "topic": label} for i, label in enumerate(labels)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return load({"train": folder / "rows.json", "validation": folder / "rows.json"}, text="title", **more)


def failure(data, **more) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(data, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the setting ------------------------------------------------------------------------------------------------------


def test_it_is_given_in_a_file_and_by_flags_alike(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {task: {kind: classification, data: my.csv, text: [title, body], label: topic}}")
    flags = {"kind": "classification", "data": "my.csv", "text": '["title", "body"]', "label": "topic"}
    by_flags = read_config([], [(f"finetune.task.{key}", value) for key, value in flags.items()])
    assert read_config([path], []) == by_flags == Config(finetune=FinetuneConfig(task=own("my.csv")))
    mixed = read_config([path], [("finetune.task.data", "{train: a.csv, test: b.csv}"), ("finetune.task.name", "news")])
    assert mixed.finetune.task == own({"train": "a.csv", "test": "b.csv"}, name="news")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: c, data: a, text: b}", "^finetune.task: needs label too$"),
        ("{kind: c}", "^finetune.task: needs data, text, label too$"),
        (
            "{kind: c, data: a, text: b, lable: c}",
            "unknown setting 'finetune.task.lable'; did you mean 'finetune.task.l",
        ),
        ("{kind: c, data: 3, text: b, label: c}", "^finetune.task.data: must be a mapping or text, got 3$"),
        (
            "{kind: c, data: a, text: b, label: c, validation_share: 2}",
            "^finetune.task.validation_share: Input should be",
        ),
        ("{kind: c, data: a, text: b, label: c, quotes: 3}", "^finetune.task.quotes: must be true or false, got 3$"),
        ("{kind: c, data: a, text: b, label: c, name: true}", "finetune.task.name is no yes/no setting, got true"),
        ("my.csv", "finetune.task must be a mapping or null, got 'my.csv'"),
        ("[1]", "^finetune.task: must be a mapping or null, got"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"finetune: {{task: {text}}}")
    with pytest.raises(ConfigError, match=message) as caught:
        read_config([path], [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["finetune.task", "train.phases"])
def test_a_text_for_a_section_imports_nothing(tmp_path, monkeypatch, key):
    """jsonargparse would take it for the name of a class, and import its module."""
    (tmp_path / "bomb.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    section, name = key.split(".")
    for text in ("bomb.Class", "[bomb.Class]", '["bomb.Class"]', "bomb"):
        (tmp_path / "c.yaml").write_text(f"{section}: {{{name}: {text}}}")
        for files, flags in (([tmp_path / "c.yaml"], []), ([], [(key, text)])):
            with pytest.raises(ConfigError, match="must be"):
                read_config(files, flags)
    assert not (tmp_path / "imported").exists()


def test_it_runs_alone_unless_tasks_are_named_too(tmp_path):
    task = own("news.csv")
    assert named_tasks(FinetuneConfig()) == ["docs"] and named_tasks(FinetuneConfig(task=task)) == []
    assert tasks.chosen([], None, task) == ["news"]
    assert tasks.chosen(["mrpc", "news"], None, task) == ["mrpc", "news"]
    assert tasks.chosen("all", None, task)[-2:] == [tasks.chosen("all", None)[-1], "news"]


@pytest.mark.parametrize(
    ("data", "name"),
    [("a/news.csv", "news"), ("a/my news (2).tsv.gz", "my-news-2"), ("a/новости.json", "новости"), ("a/%.csv", "own"),
     ({"train": "a/news/train.csv"}, "news"), ("a/news", "news")],
)  # fmt: skip
def test_the_name_is_the_files(data, name):
    assert own_task.name_of(own(data)) == name


WRONG = [
    ({"kind": "clasification"}, "finetune.task.kind: 'clasification' is not one of classification, multi_label, "),
    ({"kind": "clasification"}, "did you mean 'classification'?"),
    ({"text": ["a", "b", "c"]}, "finetune.task.text: ['a', 'b', 'c'] must be one column, or the two of a pair; join"),
    ({"text": ["a", "a"]}, "must be one column, or the two of a pair"),
    ({"text": []}, "finetune.task.text: [] must be"),
    ({"kind": "choices"}, "must be the column of the first text and those of the choices"),
    ({"label": "title"}, "finetune.task.label: title must be columns beside the text"),
    ({"label": ["x", "y"]}, "finetune.task.label: several labels a row need finetune.task.kind: multi_label"),
    ({"label_separator": ","}, "finetune.task.label_separator: several labels a row need"),
    ({"kind": "multi_label", "label": ["x", "y"], "label_separator": ","}, "finetune.task.label_separator: needs"),
    ({"delimiter": ", "}, "finetune.task.delimiter: ', ' must be one character"),
    ({"encoding": "utf-9"}, "finetune.task.encoding: no text encoding is called 'utf-9'"),
    ({"encoding": "base64"}, "finetune.task.encoding: no text encoding is called 'base64'"),
    ({"name": "rte"}, "finetune.task.name: 'rte' is a task of the table; give the task a name of its own"),
    ({"name": "../x"}, "finetune.task.name: '../x' can't be the name of a folder"),
    ({"name": "all"}, "finetune.task.name: 'all' can't be the name of a folder"),
    ({"data": {"train": "a.csv", "dev": "b.csv"}}, "finetune.task.data: 'dev' is not one of train, validation, test"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_what_can_be_no_task_is_said_before_anything_is_read(more, message):
    settings = FinetuneConfig(task=own(**({"data": "nowhere.csv"} | more)), model="x")
    with pytest.raises((ConfigError, DataError)) as caught:
        grid.check(settings)
        tasks.identify(tasks.chosen([], None, settings.task), None, None, settings.task)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_a_users(kind):
    alike = next((task for task in tasks.TASKS.values() if task.kind == kind), None)
    text = ("a", "b", "c") if kind == "choices" else alike.text if alike else ("a",)
    task = tasks.get("x", own("x.csv", kind=kind, text=list(text)))
    assert (task.kind, task.text, task.label) == (kind, text, "topic") and task.metric and task.headline


# --- good data --------------------------------------------------------------------------------------------------------


def test_classes_by_name_from_one_file(tmp_path):
    splits = load(write_csv(tmp_path / "news.csv", TOPICS))
    train, validation = splits["train"], splits["validation"]
    assert list(splits) == ["train", "validation"] and (len(train), len(validation)) == (36, 4)
    assert train.label_names == validation.label_names == ("music", "sport")
    both = {
        i: (split.texts[n], split.label_names[split.labels[n]])
        for split in splits.values()
        for n, i in enumerate(split.ids)
    }
    assert [both[i] for i in range(40)] == [((r["title"], r["body"]), r["topic"]) for r in TOPICS], (
        "ids are row numbers"
    )
    assert train.counts == {} and validation.counts == {"held_out_of_train": 4}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.99), st.randoms())
def test_the_hold_out_goes_by_content(values, share, rng):
    """Equal texts on one side, the same for any order of the rows, about the share of the different texts."""
    texts = [(f"text {value}", "b") for value in values]
    if len(set(texts)) == 1:
        with pytest.raises(DataError, match="x: all rows have the same text"):
            own_task._held_out(texts, share, "x")
        return
    held = {text for text, chosen in zip(texts, own_task._held_out(texts, share, "x"), strict=True) if chosen}
    kept = {text for text, chosen in zip(texts, own_task._held_out(texts, share, "x"), strict=True) if not chosen}
    assert held and kept and not held & kept
    assert abs(len(held) - share * len(held | kept)) <= 1
    rng.shuffle(texts)
    assert held == {text for text, chosen in zip(texts, own_task._held_out(texts, share, "x"), strict=True) if chosen}


def test_the_hold_out_is_the_same_tomorrow(tmp_path):
    assert load(write_csv(tmp_path / "news.csv", TOPICS))["validation"].ids == [0, 12, 16, 38]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False, True], ("false", "true")),
        ([1.0, 0.0, 3.0], ("0", "1", "3")),
        ([-3, -2, 1], ("-3", "-2", "1")),
        ([" b", "b", "a"], (" b", "a", "b")),
    ],
)
def test_classes_in_their_forms(tmp_path, labels, names):
    train = labelled(tmp_path, labels)["train"]
    assert train.label_names == names and train.labels.dtype == np.int64
    words = [json.dumps(int(label) if isinstance(label, float) else label).strip('"') for label in labels]
    assert [names[code] for code in train.labels] == words


def test_classes_as_pandas_and_datasets_write_them(tmp_path):
    info = {"info": {"features": {"topic": {"names": ["world", "sport", "music"], "_type": "ClassLabel"}}}}
    coded = pa.table({"title": ["a", "b"], "topic": [1, 0]}).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(coded, tmp_path / "train.parquet")
    categories = pa.table({"title": ["c", "d"], "topic": pa.array(["sport", "world"]).dictionary_encode()})
    pq.write_table(categories, tmp_path / "validation.parquet")
    write_csv(tmp_path / "test.csv", [{"title": "e", "topic": "music"}])
    splits = load(tmp_path, text="title")
    assert splits["train"].label_names == ("world", "sport", "music"), "the order that the file declares"
    assert [split.labels.tolist() for split in splits.values()] == [[1, 0], [1, 0], [2]]


def test_numbers_from_text(tmp_path):
    rows = [{"title": str(i), "topic": value} for i, value in enumerate(["1", "-1", "2.5e0", " 3 "])]
    train = load(
        {"train": write_csv(tmp_path / "a.csv", rows), "validation": tmp_path / "a.csv"},
        text="title",
        kind="regression",
    )["train"]
    assert train.labels.tolist() == [1, -1, 2.5, 3] and train.labels.dtype == np.float32 and train.label_names is None


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label"])
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("column", ["missing", "", "-1", None, "nan"])
def test_a_split_without_labels_is_predicted(tmp_path, kind, split, column):
    labels = {"classification": ["a", "b"], "regression": [1, 2], "multi_label": [["a"], ["b"]]}[kind]
    rows = [{"title": "x", "topic": label} for label in labels]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    secret = {"": "", "-1": -1, None: None, "nan": float("nan")}.get(column, 0)
    if kind == "multi_label" and column in ("", "-1", "nan"):
        secret = None
    bare = [{"title": "y"} | ({} if column == "missing" else {"topic": secret})]
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    if split == "test":
        (tmp_path / "validation.json").write_text(json.dumps(rows))
    elif column == "missing":
        assert "validation.jsonl: no column 'topic'; it has title" in failure(tmp_path, kind=kind, text="title")
        return
    found = load(tmp_path, kind=kind, text="title")[split]
    assert found.labels is None and len(found) == 1
    assert found.label_names == load(tmp_path, kind=kind, text="title")["train"].label_names


def test_empty_texts_are_kept_and_counted(tmp_path):
    rows = [{"title": title, "topic": topic} for title, topic in [("", "a"), ("x", "b"), (" ", "a"), ("y", "a")]]
    train = load({"train": write_csv(tmp_path / "a.csv", rows), "validation": tmp_path / "a.csv"}, text="title")[
        "train"
    ]
    assert train.texts[0] == ("",) and train.counts == {"with_an_empty_text": 2}


def test_a_class_with_one_example_is_a_class(tmp_path):
    train = labelled(tmp_path, ["a"] * 20 + ["b"])["train"]
    assert Counter(train.labels.tolist()) == {0: 20, 1: 1}


@pytest.mark.parametrize("column", ["idx", "id"])
def test_ids_of_the_table_are_kept(tmp_path, column):
    rows = [row | {column: f"n{i}"} for i, row in enumerate(TOPICS)]
    splits = load(write_csv(tmp_path / "a.csv", rows))
    assert {name for split in splits.values() for name in split.ids} == {f"n{i}" for i in range(40)}


def test_choices_by_number(tmp_path):
    rows = [{"q": "a", "x": "b", "y": "c", "topic": n % 2} for n in range(4)]
    data = {"train": write_csv(tmp_path / "a.csv", rows), "validation": tmp_path / "a.csv"}
    train = load(data, kind="choices", text=["q", "x", "y"])["train"]
    assert train.texts[0] == ("a", "b", "c") and train.labels.tolist() == [0, 1, 0, 1]
    write_csv(tmp_path / "a.csv", [*rows, rows[0] | {"topic": 2}])
    assert "a.csv: row 4: column 'topic' is 2, not one of 0, 1" in failure(data, kind="choices", text=["q", "x", "y"])


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tags_of_words(tmp_path):
    rows = [{"words": ["Ada", "met", "Bob", str(n)], "tags": ["B-PER", "O", "B-PER", "O"]} for n in range(20)]
    splits = load(write_jsonl(tmp_path / "ner.jsonl", rows), kind="tokens", text="words", label="tags")
    assert [len(split) for split in splits.values()] == [18, 2]
    assert splits["validation"].label_names == splits["train"].label_names == ("O", "B-PER", "I-PER")
    assert {split.labels[0].tolist() == [1, 0, 1, 0] for split in splits.values()} == {True}
    rows[7]["tags"] = ["O"]
    message = failure(write_jsonl(tmp_path / "ner.jsonl", rows), kind="tokens", text="words", label="tags")
    assert "ner.jsonl: row 7: column 'tags' has 1 tags for 4 words" in message


def test_answers_in_a_context(tmp_path):
    rows = [
        {"q": f"where {n}?", "c": f"It is in Rome {n}.", "a": {"text": ["Rome"], "answer_start": [9]}}
        for n in range(20)
    ]
    splits = load(write_jsonl(tmp_path / "qa.jsonl", rows), kind="answers", text=["q", "c"], label="a")
    assert [len(split) for split in splits.values()] == [18, 2]
    assert splits["validation"].texts[0][0] == f"where {splits['validation'].ids[0]}?"
    rows[3]["a"]["text"] = ["Paris"]
    message = failure(write_jsonl(tmp_path / "qa.jsonl", rows), kind="answers", text=["q", "c"], label="a")
    assert "qa.jsonl: question 3: its answer 'Paris' is not in the context" in message


def test_a_model_that_is_scored_as_it_is_needs_no_train(tmp_path):
    """finetune.epochs: 0. Of one file, what would be held out; the names are those of train where that is given."""
    path = write_csv(tmp_path / "a.csv", TOPICS)
    held = load(path)["validation"]

    def untrained(data):
        settings = own(data, name="a")
        return tasks.load("a", None, settings, train=False)

    (found,) = untrained(path).values()
    assert found.ids == held.ids and found.label_names == ("music", "sport")
    new = write_csv(tmp_path / "new.csv", [TOPICS[1]])
    (found,) = untrained({"train": path, "validation": new}).values()
    assert found.label_names == ("music", "sport") and found.labels.tolist() == [1]
    (found,) = untrained({"validation": path}).values()
    assert len(found) == 40 and found.label_names == ("music", "sport")


# --- multi-label ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "more"),
    [
        ({"topic": [["b", "a"], [], ["c"]]}, {}),
        ({"topic": ["b;a", "", " c ;"]}, {"label_separator": ";"}),
        ({"a": [1, 0, 0], "b": [True, False, False], "c": ["0", "0.0", "1"]}, {"label": ["a", "b", "c"]}),
    ],
)
def test_sets_of_labels_in_their_forms(tmp_path, columns, more):
    pq.write_table(pa.table({"title": ["x", "y", "z"]} | columns), tmp_path / "train.parquet")
    pq.write_table(pa.table({"title": ["x", "y", "z"]} | columns), tmp_path / "validation.parquet")
    train = load(tmp_path, kind="multi_label", text="title", **more)["train"]
    assert train.label_names == ("a", "b", "c") and train.labels.dtype == np.float32
    assert train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_columns_of_labels_keep_their_order_and_those_that_never_hold(tmp_path):
    rows = [{"title": str(i), "z": i % 2, "a": 0} for i in range(20)]
    splits = load(write_csv(tmp_path / "a.csv", rows), kind="multi_label", text="title", label=["z", "a"])
    assert splits["train"].label_names == splits["validation"].label_names == ("z", "a")
    assert sum(split.labels.sum(0) for split in splits.values()).tolist() == [10, 0]


def test_declared_sets_of_codes(tmp_path):
    feature = {"feature": {"names": ["joy", "fear"], "_type": "ClassLabel"}, "_type": "List"}
    table = pa.table({"title": ["x", "y"], "topic": [[1], [0, 1]]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"topic": feature}}})})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "validation.parquet")
    train = load(tmp_path, kind="multi_label", text="title")["train"]
    assert train.label_names == ("joy", "fear") and train.labels.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [{"topic": "a|b"}],
            {},
            "column 'topic' holds string, not lists of labels; if it is a text of several, say what ",
        ),
        ([{"topic": []}, {"topic": []}], {}, "a.json: column 'topic' has no label in any row"),
        (
            [{"topic": ["a"]}, {"topic": None}],
            {},
            "a.json: row 1: column 'topic' is null; label the row, [] if none holds",
        ),
        ([{"topic": ["a", ""]}], {}, "a.json: row 0: column 'topic' has an empty text, a null or -1 in its list"),
        ([{"a": 1, "b": 2}], {"label": ["a", "b"]}, "a.json: row 0: column 'b' is 2, neither 0 nor 1"),
        (
            [{"a": 1, "b": 0}, {"a": None, "b": 1}],
            {"label": ["a", "b"]},
            "a.json: row 1: column 'a' is empty, null or -1",
        ),
        ([{"a": 1}], {"label": ["a", "b"]}, "a.json: no column 'b'; it has title, a"),
    ],
)
def test_wrong_sets_of_labels(tmp_path, rows, more, message):
    (tmp_path / "a.json").write_text(json.dumps([{"title": str(i)} | row for i, row in enumerate(rows)]))
    assert message in failure(tmp_path / "a.json", kind="multi_label", text="title", **more)


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_missing_column_lists_those_there_are(tmp_path):
    message = failure(write_csv(tmp_path / "news.csv", TOPICS), text=["titel", "body"])
    assert message.startswith(
        f"{tmp_path}/news.csv: no column 'titel'; it has title, body, topic; the task news needs "
    )
    assert message.endswith("; did you mean 'title'?")
    assert "did you mean 'topic'?" in failure(tmp_path / "news.csv", label="TOPIC")


def test_a_label_that_train_does_not_have(tmp_path):
    train = write_csv(tmp_path / "train.csv", TOPICS)
    other = write_csv(tmp_path / "validation.csv", [*TOPICS[:3], TOPICS[3] | {"topic": "sports"}])
    message = failure({"train": train, "validation": other})
    assert (
        f"{other}: row 3: column 'topic' has the label 'sports', which no training row has; they have music, sport"
        in message
    )
    assert message.endswith("; did you mean 'sport'?")


def test_labels_that_differ_between_splits(tmp_path):
    """Codes here, names there."""
    rows = [row | {"topic": int(row["topic"] == "sport")} for row in TOPICS]
    data = {"train": write_csv(tmp_path / "a.csv", TOPICS), "validation": write_csv(tmp_path / "b.csv", rows)}
    assert (
        "b.csv: row 0: column 'topic' has the label '0', which no training row has; they have music, sport"
        in failure(data)
    )


@pytest.mark.parametrize("label", ["", "  ", "-1", None, -1, float("nan")])
def test_a_training_row_without_a_label(tmp_path, label):
    with pytest.raises(DataError, match=r"rows\.json: row 2: column 'topic' is empty, null or -1, which is no label"):
        labelled(tmp_path, (["a", "b"] if label is None or isinstance(label, str) else [1, 2]) + [label])


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0.5, 1, 2], "classification", "row 0: column 'topic' is 0.5, not a class"),
        (["a", "a"], "classification", "column 'topic' is 'a' in every row; classification needs two"),
        ([["a"], ["b"]], "classification", "column 'topic' holds list<item: string>, not one class a row; for lists"),
        (["1", "1,5"], "regression", "row 1: column 'topic' is '1,5', not a number"),
        ([1.0, None], "regression", "row 1: column 'topic' is null; label the row"),
        ([1.0, float("inf")], "regression", "row 1: column 'topic' is inf, not a finite number"),
        ([True, False], "regression", "column 'topic' holds bool, the task rows needs numbers"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, kind, message):
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, labels, kind=kind)
    assert f"rows.json: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_is_all_held_out(tmp_path):
    rows = [{"title": str(i), "topic": "ab"[i % 2]} for i in range(50)]
    held = load(write_csv(tmp_path / "a.csv", rows), text="title")["validation"].ids[0]
    rows[held]["topic"] = "rare"
    message = failure(write_csv(tmp_path / "a.csv", rows), text="title")
    assert "a.csv: every row with the label 'rare' was held out for validation; add rows of it" in message
    for number, row in enumerate(rows):  # one class is left to train on
        row["topic"] = "rare" if number == held else "a"
    assert "every row with the label 'rare' was held out" in failure(write_csv(tmp_path / "a.csv", rows), text="title")
    rows[held - 1]["topic"], rows[held]["topic"] = "rare", "a"
    assert "rare" in load(write_csv(tmp_path / "a.csv", rows), text="title")["train"].label_names


def test_files_that_are_not_there(tmp_path):
    assert failure(tmp_path / "x.csv") == f"{tmp_path}/x.csv: no such file; finetune.task.data names it"
    assert f"{tmp_path}: no train.csv (or .tsv, .json, .jsonl, .conll, .parquet) there; it has nothing" in failure(
        tmp_path
    )
    (tmp_path / "x.xlsx").write_bytes(b"")
    assert "x.xlsx: finetune.task.data takes tables of the kinds .csv, .tsv" in failure(tmp_path / "x.xlsx")
    (tmp_path / "train.csv").write_text("a\n")
    assert "train.csv: no rows" in failure(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    assert "train.csv and train.jsonl are both train; keep one of them" in failure(tmp_path)
    assert "has no train; give it a file to train on" in failure({"test": tmp_path / "train.csv"})


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_run_is_named_by_content_and_recipe_not_by_place(tmp_path):
    """Moving the file or changing its name reuses the runs; another label column or encoding doesn't."""

    def folder(path, **more):
        given = own(path, **({"name": "n"} | more))
        task, data = tasks.get("n", given), tasks.identify(["n"], None, None, given)["n"]
        run = grid.runs(FinetuneConfig(task=given), task)[0]
        return cells.cell(tmp_path, task, data, "model", run, FinetuneConfig(task=given)).folder

    first = folder(write_csv(tmp_path / "a.csv", TOPICS))
    (tmp_path / "elsewhere").mkdir()
    assert first == folder(write_csv(tmp_path / "elsewhere" / "b.csv", TOPICS))
    assert first != folder(write_csv(tmp_path / "c.csv", TOPICS[:-1]))
    others = [{"text": "title"}, {"label": "body", "text": "title"}, {"validation_share": 0.2}, {"encoding": "cp1252"}]
    others += [{"kind": "regression"}, {"quotes": False}]
    assert len({first, *(folder(tmp_path / "a.csv", **more) for more in others)}) == 1 + len(others)


def test_any_table_of_text_is_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(0)
    values = ["", "a", "b", "-1", "1", "1.0", "true", "nan", "a|b", " ", "2.5"]
    for number in range(150):
        rows = [{"title": rng.choice(values), "topic": rng.choice(values)} for _ in range(rng.randint(1, 8))]
        path = write_csv(tmp_path / "any.csv", rows)
        kind = rng.choice(["classification", "regression", "multi_label"])
        more = {"label_separator": "|"} if kind == "multi_label" else {}
        try:
            splits = load(path, kind=kind, text="title", **more)
        except DataError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}: "), number
        else:
            assert sum(map(len, splits.values())) == len(rows)


def test_a_type_with_many_keys_is_shown_in_short(tmp_path):
    """pandas writes a table as one object of columns, unless it is told otherwise."""
    columns = {name: {str(row): "x" for row in range(99)} for name in ("title", "topic")}
    (tmp_path / "a.json").write_text(json.dumps(columns))
    message = failure(tmp_path / "a.json", text="title").partition(": ")[2]
    assert message.startswith("column 'title' holds struct<0: string") and len(message) < 120


def test_classes_called_minus_one_are_told_why_not(tmp_path):
    """-1 is GLUE's code for a secret label; sentiment is often -1, 0, 1."""
    path = write_csv(tmp_path / "a.csv", [{"title": str(n), "topic": n % 3 - 1} for n in range(12)])
    assert "a.csv: row 0: column 'topic' is empty, null or -1, which is no label; " in failure(path, text="title")
    assert failure(path, text="title").endswith("(a class can't be called -1: call it otherwise)")


def test_answers_in_a_csv_are_refused_for_what_they_are(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"q": "where?", "c": "In Rome.", "a": "{'text': ['Rome']}"}])
    message = failure(path, kind="answers", text=["q", "c"], label="a")
    assert message.endswith("a.csv: column 'a' holds text; answers need a .json, .jsonl or .parquet file")
