"""Stage: a checkpoint -> scores on tasks, through the same packed loop as pretraining.

    finetune-<fingerprint>/
        scores.json                       every run and the median over seeds
        <task>/model/                     the best seed's stock folder, label names included
        <task>/scores.json                the task's part of scores.json
        <task>/runs/<init>-seed-<n>/      scores.json, metrics.jsonl, speed.jsonl, predictions-*.jsonl

A unit is one run, task x init x seed; a rerun does the missing ones. Inits: `model`, and the baselines asked for
(`scratch` is the same architecture from random weights; majority and tfidf see the same data).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe import artifact, outside
from bertpipe.config import Config, FinetuneConfig, listed
from bertpipe.data.batches import Examples, ExampleSlots, pack_examples
from bertpipe.downstream import tasks
from bertpipe.downstream.baselines import BASELINES
from bertpipe.downstream.encode import encode
from bertpipe.downstream.tasks import Split, Task
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels
from bertpipe.model.objectives import SequenceLabel
from bertpipe.model.pooling import check_head
from bertpipe.train import loop
from bertpipe.train.checkpoint import save_model
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.pretrain import load_tokenizer
from bertpipe.train.tracking import Record

PREDICT_TOKENS = 8_192  # of one packed row when predicting
SCRATCH = "scratch"


@dataclass(frozen=True)
class Job:
    """A task ready to train on."""

    task: Task
    splits: dict[str, Split]
    examples: dict[str, Examples]
    num_truncated: int
    model: str
    """Checkpoint folder or Hub id."""
    tokenizer: Any

    @property
    def headline(self) -> str:
        return self.task.headline


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Fine-tune and score; every process calls it, the main one writes into `out`."""
    settings = cfg.finetune
    check(cfg)
    names = tasks.chosen(settings.tasks, settings.data)
    place = Place(cfg.runtime, settings.precision)
    place.share(settings.slots_per_step, "finetune.slots_per_step")
    with place.together():
        _run(cfg, names, settings.model or str(inputs["pretrain"] / "model"), out, counts, place)


def _run(cfg: Config, names: list[str], model: str, out: Path, counts: dict[str, Any], place: Place) -> None:
    settings, table = cfg.finetune, {}
    for name in names:
        folder = out / name
        if not (folder / "scores.json").is_file():
            job = prepare(name, settings, model)
            for init, seed in runs(settings, job.task):
                _unit(cfg, place, job, init, seed, folder / "runs" / f"{init}-seed-{seed}")
            if place.is_main:
                _choose(job, settings, folder)
            place.barrier()
        table[name] = json.loads((folder / "scores.json").read_text())
        if place.is_main:
            _tidy(folder)
            print(_line(name, table[name]), flush=True)
    if place.is_main:
        artifact.write_json(out / "scores.json", {"model": model, "tasks": table})
        counts |= {name: {i: s["median"] for i, s in row["summary"].items()} for name, row in table.items()}
        counts |= {"runs": sum(len(row["runs"]) for row in table.values()), **place.facts()}


def check(cfg: Config) -> None:
    """ConfigError for unknown tasks or baselines, or no seeds; before anything is loaded."""
    settings = cfg.finetune
    for name in tasks.chosen(settings.tasks, settings.data):
        tasks.get(name)
    if not settings.seeds or (isinstance(settings.seeds, list) and len(set(settings.seeds)) < len(settings.seeds)):
        raise ConfigError(f"finetune.seeds: {settings.seeds} must be at least one seed, each once")
    choices = (*BASELINES, SCRATCH)
    for name in listed(settings.baselines):
        if name not in choices:
            raise ConfigError(f"finetune.baselines: {name!r} is not one of {', '.join(choices)}")


def runs(settings: FinetuneConfig, task: Task) -> list[tuple[str, int]]:
    """(init, seed) of every run of a task."""
    seeds = list(range(1, settings.seeds + 1)) if isinstance(settings.seeds, int) else settings.seeds
    baselines = listed(settings.baselines)
    trained = ["model", *(name for name in baselines if name == SCRATCH)]
    plain = [name for name in baselines if name in BASELINES and task.kind in BASELINES[name].kinds]
    return [(init, seed) for init in trained for seed in seeds] + [(init, seeds[0]) for init in plain]


def prepare(name: str, settings: FinetuneConfig, model: str) -> Job:
    """Load and tokenize a task's data."""
    task, splits, tokenizer = tasks.get(name), tasks.load(name, settings.data), load_tokenizer_of(model)
    encoded = encode(splits, tokenizer, settings.max_length)
    examples = {s: Examples(e.input_ids, e.token_type_ids, splits[s].labels) for s, e in encoded.items()}
    return Job(task, splits, examples, sum(e.num_truncated for e in encoded.values()), model, tokenizer)


def load_tokenizer_of(model: str) -> Any:
    """The tokenizer that lies beside a checkpoint; ConfigError when there is none."""
    outside.check(model, "finetune.model")
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"finetune.model: no tokenizer can be loaded from {model!r}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there is none
        raise ConfigError(f"finetune.model: {model!r} holds no tokenizer (tokenizer.json or vocab.txt)")
    return tokenizer


def build(job: Job, settings: FinetuneConfig, init: str, seed: int) -> Any:
    """The stock classifier of a run: the checkpoint's weights or random ones, the head random; all from `seed`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    names = job.splits["train"].label_names
    labels: dict[str, Any] = {"num_labels": len(names) if names else 1}
    if names:
        labels |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(seed)
    if init == SCRATCH:
        stock = AutoConfig.from_pretrained(job.model, **labels)
        encoders.set_dropout(stock, settings.dropout)
        model = AutoModelForSequenceClassification.from_config(stock, attn_implementation="eager", dtype=torch.float32)
    else:
        auto = AutoModelForSequenceClassification
        model = encoders.load(auto, job.model, "finetune.model", settings.dropout, **labels)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(job.tokenizer) > rows:
        raise ConfigError(
            f"finetune.model: its tokenizer has {len(job.tokenizer)} entries but the model only {rows} rows; "
            f"they are not of one run"
        )
    check_head(model)
    encoders.check_length(model, settings.max_length, "finetune.max_length")
    return model


def _unit(cfg: Config, place: Place, job: Job, init: str, seed: int, folder: Path) -> None:
    """One run, committed as `folder`."""
    if any(place.sum([float(place.is_main and artifact.is_complete(folder))])):  # the main process decides for all
        return
    if place.is_main:
        folder.parent.mkdir(parents=True, exist_ok=True)
        artifact.discard(folder.with_name(folder.name + artifact.PARTIAL))  # a run is redone whole
        writing: Any = artifact.committing(folder, kind="run", task=job.task.name, init=init, seed=seed)
    else:
        writing = contextlib.nullcontext((None, {}))
    started = time.monotonic()
    with writing as (scratch, counts):
        if init in BASELINES:
            outcome = _score_baseline(job, init, seed)
        else:
            outcome = train(cfg, place, job, init, seed, scratch)
        result = {"init": init, "seed": seed, **outcome, "wall_seconds": round(time.monotonic() - started, 1)}
        if place.is_main:
            artifact.write_json(scratch / "scores.json", result)
            counts |= result["scores"]
    place.barrier()


def _score_baseline(job: Job, init: str, seed: int) -> dict[str, Any]:
    validation = job.splits["validation"]
    predicted = BASELINES[init].predict(job.splits, seed)
    assert validation.labels is not None
    return {"scores": score(job.task, predicted, validation.labels), "best_epoch": None}


def train(cfg: Config, place: Place, job: Job, init: str, seed: int, scratch: Path | None) -> dict[str, Any]:
    """Fine-tune one model; the epoch with the best headline score on validation counts and is kept.

    Writes records, predictions and (for init `model`) the model into `scratch` where that is given.
    """
    settings, train_set = cfg.finetune, job.examples["train"]
    model = build(job, settings, init, seed)
    kernel = kernels.choose(model.config, place.device, place.precision)
    kernels.settle(kernel, cfg.runtime.require_fast_attention, say=place.is_main)
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing, kernel.name)
    objective = SequenceLabel(model, place.precision).to(place.device)
    source = ExampleSlots(
        train_set, settings.batch_size, settings.slots_per_step, seed, job.tokenizer.pad_token_id or 0
    )
    steps = source.steps_per_epoch * settings.epochs
    optimizer = Optimizer(objective.model, recipe(settings, steps))
    best = _Best(job, objective, place)
    looping = loop.LoopSettings(
        steps=steps,
        slots_per_step=settings.slots_per_step,
        seed=seed,
        eval_every=source.steps_per_epoch,
        log_every=cfg.runtime.log_every,
        loader_workers=cfg.runtime.loader_workers,
        progress=cfg.runtime.progress,
        description=f"{job.task.name} {init} seed {seed}",
        desync_every=cfg.runtime.desync_every,
        timeout=cfg.runtime.timeout,
    )
    epoch_of = source.steps_per_epoch
    with Record(scratch, cfg.runtime.log_every) as record:
        loop.fit(objective, source, optimizer, looping, place, record, best, None, lambda step: step // epoch_of)
    objective.model.load_state_dict(best.weights)
    place.release()
    for split in job.splits:
        if split != "train":
            logits = best.logits if split == "validation" else predict(objective, job, split, place)
            if scratch is not None:
                _write_predictions(job, split, logits, scratch / f"predictions-{split}.jsonl")
    if scratch is not None and init == "model":
        save_model(objective.model, job.tokenizer, scratch / "model")
    return {"scores": best.scores, "best_epoch": best.epoch, "by_epoch": best.history}


def recipe(settings: FinetuneConfig, steps: int) -> Recipe:
    """AdamW as BERT's fine-tuning has it (Devlin et al. 2019, A.3)."""
    return Recipe(
        name="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
        schedule="linear",
        warmup_steps=round(settings.warmup_ratio * steps),
        steps=steps,
        max_grad_norm=settings.max_grad_norm,
    )


class _Best:
    """Scores the model on validation when called, and remembers the best epoch's weights."""

    def __init__(self, job: Job, objective: SequenceLabel, place: Place):
        self.job, self.objective, self.place = job, objective, place
        self.scores: dict[str, float] = {}
        self.epoch = 0
        self.history: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.logits = np.zeros(0)

    def __call__(self) -> dict[str, float]:
        logits = predict(self.objective, self.job, "validation", self.place)
        labels = self.job.splits["validation"].labels
        assert labels is not None
        scores = score(self.job.task, decide(logits, self.job.task), labels)
        self.history.append(scores[self.job.headline])
        if not self.weights or scores[self.job.headline] > self.scores[self.job.headline]:
            self.scores, self.epoch, self.logits = scores, len(self.history), logits
            self.weights = {n: t.detach().to("cpu", copy=True) for n, t in self.objective.model.state_dict().items()}
        return {f"eval_{name}": value for name, value in scores.items()}


def predict(objective: SequenceLabel, job: Job, split: str, place: Place) -> np.ndarray:
    """Logits, float32 [examples, labels], in the split's order, the same on all processes; all of them call it.

    Rows of examples are packed alike whatever the number of processes, and each takes every world-th, so the logits are
    those of one process, to the bit where its number of threads is the same.
    """
    examples = job.examples[split]
    order = np.argsort([len(ids) for ids in examples.input_ids], kind="stable")
    ends = np.cumsum([len(examples.input_ids[i]) for i in order])
    unlabelled = Examples(examples.input_ids, examples.token_type_ids, None)
    logits = np.zeros((len(order), objective.model.config.num_labels), np.float32)
    objective.eval()
    parts = np.split(order, np.flatnonzero(np.diff(ends // PREDICT_TOKENS)) + 1)
    with torch.no_grad():
        for first in range(0, len(parts), place.world):
            place.check_stop()
            if first + place.rank < len(parts):
                part = parts[first + place.rank]
                batch = pack_examples(unlabelled, part, job.tokenizer.pad_token_id or 0).to(place.device)
                logits[part] = objective(batch)["logits"].cpu().numpy()
    if place.world > 1:  # one process has a row's logits, the others zeros: their sum is exact
        logits = np.array(place.sum(torch.from_numpy(logits)), np.float32).reshape(logits.shape)
    return logits


def score(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics."""
    from bertpipe.downstream.metrics import compute  # imports `evaluate`

    return compute(task.metric, predicted, labels)


def decide(logits: np.ndarray, task: Task) -> np.ndarray:
    """Classes, int64 [N], or values, float64 [N]."""
    return logits[:, 0].astype(np.float64) if task.kind == "regression" else logits.argmax(-1)


def _write_predictions(job: Job, split: str, logits: np.ndarray, path: Path) -> None:
    data, decided = job.splits[split], decide(logits, job.task)
    names = data.label_names
    with path.open("w", encoding="utf-8") as file:
        for row, example in enumerate(data.ids):
            line: dict[str, Any] = {"id": example}
            line["prediction"] = names[int(decided[row])] if names else float(decided[row])
            if data.labels is not None:
                line["label"] = names[int(data.labels[row])] if names else float(data.labels[row])
            line["logits"] = [round(float(x), 5) for x in logits[row]]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _choose(job: Job, settings: FinetuneConfig, folder: Path) -> None:
    """Sum up a task's runs and keep the best seed's model."""
    results = [
        json.loads((folder / "runs" / f"{init}-seed-{seed}" / "scores.json").read_text())
        for init, seed in runs(settings, job.task)
    ]
    summary = {}
    for init in dict.fromkeys(result["init"] for result in results):
        values = [r["scores"][job.headline] for r in results if r["init"] == init]
        middle = statistics.median(values)
        summary[init] = {"median": middle, "lowest": min(values), "highest": max(values), "num_runs": len(values)}
    candidates = [r for r in results if r["init"] == "model"]
    best = max(candidates, key=lambda r: r["scores"][job.headline])
    kept = folder / "runs" / f"model-seed-{best['seed']}" / "model"
    if kept.is_dir():
        artifact.discard(folder / "model")
        kept.replace(folder / "model")
    scores = {
        "kind": job.task.kind,
        "metric": job.headline,
        "labels": job.splits["train"].label_names,
        "num_train": len(job.splits["train"]),
        "num_validation": len(job.splits["validation"]),
        "truncated": job.num_truncated,
        "runs": results,
        "summary": summary,
        "model": f"{folder.name}/model",
        "model_seed": best["seed"],
    }
    artifact.write_json(folder / "scores.json", scores)


def _tidy(folder: Path) -> None:
    """Drop the other seeds' models and the units' manifests: the stage's manifest lists what stays."""
    for unit in (folder / "runs").iterdir():
        artifact.discard(unit / "model")
        (unit / artifact.MANIFEST).unlink(missing_ok=True)


def _line(name: str, scores: dict[str, Any]) -> str:
    parts = [
        f"{init} {s['median']:.3f}" + (f" [{s['lowest']:.3f}, {s['highest']:.3f}]" if s["num_runs"] > 1 else "")
        for init, s in scores["summary"].items()
    ]
    return f"{name:<6} {scores['metric']}: " + "  ".join(parts)
