"""The token-shard format, writer and reader, and the stage that fills it: documents -> memory-mapped token ids.

    shards.json                             vocabulary, special ids, what lies in each shard
    continuations.npy                       bool [V]: the piece goes on with a word ("##...")
    {train,holdout}/unigrams.npy            int64 [V]: how often each token occurs in the split
    {train,holdout}/tokens-00000.npy        uint16 [T], or uint32 when V > 65,535: ids, no [CLS] or [SEP]
    {train,holdout}/documents-00000.npy     int64 [D + 1]: where each document starts among the shard's tokens
    {train,holdout}/sentences-00000.npy     int64 [S + 1]: the same for sentences; every document starts one

Standard NumPy files: nobody needs bertpipe to read them. Every document and sentence has at least one token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bertpipe.artifact import write_json
from bertpipe.errors import ArtifactError

INDEX = "shards.json"
SPLITS = ("train", "holdout")
SPECIAL_NAMES = ("pad", "unk", "cls", "sep", "mask")
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
            raise ArtifactError(
                f"{self.folder / INDEX}: {error!r} missing or malformed; rerun `bertpipe shards`"
            ) from None
        self.num_shards = len(shards)
        self.num_tokens = sum(tokens for tokens, _, _ in shards)
        self.num_documents = sum(documents for _, documents, _ in shards)
        self.num_sentences = sum(sentences for _, _, sentences in shards)
        self.first_token = np.cumsum([0] + [tokens for tokens, _, _ in shards], dtype=np.int64)
        """int64 [num_shards + 1]: tokens of the split before each shard."""
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

    A shard ends before the document that would take it past `shard_tokens`, so the files depend on the documents'
    order alone, not on how they were grouped into `add` calls.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self.folder = folder / split
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.unigrams = np.zeros(vocab_size, np.int64)
        self.shards: list[dict[str, int]] = []
        self._tokens: _GrowingNpy | None = None
        self._documents: list[np.ndarray] = []
        self._sentences: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, documents: np.ndarray, sentences: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: integer [T], ids of all documents end to end.
            documents: int64 [D], tokens of each document, all >= 1, summing to T.
            sentences: int64 [S], tokens of each sentence, all >= 1; no sentence crosses a document's end.
        """
        document_ends, sentence_ends = np.cumsum(documents), np.cumsum(sentences)
        assert (documents > 0).all() and (sentences > 0).all(), "empty documents and sentences are not stored"
        assert np.isin(document_ends, sentence_ends).all(), "a sentence crosses a document's end"
        assert int(sentences.sum()) == int(documents.sum()) == len(tokens)
        counts = np.bincount(tokens, minlength=self.vocab_size)
        assert len(counts) == self.vocab_size, f"token id {len(counts) - 1} in a vocabulary of {self.vocab_size}"
        self.unigrams += counts
        first = 0  # document
        while first < len(documents):
            start = int(document_ends[first - 1]) if first else 0
            room = self.shard_tokens - (self._tokens.length if self._tokens else 0)
            last = int(np.searchsorted(document_ends, start + room, side="right"))
            if last == first and self._tokens is None:
                last = first + 1  # longer than a shard may be: a shard of its own
            if last > first:
                stop = int(document_ends[last - 1])
                low, high = np.searchsorted(sentence_ends, (start, stop), side="right")
                self._append(tokens[start:stop], documents[first:last], sentences[low:high])
            if last < len(documents):
                self._finish()
            first = last

    def _append(self, tokens: np.ndarray, documents: np.ndarray, sentences: np.ndarray) -> None:
        if self._tokens is None:
            self._tokens = _GrowingNpy(self.folder / f"tokens-{len(self.shards):05d}.npy", self.dtype)
        self._tokens.append(tokens)
        self._documents.append(documents)
        self._sentences.append(sentences)

    def _finish(self) -> None:
        assert self._tokens is not None
        number, lengths = len(self.shards), {"documents": self._documents, "sentences": self._sentences}
        entry = {"tokens": self._tokens.length}
        self._tokens.close()
        for name, parts in lengths.items():
            offsets = np.concatenate([np.zeros(1, np.int64), *parts]).cumsum(dtype=np.int64)
            np.save(self.folder / f"{name}-{number:05d}.npy", offsets, allow_pickle=False)
            entry[name] = len(offsets) - 1
        self.shards.append(entry)
        self._tokens, self._documents, self._sentences = None, [], []

    def close(self) -> dict[str, Any]:
        """Finish the last shard; returns {"documents", "sentences", "tokens", "shards": [one entry each]}."""
        if self._tokens is not None:
            self._finish()
        np.save(self.folder / "unigrams.npy", self.unigrams, allow_pickle=False)
        names = ("documents", "sentences", "tokens")
        return {name: sum(shard[name] for shard in self.shards) for name in names} | {"shards": self.shards}


class _GrowingNpy:
    """A one-dimensional .npy file written in pieces: NumPy pads its header so that the length can be set at the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, self.length = dtype, 0
        self._file: BinaryIO = path.open("wb")
        self._header()
        self._start = self._file.tell()

    def _header(self) -> None:
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, description | {"shape": (self.length,)})

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype))
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._start, "the header grew over the first values"
        self._file.close()


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
    np.save(folder / "continuations.npy", continuations.astype(bool), allow_pickle=False)
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
    folder: Path, split: str, documents: Iterable[Sequence[Sequence[int]]], vocab_size: int, shard_tokens: int
) -> dict[str, Any]:
    """Write a split from plain lists, documents of sentences of ids; returns its entry for `write_index`.

    Empty sentences, and documents without any token, are left out.
    """
    writer = ShardWriter(folder, split, vocab_size, shard_tokens)
    for document in documents:
        sentences = [np.asarray(sentence, np.int64) for sentence in document if len(sentence)]
        if sentences:
            lengths = np.array([len(sentence) for sentence in sentences], np.int64)
            writer.add(np.concatenate(sentences), lengths.sum(keepdims=True), lengths)
    return writer.close()
