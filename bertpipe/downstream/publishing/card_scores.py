"""Scores and hold-out figures in the forms that the Hub reads: `model-index` in the card, and .eval_results/*.yaml."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from bertpipe.config import Config, listed
from bertpipe.downstream.reporting.record import is_number
from bertpipe.downstream.tasks.kind import Kind
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.downstream.tasks.task_sources import SOURCES
from bertpipe.downstream.tasks.tasks import TASKS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB_SOURCE = "hub:"
METRIC_TYPES = {"spearman": "spearmanr", "pearson": "pearsonr", "macro_f1": "f1"}
"""Ids of the Hub's metrics where they differ from our names."""
HOLDOUT_METRICS = (
    ("eval_loss", "loss", "Loss (nats per predicted token)"),
    ("eval_perplexity", "perplexity", "Perplexity"),
    ("eval_accuracy", "accuracy", "Accuracy"),
)


def shown_tasks(cfg: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """The tasks whose scores the card shows: the published one, or all that were fine-tuned from this model."""
    tasks = facts.get("finetune") or {}
    if cfg.publish.task:
        return {name: task for name, task in tasks.items() if name == cfg.publish.task}
    # With finetune.model, the scores are another checkpoint's.
    return {} if cfg.finetune.model else tasks


def pipeline_of(kind: str | None) -> str:
    """The stock pipeline that runs the model of a kind of task."""
    return KINDS[kind].pipeline if kind in KINDS else Kind.pipeline


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
