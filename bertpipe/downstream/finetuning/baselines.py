"""What a fine-tuned model has to beat: the most frequent answer, and a linear model of the words.

The third baseline, `scratch` (the same architecture from random weights), is trained by finetune.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.downstream.tasks.spans import Answer
from bertpipe.downstream.tasks.tasks import Split

if TYPE_CHECKING:
    from bertpipe.downstream.finetuning.training import Job


def majority(splits: dict[str, Split], seed: int = 0) -> np.ndarray:
    """[validation] the most frequent training label (of several, the lowest code); the training mean for regression;
    [validation, labels] the most frequent set of labels."""
    train, labels = splits["train"], splits["train"].labels
    assert labels is not None
    size = len(splits["validation"])
    if train.label_names is None:
        return np.full(size, labels.mean(dtype=np.float64), dtype=np.float32)
    if labels.ndim == 2:
        sets, counts = np.unique(labels, axis=0, return_counts=True)
        return np.tile(sets[counts.argmax()].astype(np.int64), (size, 1))
    return np.full(size, np.bincount(labels).argmax(), dtype=np.int64)


def tags_of_words(splits: dict[str, Split], seed: int = 0) -> list[np.ndarray]:
    """[validation] for each sentence int64 [words]: the word's most frequent tag in training (of several, the lowest
    code); for a word that isn't there the most frequent of all."""
    train, validation = splits["train"], splits["validation"]
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    for words, tags in zip(train.texts, train.labels, strict=True):
        for word, tag in zip(words, tags, strict=True):
            seen[word][tag] += 1
    usual = np.bincount(np.concatenate(train.labels)).argmax()
    tag_of = {word: max(counts, key=lambda tag: (counts[tag], -tag)) for word, counts in seen.items()}
    return [np.array([tag_of.get(word, usual) for word in words], np.int64) for words in validation.texts]


def tfidf(splits: dict[str, Split], seed: int = 0) -> np.ndarray:
    """[validation] codes from logistic regression on TF-IDF word weights; the two texts of a pair are joined."""
    train, validation = splits["train"], splits["validation"]
    assert train.label_names is not None and train.labels is not None, "classification only"
    texts = [" ".join(texts) for texts in train.texts]
    if np.unique(train.labels).size == 1 or not _is_written(texts):
        return majority(splits, seed)  # nothing to tell apart, or nothing to tell it by
    vectorizer, model = _fit(texts, train.labels, seed)
    return model.predict(vectorizer.transform([" ".join(texts) for texts in validation.texts])).astype(np.int64)


def tfidf_of_choices(splits: dict[str, Split], seed: int = 0) -> np.ndarray:
    """[validation] numbers of the choices whose words alone look most like those of right ones: what a task gives away
    (Gururangan et al. 2018). A linear model of the first text's words would rank all choices of an example alike."""
    train, validation = splits["train"], splits["validation"]
    texts = [choice for _, *choices in train.texts for choice in choices]
    if not _is_written(texts):
        return majority(splits, seed)
    right = np.arange(len(texts)) % (len(texts) // len(train)) == np.repeat(train.labels, len(texts) // len(train))
    vectorizer, model = _fit(texts, right, seed)
    asked = vectorizer.transform([choice for _, *choices in validation.texts for choice in choices])
    return model.decision_function(asked).reshape(len(validation), -1).argmax(1)


def no_answers(splits: dict[str, Split], seed: int = 0) -> list[Answer]:
    """[validation] that no question has an answer, which SQuAD 2.0 gives credit for."""
    return [Answer("", 0.0, 0.0)] * len(splits["validation"])


def _is_written(texts: list[str]) -> bool:
    return any(character.isalnum() for text in texts for character in text)


def _fit(texts: list[str], labels: np.ndarray, seed: int) -> tuple[Any, Any]:
    """Word weights, and logistic regression on them."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # Every run of letters or digits is a word, down to one character, so that no example set has an empty vocabulary
    # merely because its words are short.
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    words = vectorizer.fit_transform(texts)
    # Too small for several threads: on two busy cores they waited for one another, 48 s where one thread took 2.
    with threadpool_limits(1, user_api="blas"):
        return vectorizer, LogisticRegression(max_iter=1_000, random_state=seed).fit(words, labels)


@dataclass(frozen=True)
class Baseline:
    """`predict(splits, seed)` for validation, and the kinds of task it can do."""

    predict: Callable[[dict[str, Split], int], Any]
    kinds: tuple[str, ...]
    others: Mapping[str, Callable[[dict[str, Split], int], Any]] = field(default_factory=dict)
    """What does it in place of `predict` for some of these kinds."""


def predict(name: str, job: Job, split: str, seed: int = 0) -> Any:
    """The predictions of a baseline for any split of a task."""
    baseline = BASELINES[name]
    function = baseline.others.get(job.task.kind, baseline.predict)
    return function({"train": job.splits["train"], "validation": job.splits[split]}, seed)


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(
        majority,
        ("classification", "regression", "multi_label", "choices", "tokens", "answers"),
        {"tokens": tags_of_words, "answers": no_answers},
    ),
    "tfidf": Baseline(tfidf, ("classification", "choices"), {"choices": tfidf_of_choices}),
}
