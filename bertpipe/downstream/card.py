"""The model card: YAML front matter that the Hub reads, then text for people, all from measured facts.

Front matter and `model-index` are written by `huggingface_hub` (https://huggingface.co/docs/hub/model-cards). Places
of this machine never get into it: of a path only the last part is shown.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertpipe.config import Config, listed
from bertpipe.downstream.facts import is_number
from bertpipe.downstream.figures import INIT_NAMES
from bertpipe.downstream.grid import points
from bertpipe.downstream.kind import Kind
from bertpipe.downstream.kinds import KINDS
from bertpipe.downstream.report import FILTERS, ledger_rows
from bertpipe.downstream.task_sources import SOURCES
from bertpipe.downstream.tasks import TASKS, get

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATES = Path(__file__).parent
HUB_SOURCE = "hub:"
SMALL_TOKENS = 1_000_000_000  # below it, far from the data of any published BERT
RECIPE = ("model", "tokenizer", "masking", "optim", "train")
FINETUNE_RECIPE = ("epochs", "batch_size", "lr", "warmup_ratio", "weight_decay", "max_length", "dropout", "seeds")
METRIC_TYPES = {"spearman": "spearmanr", "pearson": "pearsonr", "macro_f1": "f1"}
"""Ids of the Hub's metrics where they differ from our names."""


class Verbatim(str):
    """Text that goes into the card as it is; every other text is escaped for Markdown."""


def make_card(cfg: Config, facts: dict[str, Any]) -> str:
    """README.md: front matter and body."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, finalize=escape
    )  # autoescaping is for HTML; `finalize` does the same for Markdown
    environment.filters |= FILTERS | {"public": public}
    recipe = {section: facts["config"][section] for section in RECIPE}
    if cfg.publish.task:
        recipe["finetune"] = {key: facts["config"]["finetune"][key] for key in FINETUNE_RECIPE}
    # Inside a fenced block only a fence could do harm.
    settings = yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True).replace("`", "'")
    return environment.get_template("card.md.jinja").render(
        front_matter=Verbatim(card_data(cfg, facts).to_yaml()),
        settings=Verbatim(settings),
        usage=Verbatim(usage(cfg, facts)),
        cfg=cfg,
        facts=facts,
        name=model_name(cfg),
        task=cfg.publish.task,
        tasks=shown_tasks(cfg, facts),
        pipeline=main_pipeline(cfg, facts),
        sources=[source_name(source) for source in listed(cfg.corpus.sources)],
        best=best_run(facts, cfg.publish.task),
        init=public(cfg.model.init),
        start=public(cfg.finetune.model),
        ledger=ledger_rows(facts.get("corpus") or {}),
        init_names=INIT_NAMES,
        limits=limits(cfg, facts),
        is_number=is_number,
    )


def pipeline_of(kind: str | None) -> str:
    """The stock pipeline that runs the model of a kind of task."""
    return KINDS[kind].pipeline if kind in KINDS else Kind.pipeline


def main_pipeline(cfg: Config, facts: dict[str, Any]) -> str:
    """The stock pipeline that runs the published model."""
    task = cfg.publish.task
    return pipeline_of(shown_tasks(cfg, facts).get(task, {}).get("kind")) if task else "fill-mask"


def model_name(cfg: Config) -> str:
    """The repository's name without its owner."""
    return cfg.publish.repo.rpartition("/")[2]


def card_data(cfg: Config, facts: dict[str, Any]) -> Any:
    """The front matter, as `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    base = cfg.finetune.model if cfg.publish.task and cfg.finetune.model else cfg.model.init
    datasets = [name for source in listed(cfg.corpus.sources) if (name := hub_dataset(source))]
    if cfg.publish.task and (repo := hub_repo(cfg.publish.task)):
        datasets.append(repo)
    results = index_results(cfg, facts)
    return ModelCardData(
        language=cfg.publish.language,
        license=cfg.publish.license,
        library_name="transformers",
        pipeline_tag=main_pipeline(cfg, facts),
        base_model=base if base and not is_path(base) else None,
        datasets=datasets or None,
        tags=["bertpipe", facts.get("model", {}).get("model_type") or "bert"],
        model_name=model_name(cfg),
        eval_results=results or None,
    )


def usage(cfg: Config, facts: dict[str, Any]) -> str:
    """A few lines of Python that use the model."""
    task = main_pipeline(cfg, facts)
    if task in SCRIPTS:
        return SCRIPTS[task].format(repo=cfg.publish.repo)
    mask = facts.get("model", {}).get("mask_token") or "[MASK]"
    argument: str | dict[str, str] = next(iter(listed(cfg.report.fill_mask)), "A [MASK].").replace("[MASK]", mask)
    if cfg.publish.task:
        argument = "Ada lived in London." if task == "token-classification" else "The weather is fine today."
        own = cfg.finetune.task
        row = get(cfg.publish.task, own) if own or cfg.publish.task in TASKS else None
        if row is not None and task == "text-classification" and len(row.text) == 2:
            argument = {"text": argument, "text_pair": "It is a sunny day."}
    call = json.dumps(argument, ensure_ascii=False).replace("`", "'")  # a JSON string or object is Python too
    lines = ("from transformers import pipeline", f'model = pipeline("{task}", model="{cfg.publish.repo}")')
    return "\n".join((*lines, f"print(model({call}))"))


def shown_tasks(cfg: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """The tasks whose scores the card shows: the published one, or all that were fine-tuned from this model."""
    tasks = facts.get("finetune") or {}
    if cfg.publish.task:
        return {name: task for name, task in tasks.items() if name == cfg.publish.task}
    # With finetune.model, the scores are another checkpoint's.
    return {} if cfg.finetune.model else tasks


def best_run(facts: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The run whose weights a fine-tuned task's folder holds: its seed and headline score; empty when not told."""
    task = (facts.get("finetune") or {}).get(name, {})
    for run in task.get("runs", []):
        if run.get("init") == "model" and run.get("seed") is not None and run["seed"] == task.get("model_seed"):
            return {"seed": run["seed"], "score": run.get("scores", {}).get(task.get("metric"))}
    return {}


def index_results(cfg: Config, facts: dict[str, Any]) -> list[EvalResult]:
    """Entries of `model-index`: hold-out figures (of a pretrained model) and the median score of each metric."""
    results = [] if cfg.publish.task else _holdout_results(cfg, facts)
    for name, task in shown_tasks(cfg, facts).items():
        results += _task_results(name, task)
    return results


def _holdout_results(cfg: Config, facts: dict[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    marks = [row["fingerprint"] or "" for row in facts["artifacts"] if row["stage"] == "corpus"]
    figures = facts.get("pretrain", {})
    return [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked-language modelling, 15 % of the tokens masked",
            dataset_type=next(filter(None, map(hub_dataset, listed(cfg.corpus.sources))), "bertpipe-corpus"),
            dataset_name=" ".join(["Hold-out of the training corpus", *(mark[:12] for mark in marks)]),
            dataset_split="holdout",
            metric_type=metric,
            metric_name=name,
            metric_value=round(figures[key], 6),
        )
        for key, metric, name in HOLDOUT_METRICS
        if is_number(figures.get(key))
    ]


def _task_results(name: str, task: dict[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=pipeline_of(task.get("kind")),
            task_name=f"{name}, {task.get('kind', 'classification')} after fine-tuning",
            dataset_type=hub_repo(name) or f"bertpipe-{name}",
            dataset_name=dataset_name(name),
            dataset_config=config,
            dataset_split=split,
            metric_type=METRIC_TYPES.get(bare, bare),
            metric_name=f"{metric.replace('_', ' ')}, median of {spread['num_runs']} seeds",
            metric_value=spread["median"],
            metric_args={key: spread[key] for key in ("lowest", "highest", "seeds")},
        )
        for metric, spread in metric_spreads(task).items()
        for config, split, bare in [measured_on(name, metric)]
    ]


def measured_on(name: str, metric: str) -> tuple[str, str, str]:
    """Configuration and split of the data that a score of a task is of, and the metric's own name."""
    if name not in TASKS:  # the user's own
        bare = metric.removeprefix("test_")
        return name, "validation" if bare == metric else "test", bare
    task = TASKS[name]
    config = SOURCES[task.source].configuration(task) or name
    split = next((one for one in task.splits[2:] if metric.startswith(task.prefix(one))), task.validation)
    bare = metric.removeprefix(task.prefix(split))
    return (split, "test", bare) if split in task.diagnostic else (config, split, bare)


def metric_spreads(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each metric of a task, the fine-tuned model's median, lowest and highest over the seeds."""
    runs = [run for run in task.get("runs", []) if run.get("init") == "model"]
    spreads = {}
    for metric in dict.fromkeys(name for run in runs for name in run.get("scores", {})):
        scored = [run for run in runs if is_number(run["scores"].get(metric))]
        values = [round(run["scores"][metric], 6) for run in scored]
        if values:
            spreads[metric] = {
                "median": round(statistics.median(values), 6),
                "lowest": min(values),
                "highest": max(values),
                "num_runs": len(values),
                "seeds": [run.get("seed") for run in scored],
            }
    return spreads


def eval_results(cfg: Config, facts: dict[str, Any]) -> dict[str, str]:
    """The files of .eval_results/ by name, one a task of a Hub data set: the headline metric's median and spread."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    url = f"https://huggingface.co/{cfg.publish.repo}" if "/" in cfg.publish.repo else None
    for name, task in shown_tasks(cfg, facts).items():
        spread = metric_spreads(task).get(task.get("metric", ""))
        repo = hub_repo(name)
        if repo is None or spread is None:
            continue
        notes = f"{task['metric']} on the validation set after fine-tuning, median of {spread['num_runs']} seeds "
        notes += f"[{spread['lowest']:.4f}, {spread['highest']:.4f}]"
        entry = EvalResultEntry(
            dataset_id=repo,
            task_id=name,
            value=spread["median"],
            source_url=url,
            source_name="Model card" if url else None,
            notes=notes + (", data from a local copy" if cfg.finetune.data else ""),
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True, width=1_000)
        files[f"{name}.yaml"] = text
    return files


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


def hub_repo(name: str) -> str | None:
    """The Hub data set of a task (which may have been read from a folder laid out as it); None where there is none."""
    return SOURCES[TASKS[name].source].repo if name in TASKS else None


def dataset_name(name: str) -> str:
    """What the data of a task is called."""
    if name not in TASKS:
        return name
    source = SOURCES[TASKS[name].source]
    return f"{source.title} {name}" if source.repo and source.title.lower().replace("-", "") != name else source.title


def hub_dataset(source: str) -> str | None:
    """The data set's Hub id in `hub:NAME[:CONFIG[:SPLIT]]`; None for any other source."""
    return source.removeprefix(HUB_SOURCE).split(":")[0] if source.startswith(HUB_SOURCE) else None


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
HOLDOUT_METRICS = (
    ("eval_loss", "loss", "Loss (nats per predicted token)"),
    ("eval_perplexity", "perplexity", "Perplexity"),
    ("eval_accuracy", "accuracy", "Accuracy"),
)
