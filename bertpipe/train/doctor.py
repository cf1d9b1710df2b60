"""`bertpipe doctor`: what this machine gives a run, in plain lines, each with what to do where something is wrong.

Every look at something is a row of LOOKS that yields Findings; one that fails is a finding itself, so that a broken
installation is described rather than met. Nothing is changed: a file or two are written below runtime.root, or where
it will be, and removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bertpipe import __version__, artifact, floors
from bertpipe.config import Config
from bertpipe.config_files import constraints_file
from bertpipe.errors import BertpipeError, ConfigError
from bertpipe.redaction import redact
from bertpipe.train import surroundings
from bertpipe.train.surroundings import GB, Finding

NAMED = ("torch", "transformers", "tokenizers", "datasets", "accelerate")
"""Packages whose versions are always told."""


def examine(cfg: Config) -> list[Finding]:
    """Every look in turn; one that fails says so."""
    found = []
    for name, look in LOOKS.items():
        try:
            found += list(look(cfg))
        except BertpipeError as error:
            found.append(Finding(name, "wrong", str(error), "see the line itself"))
        except Exception as error:  # whatever a broken library or an unusual machine comes up with
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            state = "fatal" if isinstance(error, ImportError) else "wrong"
            found.append(Finding(name, state, f"can't be looked at ({reason})", "install bertpipe again"))
    return found


def lines(findings: list[Finding]) -> Iterator[str]:
    """As text: state, name, what was found, and below it what to do."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield redact(f"{finding.state:<5}  {finding.name:<{width}}  {finding.text}")
        if finding.advice:
            yield redact(f"{'':<{width + 9}}-> {finding.advice}")


def as_json(findings: list[Finding]) -> str:
    """As a JSON list of objects with the fields of Finding."""
    return redact(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))


def settle(findings: list[Finding]) -> int:
    """0; ConfigError if anything keeps bertpipe from working at all."""
    fatal = [finding.name for finding in findings if finding.state == "fatal"]
    if fatal:
        raise ConfigError(f"doctor: bertpipe can't work here: {', '.join(fatal)}; what to do stands above")
    return 0


# --- versions ---------------------------------------------------------------------------------------------------------


def _python(cfg: Config) -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, bertpipe {__version__}"
    yield Finding("python", "ok", text)


def _packages(cfg: Config) -> Iterator[Finding]:
    tested, named, others = _tested(), [], []
    for name, specifier in _required():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", "fatal", f"{name} is missing", f"pip install '{name}{specifier}'")
            continue
        public = version.partition("+")[0]
        if not specifier.contains(public, prereleases=True):
            advice = f"pip install '{name}{specifier}'"
            yield Finding("packages", "wrong", f"{name} {version}; bertpipe asks for {specifier}", advice)
        elif tested.get(name, public) != public:
            others.append(f"{name} {version} (tested: {tested[name]})")
        if name in NAMED:
            named.append(f"{name} {version}")
    yield Finding("packages", "ok", ", ".join(named))
    if others:
        advice = f"nothing while all goes well; else pip install -c {constraints_file()} bertpipe"
        yield Finding("packages", "note", f"other versions than the tested ones: {', '.join(others)}", advice)
    try:
        floors.check()
    except ConfigError as error:
        yield Finding("packages", "fatal", str(error), "install the version named")


def _tested() -> dict[str, str]:
    path = constraints_file()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {n.lower().replace("_", "-"): v for n, at, v in (line.partition("==") for line in text.split()) if at}


def _required() -> Iterator[tuple[str, Any]]:
    """(name, versions allowed) of what bertpipe needs without its extras."""
    from packaging.requirements import Requirement

    for text in metadata.requires("bertpipe") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name.lower().replace("_", "-"), requirement.specifier


# --- devices ----------------------------------------------------------------------------------------------------------


def _device(cfg: Config) -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and cfg.runtime.device != "cpu" else "cpu")


def _devices(cfg: Config) -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        text = f"cuda:{number} {card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
        unused = cfg.runtime.device == "cpu"
        yield Finding("device", "note" if unused else "ok", text, "runtime.device is cpu; set auto" if unused else "")
    if torch.cuda.is_available():
        return
    state, advice = "ok", ""
    if Path("/dev/nvidia0").exists():
        state = "wrong"
        why = f"built for CUDA {torch.version.cuda}, sees none" if torch.version.cuda else "built without CUDA"
        advice = f"there is a GPU, but torch {torch.__version__} is {why}: install the build that fits the driver"
    elif cfg.runtime.device == "cuda":
        state, advice = "wrong", "runtime.device is cuda; set auto or cpu"
    yield Finding("device", state, f"cpu: {artifact.processor()}", advice)


def _bf16(cfg: Config) -> Iterator[Finding]:
    from bertpipe.train.place import has_fast_bf16

    device = _device(cfg)
    if has_fast_bf16(device):
        yield Finding("bf16", "ok", f"fast on this {device.type}; precision auto takes it")
    else:
        advice = "set train.precision to auto" if cfg.train.precision == "bf16" else ""
        text = f"emulated on this {device.type}, slower than fp32; precision auto takes fp32"
        yield Finding("bf16", "note" if advice else "ok", text, advice)


def _attention(cfg: Config) -> Iterator[Finding]:
    from bertpipe.model import kernels
    from bertpipe.train import estimate
    from bertpipe.train.place import choose_precision

    if cfg.model.init and not Path(cfg.model.init).is_dir():
        yield Finding("attention", "ok", f"depends on {cfg.model.init}, which is not on this machine")
        return
    stock = estimate.on_meta(cfg, estimate.vocabulary_size(cfg)[0]).config
    device = _device(cfg)
    precision = choose_precision(cfg.train.precision, device)
    kernel = kernels.choose(stock, device, precision)
    text = f"{kernel.name} for {stock.model_type} in {precision} on {device.type}"
    if not kernel.obstacle:
        yield Finding("attention", "ok", text)
        return
    state = "wrong" if cfg.runtime.require_fast_attention else "note"
    yield Finding("attention", state, f"{text}, not the fastest", kernel.obstacle)


def _memory(cfg: Config) -> Iterator[Finding]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, limit = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _cgroup("memory.max")
    with contextlib.suppress(OSError, StopIteration):
        rows = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * int(next(row for row in rows if row.startswith("MemAvailable")).split()[1])
    text = f"{free / GB:.1f} GB free of {total / GB:.1f} GB"
    if limit and int(limit[0]) < total:
        text += f", this process group may take {int(limit[0]) / GB:.1f} GB"
    advice = "" if free > 2 * GB else "close other programs; `bertpipe estimate` says what a run takes"
    yield Finding("memory", "note" if advice else "ok", text, advice)
    shared = Path("/dev/shm")
    if cfg.runtime.loader_workers and shared.is_dir() and (room := shutil.disk_usage(shared).free) < GB:
        advice = "give the container more (docker run --shm-size 8g), or set runtime.loader_workers 0"
        yield Finding("memory", "note", f"{room / GB:.2f} GB free in /dev/shm, which loader workers use", advice)


def _cgroup(file: str) -> list[str]:
    """The fields of a limit of this process's control group (Linux, version 2); empty where there is none."""
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / own, Path("/sys/fs/cgroup")):
            if (folder / file).is_file():
                fields = (folder / file).read_text(encoding="utf-8").split()
                return [] if fields[:1] == ["max"] else fields
    return []


def _threads(cfg: Config) -> Iterator[Finding]:
    cores, quota = len(os.sched_getaffinity(0)), _cgroup("cpu.max")
    threads = cfg.runtime.threads or cores
    text = (
        f"{threads} (runtime.threads {cfg.runtime.threads or 'unset'}); {cores} of {os.cpu_count()} cores may be used"
    )
    share = int(quota[0]) / int(quota[1]) if len(quota) == 2 else cores
    state, advice = "ok", ""
    if share < min(threads, cores) - 0.5:
        state, advice = "note", f"the container's quota is {share:.1f} cores; set runtime.threads {max(1, int(share))}"
    elif threads > cores:
        state, advice = "note", f"threads share cores; set runtime.threads {cores} or leave it unset"
    yield Finding("threads", state, text, advice)
    if (number := os.environ.get("OMP_NUM_THREADS")) and number != str(threads):
        yield Finding("threads", "ok", f"OMP_NUM_THREADS={number} is overruled by runtime.threads where torch computes")
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no"):
        advice = "unset it to tokenize on all cores"
        yield Finding("threads", "note", "TOKENIZERS_PARALLELISM is off", advice)


LOOKS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "device": _devices,
    "bf16": _bf16,
    "attention": _attention,
    "threads": _threads,
    "memory": _memory,
    "disk": surroundings.disk,
    "files": surroundings.file_system,
    "network": surroundings.hub,
}
