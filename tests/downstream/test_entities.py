"""Entities and their scores: by hand, and as seqeval 1.2.2 gave them (2026-11)."""

import random

import pytest

from bertpipe.downstream.tasks.entities import count, entities, is_tag, num_unbegun, rates
from bertpipe.downstream.tasks.metrics import compute


@pytest.mark.parametrize(
    ("tags", "found", "unbegun"),
    [
        ("O B-PER I-PER O", [("PER", 1, 3)], 0),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)], 0),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)], 2),  # IOB1
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)], 1),
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)], 1),
        ("B-a-b I-a-b S-a E-a I-a", [("a-b", 0, 2), ("a", 2, 3), ("a", 3, 4), ("a", 4, 5)], 2),
        ("B-x I-x E-x B-x E-x", [("x", 0, 3), ("x", 3, 5)], 0),
        ("O O", [], 0),
        ("", [], 0),
    ],
)
def test_entities_by_hand(tags, found, unbegun):
    assert entities(tags.split()) == found
    assert num_unbegun(tags.split()) == unbegun


def test_what_is_a_tag():
    assert all(map(is_tag, ["O", "B-PER", "I-creative-work", "E-x", "S- "]))
    assert not any(map(is_tag, ["", "o", "B", "B-", "PER", "X-PER", "-PER", "OO", "BPER"]))


def test_scores_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "O"]]
    assert count(predicted, gold) == {"LOC": (1, 2, 1), "PER": (0, 1, 2)}
    assert rates(1, 2, 1) == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert rates(0, 0, 0) == {"precision": 0, "recall": 0, "f1": 0}
    scores = compute("entities", predicted, gold)
    assert scores == {name: pytest.approx(1 / 3) for name in ("precision", "recall", "f1")} | {
        "accuracy": pytest.approx(4 / 6)
    }


def drawn(seed):
    """Gold and predicted tags of some sentences, with errors of every sort."""
    draw = random.Random(seed)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "creative-work", "LOC"))]
    weights = [4] + [3] * 6 + [1] * 6
    gold = [draw.choices(tags, weights, k=draw.randint(1, 12)) for _ in range(30)]
    return gold, [[tag if draw.random() < 0.7 else draw.choice(tags) for tag in row] for row in gold]


GOLDEN = {
    1: (
        [0.7272727272727273, 0.7887323943661971, 0.7567567567567568, 0.7540983606557377],
        {
            "LOC": [0.74, 0.9024390243902439, 0.8131868131868132, 41],
            "PER": [0.7049180327868853, 0.7413793103448276, 0.7226890756302522, 58],
            "creative-work": [0.7441860465116279, 0.7441860465116279, 0.7441860465116278, 43],
        },
    ),
    2: (
        [0.7202797202797203, 0.7357142857142858, 0.7279151943462897, 0.7309941520467836],
        {
            "LOC": [0.6829268292682927, 0.7368421052631579, 0.7088607594936709, 38],
            "PER": [0.7580645161290323, 0.7704918032786885, 0.7642276422764228, 61],
            "creative-work": [0.7, 0.6829268292682927, 0.6913580246913581, 41],
        },
    ),
    3: (
        [0.7448275862068966, 0.7105263157894737, 0.7272727272727274, 0.7081081081081081],
        {
            "LOC": [0.6923076923076923, 0.7058823529411765, 0.6990291262135924, 51],
            "PER": [0.7111111111111111, 0.7619047619047619, 0.735632183908046, 42],
            "creative-work": [0.8333333333333334, 0.6779661016949152, 0.7476635514018691, 59],
        },
    ),
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_scores_are_those_of_seqeval(seed):
    gold, predicted = drawn(seed)
    total, kinds = GOLDEN[seed]
    found = compute("entities", predicted, gold)
    assert [found[name] for name in ("precision", "recall", "f1", "accuracy")] == pytest.approx(total, abs=1e-12)
    each = {kind: [*rates(*numbers).values(), numbers[2]] for kind, numbers in count(predicted, gold).items()}
    assert each == {kind: pytest.approx(values, abs=1e-12) for kind, values in kinds.items()}
