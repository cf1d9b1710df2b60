"""train.reduction: exact gives the same bits in any number of processes; fast stays within 1e-5 (dropout 0.1)."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from bertpipe.config import RuntimeConfig
from bertpipe.errors import ConfigError
from bertpipe.train.place import Place
from bertpipe.train.reduction import Block, Exact, Tree, blocks_of
from tests import faults, kills
from tests.kills import same
from tests.launch import free_port, server
from tests.runs import bertpipe, make_shards, only


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with text, config and the artifacts that pretraining needs."""
    return make_shards(tmp_path_factory.mktemp("made"))


def pretrain(shards: Path, root: Path, world: int, reduction: str, hook=None, environment=None, **settings: object):
    """Start it below `root`: muon where it is exact."""
    more = [str(x) for name, value in settings.items() for x in (f"--{name.replace('__', '.')}", value)]
    optimizer = "adamw" if reduction == "fast" else "muon"
    command = ("--train.reduction", reduction, "--optim.name", optimizer, *more)
    return kills.pretrain(shards, root, world, *command, hook=hook, **(environment or {}))


@pytest.fixture(scope="module")
def references(shards, tmp_path_factory) -> dict[str, Path]:
    """The uninterrupted run of one process, by reduction."""
    found = {}
    for reduction in ("exact", "fast"):
        root = tmp_path_factory.mktemp(reduction) / "runs"
        pretrain(shards, root, 1, reduction).done()
        found[reduction] = only(root, "pretrain")
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_exact_gives_the_bits_of_one_process(shards, references, tmp_path, world):
    pretrain(shards, tmp_path / "runs", world, "exact").done()
    same(only(tmp_path / "runs", "pretrain"), references["exact"])


def elastic(shards: Path, root: Path, reduction: str, *worlds: int) -> Path:
    """1 -> worlds -> 1 processes, each change in the midst of an epoch: the last rank gets SIGTERM in its 7th step.

    It sends it to itself: from outside, with a busy machine between, it could come before the process has begun.
    """
    fault = {"FAULT_PHASE": "optimizer", "FAULT_CALL": "7", "FAULT_SIGNAL": "SIGTERM"}
    for world in (1, *worlds):
        started = pretrain(
            shards, root, world, reduction, hook=faults.send, environment=fault | {"FAULT_RANK": str(world - 1)}
        )
        assert started.wait() == [130] * world, started.text()
    assert "resuming after step" in pretrain(shards, root, 1, reduction).done()
    return only(root, "pretrain")


def test_exact_resumes_on_any_number_of_processes_to_the_bit(shards, references, tmp_path):
    same(elastic(shards, tmp_path / "runs", "exact", 2, 4), references["exact"])


def test_fast_resumes_on_any_number_of_processes_within_1e_5(shards, references, tmp_path):
    """AdamW: Muon rounds to bfloat16 inside, which makes a last bit of a gradient 1e-3 of its update."""
    run = elastic(shards, tmp_path / "runs", "fast", 4)
    one, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (references["fast"], run)
    )
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for a, b in zip(one, other, strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 1e-5), (a["step"], key)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (references["fast"], run))
    # the bias of the keys changes no attention weight: its gradient is rounding alone, and AdamW scales it up
    assert max(float((a[name] - b[name]).abs().max()) for name in a if not name.endswith("key.bias")) < 1e-4


def test_mixed_sources_resume_on_any_number_of_processes_to_the_bit(shards, tmp_path):
    """Two sources, of which the second, an eighth of the text, is to be three quarters of what is trained on."""
    text = (shards / "text.txt").read_text().splitlines(keepends=True)
    made = tmp_path / "made"
    made.mkdir()
    for name, lines in (("a.txt", text[:350]), ("b.txt", text[350:])):
        (made / name).write_text("".join(lines))
    config = (shards / "tiny.yaml").read_text().replace(str(shards / "text.txt"), f"[{made}/a.txt, {made}/b.txt]")
    config = config.replace(str(shards), str(made)).replace("train: {", "train: {source_weights: [1, 3], ")
    (made / "tiny.yaml").write_text(config)
    for stage in ("corpus", "tokenizer", "shards"):
        bertpipe(stage, "--config", made / "tiny.yaml")
    printed = pretrain(made, tmp_path / "whole", 1, "exact").done()
    assert f"{made}/b.txt: " in printed and "75.0% of an epoch" in printed
    run = only(tmp_path / "whole", "pretrain")
    mixture = json.loads((run / "manifest.json").read_text())["counts"]["mixture"]
    assert [share["epoch"] for share in mixture] == [0.25, 0.75] and mixture[1]["visits"] > 4
    same(elastic(made, tmp_path / "elastic", "exact", 2, 4), run)
    again = ("--runtime.root", tmp_path / "whole", "--train.reduction", "exact", "--optim.name", "muon", "--step", "29")
    replayed = bertpipe("replay", "--config", made / "tiny.yaml", *again).stdout
    line = next(x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["step"] == 29)
    assert f"the step: loss {line['loss']!r}, gradient norm {line['grad_norm']!r}" in replayed

    for weights, said in (("[1]", "1 weights for the 2 entries of corpus.sources"), ("[0, 0]", "all are 0")):
        refused = bertpipe("pretrain", "--config", made / "tiny.yaml", "--train.source_weights", weights, check=False)
        assert refused.returncode == 2 and said in refused.stderr


@given(st.integers(1, 40), st.data())
def test_blocks_of_any_shares_make_one_tree(count, data):
    """However neighbouring slots are shared, the joined blocks and the order of all additions are those of one."""
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    values = torch.from_numpy(np.random.default_rng(count).standard_normal(count).astype(np.float32))

    def total(blocks_and_sums):
        tree = Tree()
        for block, value in blocks_and_sums:
            tree.push(block, [value])
        return tree.root()[0]

    whole = total((Block(slot, 1), values[slot : slot + 1].clone()) for slot in range(count))
    shares = []
    for first, last in zip([0, *cuts], [*cuts, count], strict=True):
        tree = Tree()
        for slot in range(first, last):
            tree.push(Block(slot, 1), [values[slot : slot + 1].clone()])
        assert tree.blocks == blocks_of(first, last)
        shares += [(block, value[0]) for block, value in zip(tree.blocks, tree.sums, strict=True)]
    assert torch.equal(total(shares), whole)


def test_the_tree_joins_neighbours_and_is_no_running_sum():
    assert blocks_of(0, 8) == [Block(0, 8)]
    assert blocks_of(3, 6) == [Block(3, 1), Block(4, 2)]
    tree = Tree()
    for slot, value in enumerate((1.0, 2.0**-24, 2.0**-24, 2.0**-24)):
        tree.push(Block(slot, 1), [torch.tensor([value])])
    assert float(tree.root()[0]) == 1.0 + 2.0**-23  # ((1 + e) + (e + e)); from left to right it would be 1


def refused(port: int, pipe) -> None:
    """What exact says of a module that FSDP2 has sharded (over one process)."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    module = fully_shard(torch.nn.Linear(2, 2))
    try:
        Exact(module, Place(RuntimeConfig(device="cpu", threads=1), "fp32"))
    except ConfigError as error:
        pipe.send(str(error))
    pipe.close()


def test_exact_refuses_sharded_parameters_by_name():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = server().Process(target=refused, args=(free_port(), theirs))
    process.start()
    theirs.close()
    assert ours.recv().startswith("train.reduction: exact adds whole gradients, and weight is sharded (DTensor)")
    process.join()
