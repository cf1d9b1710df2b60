"""Stage: one self-contained HTML page of a run, and report.json with the figures it shows.

The page asks for nothing outside itself: plotly is inlined once, and a content security policy says so to the browser.
`fill_mask_lines` gives the lines the command line prints at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bertpipe.artifact import write_json
from bertpipe.config import Config, listed
from bertpipe.downstream.reporting import pages
from bertpipe.downstream.reporting.alternatives import alternative
from bertpipe.downstream.reporting.explorer import explorer
from bertpipe.downstream.reporting.facts import gather
from bertpipe.downstream.reporting.figures import INIT_NAMES, make_figures
from bertpipe.downstream.reporting.record import broken_lines, is_number
from bertpipe.downstream.reporting.understanding import understand
from bertpipe.errors import ArtifactError, ConfigError

PAGE = "report.html"
FIGURES = "report.json"
TOP = 5  # fillings shown for each sentence
UNKNOWN = "–"


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict) -> None:
    """Write out/report.html and out/report.json from whichever artifacts `inputs` names; what is missing is said, and
    so are lines of a record that can't be read."""
    facts = complete(gather(cfg, inputs), inputs, listed(cfg.report.fill_mask))
    (out / PAGE).write_text(render(facts, explorer_of(inputs)), encoding="utf-8")
    write_json(out / FIGURES, clean(facts))
    for line in broken_lines(facts["broken"]):
        print(f"note: {line}", flush=True)
    broken = {"broken_lines": len(facts["broken"])} if facts["broken"] else {}
    counts.update(page=PAGE, missing=facts["missing"], fill_mask=len(facts["fill_mask"]), **broken)


def complete(facts: dict[str, Any], inputs: dict[str, Path], sentences: list[str]) -> dict[str, Any]:
    """The facts with what the models, the tokenizer and the predictions say beside them."""
    model = inputs["pretrain"] / "model" if "pretrain" in inputs else None
    facts["fill_mask"] = fill_masks(model, sentences) if model and model.is_dir() else []
    facts["segments"] = segment(inputs["tokenizer"], sentences) if "tokenizer" in inputs else []
    facts["understanding"] = understand_tasks(inputs["finetune"], facts["finetune"]) if "finetune" in inputs else {}
    for task in facts["understanding"].values():
        facts["broken"] += task.pop("broken")
    return facts


def explorer_of(inputs: dict[str, Path]) -> dict[str, Any] | None:
    """What the tokenizer explorer needs, of the run's tokenizer or else of its model; None where there is neither."""
    places = [inputs[stage] / part for stage, part in (("tokenizer", ""), ("pretrain", "model")) if stage in inputs]
    folder = next((place for place in places if place.is_dir()), None)
    return explorer(folder) if folder else None


def understand_tasks(folder: Path, tasks: dict[str, Any]) -> dict[str, Any]:
    """Where the best run of each task in a finetune artifact goes wrong; tasks without predictions are left out."""
    found = {name: understand(folder / name) for name in tasks}
    return {name: facts for name, facts in found.items() if facts is not None}


def fill_masks(model: Path, sentences: list[str]) -> list[dict[str, Any]]:
    """The model's likeliest fillings of each sentence's one [MASK], on the CPU.

    Returns one {"sentence", "fillings": [{"token", "probability"}]} a sentence, the likeliest first. ConfigError when
    a sentence has no [MASK], several, or more tokens than the model takes; ArtifactError for a damaged model.
    """
    for index, sentence in enumerate(sentences):
        if sentence.count("[MASK]") != 1:
            raise ConfigError(f"report.fill_mask[{index}]: needs exactly one [MASK], got {sentence!r}")
    if not sentences:
        return []
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, pipeline

    from bertpipe.model.encoders import UNUSABLE

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        fill = pipeline(
            "fill-mask", model=str(model), tokenizer=tokenizer, device="cpu", top_k=TOP, trust_remote_code=False
        )
    except (OSError, SafetensorError, *UNUSABLE):
        where = f"`bertpipe verify {model.parent}` says which file is missing or changed"
        raise ArtifactError(f"{model}: no model can be loaded from it; {where}") from None
    longest = min(tokenizer.model_max_length, fill.model.config.max_position_embeddings)
    rows = []
    for index, sentence in enumerate(sentences):
        text = sentence.replace("[MASK]", tokenizer.mask_token)
        length = len(tokenizer(text)["input_ids"])
        if length > longest:
            raise ConfigError(f"report.fill_mask[{index}]: {length} tokens, the model takes {longest}; shorten it")
        fillings = [{"token": row["token_str"].strip(), "probability": row["score"]} for row in fill(text)]
        rows.append({"sentence": sentence, "fillings": fillings})
    return rows


def segment(folder: Path, sentences: list[str]) -> list[list[str]]:
    """The pieces into which the tokenizer in `folder` cuts each sentence; its [MASK] stays whole."""
    if not (folder / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mask = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("mask_token") or "[MASK]"
    texts = [sentence.replace("[MASK]", mask) for sentence in sentences]
    return [tokenizer.encode(text, add_special_tokens=False).tokens for text in texts]


def fill_mask_lines(report_json: Path) -> list[str]:
    """Three fill-mask examples as lines of text, from a report.json; fewer when it has fewer."""
    if not report_json.is_file():
        raise ArtifactError(f"{report_json}: missing; run `bertpipe report`")
    rows = json.loads(report_json.read_text(encoding="utf-8")).get("fill_mask", [])
    lines = []
    for row in rows[:3]:
        fillings = ", ".join(f"{item['token']} {percent(item['probability'], 0)}" for item in row["fillings"][:3])
        lines.append(f"{row['sentence']}  ->  {fillings}")
    return lines


def render(facts: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> str:
    """The page, from the facts and what `explorer_of` gives. Every text is escaped by the template engine."""
    import yaml

    summaries = [row for task in facts.get("finetune", {}).values() for row in task.get("summary", {}).values()]
    figures = clean(make_figures(facts))
    sentences = [row["sentence"] for row in facts.get("fill_mask", [])]
    return pages.render(
        "page.html.jinja",
        FILTERS,
        facts=facts,
        figures=figures,
        alternatives={name: alternative(figure) for name, figure in figures.items()},
        explorer=tokenizer,
        explorer_text=sentences[0] if sentences else "Type a sentence, and see how it is cut: reading, naïveté, 3.14!",
        now=now(),
        cards=summary_cards(facts.get("pretrain", {})),
        verdict=verdict(facts.get("pretrain", {})),
        ledger=ledger_rows(facts.get("corpus") or {}),
        quartered=any(is_number(row.get("lower_quartile")) for row in summaries),
        num_failed=sum(row.get("num_failed", 0) for row in summaries),
        init_names=INIT_NAMES,
        config_yaml=yaml.safe_dump(facts.get("config", {}), sort_keys=False, allow_unicode=True, width=100),
        **pages.with_plots("plots.js", "explorer.js"),
    )


def verdict(figures: dict[str, Any]) -> str:
    """One sentence on what the hold-out loss means beside the floor of knowing only word frequencies."""
    gap, loss = figures.get("gap"), figures.get("eval_loss")
    if not is_number(gap) or not is_number(loss):
        return ""
    where = f"The hold-out loss is {loss:.2f} nats, {abs(gap):.2f} {'below' if gap >= 0 else 'above'} the unigram"
    where += f" cross-entropy of {loss + gap:.2f}"
    if gap >= 1.5:  # a BERT-mini that was 1.0 below still filled every blank with "the" (docs/results/enwiki.md)
        return f"{where}: the model reads context, not only word frequencies."
    if gap >= 0.1:
        return f"{where}: the model has begun to read context."
    return f"{where}: so far it knows little more than word frequencies. Train longer."


def summary_cards(figures: dict[str, Any]) -> list[dict[str, str]]:
    """The figures at the head of the page: [{"label", "value", "unit"}], those that were measured."""
    return [
        {"label": label, "value": show(figures[key]), "unit": unit}
        for key, label, show, unit in CARDS
        if is_number(figures.get(key))
    ]


def ledger_rows(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    """The total and every source as {"name", "documents_in", "documents_out", "skipped", "bytes"}, the total first."""
    total, sources = ledger.get("total"), ledger.get("sources", {})
    named = [("all sources", total)] if total else []
    named += sorted(sources.items(), key=lambda item: -item[1].get("documents_in", 0))
    return [{"skipped": {}, **row, "name": name} for name, row in named]


def clean(value: Any) -> Any:
    """The same tree with NaN and infinities as null, so that any JSON reader takes it."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def integer(value: Any) -> str:
    """12,345."""
    return f"{value:,.0f}" if is_number(value) else UNKNOWN


def fixed(value: Any, digits: int = 3) -> str:
    """0.123."""
    return f"{value:.{digits}f}".replace("-", "−") if is_number(value) else UNKNOWN


def percent(value: Any, digits: int = 1) -> str:
    """A share as 12.3 %."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else UNKNOWN


def compact(value: Any) -> str:
    """1.23 M; for counts that nobody reads digit by digit."""
    if not is_number(value):
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return integer(value)


def byte_size(value: Any) -> str:
    """1.2 MB (powers of ten)."""
    if not is_number(value):
        return UNKNOWN
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def duration(value: Any) -> str:
    """Seconds as 12 s, 3 min 20 s or 2 h 05 min."""
    if not is_number(value):
        return UNKNOWN
    seconds = round(value)
    if seconds < 60:
        return f"{value:.1f} s" if value < 10 else f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def now() -> str:
    """This moment, as an ISO time."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def moment(value: Any) -> str:
    """An ISO time as 2026-11-23 08:41 UTC."""
    return f"{datetime.fromisoformat(value).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if value else UNKNOWN


FILTERS: dict[str, Callable[..., str]] = {
    "integer": integer,
    "fixed": fixed,
    "percent": percent,
    "compact": compact,
    "byte_size": byte_size,
    "duration": duration,
    "moment": moment,
}

CARDS: tuple[tuple[str, str, Callable[..., str], str], ...] = (
    ("eval_loss", "Hold-out loss", lambda value: fixed(value, 3), "nats per predicted token"),
    (
        "eval_unigram_cross_entropy",
        "Unigram cross-entropy",
        lambda value: fixed(value, 3),
        "nats, word frequencies alone",
    ),
    ("gap", "Loss below unigram", lambda value: fixed(value, 3), "nats"),
    ("eval_perplexity", "Perplexity", lambda value: fixed(value, 1), "hold-out"),
    ("eval_accuracy", "Masked accuracy", percent, "of hidden tokens right"),
    ("eval_nsp_accuracy", "Next sentence", percent, "of hold-out pairs right"),
    ("eval_sop_accuracy", "Sentence order", percent, "of hold-out pairs right"),
    ("tokens", "Tokens seen", compact, "padding not counted"),
    ("tokens_per_second", "Throughput", integer, "tokens/s"),
    ("mfu", "Utilisation (MFU)", percent, "model FLOPs/s of a matrix product's"),
    ("parameters", "Parameters", compact, ""),
    ("train_seconds", "Training time", duration, "wall clock"),
    ("memory_bytes", "Peak memory", byte_size, "of a training process"),
)
