"""The baselines on small data whose answer is known."""

import numpy as np
import pytest

from bertpipe.downstream.finetuning.baselines import BASELINES, majority, tags_of_words, tfidf
from bertpipe.downstream.tasks.kind import Split


def split(texts, labels, names=("bad", "good")):
    rows = [text if isinstance(text, tuple) else (text,) for text in texts]
    kind = np.float32 if names is None else np.int64
    return Split(rows, np.array(labels, kind), list(range(len(rows))), names, 0)


def separable():
    train = split(["awful plot", "fine plot", "awful cast", "fine cast", "awful end"], [0, 1, 0, 1, 0])
    return {"train": train, "validation": split(["a fine thing", "an awful thing", "fine"], [1, 0, 1])}


def test_majority_is_the_training_sets():
    assert majority(separable()).tolist() == [0, 0, 0], "two of three validation labels are 1, but train has more 0"


def test_majority_of_numbers_is_the_mean():
    splits = {"train": split(["a", "b"], [1, 4], None), "validation": split(["c", "d", "e"], [0, 5, 5], None)}
    assert majority(splits).tolist() == [2.5, 2.5, 2.5]


def test_majority_of_tokens_is_each_words_most_frequent_tag():
    texts = [("Paris", "is", "big"), ("Paris", "Hilton"), ("in", "Paris"), ("a", "Hilton")]
    tags = [[1, 0, 0], [2, 2], [0, 1], [0, 1]]
    train = Split(texts, [np.array(row) for row in tags], [0, 1, 2, 3], ("O", "B-place", "B-person"))
    splits = {"train": train, "validation": Split([("Paris", "new"), ("Hilton",)], None, [0, 1], train.label_names)}
    found = tags_of_words(splits)
    assert [row.tolist() for row in found] == [[1, 0], [1]], "Hilton is each once: the lower code; a new word is O"
    assert found[0].dtype == np.int64


def test_tfidf_learns_words():
    assert tfidf(separable(), 0).tolist() == [1, 0, 1]


def test_tfidf_reads_both_texts_of_a_pair():
    train = split([("x", "awful"), ("x", "fine"), ("y", "awful"), ("y", "fine")], [0, 1, 0, 1])
    assert tfidf({"train": train, "validation": split([("x", "fine"), ("y", "awful")], [1, 0])}).tolist() == [1, 0]


@pytest.mark.parametrize("train", [split(["a b", "c"], [1, 1]), split(["", " ", "?"], [1, 0, 1])])
def test_tfidf_with_nothing_to_learn_is_the_majority(train):
    assert tfidf({"train": train, "validation": split(["a", ""], [0, 1])}).tolist() == [1, 1]


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_gives_the_same_answers(name):
    predict = BASELINES[name].predict
    first = predict(separable(), 5)
    assert first.dtype == np.int64 and first.shape == (3,)
    assert first.tolist() == predict(separable(), 5).tolist()
