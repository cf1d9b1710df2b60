"""Questions and contexts as windows of tokens, and answers out of their logits.

    [CLS] question [SEP] some tokens of the context [SEP]

A context that is too long for one window is shown in several, which share `finetune.stride` tokens. An answer is a
slice of the context as it was written, from the first character of one token to the last one of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bertpipe.config import FinetuneConfig
from bertpipe.downstream.tasks import windows
from bertpipe.downstream.tasks.encode import CHUNK
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.errors import ConfigError, DataError

N_BEST = 20
"""Starts, and ends, of a window that are tried with one another (run_squad.py of Devlin et al. 2019)."""
KEPT = 3
"""Answers to a question that are told."""
NOTHING = 1e6
"""Odds that there is no answer where the windows show nothing that could be one."""


@dataclass(frozen=True)
class Windows:
    """The windows of a split, all those of an example in a row."""

    input_ids: list[np.ndarray]
    """Of each int64 [length]"""
    token_type_ids: list[np.ndarray]
    """Of each int64 [length]"""
    example: np.ndarray
    """int64 [W]: whose it is."""
    first: np.ndarray
    """int64 [W]: the token of the context that it shows first."""
    begin: np.ndarray
    """int64 [W]: where that one stands in the window."""
    size: np.ndarray
    """int64 [W]: tokens of the context that it shows."""
    offsets: list[np.ndarray]
    """Of each example int32 [tokens of the context, 2]: the characters of each token, from and to."""
    max_answer_length: int
    num_cut: int
    """Questions that were cut."""

    def of_examples(self) -> Iterator[range]:
        """The windows of each example."""
        ends = np.cumsum(np.bincount(self.example, minlength=len(self.offsets)))
        yield from map(range, np.append(0, ends[:-1]), ends)


def make_windows(texts: Sequence[tuple[str, ...]], tokenizer: Any, settings: FinetuneConfig) -> Windows:
    """The windows of (question, context) pairs.

    Equal to those of `tokenizer(question, context, truncation="only_second", max_length=..., stride=...,
    return_overflowing_tokens=True)`, once the question is cut to `finetune.max_query_length` tokens, or to half of the
    room if that is less. ConfigError for a stride that leaves a window nothing new, or a tokenizer without offsets.
    """
    frame = _Frame(tokenizer)
    room = settings.max_length - sum(map(len, frame.ids))
    longest = min(settings.max_query_length, room // 2)
    share = windows.shared(settings.stride, settings.max_length, room - longest)
    questions = _tokens(tokenizer, [question for question, _ in texts])
    distinct = list(dict.fromkeys(context for _, context in texts))
    contexts = dict(zip(distinct, _tokens(tokenizer, distinct), strict=True))
    input_ids, token_type_ids, rows, offsets = [], [], [], []
    for example, ((_, context), (question, _)) in enumerate(zip(texts, questions, strict=True)):
        asked = question[:longest]
        tokens, places = contexts[context]
        offsets.append(places)
        space = room - len(asked)
        for first in range(0, max(1, len(tokens) - share), space - share):
            shown = tokens[first : first + space]
            ids, types, begin = frame.fill(asked, shown)
            input_ids.append(ids)
            token_type_ids.append(types)
            rows.append((example, first, begin, len(shown)))
    table = np.array(rows, np.int64)
    num_cut = sum(len(ids) > longest for ids, _ in questions)
    return Windows(
        input_ids,
        token_type_ids,
        *(table[:, 0], table[:, 1], table[:, 2], table[:, 3]),
        offsets,
        settings.max_answer_length,
        num_cut,
    )


class _Frame:
    """The special tokens that a tokenizer puts around and between the two texts of a pair."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise ConfigError(
                f"finetune.model: its tokenizer, a {type(tokenizer).__name__}, doesn't say where in the text a token "
                f"stands; question answering needs one with a tokenizer.json"
            )
        pair = tokenizer(["a"], ["a"], return_token_type_ids=True, return_attention_mask=False)
        whose = np.array([-1 if text is None else text for text in pair.sequence_ids(0)])
        edges = [
            bounds
            for text in (0, 1)
            for bounds in (np.argmax(whose == text), len(whose) - (whose[::-1] == text).argmax())
        ]
        self.ids = np.split(np.array(pair["input_ids"][0], np.int64), edges)[::2]
        """Before the question, between, behind the context."""
        self.types = np.split(np.array(pair["token_type_ids"][0], np.int64), edges)
        """Before, question, between, context, behind."""
        if len(self.ids[0]) == 0:
            raise ConfigError("finetune.model: its tokenizer puts no [CLS], which stands for no answer, before a pair")

    def fill(self, question: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """input_ids and token_type_ids, int64 [length], and where the context begins in them."""
        before, between, behind = self.ids
        parts = [before, question, between, context, behind]
        types = [np.full(len(part), kind[0]) for part, kind in zip(parts, self.types, strict=True) if len(kind)]
        return np.concatenate(parts), np.concatenate(types), len(before) + len(question) + len(between)


def _tokens(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text the ids, int64 [length], and their characters, int32 [length, 2]; no special tokens."""
    rows = []
    for start in range(0, len(texts), CHUNK):
        encoding = tokenizer(
            texts[start : start + CHUNK],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, places in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            rows.append((np.array(ids, np.int64), np.array(places, np.int32).reshape(-1, 2)))
    return rows


def tokens_of(start: int, end: int, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the characters from `start` to `end`; None where no token holds any of them."""
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return (first, last) if first <= last else None


def place_labels(windows: Windows, spans: Sequence[tuple[int, int] | None]) -> tuple[np.ndarray, int]:
    """Where in each window the answer stands.

    Args:
        windows: W windows.
        spans: of each example the characters of its answer, from and to; None if it has none.

    Returns:
        int64 [W, 2]: its first and last token; 0, [CLS], where the window doesn't show the whole of it. And how many
        answers no window shows.
    """
    labels, num_unseen = np.zeros((len(windows.example), 2), np.int64), 0
    for mine, span, offsets in zip(windows.of_examples(), spans, windows.offsets, strict=True):
        if span is None:
            continue
        tokens, seen = tokens_of(*span, offsets), False
        for w in mine:
            if tokens and windows.first[w] <= tokens[0] and tokens[1] < windows.first[w] + windows.size[w]:
                labels[w] = np.array(tokens) - windows.first[w] + windows.begin[w]
                seen = True
        num_unseen += not seen
    return labels, num_unseen


@dataclass(frozen=True)
class Answer:
    """What a model answers to a question."""

    text: str
    """A slice of the context: the best answer; empty where there is nothing that could be one."""
    score: float = field(compare=False)
    """Logit of its start plus that of its end."""
    odds: float = field(compare=False)
    """Score of no answer, the lowest of all windows, minus that of the best answer."""
    others: tuple[tuple[str, float], ...] = field(default=(), compare=False)
    """The next best answers and their scores."""
    withheld: bool | None = None
    """Whether no answer is given in its place; None while that is not decided, or where every question has one."""

    @property
    def given(self) -> str:
        """The text, or nothing."""
        return "" if self.withheld else self.text


def decode(windows: Windows, outputs: Outputs, contexts: Sequence[str]) -> list[Answer]:
    """The answer of each example, the best over its windows; of equal ones the one that stands first.

    A span begins and ends in the context and has at most `max_answer_length` tokens. DataError for logits that are not
    finite.
    """
    if not np.isfinite(outputs.logits).all():
        raise DataError("answers: a logit is not a finite number: training diverged; lower finetune.lr")
    return [
        _answer(windows, outputs, *row) for row in zip(windows.of_examples(), windows.offsets, contexts, strict=True)
    ]


def _answer(windows: Windows, outputs: Outputs, mine: range, offsets: np.ndarray, context: str) -> Answer:
    none = min(float(outputs.of(w)[0].astype(np.float64).sum()) for w in mine)
    found = np.concatenate([_spans(windows, outputs.of(w), w) for w in mine])
    found = found[np.lexsort((found[:, 2], found[:, 1], -found[:, 0]))]
    texts: dict[str, float] = {}
    for score, first, last in found.tolist():
        text = context[offsets[int(first), 0] : offsets[int(last), 1]].strip()
        if text:
            texts.setdefault(text, score)
        if len(texts) == KEPT:
            break
    if not texts:
        return Answer("", none - NOTHING, NOTHING)
    (text, score), *others = texts.items()
    return Answer(text, score, none - score, tuple(others))


def _spans(windows: Windows, logits: np.ndarray, w: int) -> np.ndarray:
    """float64 [spans, 3]: score, first and last token in the context, of the best starts with the best ends."""
    shown = logits[windows.begin[w] : windows.begin[w] + windows.size[w]].astype(np.float64)
    starts, ends = (np.argsort(-column, kind="stable")[:N_BEST] for column in shown.T)
    size = ends[None] - starts[:, None] + 1
    a, b = np.nonzero((size > 0) & (size <= windows.max_answer_length))
    first, last = starts[a], ends[b]
    scores = shown[first, 0] + shown[last, 1]
    return np.stack([scores, first + windows.first[w], last + windows.first[w]], 1)
