"""Stage: token shards -> a pretrained checkpoint.

pretrain-<fingerprint>/
    model/          stock folder: from_pretrained loads it, tokenizer included
    metrics.jsonl   the record of the recipe (see tracking.py)
    speed.jsonl     the record of the machine
    profile/        with runtime.profile: a trace of a few steps and their costs
    checkpoints/    the newest ones, with optimizer tensors
    budget.json     with `train.budget`: the number of steps it came to
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bertpipe import artifact, outside
from bertpipe.config import Config
from bertpipe.config_files import read_preset
from bertpipe.data import masking, phases
from bertpipe.data.batches import StepSource
from bertpipe.data.mixture import MixedShards, describe, open_train
from bertpipe.data.new_words import split_added
from bertpipe.data.order import Order
from bertpipe.data.phases import PhasedOrder
from bertpipe.data.shards import TokenShards
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels
from bertpipe.model.objectives import OBJECTIVES, Objective, Row, SentencePairs
from bertpipe.train import boards, budget, extend, flops, loop
from bertpipe.train.checkpoint import Checkpoints, identify, save_model
from bertpipe.train.evaluation import Evaluation
from bertpipe.train.optim import Optimizer, Recipe, check_names, check_schedule
from bertpipe.train.place import Place, check_processes
from bertpipe.train.profile import Trace
from bertpipe.train.samples import Epochs, open_source
from bertpipe.train.tracking import Record


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Pretrain; every process calls it, the main one writes into `out`."""
    started = time.monotonic()
    check(cfg)
    run_id = identify(cfg, inputs)  # before a budget is turned into steps
    check_processes(*phases.smallest_step(cfg.train))
    place = Place(cfg.runtime, cfg.train.precision)
    with place.together():
        _run(cfg, inputs, out, counts, place, run_id, started)


def _run(
    cfg: Config,
    inputs: dict[str, Path],
    out: Path,
    counts: dict[str, Any],
    place: Place,
    run_id: str,
    started: float,
) -> None:
    tokenizer, added = prepare_tokenizer(cfg, inputs)
    train = open_train(inputs["shards"], cfg.train.source_weights)
    row = OBJECTIVES[cfg.train.objective]
    objective, kernel = make_objective(cfg, row, train, added, place)
    model = objective.model
    evaluation = Evaluation(cfg, inputs["shards"], objective, place)
    begun = _begin(cfg, inputs, out, place) if cfg.train.extend_from else 0
    budgeted: dict[str, Any] = {}
    if cfg.train.budget is not None:

        def cost() -> budget.Cost:
            def probe(cfg: Config, plans: Path) -> StepSource:
                return open_source(cfg, row, train, plans, place)[1]

            evaluate = evaluation if evaluation.slots else None
            return budget.measure(cfg, objective, recipe(cfg), probe, evaluate, tokenizer, place, out)

        cfg, budgeted = budget.freeze(cfg, out, started, begun, place, cost)
        evaluation.last = {}
    optimizer = Optimizer(objective.model, recipe(cfg))
    checkpoints = Checkpoints(
        out / "checkpoints", cfg.runtime.keep_checkpoints, tokenizer, cfg.runtime.checkpoint_failures, run_id
    )
    order, source = open_source(cfg, row, train, out / "plans", place, checkpoints.last_step())
    epochs = Epochs(order, cfg.train.steps, place.is_main)
    if place.is_main:
        _introduce(cfg, place, model, order, kernel)
    tokens = phases.total_tokens(cfg.train)
    meter = flops.make_meter(model, place.device, place.precision, tokens // place.world, place.world)
    trace = Trace(out / "profile", cfg.runtime.profile) if cfg.runtime.profile and place.is_main else None
    record = open_record(cfg, place, out)
    if place.is_main:
        checkpoints.check_room(model, optimizer)
    with record:
        speed = loop.fit(
            objective,
            source,
            optimizer,
            settings(cfg),
            place,
            record,
            evaluation if evaluation.slots else None,
            checkpoints,
            epochs,
            meter,
            trace,
        )
    if evaluation.slots and not evaluation.last:  # an earlier sitting came to the end but not to the publishing
        evaluation()
    if place.is_main:
        changed = extend.changes(cfg, extend.read_parent(cfg), inputs) if begun else []
        epochs.wait()
        artifact.discard(out / "plans")
        checkpoints.clean()
        save_model(model, tokenizer, out / "model")
        counts |= {
            "parameters": encoders.count_parameters(model),
            "steps": cfg.train.steps,
            "epochs": order.locate(cfg.train.steps - 1)[0] + 1,
            "train_seconds": round(speed.seconds, 1),
            **({"mixture": [share._asdict() for share in train.mixture]} if isinstance(train, MixedShards) else {}),
            **({"budget": budgeted} if budgeted else {}),
            **({"extended_after": begun, "extended_changes": changed} if begun else {}),
            "attention": kernel,
            **place.facts(),
            **evaluation.last,
        }
    place.barrier()


def prepare_tokenizer(cfg: Config, inputs: dict[str, Path]) -> tuple[Any, list[list[int]]]:
    """The tokenizer of the run, and what `check_tokenizer` says of the checkpoint it goes on from."""
    tokenizer = load_tokenizer(inputs["tokenizer"])
    added = check_tokenizer(cfg.model.init, tokenizer) if cfg.model.init else []
    if cfg.model.max_positions:
        tokenizer.model_max_length = cfg.model.max_positions
    return tokenizer, added


def make_objective(
    cfg: Config, row: Row, shards: TokenShards, added: list[list[int]], place: Place
) -> tuple[Objective, str]:
    """What is trained, on its device, and the attention kernel it uses (", compiled" where it is)."""
    length, seed = cfg.train.sequence_length, cfg.train.seed
    model = encoders.build(cfg.model, shards.vocab_size, shards.special_ids, length, seed, row.auto_class, added)
    kernel = kernels.choose(model.config, place.device, place.precision)
    kernels.settle(kernel, cfg.runtime.require_fast_attention, say=place.is_main)
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing, kernel.name)
    objective = row.module(model, place.precision).to(place.device)
    compiled = kernels.compiles(kernel, place.device, cfg.runtime.compile)
    if compiled:
        objective.compile()
    return objective, kernel.name + ", compiled" * compiled


def check(cfg: Config) -> None:
    """ConfigError for settings that can't be trained with; before anything is loaded."""
    if cfg.train.objective not in OBJECTIVES:
        raise ConfigError(f"train.objective: {cfg.train.objective!r} is not one of {', '.join(OBJECTIVES)}")
    if cfg.train.slot_tokens < cfg.train.sequence_length:
        raise ConfigError(
            f"train.slot_tokens: {cfg.train.slot_tokens} is less than train.sequence_length {cfg.train.sequence_length}"
        )
    phases.check(cfg.train)
    if cfg.train.source_weights and not any(cfg.train.source_weights):
        raise ConfigError("train.source_weights: all are 0, so no text is left; give one a weight")
    masking.check(cfg.masking.strategy, cfg.masking.mask_share, cfg.masking.random_share)
    masking.check_rate(cfg.masking.schedule, cfg.masking.final_probability)
    module = OBJECTIVES[cfg.train.objective].module
    if issubclass(module, SentencePairs) and not cfg.model.init:
        module.check_family(read_preset(cfg.model.preset)["model_type"])
    check_names(cfg.optim.name, cfg.optim.schedule)
    if cfg.train.budget is None:
        check_schedule(recipe(cfg))
    else:  # the number of steps is yet to be found
        budget.seconds_of(cfg.train.budget)
    extend.check(cfg)
    boards.check(cfg.runtime)


def _begin(cfg: Config, inputs: dict[str, Path], out: Path, place: Place) -> int:
    """Begin where the run that `train.extend_from` names ended; its steps, alike on all processes."""
    begun = extend.begin(cfg, inputs, out) if place.is_main else 0
    return int(place.sum([float(begun)])[0])


def check_tokenizer(init: str, tokenizer: Any) -> list[list[int]]:
    """For each entry `tokenizer` adds to the checkpoint's vocabulary, the checkpoint's ids for it; none if they agree.

    ConfigError when the checkpoint `init` has a tokenizer of its own with another vocabulary that this one's doesn't
    begin with.
    """
    outside.check(init, "model.init")
    try:
        own = load_tokenizer(init)
    except (OSError, ValueError):
        return []
    if len(own) <= len(own.all_special_ids) or own.get_vocab() == tokenizer.get_vocab():
        return []
    added = split_added(own.backend_tokenizer, tokenizer.backend_tokenizer) if own.is_fast else None
    if added is None:
        raise ConfigError(
            f"model.init: {init} has another vocabulary than this run's tokenizer; adopt it: --tokenizer.adopt {init}"
        )
    return added


def load_tokenizer(folder: Path | str) -> Any:
    """The stock tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def recipe(cfg: Config) -> Recipe:
    """The optimizer's settings."""
    fields = cfg.optim.model_dump()
    return Recipe(**fields, steps=cfg.train.steps)


def settings(cfg: Config, steps: int | None = None) -> loop.LoopSettings:
    """The loop's settings; for `steps` steps instead of the whole run."""
    return loop.LoopSettings(
        steps=cfg.train.steps if steps is None else steps,
        slots_per_step=cfg.train.slots_per_step,
        seed=cfg.train.seed,
        eval_every=cfg.train.eval_every,
        checkpoint_every=cfg.runtime.checkpoint_every,
        log_every=cfg.runtime.log_every,
        loader_workers=cfg.runtime.loader_workers,
        progress=cfg.runtime.progress,
        reduction=cfg.train.reduction,
        max_skipped=cfg.train.max_skipped,
        spike_deviations=cfg.train.spike_deviations,
        desync_every=cfg.runtime.desync_every,
        timeout=cfg.runtime.timeout,
    )


def open_record(cfg: Config, place: Place, out: Path) -> Record:
    """The run's record; trackers as asked for."""
    if not place.is_main:
        return Record(None)
    name = out.name.removesuffix(artifact.PARTIAL)
    return Record(out, cfg.runtime.log_every, boards.open_all(cfg.runtime, name, cfg.model_dump(mode="json")))


def _introduce(cfg: Config, place: Place, model: Any, order: Order | PhasedOrder, kernel: str) -> None:
    facts = place.facts()
    train = cfg.train
    lengths = " then ".join(f"{p.slot_tokens} ({p.sequence_length} a sequence)" for p in phases.parts(train))
    lengths = lengths if train.phases else str(train.slot_tokens)
    first = "".join(f"{ramp.slots} for {ramp.steps}, then " for ramp in train.batch_warmup)
    shape = f"{train.steps} steps x {first}{train.slots_per_step} slots x {lengths}"
    size = f"{encoders.count_parameters(model):,} parameters"
    print(
        f"pretrain: {facts['world_size']} process(es) x {facts['threads']} thread(s), {facts['device']}, "
        f"{facts['precision']}, {kernel} | {model.config.model_type}, {size} | "
        f"{shape} = {phases.total_tokens(train):,} tokens, "
        f"{order.steps_in(0)} steps an epoch",
        *(f"  {line}" for line in describe(order.shards)),
        sep="\n",
        flush=True,
    )
