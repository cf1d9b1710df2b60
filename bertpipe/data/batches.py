"""PackedBatch, what every model sees, and the loader that makes them: the one place where data meets torch.

Shapes: T tokens of a slot, S sequences in it (tail padding included), P positions to predict.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bertpipe.data import keyed
from bertpipe.data.masking import Masking, Tokens
from bertpipe.data.order import Order, Pieces
from bertpipe.data.phases import PhasedOrder
from bertpipe.data.shards import TokenShards

BUDGET_SLACK = 32  # predicted positions above the run's highest probability x T that a slot has room for before P grows


@dataclass(frozen=True)
class PackedBatch:
    """One slot: sequences end to end in one row, each seeing itself alone."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each sequence."""
    token_type_ids: torch.Tensor
    """int64 [1, T]"""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]: where each sequence begins and the last ends; tail padding makes sequences of its own."""
    max_seqlen: int
    """Length of the longest sequence, at most."""
    num_sequences: int
    """Real sequences: the first of the S."""
    num_tokens: int
    """Real tokens: the first of the T."""
    predict_index: torch.Tensor | None = None
    """int64 [P]: positions to predict; filled up with 0."""
    predict_labels: torch.Tensor | None = None
    """int64 [P]"""
    predict_weight: torch.Tensor | None = None
    """float32 [P]: 1, or 0 for fill."""
    sequence_labels: torch.Tensor | None = None
    """[num_sequences]: int64 classes or float32 values."""
    group_ids: torch.Tensor | None = None
    """int64 [num_sequences]: choices of one question, windows of one document."""
    example_ids: torch.Tensor | None = None
    """int64 [num_sequences]: which example of the data set each sequence is."""

    def map(self, function: Any) -> PackedBatch:
        """The same batch with `function` applied to every tensor."""
        tensors = {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by torch's loader)."""
        return self.map(torch.Tensor.pin_memory)


def pack(
    input_ids: list[np.ndarray] | np.ndarray,
    lengths: np.ndarray,
    total: int,
    pad_id: int,
    longest: int,
    token_type_ids: np.ndarray | None = None,
    **more: torch.Tensor | None,
) -> PackedBatch:
    """Lay sequences end to end into a row of `total` tokens.

    Args:
        input_ids: int [sum of lengths], special tokens included.
        lengths: int [S] of the sequences.
        total: T; what the sequences leave is padded, in sequences of at most `longest`.
        pad_id: id of [PAD].
        longest: the batch's `max_seqlen`.
        token_type_ids: int [sum of lengths], or None for 0.
        more: further fields of PackedBatch.
    """
    used = int(lengths.sum())
    assert used <= total and (len(lengths) == 0 or lengths.max() <= longest)
    full, rest = divmod(total - used, longest)
    every = np.concatenate([lengths, np.full(full, longest), np.full(int(rest > 0), rest)]).astype(np.int64)
    starts = np.cumsum(every) - every
    row = np.full((1, total), pad_id, np.int64)
    row[0, :used] = input_ids
    types = np.zeros((1, total), np.int64)
    if token_type_ids is not None:
        types[0, :used] = token_type_ids
    return PackedBatch(
        input_ids=torch.from_numpy(row),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, every))[None],
        token_type_ids=torch.from_numpy(types),
        cu_seqlens=torch.from_numpy(np.append(starts, total).astype(np.int32)),
        max_seqlen=int(longest),
        num_sequences=len(lengths),
        num_tokens=used,
        **more,
    )


class StepSource(Protocol):
    """Where a loop's batches come from."""

    def slots(self, step: int, first: int, last: int) -> list[PackedBatch]:
        """Slots first .. last - 1 of a step."""


class MaskedSlots:
    """Slots of an Order with masks drawn anew each epoch: the sampler of masked language modelling."""

    def __init__(self, order: Order | PhasedOrder, masking: Masking, seed: int):
        self.order, self.masking, self.seed = order, masking, seed

    def slots(self, step: int, first: int, last: int) -> list[PackedBatch]:
        """Slots first .. last - 1 of a step of the run."""
        epoch, _ = self.order.locate(step)
        order, masking = self.order.at(step), self.masking.at(step)
        return [
            masked_batch(order.shards, p, masking, self.seed, epoch, order.slot_tokens, order.sequence_length)
            for p in order.slots(step)[first:last]
        ]


def masked_batch(
    shards: TokenShards, pieces: Pieces, masking: Masking, seed: int, epoch: int, total: int, longest: int
) -> PackedBatch:
    """A slot of `total` tokens: [CLS] piece [SEP] [CLS] piece [SEP] ..., masked; of pairs [CLS] A [SEP] B [SEP] ...

    The two segments of a pair are masked each by itself, so that no word reaches from one into the other.
    """
    per_sequence = 1 if pieces.labels is None else 2
    second = np.arange(len(pieces.length)) % per_sequence == 1
    costs = pieces.length + 2 - second  # [SEP] behind each piece, [CLS] before a sequence
    ends = np.cumsum(costs)
    body = np.ones(int(costs.sum()), bool)
    body[(ends - costs)[~second]] = body[ends - 1] = False
    ids, places = _read(shards, pieces)
    row = np.empty(len(body), np.int64)
    row[(ends - costs)[~second]], row[ends - 1] = shards.special_ids["cls"], shards.special_ids["sep"]
    row[body] = ids
    positions, shown = masking.draw(Tokens(ids, places, pieces.length), seed, epoch)
    index = np.flatnonzero(body)[positions]
    row[index] = shown
    room = max(int(np.ceil(masking.highest * total)) + BUDGET_SLACK, len(index))
    return pack(
        row,
        costs.reshape(-1, per_sequence).sum(1),
        total,
        shards.special_ids["pad"],
        longest,
        None if pieces.labels is None else np.repeat(second, costs),
        sequence_labels=None if pieces.labels is None else torch.from_numpy(pieces.labels),
        predict_index=_filled(index, room),
        predict_labels=_filled(ids[positions], room),
        predict_weight=_filled(np.ones(len(index), np.float32), room),
    )


def _filled(values: np.ndarray, room: int) -> torch.Tensor:
    """`values` [n], then zeros, [room]."""
    row = np.zeros(room, values.dtype)
    row[: len(values)] = values
    return torch.from_numpy(row)


def _read(shards: TokenShards, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int64 [n], and their places in the corpus, int64 [n]."""
    starts = np.cumsum(pieces.length) - pieces.length
    within = np.arange(int(pieces.length.sum())) + np.repeat(pieces.start - starts, pieces.length)
    shard = np.repeat(pieces.shard, pieces.length)
    ids = np.empty(len(within), np.int64)
    for number in np.flatnonzero(np.bincount(pieces.shard)):
        here = shard == number
        ids[here] = np.asarray(shards.tokens(int(number)))[within[here]]
    return ids, within + np.asarray(shards.first_token)[shard]


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of a task, special tokens included. Each is one sequence, or `choices` of them in a row."""

    input_ids: list[np.ndarray]
    """Of each sequence int64 [length]."""
    token_type_ids: list[np.ndarray]
    """Of each sequence int64 [length]."""
    labels: np.ndarray | list[np.ndarray] | None
    """Of each example: int64 class, float32 value, float32 [L] or int64 [2]; with `positions` int64 [positions of the
    sequence]. None without gold labels."""
    positions: list[np.ndarray] | None = None
    """Of each sequence, int64: the tokens that are labelled, where not the sequence is."""
    choices: int = 1
    """Sequences an example; more than 1 not with `positions`."""

    def __len__(self) -> int:
        return len(self.input_ids) // self.choices

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: tokens of each, of all its sequences."""
        lengths = np.array([len(ids) for ids in self.input_ids], np.int64)
        return lengths.reshape(-1, self.choices).sum(1)


class ExampleSlots:
    """Batches of examples, shuffled anew each epoch, spread over slots: the sampler of fine-tuning.

    A step is `batch_size` examples (an epoch's last step may have fewer), its slots as long as they need to be.
    """

    def __init__(self, examples: Examples, batch_size: int, slots_per_step: int, seed: int, pad_id: int):
        self.examples, self.batch_size, self.slots_per_step = examples, batch_size, slots_per_step
        self.seed, self.pad_id = seed, pad_id
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self.shuffled: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def slots(self, step: int, first: int, last: int) -> list[PackedBatch]:
        """Slots first .. last - 1 of a step of the run."""
        epoch, step = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        return [pack_examples(self.examples, part, self.pad_id) for part in self._split(chosen)[first:last]]

    def _order(self, epoch: int) -> np.ndarray:
        """The examples of an epoch as they follow one another; kept, for sorting many takes milliseconds."""
        if self.shuffled[0] != epoch:
            self.shuffled = epoch, keyed.permutation(keyed.key(self.seed, "examples", epoch), len(self.examples))
        return self.shuffled[1]

    def _split(self, chosen: np.ndarray) -> list[np.ndarray]:
        return np.array_split(chosen, self.slots_per_step)


def pack_examples(examples: Examples, chosen: np.ndarray, pad_id: int, labelled: bool = True) -> PackedBatch:
    """One slot of the examples `chosen`, int [S], in that order; an empty slot is one padding token.

    With `positions` the batch predicts at those, as in masked language modelling; else it has `sequence_labels`, one an
    example, and with several choices `group_ids`. Without `labelled` the labels are left out.
    """
    chosen = np.asarray(chosen, np.int64)
    sequences = (chosen[:, None] * examples.choices + np.arange(examples.choices)).ravel()
    ids = [examples.input_ids[i] for i in sequences]
    lengths = np.array([len(x) for x in ids], np.int64)
    empty = np.zeros(0, np.int64)
    more: dict[str, torch.Tensor | None] = {"example_ids": torch.from_numpy(np.repeat(chosen, examples.choices))}
    if examples.positions is not None:
        more |= _predicted(examples, sequences, lengths, labelled)
    elif labelled and examples.labels is not None:
        more["sequence_labels"] = torch.from_numpy(np.asarray(examples.labels)[chosen])
    if examples.choices > 1:
        more["group_ids"] = torch.from_numpy(np.repeat(np.arange(len(chosen)), examples.choices))
    return pack(
        np.concatenate(ids or [empty]),
        lengths,
        max(1, int(lengths.sum())),
        pad_id,
        max(1, int(lengths.max(initial=0))),
        np.concatenate([examples.token_type_ids[i] for i in sequences] or [empty]),
        **more,
    )


def _predicted(
    examples: Examples, sequences: np.ndarray, lengths: np.ndarray, labelled: bool
) -> dict[str, torch.Tensor | None]:
    """Where the labelled tokens of these sequences stand in the row, and their labels; one of weight 0 behind them, so
    that an empty slot has something to send through the head."""
    assert examples.positions is not None and examples.choices == 1
    starts = np.cumsum(lengths) - lengths
    fill = np.zeros(1, np.int64)
    index = [examples.positions[i] + start for i, start in zip(sequences, starts, strict=True)]
    labels = [examples.labels[i] for i in sequences] if labelled and examples.labels is not None else None
    weight = np.ones(sum(map(len, index)) + 1, np.float32)
    weight[-1] = 0
    return {
        "predict_index": torch.from_numpy(np.concatenate([*index, fill])),
        "predict_labels": None if labels is None else torch.from_numpy(np.concatenate([*labels, fill])),
        "predict_weight": torch.from_numpy(weight),
    }


class _Steps(Dataset):
    """The slots of this process for each step, as torch's loader wants them."""

    def __init__(self, source: StepSource, first: int, last: int):
        self.source, self.first, self.last = source, first, last

    def __getitem__(self, step: int) -> tuple[int, list[PackedBatch]]:
        return step, self.source.slots(step, self.first, self.last)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole group; the training process stops its workers when it is done with them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load(
    source: StepSource, steps: range, first: int, last: int, workers: int, pin: bool, timeout: float = 0.0
) -> Generator[tuple[int, list[PackedBatch]], None, None]:
    """Each of `steps` with its slots first .. last - 1, prepared ahead by `workers` processes (0: in line).

    Closing it ends the workers. A worker that dies, or answers for `timeout` seconds (0: ever) no more, is a
    RuntimeError that names torch's DataLoader.
    """
    batches = DataLoader(
        _Steps(source, first, last),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=4 if workers else None,
        timeout=timeout if workers else 0.0,
        worker_init_fn=_ignore_signals if workers else None,
    )
    try:
        yield from batches
    except (OSError, EOFError) as error:
        if not workers or "DataLoader worker" in str(error):  # of the source itself
            raise
        # a dying worker's sockets close before it is seen to be dead
        raise RuntimeError(f"DataLoader: a worker can't be reached: {error}") from error
