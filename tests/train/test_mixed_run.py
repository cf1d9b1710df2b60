"""Runs on sources mixed by weight that are also budgeted, grow their steps, come in phases or extend another run."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer

from bertpipe import artifact
from bertpipe.data import phases
from bertpipe.data.mixture import MixedShards, open_train
from bertpipe.data.order import Order
from bertpipe.errors import ConfigError
from bertpipe.train import budget, pretrain
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE, write_shards
from tests.train.test_pretrain import PHASES, config, interrupted, lines, manifest, run, same

WEIGHTS = [1, 3]
RAMP = [{"steps": 3, "slots": 1}, {"steps": 3, "slots": 2}]  # then 4; of which an epoch has two
MIXED = {"source_weights": WEIGHTS, "batch_warmup": RAMP, "steps": 10}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer, and shards of two sources: 8 and 4 documents."""
    folder = tmp_path_factory.mktemp("mixed")
    names = {number: f"[{name.upper()}]" for name, number in SPECIAL_IDS.items()}
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(names.get(number, f"w{number}") for number in range(VOCAB_SIZE)))
    with artifact.committing(folder / "tokenizer", fingerprint="t"):
        pass
    BertTokenizer(vocab=str(vocab)).save_pretrained(folder / "tokenizer")
    with artifact.committing(folder / "shards", fingerprint="s") as (scratch, _):
        write_shards(scratch, [9, 30, 17] * 4, sources=[0] * 8 + [1] * 4)
    return {name: folder / name for name in ("tokenizer", "shards")}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The uninterrupted run of 10 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    counts = run(config(MIXED), inputs, out)
    assert [share["epoch"] for share in counts["mixture"]] == [0.25, 0.75] and counts["epochs"] > 3
    return out


def trained_on(inputs, cfg) -> Counter:
    """Tokens of each source that a run trains on."""
    shards = open_train(inputs["shards"], cfg.train.source_weights)
    order, found = phases.make_order(shards, cfg.train), Counter()
    for step in range(cfg.train.steps):
        for pieces in order.slots(step):
            for shard, length in zip(pieces.shard, pieces.length, strict=True):
                found[int(shards.source[shard])] += int(length)
    return found


def test_growing_steps_go_on_from_any_step(inputs, whole, tmp_path):
    """In the warmup, at its stages' ends and behind it, epochs from all of them."""
    for step in (1, 3, 4, 6, 9):
        out = interrupted(whole, step, tmp_path / str(step))
        run(config(MIXED), inputs, out)
        same(whole, out, 10)
    rooms = [line["tokens"] for line in lines(whole) if "loss" in line]
    most = np.cumsum([64, 64, 64, 128, 128, 128, *[256] * 4])
    assert len(rooms) == 10 and (np.array(rooms) <= most).all()


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp", "mlm_sop"])
@pytest.mark.parametrize("phased", [[], PHASES])
def test_the_shares_are_those_of_the_weights(inputs, objective, phased):
    """Over a long run, whatever the steps' sizes, whichever the order."""
    train = {"source_weights": WEIGHTS, "batch_warmup": RAMP, "phases": phased, "steps": 200, "objective": objective}
    found = trained_on(inputs, config(train))
    assert found[1] / found.total() == pytest.approx(0.75, abs=0.02)


def test_smaller_steps_visit_the_same_text(inputs):
    """An epoch of a mixture has the same segments in the same order, however its steps are cut."""
    mixed = MixedShards(inputs["shards"], "train", WEIGHTS)
    digests = set()
    for ramp in ((), ((3, 1), (3, 2)), ((200, 1),)):
        order, state = Order(mixed, 3, 32, 64, 4, ramp=ramp), hashlib.sha256()
        epoch = [pieces for step in range(order.steps_in(0)) for pieces in order.slots(step) if len(pieces.length)]
        assert order.locate(order.steps_in(0)) == (1, 0)
        for pieces in epoch:
            state.update(np.stack([pieces.shard, pieces.start, pieces.length]).tobytes())
        digests.add(state.hexdigest())
    assert len(digests) == 1


def test_a_budget(inputs, whole, tmp_path, monkeypatch):
    """Measured on the mixture; then the run of that many steps to the bit, a resume in the warmup included."""
    measured = []
    make_source = pretrain.open_source

    def watched(cfg, row, shards, *rest):
        measured.append((type(shards), cfg.train.batch_warmup))
        return make_source(cfg, row, shards, *rest)

    monkeypatch.setattr(pretrain, "open_source", watched)
    monkeypatch.setattr(budget, "affordable", lambda *_: 10)  # whatever was measured, to have a run to compare with
    cfg = config(MIXED | {"steps": 3, "budget": "10s"})
    counts = run(cfg, inputs, tmp_path / "run")
    assert counts["steps"] == 10 and counts["budget"]["cost_seconds"]["steps"][0] > 0
    assert [kind for kind, _ in measured] == [MixedShards, MixedShards]
    assert measured[0][1] == [] and measured[1][1], "full steps are measured"
    same(whole, tmp_path / "run", 10)
    monkeypatch.setattr(budget, "measure", None)  # a resume must not measure again
    out = interrupted(tmp_path / "run", 4, tmp_path / "resumed")
    run(cfg, inputs, out)
    same(whole, out, 10)


def test_a_budget_in_phases(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "affordable", lambda *_: 9)
    phased = MIXED | {"phases": PHASES, "objective": "mlm_nsp"}
    counts = run(config(phased | {"budget": "10s"}), inputs, tmp_path / "budgeted")
    assert len(counts["budget"]["cost_seconds"]["steps"]) == 2
    run(config(phased | {"steps": 9}), inputs, tmp_path / "steps")
    same(tmp_path / "steps", tmp_path / "budgeted", 9)


def test_a_run_that_extends_another(inputs, tmp_path, monkeypatch):
    """The parent ends in the warmup, in the midst of an epoch; by steps and by a budget."""
    constant = {"schedule": "constant"}
    short, long = (config(MIXED | {"steps": steps}, optim=constant) for steps in (4, 10))
    run(long, inputs, tmp_path / "whole")
    manifest(short, inputs, tmp_path / "short", run(short, inputs, tmp_path / "short"))
    longer = MIXED | {"extend_from": str(tmp_path / "short")}
    for name, more in (("steps", {}), ("budget", {"steps": 1, "budget": "10s"})):
        cfg = config(longer | more, optim=constant)
        monkeypatch.setattr(budget, "affordable", lambda train, cost, left, begun: begun + 6)
        counts = run(cfg, inputs, tmp_path / name)
        assert counts["extended_after"] == 4 and len(counts["mixture"]) == 2
        same(tmp_path / "whole", tmp_path / name, 10)
        out = interrupted(tmp_path / name, 5, tmp_path / f"{name}-again")
        run(cfg, inputs, out)
        same(tmp_path / "whole", out, 10)


def test_other_weights_than_the_parents(inputs, tmp_path):
    """Refused by name; where that is allowed, the steps after the parent's are those of the new mixture."""
    short = config({"steps": 4, "source_weights": WEIGHTS})
    manifest(short, inputs, tmp_path / "short", run(short, inputs, tmp_path / "short"))
    for weights in ([3, 1], []):
        longer = {"steps": 8, "source_weights": weights, "extend_from": str(tmp_path / "short")}
        cfg = config(longer)
        said = r"train.source_weights is .*, the parent's was \[1.0, 3.0\]; only the number of steps"
        with pytest.raises(ConfigError, match=said) as error:
            pretrain.check(cfg)
        assert "\n" not in str(error.value)
        out = tmp_path / f"{len(weights)}"
        counts = run(config(longer | {"extend_changed": True}), inputs, out)
        assert counts["extended_changes"] == [str(error.value).split(": ", 1)[1].partition("; only")[0]]
        assert ("mixture" in counts) == bool(weights)
        direct = config({"steps": 8, "source_weights": weights})
        order = phases.make_order(open_train(inputs["shards"], weights), direct.train)
        sequences = {line["step"]: line["sequences"] for line in lines(out) if "loss" in line}
        for step in range(5, 9):
            assert sequences[step] == sum(len(pieces.length) for pieces in order.slots(step - 1))


def test_weights_that_do_not_fit_are_refused_before_anything_is_measured(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "measure", None)
    with pytest.raises(ConfigError, match=r"3 weights for the 2 entries of corpus\.sources"):
        run(config(MIXED | {"budget": "10s", "source_weights": [1, 2, 3]}), inputs, tmp_path / "run")
    with pytest.raises(ConfigError, match="all are 0, so no text is left"):
        pretrain.check(config(MIXED | {"budget": "10s", "source_weights": [0, 0]}))
