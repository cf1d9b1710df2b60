"""`bertpipe demo`: a page on this machine where people try a checkpoint, in the form that its head asks for.

Gradio shows it, bound to 127.0.0.1, without its analytics, its links to elsewhere and its fonts from elsewhere.
`answer` gives what the page shows; the page adds nothing to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from bertpipe.config import FinetuneConfig
from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks.kind import Outputs, Split
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.using.finished import Finished
from bertpipe.errors import ConfigError, DataError
from bertpipe.model.labelled import problem_of
from bertpipe.train.dashboard import HOST, free_port

FIRST_PORT = 7860  # gradio's
WINDOW = 384  # tokens, as published models for SQuAD were trained
WORD = re.compile(r"\w+|[^\w\s]")
LONGEST = 50_000  # characters of a text
TOP = 8  # likeliest tokens or classes shown


def fill_mask(finished: Finished, text: str) -> tuple[dict[str, float], str]:
    """The likeliest tokens in the place of the one mask, with their probabilities."""
    mask = finished.tokenizer.mask_token
    text = text.replace("[MASK]", mask)
    encoding, note = _encode(finished, text)
    (places,) = torch.nonzero(encoding["input_ids"][0] == finished.tokenizer.mask_token_id, as_tuple=True)
    if len(places) != 1:
        raise DataError(f"the text needs one {mask}, it has {len(places)}" + (f" ({note})" if note else ""))
    best = _run(finished, encoding).logits[0, places[0]].softmax(-1).topk(min(TOP, len(finished.tokenizer)))
    shown = finished.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    return dict(zip(shown, best.values.tolist(), strict=True)), note


def classify(finished: Finished, text: str, second: str = "") -> tuple[dict[str, float] | float, str]:
    """Of each class its probability, of several labels each its own; of a regression the number. Where two classes have
    one name, their numbers tell them apart."""
    config, problem = finished.model.config, problem_of(finished.model.config)
    encoding, note = _encode(finished, text, second)
    logits = _run(finished, encoding).logits[0]
    if problem == "regression":
        return float(logits[0]), note
    shares = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
    names = [config.id2label[i] for i in range(len(shares))]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names)]
    return dict(zip(names, shares.tolist(), strict=True)), note


def tag(finished: Finished, text: str) -> tuple[list[tuple[str, str | None]], str]:
    """The text in pieces, each with its kind of entity or None; tokens, windows and tags of words are those of
    fine-tuning, and a word is a run of letters and digits or one other character."""
    words = list(WORD.finditer(text))
    names = tuple(finished.model.config.id2label[code] for code in range(finished.model.config.num_labels))
    split = Split([tuple(word[0] for word in words)], None, [0], names)
    kind, settings = KINDS["tokens"], _settings(finished)
    encoded = kind.encode(split, finished.tokenizer, settings)
    rows = [out.logits[0].numpy() for out in _run_all(finished, encoded.examples)]
    chosen = [row[places] for row, places in zip(rows, encoded.examples.positions or [], strict=True)]
    (codes,) = kind.decide(split, encoded, _outputs(chosen))
    shown: list[tuple[str, str | None]] = []
    ended = 0
    for word, code in zip(words, codes, strict=True):
        shown += [(text[ended : word.start()], None), (word[0], None if names[code] == "O" else names[code])]
        ended = word.end()
    pieces = [piece for piece in _joined([*shown, (text[ended:], None)]) if piece[0]]
    return pieces, _windows(rows)


def _joined(pieces: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Neighbours of one entity as one piece under its type: B-x and the I-x behind it, or those without a tag."""
    out: list[tuple[str, str | None]] = []
    for number, (text, tag) in enumerate(pieces):
        kind = tag.partition("-")[2] or tag if tag else None
        behind = pieces[number + 1][1] if number + 1 < len(pieces) else None
        if tag is None and not text.strip() and out and behind and out[-1][1] and behind == f"I-{out[-1][1]}":
            out[-1] = (out[-1][0] + text, out[-1][1])
        elif out and out[-1][1] == kind and (tag is None or tag.startswith("I-")):
            out[-1] = (out[-1][0] + text, kind)
        else:
            out.append((text, kind))
    return out


def ask(finished: Finished, question: str, context: str) -> tuple[list[list[Any]], str]:
    """The best answers out of the context, each with its score: windows and decoding are those of fine-tuning."""
    split: Split = Split([(question, context)], None, [0], None)
    kind = KINDS["answers"]
    encoded = kind.encode(split, finished.tokenizer, _settings(finished))
    rows = [
        torch.stack([out.start_logits[0], out.end_logits[0]], -1).numpy()
        for out in _run_all(finished, encoded.examples)
    ]
    (answer,) = kind.decide(split, encoded, _outputs(rows))
    found = [[text, round(score, 2)] for text, score in ((answer.text, answer.score), *answer.others) if text]
    found.append(["no answer", round(answer.score + answer.odds, 2)])
    return sorted(found, key=lambda row: -row[1]), _windows(rows)


def _settings(finished: Finished) -> FinetuneConfig:
    """Of windows as long as the model was made for, WINDOW at most."""
    return FinetuneConfig(max_length=min(finished.max_length, WINDOW))


def _run_all(finished: Finished, examples: Examples) -> list[Any]:
    """What the model says of each example, alone."""
    outs = []
    for ids, types in zip(examples.input_ids, examples.token_type_ids, strict=True):
        made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}
        names = finished.tokenizer.model_input_names
        outs.append(_run(finished, {name: torch.from_numpy(made[name])[None] for name in made if name in names}))
    return outs


def _outputs(rows: list[np.ndarray]) -> Outputs:
    return Outputs(np.concatenate(rows), np.append(0, np.cumsum([len(row) for row in rows])))


def _windows(rows: list[np.ndarray]) -> str:
    return f"{len(rows)} windows" if len(rows) > 1 else ""


def _encode(finished: Finished, *texts: str) -> tuple[Any, str]:
    """Tokens [1, T] of a text or a pair, and a note where they had to be cut."""
    given = [text for text in texts if text]
    num = len(finished.tokenizer(*given, verbose=False)["input_ids"])
    longest = finished.max_length
    encoding = finished.tokenizer(
        *given, truncation="longest_first", max_length=longest, return_tensors="pt", verbose=False
    )
    return encoding, f"{num} tokens, the model takes {longest}: the rest is cut" if num > longest else ""


@torch.no_grad()
def _run(finished: Finished, encoding: Any) -> Any:
    return finished.model(**encoding)


@dataclass(frozen=True)
class Page:
    """What people fill in and what they see."""

    fields: tuple[str, ...]
    examples: tuple[str, ...]
    answer: Callable[..., tuple[Any, str]]
    needs: int
    """Fields that mustn't be empty, the first ones."""


PAGES = {
    "fill-mask": Page(("Text with one {mask}",), ("The capital of France is {mask}.",), fill_mask, 1),
    "text-classification": Page(("Text", "Second text (of a pair)"), ("", ""), classify, 1),
    "token-classification": Page(("Text",), ("Ada Lovelace wrote to Charles Babbage in London.",), tag, 1),
    "question-answering": Page(("Question", "Context"), ("", ""), ask, 2),
}
"""By what a checkpoint's head is for."""


def answer(finished: Finished, *texts: str) -> tuple[Any, str]:
    """What the page shows for these texts, and a note. DataError where one is missing, or can't be read."""
    page = page_of(finished)
    for number, (name, text) in enumerate(zip(page.fields, texts, strict=True)):
        wrong = ""
        if number < page.needs and not text.strip():
            wrong = "empty"
        elif len(text) > LONGEST:
            wrong = f"{len(text):,} characters long; {LONGEST:,} will do"
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            wrong = "not UTF-8"
        if wrong:
            raise DataError(f"{name.partition(' ')[0].lower()} is {wrong}")
    return page.answer(finished, *texts)


def page_of(finished: Finished) -> Page:
    """ConfigError for a checkpoint with a head that has no page."""
    if finished.task not in PAGES:
        kind = type(finished.model).__name__
        raise ConfigError(f"--model: {finished.name}: a {kind} has no page; there is one for {', '.join(PAGES)}")
    return PAGES[finished.task]


def serve(finished: Finished, port: int | None, ready: Callable[[str], None]) -> NoReturn:
    """Show the page until Ctrl-C; `ready` is told its address."""
    with running(finished, port) as address:
        ready(address)
        while True:
            time.sleep(3_600)


@contextlib.contextmanager
def running(finished: Finished, port: int | None = None) -> Iterator[str]:
    """The page's address, while it is shown. ConfigError for a port in use, or without gradio."""
    page_of(finished)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ConfigError("demo needs gradio: pip install 'bertpipe[demo]'") from None
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it has begun
    port = free_port(port, FIRST_PORT)
    blocks = _blocks(gradio, finished)
    blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=_theme(gradio),
    )
    try:
        yield f"http://{HOST}:{port}"
    finally:
        blocks.close(verbose=False)


def _theme(gradio: Any) -> Any:
    """Gradio's own, in fonts that are there already."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gradio.themes.Default(primary_hue="teal", font=sans, font_mono=mono)


def _blocks(gradio: Any, finished: Finished) -> Any:
    page, mask = page_of(finished), finished.tokenizer.mask_token or "[MASK]"

    def shown(*texts: str) -> Any:
        try:
            found, note = answer(finished, *texts)
        except DataError as error:
            raise gradio.Error(f"{error}", print_exception=False) from None
        return found, note

    with gradio.Blocks(title=f"{finished.task}: {finished.name}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {finished.task.replace('-', ' ').capitalize()}")
        gradio.Textbox(finished.name, label="Model", interactive=False)
        boxes = [
            gradio.Textbox(example.format(mask=mask), label=label.format(mask=mask), lines=2 + 4 * (label == "Context"))
            for label, example in zip(page.fields, page.examples, strict=True)
        ]
        button = gradio.Button("Run", variant="primary")
        result, note = _result(gradio, finished), gradio.Markdown()
        events = [button.click, *(box.submit for box in boxes)]
        gradio.on(events, shown, boxes, [result, note], api_name="answer", show_progress="minimal")
    return blocks


def _result(gradio: Any, finished: Finished) -> Any:
    """The part of the page that shows what `answer` gives."""
    if finished.task == "token-classification":
        return gradio.HighlightedText(label="Entities", show_legend=True, elem_id="result")
    if finished.task == "question-answering":
        headers, widths = ["Answer", "Score (logits)"], ["75%", "25%"]
        return gradio.Dataframe(headers=headers, column_widths=widths, wrap=True, label="Answers", elem_id="result")
    if finished.task == "text-classification" and problem_of(finished.model.config) == "regression":
        return gradio.Number(label="Score", interactive=False, elem_id="result")
    return gradio.Label(label="Probabilities", num_top_classes=TOP, elem_id="result")
