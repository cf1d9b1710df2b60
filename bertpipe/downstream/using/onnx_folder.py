"""`bertpipe export`: a checkpoint as an ONNX graph, for runtimes without Python or torch, checked before it is kept.

    model.onnx  model.onnx.data     graph and weights, fp32; batch and length are free
    config.json tokenizer.json ...  as beside the checkpoint
    export.json                     what transformers' exporter says of inputs and outputs

The graph is made by `transformers.exporters` from the stock class. ONNX Runtime then runs it on other batch sizes and
lengths, padding included, beside torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe.artifact import making
from bertpipe.downstream.using.finished import Finished
from bertpipe.errors import ArtifactError, ConfigError

BOUND = 1e-5
"""Largest difference from torch, as a share of the largest output (or of 1, if that is more)."""
SHAPES = ((1, 3), (2, 17), (5, 64))
"""Batch sizes and lengths of the check; none is the exporter's own."""
TRACED = (2, 8)
CHOICES = 4
GRAPH = "model.onnx"


def export(finished: Finished, folder: Path) -> str:
    """Write `folder` whole, or not at all; returns a line to say.

    ConfigError if it is there already, the extra isn't installed, or the exporter can't take the model; ArtifactError
    where the graph's outputs are not torch's.
    """
    if folder.exists():
        raise ConfigError(f"--out: {folder} is there already; name another or remove it")
    with making(folder) as partial:
        _write(finished, partial)
        worst = _difference(finished, partial / GRAPH)
        if not worst <= BOUND:
            raise ArtifactError(
                f"{finished.name}: ONNX Runtime's outputs differ from torch's by {worst:.1e} of the largest, "
                f"{BOUND:.0e} is allowed; nothing was kept"
            )
        finished.tokenizer.save_pretrained(partial)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {GRAPH} for {finished.task}, {size / 1e6:.1f} MB; ONNX Runtime's outputs are torch's to "
        f"{worst:.1e} of the largest, at {' and '.join(f'{b} x {t}' for b, t in _shapes(finished))} tokens"
    )


def _shapes(finished: Finished) -> list[tuple[int, int]]:
    return [(batch, min(length, finished.max_length)) for batch, length in SHAPES]


def _write(finished: Finished, folder: Path) -> None:
    with _quiet():
        try:
            import onnxruntime  # noqa: F401
            from transformers.exporters.configs import OnnxConfig
            from transformers.exporters.exporter_onnx import OnnxExporter

            exporter = OnnxExporter()
        except ImportError:
            raise ConfigError("export needs ONNX: pip install 'bertpipe[onnx]'") from None
        try:
            traced = exporter.export(finished.model, _inputs(finished, *TRACED), config=OnnxConfig(dynamic=True))
        except Exception as error:  # whatever torch.export stumbles over
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            kind = type(finished.model).__name__
            raise ConfigError(f"--model: {finished.name}: a {kind} can't be exported here: {reason}") from error
        traced.save_pretrained(folder)


def _difference(finished: Finished, graph: Path) -> float:
    """The largest of all shapes, at the tokens that aren't padding, as a share of the largest output."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    return max(_difference_at(finished, session, *shape) for shape in _shapes(finished))


def _difference_at(finished: Finished, session: Any, batch: int, length: int) -> float:
    inputs = _inputs(finished, batch, length)
    with torch.no_grad():
        expected = {key: value.numpy() for key, value in finished.model(**inputs).items() if torch.is_tensor(value)}
    names = [output.name for output in session.get_outputs()]
    real, worst = inputs["attention_mask"].bool().numpy(), 0.0
    for name, found in zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True):
        theirs, by_token = expected[name], expected[name].shape[: real.ndim] == real.shape
        if found.shape != theirs.shape:
            raise ArtifactError(f"{finished.name}: ONNX Runtime's {name} is {found.shape}, torch's {theirs.shape}")
        ours, theirs = (found[real], theirs[real]) if by_token else (found, theirs)
        worst = max(worst, float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())))
    return worst


def _inputs(finished: Finished, batch: int, length: int) -> dict[str, Any]:
    """Random tokens, [batch, length] int64, or [batch, CHOICES, length]; the last rows end in padding."""
    shape = (batch, CHOICES, length) if finished.task == "multiple-choice" else (batch, length)
    numbers = torch.Generator().manual_seed(length)
    ids = torch.randint(len(finished.tokenizer), shape, generator=numbers)
    mask = torch.ones(shape, dtype=torch.int64)
    if batch > 1:
        mask[-1, ..., length - length // 3 :] = 0
        ids[mask == 0] = finished.tokenizer.pad_token_id or 0
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros(shape, dtype=torch.int64)}
    return {name: made[name] for name in finished.tokenizer.model_input_names if name in made}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter tells of its own progress."""
    before, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
