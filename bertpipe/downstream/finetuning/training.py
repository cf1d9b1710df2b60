"""One run of fine-tuning: a task's data and a checkpoint -> scores, predictions and a stock model.

The same loop as pretraining, on the same packed batches; what depends on the form of the task is its Kind's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe.config import Config, FinetuneConfig
from bertpipe.data.batches import Examples, ExampleSlots, pack_examples
from bertpipe.downstream.finetuning import baselines, grid, start_checks
from bertpipe.downstream.finetuning.baselines import BASELINES
from bertpipe.downstream.finetuning.grid import MODEL, SCRATCH, point_of, points
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.kind import Encoded, Kind, Outputs, Split, Task
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.errors import ConfigError, DataError, DivergedError
from bertpipe.model import encoders, kernels
from bertpipe.model.labelled import HEADS_OF, Head, Labelled
from bertpipe.train import loop
from bertpipe.train.checkpoint import save_model
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.trackers import Background
from bertpipe.train.tracking import Record

PREDICT_TOKENS = 8_192  # of one packed row when predicting


@dataclass(frozen=True)
class Job:
    """A task ready to train on."""

    task: Task
    splits: dict[str, Split]
    encoded: dict[str, Encoded]
    model: str
    """Checkpoint folder or Hub id."""
    tokenizer: Any
    new_head: bool = False
    """Whether the checkpoint's own head, if it has one, is left behind."""

    @property
    def kind(self) -> Kind:
        """The task's form."""
        return KINDS[self.task.kind]

    @property
    def head(self) -> Head:
        """Its stock class and loss."""
        return HEADS_OF[self.kind.head]

    @property
    def labels(self) -> Split:
        """The split that says which labels there are."""
        return self.splits["train" if "train" in self.splits else self.task.validation]

    @property
    def pad_id(self) -> int:
        """What rows are filled with."""
        return self.tokenizer.pad_token_id or 0

    @cached_property
    def floor(self) -> float | None:
        """The headline score of the most frequent training label; 0 for a form of task that has none, and without
        training data; None where validation has no labels, so that nothing is scored."""
        if self.splits[self.task.validation].labels is None:
            return None
        majority, kind = BASELINES["majority"], self.task.kind
        if "train" not in self.splits or kind not in majority.kinds or kind in majority.others:
            return 0.0
        predicted = baselines.predict("majority", self, self.task.validation)
        return self.score(self.task.validation, predicted)[self.task.headline]

    def is_scored(self, split: str) -> bool:
        """Whether it is evaluated, or another one whose labels are known."""
        return split != "train" and self.splits[split].labels is not None

    def score(self, split: str, predicted: Any) -> dict[str, float]:
        """The task's metrics of a split, none if it has no labels; of any but the one that chooses, named after it."""
        if self.splits[split].labels is None:
            return {}
        task = replace(self.task, metric=self.task.diagnostic.get(split, self.task.metric))
        scores = self.kind.score(task, self.splits[split], predicted)
        return {task.prefix(split) + name: value for name, value in scores.items()}

    def details(self, split: str, predicted: Any) -> dict[str, Any]:
        """Scores of parts of a labelled split; named as `score` names."""
        found = self.kind.details(self.splits[split], predicted)
        return {self.task.prefix(split) + name: value for name, value in found.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """What is odd in each split and was kept, and what was done to it, by reason."""
        found = {split: data.counts | self.encoded[split].counts for split, data in self.splits.items()}
        for split in self.task.evaluated:
            if self.splits[split].labels is None:
                found[split] |= {"without_labels_so_predicted_but_not_scored": len(self.splits[split])}
        return {split: counts for split, counts in found.items() if counts}

    def lines(self) -> list[str]:
        """The same in words, a line a split."""
        return [
            f"{self.task.name} {split}: {len(self.splits[split]):,} examples, "
            + ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in counts.items())
            for split, counts in self.counts().items()
        ]

    def decide(self, split: str, outputs: Outputs) -> Any:
        """A prediction for each example of a split."""
        return self.kind.decide(self.splits[split], self.encoded[split], outputs)


def prepare(name: str, settings: FinetuneConfig, model: str, new_head: bool = False) -> Job:
    """Load and tokenize a task's data."""
    setting = "finetune.warm_start" if new_head else "finetune.model"
    task = tasks.get(name, settings.task)
    splits = tasks.load(name, settings.data, settings.task, grid.is_trained(settings))
    if splits[task.validation].labels is None and len(points(settings)) > 1:
        raise DataError(
            f"{name}: {task.validation} has no labels, so nothing says which of several values is best; give "
            "finetune.lr, batch_size and epochs one value each"
        )
    tokenizer = start_checks.load_tokenizer_of(model, setting)
    encoded = {s: KINDS[task.kind].encode(split, tokenizer, settings) for s, split in splits.items()}
    return Job(task, splits, encoded, model, tokenizer, new_head)


def build(job: Job, settings: FinetuneConfig, init: str, seed: int, say: bool = False) -> Any:
    """The stock model of a run: the checkpoint's weights or random ones, a new head random; all from `seed`.

    A pooler that the checkpoint hasn't got starts as `finetune.pooler` says; with `say` that is told. With
    `finetune.epochs: 0` the head is the checkpoint's too; ConfigError if it has none, or one of other labels.
    """
    import transformers

    auto = getattr(transformers, job.head.auto_class)
    fields = job.kind.model_fields(job.labels)
    torch.manual_seed(seed)
    warm = job.new_head and init != SCRATCH
    if init == SCRATCH or warm:
        stock = transformers.AutoConfig.from_pretrained(job.model, **fields)
        encoders.check_class(auto, stock, "finetune.model")
        encoders.set_dropout(stock, settings.dropout)
        model = auto.from_config(stock, attn_implementation="eager", dtype=torch.float32)
        if warm:  # with the pooler, where the family has it there
            whole = transformers.AutoModel
            body, missing, _ = encoders.load_with_missing(whole, job.model, "finetune.warm_start", settings.dropout)
            _start_pooler(body, missing, job, settings, say)
            model.base_model.load_state_dict(body.state_dict(), strict=False)
    else:
        model, missing, resized = encoders.load_with_missing(
            auto, job.model, "finetune.model", settings.dropout, **fields
        )
        if grid.is_trained(settings):
            _start_pooler(model, missing, job, settings, say)
            if resized and say:
                kernels.say_once(
                    f"note: {job.model}: its head is for other labels ({resized[0]}); a new one is trained"
                )
        else:
            _check_whole(job.model, missing, resized, fields)
    start_checks.check_tokenizer(job.tokenizer, model)
    if say:
        start_checks.tell_of_small(job.model, job.tokenizer, model)
    job.head.module.check(model)
    encoders.check_length(model, settings.max_length, "finetune.max_length")
    return model


def _start_pooler(model: Any, missing: set[str], job: Job, settings: FinetuneConfig, say: bool) -> None:
    poolers = encoders.missing_poolers(model, missing)
    if poolers and settings.pooler == "identity":
        encoders.make_identity(model, poolers)
    if poolers and say:
        kernels.say_once(f"note: {job.model} has no pooler; it starts {_STARTS[settings.pooler]} (finetune.pooler)")


_STARTS = {"random": "random", "identity": "as the identity, so that the head sees tanh of [CLS] as pretrained"}


def _check_whole(model: str, missing: set[str], resized: list[str], fields: dict[str, Any]) -> None:
    """ConfigError unless a checkpoint can be scored as it is: a head, and the task's labels in their order.

    Where it has no names for its labels (LABEL_0, ...), they are taken to be in this order.
    """
    import transformers

    why = "finetune.epochs: 0 scores a model as it is, but"
    if resized:
        raise ConfigError(f"{why} the head of {model!r} is for other labels ({resized[0]})")
    if missing:
        raise ConfigError(f"{why} {model!r} has no {', '.join(sorted(missing))[:200]}; train with finetune.epochs")
    names = [str(name) for _, name in sorted(transformers.AutoConfig.from_pretrained(model).id2label.items())]
    wanted = list(fields.get("id2label", {}).values())
    nameless = all(name.startswith("LABEL_") for name in names)
    if wanted and not nameless and list(map(str.lower, names)) != list(map(str.lower, wanted)):
        raise ConfigError(
            f"{why} the labels of {model!r} are {', '.join(names)}, those of the task {', '.join(wanted)}"
        )


def train(
    cfg: Config,
    place: Place,
    job: Job,
    init: str,
    seed: int,
    scratch: Path | None,
    copies: Sequence[Background] = (),
) -> dict[str, Any]:
    """Fine-tune one model; the epoch with the best headline score on validation counts and is kept, the last one where
    validation has no labels: then nothing is scored.

    The settings are those of one point (grid.at); without epochs the model is scored as it is. Writes records, which
    `copies` get too, predictions and (for init `model`) the model into `scratch` where that is given. A run that
    diverges has no scores; `failed` says why a run counts for nothing.
    """
    settings = cfg.finetune
    model = build(job, settings, init, seed, say=place.is_main)
    kernel = kernels.choose(model.config, place.device, place.precision)
    kernels.settle(kernel, cfg.runtime.require_fast_attention, say=place.is_main)
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing, kernel.name)
    objective = job.head.module(model, place.precision).to(place.device)
    best = _Best(job, objective, place, settings.patience)
    try:
        if grid.is_trained(settings):
            with Record(scratch, cfg.runtime.log_every, copies) as record:
                _fit(cfg, place, job, best, init, seed, record)
        else:
            best()
    except DivergedError as error:
        reason = str(error).partition(";")[0]
        return {"scores": {}, "best_epoch": None, "by_epoch": best.history, "failed": f"diverged: {reason}"}
    finally:
        place.release()
    objective.model.load_state_dict(best.weights)
    scores, details = dict(best.scores), dict[str, Any]()
    failed = failure(job, best.outputs, scores)
    for split in job.splits:
        if split == "train":
            continue
        outputs = best.outputs if split == job.task.validation else predict(objective, job, split, place)
        predicted = job.kind.final(job.task, job.decide(split, outputs), best.scores)
        if job.is_scored(split):
            details |= job.details(split, predicted)
            scores |= job.score(split, predicted) if split != job.task.validation else {}
        if scratch is not None:
            _write_predictions(job, split, outputs, predicted, scratch / f"predictions-{split}.jsonl")
    if scratch is not None and init == MODEL:
        save_model(objective.model, job.tokenizer, scratch / "model")
    found = {"scores": scores, "best_epoch": best.epoch, "by_epoch": best.history, "failed": failed}
    found |= {} if grid.is_trained(settings) else {"best_epoch": 0}
    return found | details


def _fit(cfg: Config, place: Place, job: Job, best: _Best, init: str, seed: int, record: Record) -> None:
    """Train the objective of `best` in place, which is asked after each epoch."""
    settings, point = cfg.finetune, point_of(cfg.finetune)
    examples = job.encoded["train"].examples
    source = ExampleSlots(examples, point.batch_size, settings.slots_per_step, seed, job.pad_id)
    steps, epoch_of = source.steps_per_epoch * point.epochs, source.steps_per_epoch
    optimizer = Optimizer(best.objective.model, recipe(settings, steps))
    looping = loop.LoopSettings(
        steps=steps,
        slots_per_step=settings.slots_per_step,
        seed=seed,
        eval_every=epoch_of,
        log_every=cfg.runtime.log_every,
        loader_workers=cfg.runtime.loader_workers,
        progress=cfg.runtime.progress,
        description=f"{job.task.name} {init} {point} seed {seed}",
        desync_every=cfg.runtime.desync_every,
        timeout=cfg.runtime.timeout,
    )
    loop.fit(
        *(best.objective, source, optimizer, looping, place, record, best),
        epoch_of=lambda step: step // epoch_of,
        enough=best.enough,
    )


def failure(job: Job, outputs: Outputs, scores: dict[str, float]) -> str | None:
    """Why a run counts as failed, if it does: one answer to everything, or no better than the majority's.

    Mosbach et al. 2021, section 3, after Dodge et al. 2020; they look at the last epoch, this at the one that counts.
    """
    split, score = job.task.validation, scores.get(job.task.headline)
    predicted = job.decide(split, outputs)
    if score is not None and score >= 1:  # also where validation knows one answer only
        return None
    if len(predicted) > 1 and all(np.array_equal(one, predicted[0]) for one in predicted):
        line = job.kind.line(job.splits[split], job.encoded[split], outputs, predicted, 0)
        return f"predicts {line.get('prediction')!r} for every example"
    if score is not None and job.floor is not None and score <= job.floor:
        return f"scores {score:.3f}, no more than the same answer to every example ({job.floor:.3f})"
    return None


def recipe(settings: FinetuneConfig, steps: int) -> Recipe:
    """AdamW as BERT's fine-tuning has it (Devlin et al. 2019, A.3)."""
    return Recipe(
        name="adamw",
        lr=point_of(settings).lr,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
        schedule="linear",
        warmup_steps=round(settings.warmup_ratio * steps),
        steps=steps,
        max_grad_norm=settings.max_grad_norm,
    )


class _Best:
    """Scores the model on validation when called, and remembers the weights of the best epoch; where validation has no
    labels, of the last."""

    def __init__(self, job: Job, objective: Labelled, place: Place, patience: int | None):
        self.job, self.objective, self.place, self.patience = job, objective, place, patience
        self.scores: dict[str, float] = {}
        self.epoch = 0
        self.history: list[float | None] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.outputs = Outputs(np.zeros((0, 1), np.float32), np.zeros(1, np.int64))

    def __call__(self) -> dict[str, float]:
        split, headline = self.job.task.validation, self.job.task.headline
        outputs = predict(self.objective, self.job, split, self.place)
        if not np.isfinite(outputs.logits).all():
            raise DivergedError(f"epoch {len(self.history) + 1}: logits on {split} are not finite; lower finetune.lr")
        scores = self.job.score(split, self.job.decide(split, outputs))
        self.history.append(scores.get(headline))
        if not self.weights or not scores or scores[headline] > self.scores[headline]:
            self.scores, self.epoch, self.outputs = scores, len(self.history), outputs
            self.weights = {n: t.detach().to("cpu", copy=True) for n, t in self.objective.model.state_dict().items()}
        return {f"eval_{name}": value for name, value in scores.items()}

    def enough(self) -> bool:
        """Whether the score has not risen for `finetune.patience` epochs."""
        return self.patience is not None and len(self.history) - self.epoch >= self.patience


def predict(objective: Labelled, job: Job, split: str, place: Place) -> Outputs:
    """The logits of a split, the same on all processes; all of them call it.

    Rows of examples are packed alike whatever the number of processes, and each takes every world-th, so the logits are
    those of one process, to the bit where its number of threads is the same.
    """
    examples = job.encoded[split].examples
    rows = objective.num_rows(examples)
    first = np.append(0, np.cumsum(rows))
    logits = np.zeros((int(first[-1]), objective.model.config.num_labels), np.float32)
    objective.eval()
    parts = rows_by_length(examples)
    with torch.no_grad():
        for number in range(0, len(parts), place.world):
            place.check_stop()
            if number + place.rank < len(parts):
                part = parts[number + place.rank]
                batch = pack_examples(examples, part, job.pad_id, labelled=False).to(place.device)
                found = objective(batch)["logits"].cpu().numpy()
                logits[np.concatenate([np.arange(first[i], first[i + 1]) for i in part])] = found
    if place.world > 1:  # one process has a row's logits, the others zeros: their sum is exact
        logits = np.array(place.sum(torch.from_numpy(logits)), np.float32).reshape(logits.shape)
    return Outputs(logits, first)


def rows_by_length(examples: Examples) -> list[np.ndarray]:
    """The examples by length, cut into rows of about PREDICT_TOKENS."""
    lengths = examples.lengths
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    return np.split(order, np.flatnonzero(np.diff(ends // PREDICT_TOKENS)) + 1)


def _write_predictions(job: Job, split: str, outputs: Outputs, predicted: Any, path: Path) -> None:
    """One line an example: its id, what its kind says of it, and its texts."""
    data, encoded = job.splits[split], job.encoded[split]
    with path.open("w", encoding="utf-8") as file:
        for row, example in enumerate(data.ids):
            line = {"id": example} | job.kind.line(data, encoded, outputs, predicted, row)
            line |= {"text": list(data.texts[row])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for ending, content in job.kind.files(data, predicted).items():
        path.with_suffix(f".{ending}").write_text(content, encoding="utf-8")
