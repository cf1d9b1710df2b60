"""The model card: YAML front matter that the Hub reads, then text for people, all from measured facts.

Front matter and `model-index` are written by `huggingface_hub` (https://huggingface.co/docs/hub/model-cards). Places
of this machine never get into it: of a path only the last part is shown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config, listed
from bertpipe.downstream.finetuning.grid import points
from bertpipe.downstream.publishing.card_scores import hub_dataset, hub_repo, index_results, pipeline_of, shown_tasks
from bertpipe.downstream.reporting.figures import INIT_NAMES
from bertpipe.downstream.reporting.record import is_number
from bertpipe.downstream.reporting.report import FILTERS, ledger_rows
from bertpipe.downstream.tasks.tasks import TASKS, get

TEMPLATES = Path(__file__).parent
SMALL_TOKENS = 1_000_000_000  # below it, far from the data of any published BERT
RECIPE = ("model", "tokenizer", "masking", "optim", "train")
FINETUNE_RECIPE = ("epochs", "batch_size", "lr", "warmup_ratio", "weight_decay", "max_length", "dropout", "seeds")


class Verbatim(str):
    """Text that goes into the card as it is; every other text is escaped for Markdown."""


def make_card(cfg: Config, facts: dict[str, Any], folder: Path) -> str:
    """README.md of the model in `folder`: front matter and body."""
    import yaml

    recipe = {section: facts["config"][section] for section in RECIPE}
    if cfg.publish.task:
        recipe["finetune"] = {key: facts["config"]["finetune"][key] for key in FINETUNE_RECIPE}
    # Inside a fenced block only a fence could do harm.
    settings = yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True).replace("`", "'")
    return _render(
        "card.md.jinja",
        cfg,
        facts,
        front_matter=card_data(cfg, facts),
        settings=Verbatim(settings),
        usage=Verbatim(usage(cfg, facts)),
        task=cfg.publish.task,
        tasks=shown_tasks(cfg, facts),
        pipeline=main_pipeline(cfg, facts),
        best=best_run(facts, cfg.publish.task),
        init=public(cfg.model.init),
        start=public(cfg.finetune.model),
        init_names=INIT_NAMES,
        limits=limits(cfg, facts),
        hashes=hashes(folder),
    )


def make_tokenizer_card(cfg: Config, facts: dict[str, Any], folder: Path) -> str:
    """README.md of the tokenizer in `folder`, published alone."""
    return _render(
        "card_tokenizer.md.jinja",
        cfg,
        facts,
        front_matter=_front_matter(cfg, tags=["bertpipe", "tokenizer"]),
        usage=Verbatim(TOKENIZE.format(repo=cfg.publish.repo, text=_code(_sentence(cfg)))),
        adopted=public(cfg.tokenizer.adopt),
        lowercase=cfg.tokenizer.lowercase,
        hashes=hashes(folder),
    )


def make_revision_card(cfg: Config, facts: dict[str, Any], revision: str) -> str:
    """README.md of a checkpoint, step-N: that it is one, and where the figures are."""
    step = int(revision.rpartition("-")[2])
    lines = usage(cfg, facts).replace(
        f'model="{cfg.publish.repo}"', f'model="{cfg.publish.repo}", revision="{revision}"'
    )
    return _render(
        "card_revision.md.jinja",
        cfg,
        facts,
        front_matter=_front_matter(cfg, pipeline_tag=main_pipeline(cfg, facts), tags=["bertpipe"]),
        usage=Verbatim(lines),
        revision=revision,
        step=step,
    )


def _render(template: str, cfg: Config, facts: dict[str, Any], front_matter: Any, **more: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, finalize=escape
    )  # autoescaping is for HTML; `finalize` does the same for Markdown
    environment.filters |= FILTERS | {"public": public}
    return environment.get_template(template).render(
        cfg=cfg,
        facts=facts,
        front_matter=Verbatim(front_matter.to_yaml()),
        name=model_name(cfg),
        sources=[source_name(source) for source in listed(cfg.corpus.sources)],
        ledger=ledger_rows(facts.get("corpus") or {}),
        content=next((row["content"] for row in facts["artifacts"] if row["stage"] == "corpus"), None),
        is_number=is_number,
        **more,
    )


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file in `folder` by name, of the card itself excepted."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    return {path.name: artifact.hash_file(path) for path in files}


def main_pipeline(cfg: Config, facts: dict[str, Any]) -> str:
    """The stock pipeline that runs the published model."""
    task = cfg.publish.task
    return pipeline_of(shown_tasks(cfg, facts).get(task, {}).get("kind")) if task else "fill-mask"


def model_name(cfg: Config) -> str:
    """The repository's name without its owner."""
    return cfg.publish.repo.rpartition("/")[2]


def card_data(cfg: Config, facts: dict[str, Any]) -> Any:
    """The front matter, as `huggingface_hub.ModelCardData`."""
    base = cfg.finetune.model if cfg.publish.task and cfg.finetune.model else cfg.model.init
    repo = hub_repo(cfg.publish.task) if cfg.publish.task else None
    return _front_matter(
        cfg,
        repo,
        pipeline_tag=main_pipeline(cfg, facts),
        base_model=base if base and not is_path(base) else None,
        tags=["bertpipe", facts.get("model", {}).get("model_type") or "bert"],
        model_name=model_name(cfg),
        eval_results=index_results(cfg, facts) or None,
    )


def _front_matter(cfg: Config, dataset: str | None = None, **more: Any) -> Any:
    """Language, licence, library and data sets: those of the corpus, and `dataset`."""
    from huggingface_hub import ModelCardData

    found = [*map(hub_dataset, listed(cfg.corpus.sources)), dataset]
    return ModelCardData(
        language=cfg.publish.language,
        license=cfg.publish.license,
        library_name="transformers",
        datasets=[name for name in found if name] or None,
        **more,
    )


def usage(cfg: Config, facts: dict[str, Any]) -> str:
    """A few lines of Python that use the model."""
    task = main_pipeline(cfg, facts)
    if task in SCRIPTS:
        return SCRIPTS[task].format(repo=cfg.publish.repo)
    mask = facts.get("model", {}).get("mask_token") or "[MASK]"
    argument: str | dict[str, str] = _sentence(cfg).replace("[MASK]", mask)
    if cfg.publish.task:
        argument = "Ada lived in London." if task == "token-classification" else "The weather is fine today."
        own = cfg.finetune.task
        row = get(cfg.publish.task, own) if own or cfg.publish.task in TASKS else None
        if row is not None and task == "text-classification" and len(row.text) == 2:
            argument = {"text": argument, "text_pair": "It is a sunny day."}
    lines = ("from transformers import pipeline", f'model = pipeline("{task}", model="{cfg.publish.repo}")')
    return "\n".join((*lines, f"print(model({_code(argument)}))"))


def _sentence(cfg: Config) -> str:
    return next(iter(listed(cfg.report.fill_mask)), "A [MASK].")


def _code(argument: str | dict[str, str]) -> str:
    """As Python inside a fenced block: a JSON string or object is Python too."""
    return json.dumps(argument, ensure_ascii=False).replace("`", "'")


def best_run(facts: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The run whose weights a fine-tuned task's folder holds: its seed and headline score; empty when not told."""
    task = (facts.get("finetune") or {}).get(name, {})
    for run in task.get("runs", []):
        if run.get("init") == "model" and run.get("seed") is not None and run["seed"] == task.get("model_seed"):
            return {"seed": run["seed"], "score": run.get("scores", {}).get(task.get("metric"))}
    return {}


def limits(cfg: Config, facts: dict[str, Any]) -> list[str]:
    """What a reader should know before use, each from a fact of this run."""
    figures, model = facts.get("pretrain", {}), facts.get("model", {})
    tokens, gap = figures.get("tokens"), figures.get("gap")
    lines = []
    if is_number(tokens) and tokens < SMALL_TOKENS and not cfg.model.init:
        lines.append(f"Small: {tokens:,} tokens were seen in training, far fewer than by the published BERT models.")
    if is_number(gap):
        meaning = "so it knows little beyond word frequencies"
        if gap >= 0.1:
            meaning = "so it has learnt to use context" if gap >= 1.5 else "so it has only begun to use context"
        side = "below" if gap >= 0 else "above"
        lines.append(f"Its hold-out loss lies {abs(gap):.2f} nats {side} the unigram cross-entropy, {meaning}.")
    lines.append(
        "One pretraining run with one seed: how much the hold-out figures vary from seed to seed is not known. "
        "The hold-out comes from the same sources as the training text."
    )
    length = cfg.train.sequence_length
    if is_number(model.get("max_positions")) and length < model["max_positions"] and not cfg.model.init:
        lines.append(
            f"Trained on sequences of at most {length} tokens: positions beyond {length} (it accepts "
            f"{model['max_positions']}) were never trained."
        )
    lines.append(
        f"Text in one language ({cfg.publish.language}), neither filtered for content nor stripped of personal data: "
        "the model can repeat the biases, errors and personal details of its text."
    )
    if listed(cfg.corpus.sources) == ["docs"]:
        lines.append("Its text is technical documentation of Python packages: expect little of it on any other text.")
    unknown = facts.get("tokenizer", {}).get("unknown_rate")
    if is_number(unknown) and unknown > 0.01:
        lines.append(f"{100 * unknown:.1f} % of the tokens of its own training text are unknown to its vocabulary.")
    return lines + _score_limits(shown_tasks(cfg, facts), max(point.epochs for point in points(cfg.finetune)))


def _score_limits(tasks: dict[str, Any], epochs: int) -> list[str]:
    """What to keep in mind about the scores, each line naming the tasks it holds for."""
    runs = {name: [run for run in task.get("runs", []) if run.get("init") == "model"] for name, task in tasks.items()}
    single = [name for name, rows in runs.items() if len(rows) == 1]
    beaten = [line for name, task in tasks.items() for line in _beaten_by(name, task)]
    chosen = [name for name, rows in runs.items() if epochs > 1 and any(run.get("best_epoch") for run in rows)]
    cut = [f"{name} ({task['truncated']:,})" for name, task in tasks.items() if task.get("truncated")]
    lines = beaten
    if single:
        lines.append(f"Scores of a single seed: {', '.join(single)}.")
    if chosen:
        names = ", ".join(chosen)
        lines.append(f"The best epoch was chosen on the validation set that is also scored, which flatters: {names}.")
    if gridded := [name for name, task in tasks.items() if task.get("grid")]:
        lines.append(f"Learning rate, batch size and epochs were chosen there as well: {', '.join(gridded)}.")
    if cut:
        lines.append(f"Inputs that were longer than the limit of the fine-tuning, and were cut: {', '.join(cut)}.")
    return lines


def _beaten_by(name: str, task: dict[str, Any]) -> list[str]:
    """A line for each baseline that does as well as the model, or better."""
    summary = task.get("summary", {})
    own = summary.get("model", {}).get("median")
    return [
        f"On {name} it does no better than the baseline `{init}`: {own:.3f} against {row['median']:.3f}."
        for init, row in summary.items()
        if init != "model"
        and is_number(own)
        and is_number(row.get("median"))
        and round(row["median"], 3) >= round(own, 3)
    ]


def source_name(source: str) -> str:
    """A corpus source as the card names it."""
    if source == "docs":
        return "the documentation (docstrings) of the Python packages installed on the training machine"
    return hub_dataset(source) or public(source)


def is_path(text: str) -> bool:
    """Whether a setting names a place on this machine rather than, say, a Hub id."""
    return (
        text.startswith(("/", "~", "./", "../"))
        or text.count("/") > 1
        or ("/" in text and re.search(r"[*?\[]", text) is not None)
        or ("/" in text and Path(text).exists())
    )


def public(value: Any) -> Any:
    """The same tree with every path cut to its last part."""
    if isinstance(value, dict):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_path(value) else value


def escape(value: Any) -> Any:
    """Make text harmless in Markdown, tables and HTML included."""
    if isinstance(value, Verbatim) or not isinstance(value, str):
        return value
    text = " ".join(value.split()) if "\n" in value else value
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


TOKENIZE = """\
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{repo}")
print(tokenizer.tokenize({text}))"""
SCRIPTS = {
    "multiple-choice": """\
from transformers import AutoModelForMultipleChoice, AutoTokenizer
model, tokenizer = (stock.from_pretrained("{repo}") for stock in (AutoModelForMultipleChoice, AutoTokenizer))
choices = tokenizer(["It rains."] * 2, ["She opens an umbrella.", "She is two."], padding=True, return_tensors="pt")
print(model(**{{name: rows[None] for name, rows in choices.items()}}).logits.argmax().item())""",
    "question-answering": """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model, tokenizer = (stock.from_pretrained("{repo}") for stock in (AutoModelForQuestionAnswering, AutoTokenizer))
text = tokenizer("Where is the Nile?", "The river Nile is in Africa.", return_tensors="pt")
found = model(**text)
print(tokenizer.decode(text.input_ids[0, found.start_logits.argmax() : found.end_logits.argmax() + 1]))""",
}
"""How a model is used where `transformers` has no pipeline, by what the Hub calls the task."""
