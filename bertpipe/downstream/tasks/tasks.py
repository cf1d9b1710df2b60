"""Which tasks there are: a task is one row of `TASKS`. Its data comes from a row of SOURCES (task_sources.py), its form
is a row of KINDS (kinds/). GLUE: Wang et al. 2019, https://gluebenchmark.com. SuperGLUE: Wang et al. 2019,
https://super.gluebenchmark.com; its RTE is GLUE's under other column names. SWAG: Zellers et al. 2018. CoNLL-2003:
Tjong Kim Sang and De Meulder 2003. WNUT-17: Derczynski et al. 2017. SQuAD: Rajpurkar et al. 2016 and 2018.

    splits = load("mrpc", data="glue")
    splits["train"].texts[0], splits["train"].labels[0]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bertpipe.config import TaskConfig, listed
from bertpipe.downstream.tasks import own_task
from bertpipe.downstream.tasks.kind import Split, Task
from bertpipe.downstream.tasks.task_sources import SOURCES, Source, is_there
from bertpipe.errors import ConfigError, DataError

ALL = "all"


def get(name: str, own: TaskConfig | None = None) -> Task:
    """The row called `name`, which may be the task `own`; ConfigError lists the choices."""
    if own is not None and name == own_task.name_of(own):
        return own_task.row(own, TASKS)
    if name not in TASKS:
        raise ConfigError(f"finetune.tasks: no task called {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def chosen(names: str | list[str], data: str | None, own: TaskConfig | None = None) -> list[str]:
    """The tasks that `finetune.tasks` names, and `own`: the entries themselves, or with `all` those that can be had.

    Of a folder, those that it holds; of the Hub, those of GLUE. Raises DataError for a folder that holds none.
    """
    entries = listed(names)
    if ALL in entries:
        if len(entries) > 1:
            raise ConfigError(f"finetune.tasks: {ALL!r} stands alone, got {', '.join(entries)}")
        entries = available(data) if data is not None else [n for n, task in TASKS.items() if task.source == "glue"]
        if not entries:
            raise DataError(f"{data}: no task there; finetune.data needs <task>/{{train,validation,test}}.parquet")
    return list(dict.fromkeys([*entries, *([own_task.name_of(own)] if own else [])]))


def available(data: str) -> list[str]:
    """Tasks that the folder `data` holds."""
    return [name for name, task in TASKS.items() if SOURCES[task.source].gathered and is_there(task, data)]


def load(name: str, data: str | None = None, own: TaskConfig | None = None, train: bool = True) -> dict[str, Split]:
    """Read and check the splits of a task: train (if wanted), validation and, where there is one, test.

    `data` is a folder of `<task>/<split>.parquet`; None loads the task's data set from the Hub (or from its cache).
    `own` is `finetune.task`. Raises ConfigError for an unknown task, and DataError, naming file, column and row, for
    data that can't be used.
    """
    return _source(name, own).load(replace(get(name, own), trained=train), data)


def identify(
    names: Iterable[str],
    data: str | None = None,
    cache: Path | None = None,
    own: TaskConfig | None = None,
    train: bool = True,
) -> dict[str, Any]:
    """Content identity of the raw inputs of these tasks, for the fingerprint of what is made from them."""
    wanted = [replace(get(name, own), trained=train) for name in names]
    return {task.name: _source(task.name, own).identify(task, data, cache) for task in wanted}


def _source(name: str, own: TaskConfig | None) -> Source:
    """Where the data of a task comes from."""
    if own is not None and name == own_task.name_of(own):
        return own_task.OwnTable(own)
    return SOURCES[get(name).source]


_ONE, _PAIR, _NLI = ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis")
_ENDINGS = ("ending0", "ending1", "ending2", "ending3")
_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
"""As the baselines of SuperGLUE's authors ask COPA: https://github.com/nyu-mll/jiant, jiant/tasks/lib/copa.py."""

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "classification", _ONE, "label", ("unacceptable", "acceptable"),
             "matthews_correlation", "matthews_correlation", "glue"),
        Task("sst2", "classification", _ONE, "label", ("negative", "positive"), "accuracy", "accuracy", "glue"),
        Task("mrpc", "classification", _PAIR, "label", ("not_equivalent", "equivalent"),
             "accuracy_and_f1", "f1", "glue"),
        Task("qqp", "classification", ("question1", "question2"), "label", ("not_duplicate", "duplicate"),
             "accuracy_and_f1", "f1", "glue"),
        Task("stsb", "regression", _PAIR, "label", None, "pearson_and_spearman", "spearman", "glue"),
        Task("mnli", "classification", _NLI, "label", ("entailment", "neutral", "contradiction"),
             "accuracy", "accuracy", "glue", ("validation_matched", "validation_mismatched"),
             ("test_matched", "test_mismatched", "ax"), diagnostic={"ax": "matthews_correlation"}),
        Task("qnli", "classification", ("question", "sentence"), "label", ("entailment", "not_entailment"),
             "accuracy", "accuracy", "glue"),
        Task("rte", "classification", _PAIR, "label", ("entailment", "not_entailment"), "accuracy", "accuracy", "glue",
             other_text=_NLI),
        Task("wnli", "classification", _PAIR, "label", ("not_entailment", "entailment"),
             "accuracy", "accuracy", "glue"),
        Task("boolq", "classification", ("question", "passage"), "label", ("False", "True"),
             "accuracy", "accuracy", "superglue"),
        Task("cb", "classification", _NLI, "label", ("entailment", "contradiction", "neutral"),
             "accuracy_and_mean_f1", "combined", "superglue"),
        # A sentence classifier is told the word before the first sentence (Schick and Schuetze 2021, NAACL, whose code
        # is https://github.com/timoschick/pet, pet/task_helpers.py); SuperGLUE's own baseline has a head of its own.
        Task("wic", "classification", ("word", *_PAIR), "label", ("False", "True"), "accuracy", "accuracy", "superglue",
             templates=("{word}: {sentence1}", "{sentence2}")),
        Task("copa", "choices", ("premise", "question", "choice1", "choice2"), "label", ("choice1", "choice2"),
             "accuracy", "accuracy", "superglue", templates=("{premise} {question}", "{choice1}", "{choice2}"),
             phrases={"question": _QUESTIONS}),
        Task("swag", "choices", ("sent1", "sent2", *_ENDINGS), "label", ("0", "1", "2", "3"),
             "accuracy", "accuracy", "swag", templates=("{sent1}", *(f"{{sent2}} {{{e}}}" for e in _ENDINGS))),
        Task("conll2003", "tokens", ("tokens",), "ner_tags", (), "entities", "f1", "conll2003"),
        Task("wnut17", "tokens", ("tokens",), "ner_tags", (), "entities", "f1", "wnut17"),
        Task("squad", "answers", ("question", "context"), "answers", None, "squad", "f1", "squad"),
        Task("squad_v2", "answers", ("question", "context"), "answers", None, "squad_v2", "f1", "squad_v2"),
        Task("docs", "classification", ("text",), "label", (), "accuracy_and_macro_f1", "accuracy", "docs"),
    )
}  # fmt: skip
