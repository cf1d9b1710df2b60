"""What several test files need: small real shards, the folder of real data, offline libraries."""

import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest

from bertpipe.data.shards import TokenShards, write_index, write_split

VOCAB_SIZE = 200
SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}

# A shell's background job ignores Ctrl-C, and what it starts inherits that; the tests send it to real processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_shards(
    folder: Path, lengths: list[int], shard_tokens: int = 1000, seed: int = 0, sources: Sequence[int] = ()
) -> Path:
    """Shards with documents of `lengths` tokens; ids follow a simple law, so that there is something to learn.

    `sources` says which source each document is from, in ascending order; none: all from one.
    """
    rng = np.random.default_rng(seed)
    entries = {}
    for split, sizes in (("train", lengths), ("holdout", lengths[:20])):
        documents = []
        for size in sizes:
            start, stride = rng.integers(0, 150), rng.integers(1, 4)
            ids = 5 + (start + stride * np.arange(size)) % (VOCAB_SIZE - 5)
            documents.append([ids[: size // 2].tolist(), ids[size // 2 :].tolist()])
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries[split] = write_split(folder, split, documents, VOCAB_SIZE, shard_tokens, sources or itertools.repeat(0))
    continues = np.zeros(VOCAB_SIZE, bool)
    continues[100::3] = True
    names = [f"source {number}" for number in range(max(sources, default=0) + 1)]
    write_index(folder, entries, continues, SPECIAL_IDS, list(SPECIAL_IDS.values()), sources=names)
    return folder


@pytest.fixture
def shards(tmp_path):
    """Training split of small shards: 300 documents of 1 to 90 tokens in several shards."""
    lengths = np.random.default_rng(1).integers(1, 90, 300).tolist()
    return TokenShards(write_shards(tmp_path / "shards", lengths), "train")


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is room, for files that are made and deleted by the hundred thousand: on a disk
    each takes longer than the one before.
    """
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as folder:
        yield Path(folder)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """`in_memory` as a fixture."""
    with in_memory() as folder:
        yield folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, from BERTPIPE_DATA."""
    folder = os.environ.get("BERTPIPE_DATA")
    if not folder:
        pytest.skip("BERTPIPE_DATA is not set: no real data to test on")
    return Path(folder)


LONG = (
    *(
        "test_pipeline",
        "test_full_disk",
        "test_whole_run",
        "test_readme",
        "test_faults",
        "test_docs",
        "test_fuzz_config",
    ),
    *("test_exact", "test_trackers", "test_push_command", "test_kills", "test_resume", "test_crash_points"),
)
"""Files that take half a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that none of them is left to run alone at the end, when the other workers are done."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
