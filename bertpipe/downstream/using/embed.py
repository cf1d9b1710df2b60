"""Texts -> one vector each: `bertpipe embed`. No training; the model's last hidden states, pooled.

The texts are packed as in fine-tuning, so nothing is padded. The vectors are those of the sentence-transformers library
(Reimers and Gurevych 2019, Sentence-BERT), whose `mean` averages every token, [CLS] and [SEP] too; a folder of that
library brings its own pooling and length (sentence_folder.py).

    vectors = Embedder("checkpoint", Place(RuntimeConfig(), "fp32")).embed(["a text", "another"])     float32 [2, H]
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe.artifact import fsync, replacing
from bertpipe.config import CorpusConfig
from bertpipe.data.batches import Examples, pack_examples
from bertpipe.data.npy import GrowingNpy
from bertpipe.data.readers import FORMATS, Bad, read_file
from bertpipe.downstream.finetuning.start_checks import load_tokenizer_of
from bertpipe.downstream.finetuning.training import rows_by_length
from bertpipe.downstream.tasks import tasks
from bertpipe.downstream.tasks.encode import encode_texts
from bertpipe.downstream.using import sentence_folder
from bertpipe.errors import ConfigError, DataError
from bertpipe.model import encoders, kernels
from bertpipe.model.pooling import POOLINGS
from bertpipe.train.place import Place

CHUNK = 4_096  # texts tokenized, sorted by length and packed together: bounds the memory
ENDINGS = (*FORMATS, "csv")


class Embedder:
    """A checkpoint that turns texts into vectors; ConfigError for one that can't."""

    def __init__(
        self,
        model: str,
        place: Place,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
    ):
        own = sentence_folder.read(model)
        self.pooling = pooling or own.pooling
        self.normalize = own.normalize if normalize is None else normalize
        self.place, self.tokenizer = place, load_tokenizer_of(own.model, "--model")
        self.model = encoders.load_bare(own.model, "--model").to(place.device).eval()
        kernel = kernels.choose(self.model.config, place.device, place.precision)
        kernels.settle(kernel, False, say=True)
        encoders.make_packed(self.model, kernel=kernel.name)
        longest = min(own.max_length or sys.maxsize, self.tokenizer.model_max_length)
        self.max_length = max_length or encoders.longest(self.model, longest)
        encoders.check_length(self.model, self.max_length, "--max-length")
        if self.max_length <= (around := self.tokenizer.num_special_tokens_to_add()):
            raise ConfigError(f"--max-length: {self.max_length} leaves no room for text beside {around} special tokens")
        self.num_truncated = self.num_tokens = 0

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return self.model.config.hidden_size

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, size]; all in memory at once, so `embed_file` comes with a few thousand at a time."""
        tokens = encode_texts([(text,) for text in texts], self.tokenizer, self.max_length)
        examples = Examples(tokens.input_ids, tokens.token_type_ids, None)
        self.num_truncated += tokens.num_truncated
        self.num_tokens += int(examples.lengths.sum())
        vectors = np.empty((len(texts), self.size), np.float32)
        for part in rows_by_length(examples):
            vectors[part] = self._pooled(pack_examples(examples, part, self.tokenizer.pad_token_id or 0))
        return vectors

    def write(self, folder: Path) -> None:
        """Write a folder that sentence-transformers loads, and whose vectors are these."""
        sentence_folder.write(folder, self.model, self.tokenizer, self.pooling, self.normalize, self.max_length)

    @torch.no_grad()
    def _pooled(self, batch: Any) -> np.ndarray:
        batch, bf16 = batch.to(self.place.device), self.place.precision == "bf16"
        with torch.autocast(self.place.device.type, dtype=torch.bfloat16, enabled=bf16):
            hidden = encoders.encode(self.model, batch)
        pooled = POOLINGS[self.pooling](lambda rows: rows, hidden.float(), batch.cu_seqlens)[: batch.num_sequences]
        return (torch.nn.functional.normalize(pooled) if self.normalize else pooled).cpu().numpy()


def embed_file(embedder: Embedder, source: Path, column: str, out: Path, progress: bool = True) -> str:
    """Write the vectors of a file's texts to `out`, a .npy file float32 [texts, size], whole or not at all.

    Every text is read once before the first is embedded, so that a bad one is told of at once. Returns a line to say.
    """
    total, started = sum(1 for _ in read_texts(source, column)), time.monotonic()
    if total == 0:
        raise DataError(f"{source}: no texts")
    with replacing(out) as temporary:
        file = GrowingNpy(temporary, np.dtype(np.float32), (embedder.size,))
        try:
            for texts in _shown(_chunks(read_texts(source, column)), total, progress):
                file.append(embedder.embed(texts))
        finally:
            file.close()
        fsync(temporary)
    fsync(out.parent)
    seconds = time.monotonic() - started
    cut = f", {embedder.num_truncated:,} cut to {embedder.max_length} tokens" if embedder.num_truncated else ""
    return (
        f"{out}: {file.length:,} vectors of {embedder.size} ({embedder.pooling} pooling"
        f"{', normalized' if embedder.normalize else ''}){cut}; {embedder.num_tokens:,} tokens in {seconds:.1f} s, "
        f"{file.length / seconds:,.0f} texts/s"
    )


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _shown(chunks: Iterable[list[str]], total: int, shown: bool) -> Iterator[list[str]]:
    """The same chunks, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("embedding", total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file, in order: the lines of a .txt, or the values of `column` of a .jsonl, .csv or .parquet.

    All but .csv may be compressed (.gz, .zst). An empty line is an empty text, which has a vector as well. DataError
    names file and place of what can't be read.
    """
    if path.suffix.lower() == ".csv":
        yield from _read_csv(path, column)
        return
    parts = path.name.lower().split(".")
    if not any(part in FORMATS for part in parts[-2:]):
        raise DataError(f"{path}: not a kind of file that can be embedded ({', '.join(f'.{end}' for end in ENDINGS)})")
    for item in read_file(path, CorpusConfig(text_key=column, txt_documents="line")):
        if isinstance(item, Bad):
            raise DataError(item.message.replace("corpus.text_key", "--column").replace(_SKIP, ""))
        yield item.text


_SKIP = ", or set corpus.on_error: skip"


def _read_csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            if column not in header:
                names = ", ".join(header[:8]) or "none"
                raise DataError(f"{path}: no column {column!r} (--column); the first line names {names}")
            place = header.index(column)
            for row in rows:
                if not row and len(header) == 1:
                    row = [""]  # a blank line is an empty text
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}: line {rows.line_num}: {len(row)} values, the first line has {len(header)}"
                    )
                if row:
                    yield row[place]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); write the file again as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: not readable as CSV ({error}); mend the file") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None


def score_pairs(embedder: Embedder, name: str, data: str | None) -> Iterator[str]:
    """How well the cosine of the vectors of two texts ranks the pairs of a task such as stsb, without any training.

    A line for each labelled split but train. ConfigError for a task that isn't numbers for pairs.
    """
    from bertpipe.downstream.tasks.metrics import compute

    task = tasks.get(name)
    if task.kind != "regression" or len(task.text) != 2:
        fits = [t.name for t in tasks.TASKS.values() if t.kind == "regression" and len(t.text) == 2]
        raise ConfigError(f"--score: {name} has no numbers for pairs of texts; choose from {', '.join(fits)}")
    for split, examples in tasks.load(name, data).items():
        if split == "train" or examples.labels is None:
            continue
        a, b = (np.concatenate([*map(embedder.embed, _chunks(s))]) for s in zip(*examples.texts, strict=True))
        scores = compute(task.metric, cosine(a, b), examples.labels)
        figures = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        yield f"{name} {split}: {figures} (cosine of {embedder.pooling} vectors, {len(a):,} pairs)"


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two arrays [n, H], float64 [n]; 0 where a row is 0."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
