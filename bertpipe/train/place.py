"""Where a run runs: processes, device, threads, precision - resolved before the first step and recorded.

Accelerate launches, places and wraps. Threads and precision are set here, because `accelerate launch` exports its own
(OMP_NUM_THREADS=1, ACCELERATE_MIXED_PRECISION), and autocast belongs to the objectives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from bertpipe.config import RuntimeConfig
from bertpipe.errors import ConfigError
from bertpipe.train.peers import Peers
from bertpipe.train.signals import Stop, Stopped, catching


class Place:
    """The processes of this run and this one's share of the machine.

    Raises ConfigError when CUDA is asked for and missing, or when the launcher announced another number of processes
    than came together.
    """

    def __init__(self, runtime: RuntimeConfig, precision: str):
        cuda = torch.cuda.is_available() if runtime.device == "auto" else runtime.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ConfigError("runtime.device: cuda is not available here; use cpu or auto")
        waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=runtime.timeout))
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=[waiting])
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if announced != self.world:
            raise ConfigError(
                f"the launcher announced WORLD_SIZE={announced} but {self.world} process(es) came together"
            )
        self.stop = Stop()
        self.peers = Peers(self.rank, self.world) if self.world > 1 else None
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.threads = runtime.threads or max(1, len(os.sched_getaffinity(0)) // local)
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        self.device = self.accelerator.device
        self.precision = choose_precision(precision, self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, slots_per_step: int, setting: str) -> tuple[int, int]:
        """This process's slots, first .. last - 1; ConfigError lists the legal numbers when they can't be shared."""
        _check_share(self.world, slots_per_step, setting)
        each = slots_per_step // self.world
        return self.rank * each, (self.rank + 1) * each

    def doing(self, what: str) -> None:
        """Note what this process does, for the message should another be lost meanwhile."""
        if self.peers is not None:
            self.peers.doing = what

    def watched(self) -> contextlib.AbstractContextManager[Any]:
        """Around work that waits for other processes: a RunError names the one that is lost."""
        return contextlib.nullcontext() if self.peers is None else self.peers.watched()

    def together(self) -> contextlib.AbstractContextManager[Any]:
        """Around all work: with several processes a signal is noted, and all of them stop at the next step or check.

        One that ended by itself the others would wait for in vain.
        """
        return catching(self.stop) if self.world > 1 else contextlib.nullcontext()

    def check_stop(self) -> None:
        """Stopped, on all processes, if any of them was asked to stop; all of them call it."""
        if any(self.sum([float(self.stop.asked)])):
            raise Stopped

    def sum(self, values: list[float] | torch.Tensor) -> list[float]:
        """Elementwise sum over the processes."""
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        return (self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor).tolist()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move to the device; wrapped for several processes."""
        return self.accelerator.prepare(module)

    def hold_sync(self, module: nn.Module, hold: bool) -> contextlib.AbstractContextManager[Any]:
        """While `hold`, backward passes keep their gradients to this process."""
        return self.accelerator.no_sync(module) if hold and self.world > 1 else contextlib.nullcontext()

    def barrier(self) -> None:
        """Wait for every process."""
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Let go of what `wrap` made, before another model is wrapped."""
        self.accelerator.free_memory()

    def facts(self) -> dict[str, Any]:
        """What results may depend on beyond the recipe."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"world_size": self.world, "device": name, "threads": self.threads, "precision": self.precision}


def check_processes(slots_per_step: int, setting: str) -> None:
    """ConfigError when the processes that the launcher announced can't share the slots.

    To be called before they meet in a `Place`: one that is refused there leaves while others are still joining.
    """
    _check_share(int(os.environ.get("WORLD_SIZE", "1")), slots_per_step, setting)


def _check_share(world: int, slots_per_step: int, setting: str) -> None:
    if slots_per_step % world:
        legal = [str(n) for n in range(1, slots_per_step + 1) if slots_per_step % n == 0]
        raise ConfigError(
            f"{world} processes can't share {setting} = {slots_per_step} slots evenly; "
            f"run {', '.join(legal)} processes or change {setting}"
        )


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for reuse rather than give them back to the kernel at once.

    A training step frees and asks for the same large tensors over and over; the page faults of that took 13 % of a
    BERT-mini step on CPU (docs/decisions.md). Does nothing on other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def choose_precision(precision: str, device: torch.device) -> str:
    """What a setting comes to: `auto` is bf16 where that is fast."""
    return precision if precision != "auto" else ("bf16" if has_fast_bf16(device) else "fp32")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
