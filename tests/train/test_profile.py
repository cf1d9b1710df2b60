"""A trace has the steps asked for, names the largest costs, and changes nothing."""

import gzip
import json

import pytest
import transformers as tr

from bertpipe.cli import _split as split
from bertpipe.model import encoders
from bertpipe.model.objectives import MaskedLM
from bertpipe.train import loop
from bertpipe.train.optim import Optimizer
from bertpipe.train.profile import LARGEST, Trace
from bertpipe.train.tracking import Record
from tests.train.test_loop import ADAMW, bert, masked_slots, place


def train(shards, folder, trace=None):
    """Six steps with dropout; returns the record's bytes."""
    model = encoders.make_packed(bert(tr.AutoModelForMaskedLM, dropout=0.1))
    settings = loop.LoopSettings(6, 2, seed=0, eval_every=10**9, progress=False)
    with Record(folder) as record:
        loop.fit(
            MaskedLM(model), masked_slots(shards), Optimizer(model, ADAMW), settings, place(), record, trace=trace
        )  # fmt: skip
    return (folder / "metrics.jsonl").read_bytes()


def test_a_trace_changes_nothing_and_says_what_costs_most(shards, tmp_path, capsys):
    plain = train(shards, tmp_path / "plain")
    assert train(shards, tmp_path / "traced", Trace(tmp_path / "profile", 2)) == plain
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    header, *rows = (tmp_path / "profile" / "costs.txt").read_text().splitlines()
    assert header.split() == ["operator", "CPU", "ms", "share", "calls"] and len(rows) == LARGEST
    times = [float(row[48:59].replace(",", "")) for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    calls = {row[:48].strip(): int(row.split()[-1]) for row in rows}
    for name in calls:
        if name.startswith("aten::"):  # one that only calls another of its name is counted once
            assert 0 < calls[name] <= names.count(name)
    assert calls.get("between operators (Python)", 2) == 2
    assert rows[0] in capsys.readouterr().out


def test_a_run_that_ends_before_the_trace_still_ends(shards, tmp_path):
    trace = Trace(tmp_path / "profile", 100)
    train(shards, tmp_path / "run", trace)
    assert (tmp_path / "profile" / "costs.txt").is_file(), "what there was is written"


@pytest.mark.parametrize(
    ("flags", "steps"), [(["--profile"], "3"), (["--profile", "5"], "5"), (["--profile=7"], "7")]
)  # fmt: skip
def test_profile_is_short_for_the_setting(flags, steps):
    assert split(["--train.steps", "9", *flags, "--train.seed", "1"])[1] == [
        ("train.steps", "9"),
        ("runtime.profile", steps),
        ("train.seed", "1"),
    ]
