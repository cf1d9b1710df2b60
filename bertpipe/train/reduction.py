"""How the gradients of a step's slots become the gradient of the step: `fast` or `exact`.

    fast    DistributedDataParallel: a process adds its own slots up as they come, all_reduce adds the processes up.
            How the sum is bracketed depends on the number of processes, and from 4 on, on DDP's buckets.
    exact   every slot's gradient is taken alone and added in one fixed binary tree over the slots of the step,
            whichever process computed it. The bits depend on the slots alone: worlds of 1, 2 and 4 give the same.

The tree joins neighbours: slots 0 and 1, 2 and 3, then those two sums, and so on; what is left over where the slots are
no power of two is added from left to right. A process joins what its own slots allow, so that one sum travels where
its share is a power of two, and a few where it is not. Memory of `exact`: a gradient for each level of the tree
below a process's own slots, and a piece of PIECE numbers for each process. Why not all_reduce: docs/decisions.md, S0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from bertpipe.errors import ConfigError
from bertpipe.train.place import Place

PIECE = 1 << 22  # numbers of a gradient that travel at once (16 MiB)


class Reduction(Protocol):
    """Leaves the gradient of a whole step in `.grad`, alike on every process."""

    module: Any
    """What is called forward with a slot."""
    scale: int
    """What a process multiplies its losses with."""

    def slot(self, number: int, count: int) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of this process's slot `number` of `count`."""

    def finish(self, count: int) -> None:
        """After the backward passes of this process's `count` slots."""


class Fast:
    """DDP, silent on all slots of a process but its last; it averages, so each process scales up by their number."""

    def __init__(self, objective: nn.Module, place: Place):
        self.place, self.scale = place, place.world
        self.module = place.wrap(objective)

    def slot(self, number: int, count: int) -> contextlib.AbstractContextManager[Any]:
        """See Reduction."""
        return self.place.hold_sync(self.module, hold=number + 1 < count)

    def finish(self, count: int) -> None:
        """DDP has done it."""


@dataclass(frozen=True)
class Block:
    """A node of the tree: slots `first` .. `first + size - 1`."""

    first: int
    size: int

    def joins(self, right: Block) -> bool:
        """Whether the tree adds `right`, the block behind this one, to it."""
        return self.size == right.size and self.first % (2 * self.size) == 0


class Tree:
    """Blocks that follow one another, joined as far as they can be, each with its sum: a tensor a parameter."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.sums: list[list[torch.Tensor]] = []

    def push(self, block: Block, total: list[torch.Tensor]) -> None:
        """Add the block behind the last one; sums are added up in place."""
        self.blocks.append(block)
        self.sums.append(total)
        while len(self.blocks) > 1 and self.blocks[-2].joins(self.blocks[-1]):
            right = self.sums.pop()
            if right:
                torch._foreach_add_(self.sums[-1], right)
            self.blocks[-2:] = [Block(self.blocks[-2].first, 2 * self.blocks[-2].size)]

    def root(self) -> list[torch.Tensor]:
        """The sum of all blocks; those that don't join are added from left to right."""
        for total in self.sums[1:]:
            torch._foreach_add_(self.sums[0], total)
        return self.sums[0]


def blocks_of(first: int, last: int) -> list[Block]:
    """The largest nodes of the tree that slots first .. last - 1 make, from left to right."""
    tree = Tree()
    for slot in range(first, last):
        tree.push(Block(slot, 1), [])
    return tree.blocks


class Exact:
    """The fixed tree."""

    scale = 1

    def __init__(self, objective: nn.Module, place: Place):
        self.place, self.module = place, objective.to(place.device)
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        for name, parameter in self.parameters.items():
            if type(parameter.data) is not torch.Tensor:  # a DTensor of FSDP2 or tensor parallelism
                raise ConfigError(
                    f"train.reduction: exact adds whole gradients, and {name} is sharded "
                    f"({type(parameter.data).__name__}); take train.reduction: fast"
                )
        if place.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.tree = Tree()

    @contextlib.contextmanager
    def slot(self, number: int, count: int) -> Iterator[None]:
        """See Reduction."""
        yield
        block = Block(self.place.rank * count + number, 1)
        self.tree.push(block, [self._take(name, parameter) for name, parameter in self.parameters.items()])

    @staticmethod
    def _take(name: str, parameter: nn.Parameter) -> torch.Tensor:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, f"{name} got no gradient from a slot"
        return gradient

    def finish(self, count: int) -> None:
        """See Reduction."""
        own, self.tree = self.tree, Tree()
        parameters = list(self.parameters.values())
        if self.place.world == 1:
            gradients = own.root()
        else:
            every = [blocks_of(rank * count, (rank + 1) * count) for rank in range(self.place.world)]
            gradients = [g for part in _pieces(parameters) for g in self._gather([t[part] for t in own.sums], every)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _gather(self, own: list[list[torch.Tensor]], every: list[list[Block]]) -> list[torch.Tensor]:
        """The whole step's sums of some parameters, from the sums of every process's blocks."""
        shapes = [tensor.shape for tensor in own[0]]
        size, most = sum(shape.numel() for shape in shapes), max(map(len, every))
        sent = own[0][0].new_zeros(most, size)
        for row, total in zip(sent, own, strict=False):
            torch.cat([tensor.flatten() for tensor in total], out=row)
        received = sent.new_empty(self.place.world, most, size)
        dist.all_gather(list(received), sent)
        tree = Tree()
        for rows, blocks in zip(received, every, strict=True):
            for row, block in zip(rows, blocks, strict=False):
                tree.push(block, [row])
        parts = tree.root()[0].split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _pieces(parameters: list[nn.Parameter]) -> Iterator[slice]:
    """Neighbouring parameters of PIECE numbers at most, or a single larger one."""
    first = size = 0
    for number, parameter in enumerate(parameters):
        if number > first and size + parameter.numel() > PIECE:
            yield slice(first, number)
            first, size = number, 0
        size += parameter.numel()
    yield slice(first, len(parameters))


REDUCTIONS: dict[str, type[Fast] | type[Exact]] = {"fast": Fast, "exact": Exact}
