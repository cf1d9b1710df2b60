"""Faults put into a training process before it starts: functions for `launch(..., hook=)`; settings by environment.

FAULT_RANK      which rank has the fault (default 1)
FAULT_CALL      at which call, from 1 (default 1)
"""

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving")


def _target(phase: str) -> tuple[Any, str]:
    """(class, method) that is called in a phase of training."""
    from bertpipe.data.batches import MaskedSlots
    from bertpipe.model.objectives import MaskedLM
    from bertpipe.train.checkpoint import Checkpoints
    from bertpipe.train.evaluation import Evaluation
    from bertpipe.train.optim import Optimizer

    return {
        "data": (MaskedSlots, "slots"),
        "forward": (MaskedLM, "losses"),
        "backward": (Optimizer, "clip"),
        "optimizer": (Optimizer, "update"),
        "evaluation": (Evaluation, "__call__"),
        "saving": (Checkpoints, "save"),
    }[phase]


def at_call(phase: str, act: Callable[[Any], None]) -> None:
    """Have `act(its object)` called after the FAULT_CALL-th call of a phase's method."""
    owner, name = _target(phase)
    inner, calls = getattr(owner, name), []

    @functools.wraps(inner)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        before = phase == "evaluation"  # in its midst rather than behind it
        due = len(calls) == int(os.environ.get("FAULT_CALL", "1"))
        if due and before:
            act(args[0])
        result = inner(*args, **kwargs)
        if due and not before:
            act(args[0])
        return result

    setattr(owner, name, watched)


def _chosen(rank: int) -> bool:
    return rank == int(os.environ.get("FAULT_RANK", "1"))


def send(rank: int) -> None:
    """FAULT_SIGNAL (a name; two joined by + come at once) to this very process in phase FAULT_PHASE."""
    if _chosen(rank):
        names = os.environ["FAULT_SIGNAL"].split("+")
        at_call(os.environ["FAULT_PHASE"], lambda _: [os.kill(os.getpid(), signal.Signals[n]) for n in names] and None)


def flip_a_bit(rank: int) -> None:
    """One bit of one weight, after an optimizer step."""
    if not _chosen(rank):
        return
    import torch

    def act(optimizer: Any) -> None:
        (weight,) = [p for name, p in optimizer.parameters.items() if name.endswith("layer.0.output.dense.weight")]
        weight.data.view(torch.int32)[3, 5] ^= 1

    at_call("optimizer", act)


def skip_a_batch(rank: int) -> None:
    """The loader of one process leaves a step out."""
    if not _chosen(rank):
        return
    from bertpipe.data import batches

    inner = batches._Steps.__getitem__
    batches._Steps.__getitem__ = lambda self, step: inner(self, step + (step >= 7))  # type: ignore[method-assign]


def out_of_memory(rank: int) -> None:
    if not _chosen(rank):
        return
    import torch

    def act(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    at_call("forward", act)


def poison(rank: int) -> None:
    """A NaN in the loss (and so in the gradients) of the slots whose token ids add up to FAULT_SUM; "all": of all."""
    from bertpipe.model.objectives import MaskedLM

    inner, wanted = MaskedLM.losses, os.environ["FAULT_SUM"]

    def losses(self: Any, batch: Any, factors: Any = None) -> Any:
        out = inner(self, batch, factors)
        if self.training and wanted in ("all", str(int(batch.input_ids.sum()))):
            out["loss"] = out["loss"] * float("nan")
        return out

    MaskedLM.losses = losses  # type: ignore[method-assign]


def lose_a_worker(rank: int) -> None:
    """A process that prepares batches ends, hangs, or lives on without its sockets (FAULT_WORKER: exit, hang, deaf), at
    step 8."""
    if _chosen(rank):
        from bertpipe.data import batches

        batches._ignore_signals = worker_fault  # type: ignore[assignment]


def worker_fault(worker: int) -> None:
    """In the worker, before its first batch."""
    from bertpipe.data.batches import MaskedSlots

    inner, kind = MaskedSlots.slots, os.environ["FAULT_WORKER"]

    def slots(self: Any, step: int, first: int, last: int) -> Any:
        if step == 8:
            {"exit": lambda: os._exit(1), "hang": lambda: time.sleep(600), "deaf": close_sockets}[kind]()
        return inner(self, step, first, last)

    MaskedSlots.slots = slots  # type: ignore[method-assign]


def close_sockets() -> None:
    """As the system does when a process ends, a moment before its parent can know."""
    from multiprocessing import resource_sharer

    resource_sharer.DupFd(0)  # it listens from the first of them on
    resource_sharer._resource_sharer._listener.close()  # type: ignore[attr-defined]


def terminate_corpus(rank: int) -> None:
    """SIGTERM to the corpus stage when it begins."""
    from bertpipe.data import corpus

    inner = corpus.run

    def run(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        inner(*args)

    corpus.run = run


def terminate_finetune(rank: int) -> None:
    """SIGTERM to one process while the examples of a task are made."""
    if not _chosen(rank):
        return
    from bertpipe.downstream.finetuning import finetune

    inner = finetune.prepare

    def prepare(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    finetune.prepare = prepare
