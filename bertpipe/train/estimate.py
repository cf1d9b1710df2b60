"""What a pretraining run will take: memory, tokens, FLOPs and hours, worked out before step 1, without any artifact.

The model itself is built on the meta device, so that a large one costs nothing. Activations are counted, not reckoned:
models of the same width with one and two layers run a few sequences forward, and what autograd keeps is linear in the
layers and in the tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bertpipe import outside
from bertpipe.config import Config
from bertpipe.data import phases
from bertpipe.data.batches import BUDGET_SLACK, PackedBatch, pack
from bertpipe.data.tokenizer import read_vocabulary
from bertpipe.model import encoders
from bertpipe.model.objectives import OBJECTIVES, MaskedLM
from bertpipe.train import pretrain
from bertpipe.train.flops import MATMUL, count, time_matmul
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place

ASSUMED_MFU = 0.5
GIB = 1 << 30
COUNTED_VOCABULARY = 512  # of the models that activations are counted on; logits are reckoned
LOGIT_BYTES = {"bf16": 4, "fp32": 8}  # a logit and its gradient (model/cross_entropy.py)
TIMED_SLOTS = 3
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}  # where they stand makes no difference here


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What a slot's forward keeps for its backward, logits and low-precision copies of the weights included."""
    copies: int
    """Of weights and optimizer, in a checkpoint that is being written; beside a GPU they are in the host's memory."""

    @property
    def peak(self) -> int:
        """In the backward pass, beside which a checkpoint is written."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.copies


def lines(cfg: Config, measure: bool) -> list[str]:
    """The estimate of a run as text; ConfigError for settings that can't be trained with."""
    pretrain.check(cfg)
    train, place = cfg.train, Place(cfg.runtime, cfg.train.precision)
    vocabulary, origin = vocabulary_size(cfg)
    model = on_meta(cfg, vocabulary)
    parameters = encoders.count_parameters(model)
    memory = memory_of(cfg, model, place.precision, place.device.type == "cpu")
    recomputed = ", recomputed layer by layer" if cfg.runtime.gradient_checkpointing else ""
    parts = [part for part in phases.parts(train) if part.last > part.first]
    flops = sum(_flops_of(cfg, model, part) for part in parts)
    shape = " then ".join(
        f"{part.last - part.first:,} steps x {train.slots_per_step} slots x {part.slot_tokens:,} tokens "
        f"(sequences up to {part.sequence_length})"
        for part in parts
    )
    ramp = f", fewer slots for the first {sum(r.steps for r in train.batch_warmup):,} steps" * bool(train.batch_warmup)
    return [
        f"model    {model.config.model_type}, {parameters:,} parameters, vocabulary {vocabulary:,} ({origin})",
        f"memory   {_gib(memory.peak)} at the peak, a process: weights {_gib(memory.weights)}, gradients "
        f"{_gib(memory.gradients)}, {cfg.optim.name} {_gib(memory.optimizer)}, activations of a slot "
        f"{_gib(memory.activations)} ({place.precision}{recomputed}), a checkpoint being written "
        f"{_gib(memory.copies)}; Python and its libraries come on top",
        f"tokens   {phases.total_tokens(train):,}: {shape}{ramp}",
        f"FLOPs    {flops:.3g} of the model in all, forward and backward, every sequence taken to be full",
        *_hours(cfg, place, parts, flops, vocabulary, measure),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def vocabulary_size(cfg: Config) -> tuple[int, str]:
    """Entries of the tokenizer that the run will have, as far as settings and files tell, and where that comes from."""
    name = cfg.model.init or cfg.tokenizer.adopt
    if cfg.tokenizer.adopt and Path(cfg.tokenizer.adopt).is_file():
        return len(read_vocabulary(Path(cfg.tokenizer.adopt))), cfg.tokenizer.adopt
    if name and Path(name).is_dir():
        return len(pretrain.load_tokenizer(name)), name
    if name:
        return cfg.tokenizer.vocab_size, f"taken to be tokenizer.vocab_size; {name} is not on this machine"
    return cfg.tokenizer.vocab_size, "tokenizer.vocab_size"


def on_meta(cfg: Config, vocabulary: int) -> Any:
    """The model that the run will train, without storage."""
    import transformers

    auto_class = OBJECTIVES[cfg.train.objective].auto_class
    with torch.device("meta"):
        if not cfg.model.init:
            length, seed = cfg.train.sequence_length, cfg.train.seed
            return encoders.build(cfg.model, vocabulary, SPECIAL_IDS, length, seed, auto_class)
        outside.check(cfg.model.init, "model.init")
        stock = transformers.AutoConfig.from_pretrained(cfg.model.init, **cfg.model.overrides)
        encoders.set_dropout(stock, cfg.model.dropout)
        model = getattr(transformers, auto_class).from_config(stock, attn_implementation="eager", dtype=torch.float32)
    encoders.check_length(model, cfg.train.sequence_length, "train.sequence_length")
    return encoders.settle(model)


def memory_of(cfg: Config, model: Any, precision: str, on_cpu: bool) -> Memory:
    """Bytes at the peak of a step on one process; the phase with the largest activations counts."""
    weights = 4 * encoders.count_parameters(model)
    activations = 0
    for part in phases.parts(cfg.train):
        kept = count_activations(model, precision, part.sequence_length, cfg.masking.probability)
        activations = max(activations, kept.of(part.slot_tokens, cfg.runtime.gradient_checkpointing))
    optimizer = optimizer_bytes(model, pretrain.recipe(cfg))
    gradients = weights * held_gradients(cfg.train.slots_per_step, cfg.train.reduction)
    return Memory(weights, gradients, optimizer, activations, (weights + optimizer) * on_cpu)


def held_gradients(slots: int, reduction: str) -> int:
    """Whole gradients in memory at once while one process has `slots` slots of a step: for exact, the tree's sums."""
    return max(joined.bit_count() for joined in range(slots)) + 1 if reduction == "exact" else 1


class _Small(nn.Module):
    """The names of a model's parameters, each with two entries a dimension."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.small = {
            name: nn.Parameter(torch.ones((2,) * p.ndim), p.requires_grad) for name, p in model.named_parameters()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.small.items()


def optimizer_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Bytes of an optimizer's state for `model`: one step of it on small parameters tells what it keeps for each."""
    small = _Small(model)
    optimizer = Optimizer(small, recipe)
    for p in small.small.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    state = {key: (key.split("//")[0], tensor) for key, tensor in optimizer.state().items()}
    return sum(4 * sizes[name] for name, tensor in state.values() if tensor.shape == small.small[name].shape)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward: linear in the tokens and in the layers."""

    layers: int
    hidden_size: int
    vocabulary: int
    share: float
    """Of the tokens that are predicted."""
    precision: str
    """bf16 or fp32."""
    a_token: float
    a_layer_token: float
    a_layer: float
    rest: float

    def of(self, tokens: int, recomputed: bool = False) -> int:
        """Bytes for a slot; `recomputed`: with gradient checkpointing, which keeps the input of each layer alone."""
        bytes_kept = self.rest + tokens * self.a_token + self.logits(tokens) + self.layers * self.a_layer
        if recomputed:
            return int(bytes_kept + tokens * (self.layers * 4 * self.hidden_size + self.a_layer_token))
        return int(bytes_kept + tokens * self.layers * self.a_layer_token)

    def logits(self, tokens: int) -> float:
        """Bytes of the logits and of what comes of them."""
        return LOGIT_BYTES[self.precision] * self.vocabulary * (self.share * tokens + BUDGET_SLACK)


def count_activations(model: Any, precision: str, length: int, share: float) -> Activations:
    """Count what models of `model`'s width keep for 2 and 4 sequences of `length` tokens, with 1 and 2 layers.

    All with a masked-LM head alone: a second part of an objective keeps little, one row a sequence.
    """
    from transformers import AutoModelForMaskedLM

    config, kept = model.config, {}
    for layers in (1, 2):
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers, shallow.vocab_size = layers, COUNTED_VOCABULARY
        if getattr(shallow, "layer_types", None):
            shallow.layer_types = shallow.layer_types[:layers]
        stock = AutoModelForMaskedLM.from_config(shallow, attn_implementation="eager", dtype=torch.float32)
        objective = MaskedLM(encoders.make_packed(stock), precision).train()
        for number in (2, 4):
            kept[layers, number] = _kept_bytes(objective, random_batch(number * length, length, COUNTED_VOCABULARY))
    tokens = 2 * length
    a_layer_token = (kept[2, 4] - kept[2, 2] - kept[1, 4] + kept[1, 2]) / tokens
    a_token = (kept[1, 4] - kept[1, 2]) / tokens - a_layer_token
    a_layer = kept[2, 2] - kept[1, 2] - tokens * a_layer_token
    rest = kept[1, 2] - a_layer - tokens * (a_token + a_layer_token)
    if precision == "bf16":  # the copy of the output matrix, which the counted model has for a small vocabulary
        rest += 2 * config.hidden_size * (config.vocab_size - COUNTED_VOCABULARY)
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size
    return Activations(*sizes, share, precision, a_token, a_layer_token, a_layer, rest)


def _kept_bytes(objective: nn.Module, batch: PackedBatch) -> int:
    """Bytes of the storages that autograd keeps in one forward pass, the parameters' own left out."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = objective(batch)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for address, size in sizes.items() if address not in own)


def random_batch(tokens: int, length: int, vocabulary: int, share: float = 0.15) -> PackedBatch:
    """A slot of `tokens` random tokens in sequences of `length`, a share of them predicted."""
    rng = np.random.default_rng(0)
    lengths = np.array([length] * (tokens // length) + [tokens % length] * bool(tokens % length), np.int64)
    index = torch.arange(0, tokens, max(1, round(1 / share)))
    ids = rng.integers(len(SPECIAL_IDS), vocabulary, tokens)
    return pack(
        ids,
        lengths,
        tokens,
        SPECIAL_IDS["pad"],
        length,
        predict_index=index,
        predict_labels=torch.from_numpy(ids)[index],
        predict_weight=torch.ones(len(index)),
    )


def model_flops(model: Any, tokens: int, sequence_length: int, predict_share: float) -> float:
    """FLOPs of forward and backward over `tokens` in full sequences (Kaplan et al. 2020, section 2.1).

    6 for each weight of a matrix product and each token it sees - the masked-LM head sees the predicted share alone -
    and 12 x width for each pair of positions and layer. Recomputation and padding count nothing.
    """
    counted = count(model)
    per_sequence = counted.of(torch.tensor([sequence_length]), 0)
    return tokens * per_sequence / sequence_length + 6.0 * counted.per_prediction * predict_share * tokens


def _flops_of(cfg: Config, model: Any, part: phases.Part) -> float:
    return model_flops(model, phases.tokens_of(cfg.train, part), part.sequence_length, cfg.masking.probability)


def _hours(
    cfg: Config, place: Place, parts: list[phases.Part], flops: float, vocabulary: int, measure: bool
) -> list[str]:
    """Hours on this machine as one process, from a matrix product, or from slots of random tokens timed here."""
    if not measure:
        rate = time_matmul(place.device, place.precision)
        return [
            f"hours    {flops / (rate * ASSUMED_MFU) / 3600:,.1f} on this machine as one process, evaluations and "
            f"checkpoints left out: assumes {ASSUMED_MFU:.0%} of the {rate / 1e12:.2f} TFLOP/s that a "
            f"{place.precision} product of {' x '.join(map(str, MATMUL))} ran at just now; --measure times real slots"
        ]
    seconds, said = 0.0, []
    for part in parts:
        slot, update = time_slots(cfg, place, part, vocabulary)
        slots = phases.tokens_of(cfg.train, part) // part.slot_tokens
        seconds += slots * slot + (part.last - part.first) * update
        said.append(
            f"{slot:.3g} s a slot of {part.slot_tokens:,} ({part.sequence_length}) and {update:.3g} s an update"
        )
    return [
        f"hours    {seconds / 3600:,.1f} on this machine as one process, evaluations and checkpoints left out: "
        f"{', '.join(said)} (medians of {TIMED_SLOTS}, random tokens)"
    ]


def _now(place: Place) -> float:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter()


def time_slots(cfg: Config, place: Place, part: phases.Part, vocabulary: int) -> tuple[float, float]:
    """Seconds of a slot's forward and backward and of an optimizer step: medians, after one of each to warm up."""
    model = encoders.build(cfg.model, vocabulary, SPECIAL_IDS, cfg.train.sequence_length, cfg.train.seed)
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing)
    objective = MaskedLM(model, place.precision).to(place.device).train()
    optimizer = Optimizer(model, pretrain.recipe(cfg))
    batch = random_batch(part.slot_tokens, part.sequence_length, vocabulary, cfg.masking.probability).to(place.device)
    slots, updates = [], []
    for _ in range(TIMED_SLOTS + 1):
        started = _now(place)
        out = objective(batch)
        (out["loss"] / max(1, objective.count(batch))).backward()
        slots.append(_now(place) - started)
        started = _now(place)
        optimizer.set_lr(0)
        optimizer.step()
        updates.append(_now(place) - started)
    return float(np.median(slots[1:])), float(np.median(updates[1:]))
