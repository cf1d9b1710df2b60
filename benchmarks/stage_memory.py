"""Does the memory of the data stages stay flat when the text is given four times over?

    python benchmarks/stage_memory.py GLOB [--workers N]

Runs `bertpipe corpus`, `tokenizer` and `shards` once on the files of GLOB and once on the same files four times over,
duplicates kept, so that every stage really sees four times the text. The figure is the peak of the anonymous memory
(RssAnon: not the page cache behind mapped files) of the command and all its worker processes together, read from
/proc every 20 ms. Prints a table and writes results/stage_memory-<date>.json. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bertpipe.artifact import environment

STAGES = ("corpus", "tokenizer", "shards")
CONFIG = """
corpus: {deduplicate: false}
tokenizer: {vocab_size: 8192, sample_bytes: 20000000}
"""


def tree(root: int) -> list[int]:
    """Process ids of `root` and everything below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def anonymous(process: int) -> int:
    """RssAnon of a process in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(stage: str, arguments: list[str]) -> tuple[int, float]:
    """(peak bytes, seconds) of one command."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "bertpipe.cli", stage, *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(anonymous(p) for p in tree(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{stage} failed")
    return peak, time.monotonic() - started


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("glob", help="files of text, as corpus.sources takes them")
    reader.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = reader.parse_args()
    peaks: dict[str, dict[str, dict[str, float]]] = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG)
        for times in (1, 4):
            arguments = ["--config", str(config), "--runtime.root", f"{folder}/{times}", "--runtime.workers"]
            arguments += [str(options.workers), "--corpus.sources", *[options.glob] * times]
            for stage in STAGES:
                peak, seconds = measure(stage, arguments)
                peaks[stage][str(times)] = {"peak_bytes": peak, "wall_seconds": round(seconds, 1)}
    print(f"{'stage':<10} {'x 1':>10} {'x 4':>10} {'growth':>8}")
    for stage, row in peaks.items():
        one, four = row["1"]["peak_bytes"], row["4"]["peak_bytes"]
        print(f"{stage:<10} {one / 2**20:>6.0f} MiB {four / 2**20:>6.0f} MiB {four / one - 1:>+8.1%}")
    machine = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    today = datetime.date.today().isoformat()
    result = {"date": today, "machine": machine, "versions": environment(), "workers": options.workers, "peaks": peaks}
    target = Path(__file__).parent / "results" / f"stage_memory-{today}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
