"""The token-shard format, writer and reader, and the stage that fills it: documents -> memory-mapped token ids.

    shards.json                             vocabulary, special ids, sources, what lies in each shard
    continuations.npy                       bool [V]: the piece goes on with a word ("##...")
    {train,holdout}/unigrams.npy            int64 [V]: how often each token occurs in the split
    {train,holdout}/tokens-00000.npy        uint16 [T], or uint32 when V > 65,535: ids, no [CLS] or [SEP]
    {train,holdout}/documents-00000.npy     int64 [D + 1]: where each document starts among the shard's tokens
    {train,holdout}/sentences-00000.npy     int64 [S + 1]: the same for sentences; every document starts one

Standard NumPy files: nobody needs bertpipe to read them. Every document and sentence has at least one token.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bertpipe.artifact import discard, read_manifest, write_json
from bertpipe.config import Config
from bertpipe.data import npy
from bertpipe.data.corpus import SPLITS, list_parts, list_sources
from bertpipe.data.encoding import Encoder
from bertpipe.data.engine import map_units
from bertpipe.data.tokenizer import load, read_special_ids
from bertpipe.errors import ArtifactError

INDEX = "shards.json"
UNITS = "units"
WORD_STARTS = ("\u0120", "\u2581")
"""First character of a piece that starts a word, in byte-level and in sentencepiece vocabularies."""
LARGEST_UINT16_VOCABULARY = 65_535


class TokenShards:
    """One split of a shards artifact, opened for reading; cheap to pickle (the arrays are mapped anew).

    Shapes, dtypes and outer offsets are checked when it is opened; that ids lie below `vocab_size` is the writer's
    guarantee. Raises ArtifactError naming the file that is missing or doesn't fit.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = Path(folder), split
        index = _read_index(self.folder)
        try:
            entry = index["splits"][split]
            shards = [(int(s["tokens"]), int(s["documents"]), int(s["sentences"])) for s in entry["shards"]]
            self.vocab_size = int(index["vocab_size"])
            self.special_ids: dict[str, int] = dict(index["special_ids"])
            self.all_special_ids: list[int] = list(index["all_special_ids"])
            self.dtype = np.dtype(index["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.folder / INDEX}: malformed ({error!r}); rerun `bertpipe shards`") from None
        self.sources: list[str] = index.get("sources", [])
        """The entries of `corpus.sources`, in order; none in an artifact that was made before they were recorded."""
        self.source = np.array([shard.get("source", 0) for shard in entry["shards"]], np.int64)
        """int64 [num_shards]: which of them each shard is from."""
        self.num_shards = len(shards)
        self.num_tokens = sum(tokens for tokens, _, _ in shards)
        self.num_documents = sum(documents for _, documents, _ in shards)
        self.num_sentences = sum(sentences for _, _, sentences in shards)
        self.first_token = np.cumsum([0] + [tokens for tokens, _, _ in shards], dtype=np.int64)
        """int64 [num_shards + 1]: tokens of the split before each shard."""
        self.text_place = self.first_token[:-1]
        """int64 [num_shards]: says whose text a shard is, if several are of one."""
        self.sizes = np.diff(self.first_token)
        """int64 [num_shards]: tokens of each shard that an epoch visits, about."""
        self.continuations = np.array(_load(self.folder / "continuations.npy", np.dtype(bool), self.vocab_size))
        """bool [V]: True where a piece goes on with the word before it."""
        self.unigrams = np.array(_load(self._path("unigrams.npy"), np.dtype(np.int64), self.vocab_size))
        """int64 [V]: how often each token occurs in the split."""
        self._tokens, self._documents, self._sentences = [], [], []
        for shard, (tokens, documents, sentences) in enumerate(shards):
            self._tokens.append(_load(self._path(f"tokens-{shard:05d}.npy"), self.dtype, tokens))
            self._documents.append(_load_offsets(self._path(f"documents-{shard:05d}.npy"), documents, tokens))
            self._sentences.append(_load_offsets(self._path(f"sentences-{shard:05d}.npy"), sentences, tokens))

    def __reduce__(self):
        return TokenShards, (self.folder, self.split)

    def tokens(self, shard: int) -> np.ndarray:
        """Token ids of a shard: memory map, uint16 or uint32 [T]."""
        return self._tokens[shard]

    def documents(self, shard: int) -> np.ndarray:
        """Document offsets into `tokens(shard)`: memory map, int64 [D + 1]."""
        return self._documents[shard]

    def sentences(self, shard: int) -> np.ndarray:
        """Sentence offsets into `tokens(shard)`: memory map, int64 [S + 1]; every document offset is among them."""
        return self._sentences[shard]

    def visited(self, shard: int, key: int, epoch: int) -> np.ndarray | None:
        """bool [D]: documents of a shard that an epoch visits; None for all. `key` is of the run's draws."""
        return None

    def _path(self, name: str) -> Path:
        return self.folder / self.split / name


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not there; make it with `bertpipe shards`") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error}); delete the folder, rerun") from None


def _load(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; rerun `bertpipe shards`") from None
    except (ValueError, EOFError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable .npy file ({error}); rerun `bertpipe shards`") from None
    if array.dtype != dtype or array.shape != (length,):
        found, expected = f"{array.dtype} {list(array.shape)}", f"{dtype} [{length}]"
        raise ArtifactError(f"{path}: holds {found}, {INDEX} says {expected}; rerun `bertpipe shards`")
    return array


def _load_offsets(path: Path, count: int, tokens: int) -> np.ndarray:
    offsets = _load(path, np.dtype(np.int64), count + 1)
    if offsets[0] != 0 or offsets[-1] != tokens:
        found = f"{offsets[0]} to {offsets[-1]}"
        raise ArtifactError(f"{path}: offsets run from {found}, expected 0 to {tokens}; rerun `bertpipe shards`")
    return offsets


class ShardWriter:
    """Appends documents to a split, cutting shards at document boundaries; `close` returns the split's index entry.

    A shard ends before the document that would take it past `shard_tokens`, and with its source, so the files depend on
    the documents' order alone, not on how they were grouped into `add` calls.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self.folder = folder / split
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.unigrams = np.zeros(vocab_size, np.int64)
        self.shards: list[dict[str, int]] = []
        self.source = 0
        self._open: dict[str, npy.GrowingNpy] | None = None  # of the shard at hand

    def add(self, tokens: np.ndarray, documents: np.ndarray, sentences: np.ndarray, source: int = 0) -> None:
        """Append whole documents of one source.

        Args:
            tokens: integer [T], ids of all documents end to end.
            documents: int64 [D], tokens of each document, all >= 1, summing to T.
            sentences: int64 [S], tokens of each sentence, all >= 1; no sentence crosses a document's end.
            source: its number; a source's documents stand together.
        """
        document_ends, sentence_ends = np.cumsum(documents), np.cumsum(sentences)
        assert (documents > 0).all() and (sentences > 0).all(), "empty documents and sentences are not stored"
        assert np.isin(document_ends, sentence_ends).all(), "a sentence crosses a document's end"
        assert int(sentences.sum()) == int(documents.sum()) == len(tokens)
        counts = np.bincount(tokens, minlength=self.vocab_size)
        assert len(counts) == self.vocab_size, f"token id {len(counts) - 1} in a vocabulary of {self.vocab_size}"
        self.unigrams += counts
        if source != self.source and self._open is not None:
            self._finish()
        self.source = source
        first = 0  # document
        while first < len(documents):
            start = int(document_ends[first - 1]) if first else 0
            room = self.shard_tokens - (self._open["tokens"].length if self._open else 0)
            last = int(np.searchsorted(document_ends, start + room, side="right"))
            if last == first and self._open is None:
                last = first + 1  # longer than a shard may be: a shard of its own
            if last > first:
                stop = int(document_ends[last - 1])
                low, high = np.searchsorted(sentence_ends, (start, stop), side="right")
                self._append(tokens[start:stop], documents[first:last], sentences[low:high])
            if last < len(documents):
                self._finish()
            first = last

    def _append(self, tokens: np.ndarray, documents: np.ndarray, sentences: np.ndarray) -> None:
        if self._open is None:
            offsets, number = np.dtype(np.int64), f"{len(self.shards):05d}"
            dtypes = {"tokens": self.dtype, "documents": offsets, "sentences": offsets}
            self._open = {n: npy.GrowingNpy(self.folder / f"{n}-{number}.npy", d) for n, d in dtypes.items()}
            for name in ("documents", "sentences"):
                self._open[name].append(np.zeros(1, np.int64))
        start = self._open["tokens"].length
        self._open["tokens"].append(tokens)
        self._open["documents"].append(start + np.cumsum(documents))
        self._open["sentences"].append(start + np.cumsum(sentences))

    def _finish(self) -> None:
        assert self._open is not None
        for file in self._open.values():
            file.close()
        lengths = {name: file.length - (name != "tokens") for name, file in self._open.items()}
        self.shards.append({**lengths, "source": self.source})
        self._open = None

    def close(self) -> dict[str, Any]:
        """Finish the last shard; returns {"documents", "sentences", "tokens", "shards": [one entry each]}."""
        if self._open is not None:
            self._finish()
        npy.save(self.folder / "unigrams.npy", self.unigrams)
        names = ("documents", "sentences", "tokens")
        return {name: sum(shard[name] for shard in self.shards) for name in names} | {"shards": self.shards}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.uint32)


def write_index(
    folder: Path,
    splits: dict[str, dict[str, Any]],
    continuations: np.ndarray,
    special_ids: dict[str, int],
    all_special_ids: Sequence[int],
    **facts: Any,
) -> None:
    """Write shards.json and continuations.npy; `splits` holds what `ShardWriter.close` returned."""
    npy.save(folder / "continuations.npy", continuations.astype(bool))
    index = {
        "vocab_size": len(continuations),
        "special_ids": special_ids,
        "all_special_ids": sorted(all_special_ids),
        "dtype": token_dtype(len(continuations)).name,
        **facts,
        "splits": splits,
    }
    write_json(folder / INDEX, index)


def write_split(
    folder: Path,
    split: str,
    documents: Iterable[Sequence[Sequence[int]]],
    vocab_size: int,
    shard_tokens: int,
    sources: Iterable[int] = itertools.repeat(0),
) -> dict[str, Any]:
    """Write a split from plain lists, documents of sentences of ids; returns its entry for `write_index`.

    Empty sentences, and documents without any token, are left out. `sources` says which source each document is from.
    """
    writer = ShardWriter(folder, split, vocab_size, shard_tokens)
    for document, source in zip(documents, sources, strict=False):
        sentences = [np.asarray(sentence, np.int64) for sentence in document if len(sentence)]
        if sentences:
            lengths = np.array([len(sentence) for sentence in sentences], np.int64)
            writer.add(np.concatenate(sentences), lengths.sum(keepdims=True), lengths, source)
    return writer.close()


# --- the stage --------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A row group of the corpus, and where its tokens go."""

    part: Path
    group: int
    result: Path
    source: int
    """Which entry of `corpus.sources` it is from."""

    def __str__(self) -> str:
        return f"{self.part}, row group {self.group}"


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Make the shards artifact in `out` from the artifacts `inputs["corpus"]` and `inputs["tokenizer"]`.

    Every row group of the corpus is encoded by itself, over all cores, into units/; then the units are strung together
    in order, so the bytes are the same for any number of workers. A rerun takes finished units as they are. Raises
    ArtifactError when the tokenizer belongs to another corpus.
    """
    corpus, tokenizer = inputs["corpus"], inputs["tokenizer"]
    facts = _check_parents(corpus, tokenizer)
    if not (out / INDEX).is_file():
        vocab_size = 1 + max(load(tokenizer).get_vocab(with_added_tokens=True).values())
        splits = {}
        for split in SPLITS:
            units = list_units(corpus, split, out / UNITS)
            encode = functools.partial(encode_unit, tokenizer, cfg.shards.language)
            done = map_units(
                encode,
                [unit for unit in units if not unit.result.is_file()],
                workers=cfg.runtime.workers,
                description=f"tokenizing {split}",
                progress=cfg.runtime.progress,
            )
            collections.deque(done, maxlen=0)
            discard(out / split)  # of an interrupted run
            splits[split] = _join(units, ShardWriter(out, split, vocab_size, cfg.shards.shard_tokens))
        special_ids, all_special_ids = read_special_ids(tokenizer)
        continuations = _continuations(tokenizer, vocab_size)
        names = list(list_sources(corpus))
        write_index(out, splits, continuations, special_ids, all_special_ids, **facts, sources=names)
    discard(out / UNITS)
    for split, entry in _read_index(out)["splits"].items():
        counts[split] = {name: value for name, value in entry.items() if name != "shards"}


def _check_parents(corpus: Path, tokenizer: Path) -> dict[str, str]:
    """Fingerprints of both; ArtifactError when the tokenizer was made for another corpus."""
    present, manifest = read_manifest(corpus)["fingerprint"], read_manifest(tokenizer)
    expected = manifest.get("parents", {}).get("corpus", present)
    if expected != present:
        raise ArtifactError(
            f"{tokenizer} was made for corpus {expected}, but {corpus} is {present}; "
            "make a tokenizer for it with `bertpipe tokenizer`"
        )
    return {"tokenizer_fingerprint": manifest["fingerprint"], "corpus_fingerprint": present}


def list_units(corpus: Path, split: str, results: Path) -> list[Unit]:
    """The row groups of a split, in document order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    units: list[Unit] = []
    parts = list_parts(corpus, split)
    counts = [row.get("parts", {}).get(split, 0) for row in list_sources(corpus).values()]
    if sum(counts) != len(parts):
        raise ArtifactError(f"{corpus}: not the {split} parts that its ledger counts; delete it, run `bertpipe corpus`")
    for source, part in zip(np.repeat(np.arange(len(counts)), counts).tolist(), parts, strict=True):
        try:
            num_groups = pq.read_metadata(part).num_row_groups
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(part, error) from None
        for group in range(num_groups):
            units.append(Unit(part, group, results / f"{split}-{len(units):06d}", source))
    return units


def encode_unit(tokenizer: Path, language: str, unit: Unit) -> None:
    """Write a unit's result: the arrays for `ShardWriter.add`, then what was read (documents, empty, characters)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if multiprocessing.parent_process() is not None:  # a worker: its neighbours have the other cores
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with pq.ParquetFile(unit.part, page_checksum_verification=True) as file:
            texts = file.read_row_group(unit.group, columns=["text"], use_threads=False)["text"].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(unit.part, error) from None
    tokens, documents, sentences = _encoder(tokenizer, language).encode(texts)
    kept = documents[documents > 0]
    read = np.array([len(texts), len(texts) - len(kept), sum(map(len, texts))], np.int64)
    unit.result.parent.mkdir(parents=True, exist_ok=True)
    npy.save(unit.result, tokens, kept, sentences, read, flush=True)


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path, language: str) -> Encoder:
    return Encoder(load(tokenizer), language)


def _join(units: list[Unit], writer: ShardWriter) -> dict[str, Any]:
    """String the units' results together; the split's index entry, with documents dropped and characters read."""
    total = np.zeros(3, np.int64)
    for unit in units:
        with unit.result.open("rb") as file:
            tokens, documents, sentences, read = (np.load(file, allow_pickle=False) for _ in range(4))
        writer.add(tokens, documents, sentences, unit.source)
        total += read
    entry = writer.close()
    assert entry["documents"] == total[0] - total[1]
    return {"documents_in": int(total[0]), "empty": int(total[1]), "characters": int(total[2]), **entry}


def _continuations(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """bool [V]: whether a piece goes on with the word before it, by the mark that its kind of tokenizer uses."""
    bare = load(tokenizer)
    pieces = bare.get_vocab(with_added_tokens=True)
    prefix = getattr(bare.model, "continuing_subword_prefix", None)
    special = {number for number, token in bare.get_added_tokens_decoder().items() if token.special}
    continuations = np.zeros(vocab_size, bool)
    for piece, number in pieces.items():
        starts = not piece.startswith(prefix) if prefix else piece.startswith(WORD_STARTS)
        continuations[number] = not starts and number not in special
    return continuations


def _unreadable(part: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{part}: not readable ({error}); delete the artifact and run `bertpipe corpus`")
