"""`make torture`: the long reliability tier, its table, and the page that keeps it.

    python -m tests.torture                         everything, two hours at most on 2 idle cores
    python -m tests.torture kills signals --kills 9 some parts, some of the numbers

Each part's outcome is kept in benchmarks/results/torture-<date>.json as soon as it is known, beside the machine and the
load, and docs/results/reliability.md is written from that file; so parts may be run one by one on one day.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertpipe.artifact import environment, processor, write_json
from tests import faults
from tests.kills import WORLDS, pretrain, steps_of, survive
from tests.runs import make_shards, only

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "reliability.md"
SHORT_TIER = ("faults", "exact", "kills", "resume", "checkpoint", "checkpoint_damage", "crash_points")
SETTING = (
    "BERT 2 x 32, dropout 0.1, Muon, `train.reduction: exact`, a checkpoint each 5 of 30 steps, one thread a process"
)


def kills(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """F01, E4: random kill -9 in each world, and with a world drawn anew at each start."""
    shards, undisturbed, seconds = _undisturbed(work)
    drawn: dict[str, Callable[[random.Random], int]] = {str(world): lambda _, world=world: world for world in WORLDS}
    drawn["any"] = lambda rng: rng.choice(WORLDS)
    found = {}
    for name, world in drawn.items():
        seed, folder = time.time_ns(), work / f"world-{name}"
        longest = seconds * (1.5 if name == "any" else max(1.0, int(name) / 2))
        campaign = survive(shards, folder, undisturbed, options.kills, longest, world, seed)
        found[name] = vars(campaign) | {"seed": seed}
        print(
            f"  world {name}: {campaign.kills} kills, {campaign.runs} runs ended with the undisturbed bits", flush=True
        )
    return found


def _undisturbed(work: Path) -> tuple[Path, Path, float]:
    """The shards, the run of one process, and its seconds with a warm launch server."""
    shards = make_shards(_new(work / "made"), "exact")
    for name in ("first", "second"):
        root, started = work / name / "runs", time.monotonic()
        pretrain(shards, root, 1).done()
    return shards, only(root, "pretrain"), time.monotonic() - started


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def signals(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """F06: SIGTERM to one of two ranks at random calls of each phase; nothing that was trained may be lost."""
    shards, rng = make_shards(_new(work / "made"), "exact"), random.Random(time.time_ns())
    found: dict[str, Any] = {}
    for phase in faults.PHASES:
        lost = []
        for number in range(options.signals):
            root = work / f"{phase}-{number}" / "runs"
            rank = 0 if phase == "saving" else rng.randrange(2)
            most = {"evaluation": 2, "saving": 5}.get(phase, 25)
            fault = {"FAULT_PHASE": phase, "FAULT_CALL": str(rng.randint(1, most)), "FAULT_RANK": str(rank)}
            started = pretrain(shards, root, 2, hook=faults.send, FAULT_SIGNAL="SIGTERM", **fault)
            assert started.wait() == [130, 130], f"{fault}\n{started.text()}"
            newest = sorted(root.glob("pretrain-*.partial/checkpoints/step-????????"))[-1]
            lost.append(steps_of(root)[-1] - int(newest.name.removeprefix("step-")))
        found[phase] = {"stopped": len(lost), "most_lost": max(lost)}
        print(f"  {phase}: {len(lost)} of {options.signals} stopped, at most {max(lost)} steps lost", flush=True)
    return found


def long_tests(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything marked `torture`: crash points, power cuts, flipped bits, fuzzing, the order's state machine."""
    _new(work)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "torture", f"--junitxml={work / 'tests.xml'}"]
    command += ["-k", options.only] if options.only else []
    code = subprocess.call(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = {"exit_code": code, "tests": options.before.get("tests", {}) if options.only else {}}
    for case in ElementTree.parse(work / "tests.xml").iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        passed = not [child for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found["tests"][name] = {"passed": passed, "seconds": float(case.get("time", 0)), **properties}
    return found


def speed(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Start to the first step, the price of a checkpoint and of exact: the benchmarks' own figures."""
    found = {}
    for name, key in (
        ("plan_start", "seconds"),
        ("checkpoint_cost", "share_every_5_minutes"),
        ("processes_speed", "price_of_exact"),
    ):
        out = _new(work / name)
        subprocess.check_call([sys.executable, f"benchmarks/{name}.py", "--out", str(out)], cwd=ROOT)
        (result,) = out.glob("*.json")
        found[name] = json.loads(result.read_text())[key]
        (ROOT / "benchmarks" / "results" / result.name).write_text(result.read_text())
    return found


def repeats(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The short tier's reliability tests again and again: how many runs of it failed. Ctrl-C ends them early; the next
    call with the same code goes on from there."""
    files = [f"tests/train/test_{name}.py" for name in SHORT_TIER]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *files]
    command += ["-m", "not slow and not torture", "-p", "no:cacheprovider"]
    environment, code = os.environ | {"OMP_NUM_THREADS": "1"}, _code()
    before = options.before if options.before.get("code") == code else {}
    runs, failed = before.get("runs", 0), before.get("failed", 0)
    with contextlib.suppress(KeyboardInterrupt):
        while runs < options.repeats:
            failed += subprocess.call(command, cwd=ROOT, env=environment) != 0
            runs += 1
            print(f"  run {runs} of {options.repeats}: {failed} failed so far", flush=True)
    return {"runs": runs, "failed": failed, "code": code}


def _code() -> str:
    """A hash of the package and its tests as they lie here."""
    files = sorted([*(ROOT / "bertpipe").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


PARTS = {"kills": kills, "signals": signals, "long_tests": long_tests, "speed": speed, "repeats": repeats}


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, target, seen) of the parts that were run."""
    lines = []
    for world, c in found.get("kills", {}).items():
        where = "worlds drawn at each start" if world == "any" else f"world {world}"
        seen = f"{c['kills']} of {c['kills']}, in {c['runs']} runs; at most {c['most_wasted']} steps trained again"
        lines.append((f"random kills survived bitwise, {where}", "50 of 50", seen))
    tests = found.get("long_tests", {}).get("tests", {})
    if tests:
        points = sum(int(t.get("points", 0)) for t in tests.values() if t["passed"])
        cuts = sum(int(t.get("cuts", 0)) for t in tests.values() if t["passed"])
        lines.append(("crash points of save + prune", "100 %", f"{points} of {points}; {cuts} different power cuts"))
        flips = [t for name, t in tests.items() if "flipped_bits" in name]
        seen = "1,000 of 1,000 in each file" if flips and all(t["passed"] for t in flips) else "FAILED"
        lines.append(("bit flips rejected", "1,000 of 1,000", seen))
        passed = sum(t["passed"] for t in tests.values())
        lines.append(("long tests, fuzzing at 100,000 cases included", "all", f"{passed} of {len(tests)}"))
    if stops := found.get("signals"):
        total, worst = sum(s["stopped"] for s in stops.values()), max(s["most_lost"] for s in stops.values())
        lines.append(("SIGTERM to one rank, 6 phases", "60 of 60, at most 1 step lost", f"{total}, {worst} steps lost"))
    if figures := found.get("speed"):
        start = figures["plan_start"]["all"]["median"]
        lines.append(("start to first step in a 10-billion-token plan", "1 s", f"{start:.2f} s"))
        share = figures["checkpoint_cost"]
        lines.append(("lost to a checkpoint each 5 minutes, BERT-base", "at most 0.5 %", f"{share:.2%}"))
        lines.append(("price of exact, 2 processes", "at most 15 %", f"{figures['processes_speed']:+.1%}"))
    if again := found.get("repeats"):
        lines.append(
            ("flakes of the short tier's reliability tests", "0 of 20", f"{again['failed']} of {again['runs']}")
        )
    return lines


def write_page(path: Path) -> str:
    """The page from a torture-<date>.json; returns it."""
    facts = json.loads(path.read_text())
    table = [("", "target", "seen"), ("---",) * 3, *rows(facts["parts"])]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    measured = facts["measured"]
    minutes = {name: m["seconds"] / 60 for name, m in measured.items()}
    parts = "; ".join(f"{n} on {m['date']}, {m['cores']} core(s), {minutes[n]:.0f} min" for n, m in measured.items())
    page = f"""# Reliability

What `make torture` saw ({facts["processor"]}, {facts["cores"]} cores, torch {facts["environment"]["torch"]}, gloo on
CPU). Runs: {SETTING}. Measured: {parts};
{sum(minutes.values()):.0f} min in all.
Figures: `benchmarks/results/{path.name}`.

{text}

Every run that was killed or stopped and gone on with ended with the weights, the optimizer's moments and the record
(`metrics.jsonl`) of the run that was never interrupted, byte for byte.
"""
    PAGE.write_text(page, encoding="utf-8")
    return page


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    reader.add_argument("--kills", type=int, default=50, help="in each world, and again in drawn ones")
    reader.add_argument("--signals", type=int, default=10, help="in each phase")
    reader.add_argument("--only", metavar="EXPR", help="of the long tests, those that pytest's -k chooses")
    reader.add_argument("--repeats", type=int, default=20, help="of the short tier's reliability tests")
    options = reader.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        reader.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    today = datetime.date.today().isoformat()
    path = ROOT / "benchmarks" / "results" / f"torture-{today}.json"
    facts: dict[str, Any] = {"parts": {}, "measured": {}}
    for earlier in sorted(path.parent.glob("torture-*.json"))[-1:]:  # parts that are not run keep what they saw
        facts = json.loads(earlier.read_text())
        for measured in facts["measured"].values():
            measured.update({"date": facts["date"], "cores": facts["cores"]} | measured)
        earlier.rename(path)
    for name in options.parts or PARTS:
        print(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            load, started = os.getloadavg(), time.monotonic()
            options.before = facts["parts"].get(name, {})
            outcome = PARTS[name](options, Path(folder) / name)
        facts |= {"date": today, "processor": processor()}
        facts |= {"cores": os.cpu_count(), "environment": environment()}
        facts["parts"][name] = outcome
        cores = len(os.sched_getaffinity(0))
        facts["measured"][name] = {
            "date": today,
            "cores": cores,
            "load_before": load,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(path, facts)
    print(write_page(path))
    failed = [t for t in facts["parts"].get("long_tests", {}).get("tests", {}).values() if not t["passed"]]
    sys.exit(1 if failed or facts["parts"].get("repeats", {}).get("failed") else 0)


if __name__ == "__main__":
    main()
