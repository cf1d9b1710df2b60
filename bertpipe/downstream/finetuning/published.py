"""What others' models score on the same tasks: figures as printed in the papers, in percent, each row with its source.

They were copied from the papers' tables; a figure that could not be checked is not here. Scores of a test set come from
a server or from withheld labels and are not those of validation: `split` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model in one table."""

    model: str
    split: str
    """`dev`, as validation is called there, or `test`."""
    source: str
    scores: dict[str, float]
    """By task."""
    unclear: tuple[str, ...] = ()
    """Tasks of two metrics of which the paper doesn't say which one it prints, or whether it is their mean."""


DEVLIN, SANH, LIU = "Devlin et al. 2019", "Sanh et al. 2019", "Liu et al. 2019"
TWO = ("mrpc", "qqp", "stsb")

# mnli is the matched part. Devlin et al. print F1 for mrpc, qqp, squad and conll2003, Spearman's correlation for stsb,
# Matthews' for cola and accuracy for the others: the headlines of tasks.py.
ROWS = (
    Row("BERT-base", "dev", f"{SANH}, Table 1, median of 5 runs",
        {"cola": 56.3, "mnli": 86.7, "mrpc": 88.6, "qnli": 91.8, "qqp": 89.6, "rte": 69.3, "sst2": 92.7, "stsb": 89.0,
         "wnli": 53.5}, TWO),
    Row("DistilBERT", "dev", f"{SANH}, Table 1, median of 5 runs",
        {"cola": 51.3, "mnli": 82.2, "mrpc": 87.5, "qnli": 89.2, "qqp": 88.5, "rte": 59.9, "sst2": 91.3, "stsb": 86.9,
         "wnli": 56.3}, TWO),
    Row("BERT-large", "dev", f"{LIU}, Table 5",
        {"cola": 60.6, "mnli": 86.6, "mrpc": 88.0, "qnli": 92.3, "qqp": 91.3, "rte": 70.4, "sst2": 93.2, "stsb": 90.0},
        TWO),
    Row("BERT-base", "test", f"{DEVLIN}, Table 1",
        {"cola": 52.1, "mnli": 84.6, "mrpc": 88.9, "qnli": 90.5, "qqp": 71.2, "rte": 66.4, "sst2": 93.5, "stsb": 85.8}),
    Row("BERT-large", "test", f"{DEVLIN}, Table 1",
        {"cola": 60.5, "mnli": 86.7, "mrpc": 89.3, "qnli": 92.7, "qqp": 72.1, "rte": 70.1, "sst2": 94.9, "stsb": 86.5}),
    Row("BERT-base", "dev", f"{DEVLIN}, Tables 2, 4 and 7", {"squad": 88.5, "swag": 81.6, "conll2003": 96.4}),
    Row("BERT-large", "dev", f"{DEVLIN}, Tables 2, 3, 4 and 7",
        {"squad": 90.9, "squad_v2": 81.9, "swag": 86.6, "conll2003": 96.6}),
    Row("DistilBERT", "dev", f"{SANH}, Table 2", {"squad": 85.8}),
    Row("BERT-base", "test", f"{DEVLIN}, Table 7", {"conll2003": 92.4}),
    Row("BERT-large", "test", f"{DEVLIN}, Tables 3, 4 and 7", {"squad_v2": 83.1, "swag": 86.3, "conll2003": 92.8}),
)  # fmt: skip


def of(task: str) -> list[dict[str, Any]]:
    """The published scores of a task, each from 0 or -1 to 1 as ours are, with where it stands."""
    return [
        {
            "model": row.model,
            "split": row.split,
            "score": round(row.scores[task] / 100, 4),
            "source": row.source,
            "same_metric": None if task in row.unclear else True,
        }
        for row in ROWS
        if task in row.scores
    ]
