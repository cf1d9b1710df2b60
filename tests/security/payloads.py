"""Malicious files for tests: each would touch a marker if it were unpickled, imported or run."""

import pickle
from pathlib import Path

import torch

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n\nclass Evil:\n    pass\n"


class Touch:
    """Its pickle opens the marker for writing when it is read."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def plant(folder: Path, marker: Path) -> list[Path]:
    """Write one file of each kind into `folder`; returns them."""
    raw = pickle.dumps(Touch(marker))
    for name in ("evil.pkl", ".metadata", "training_args.bin", "rng_state.pth", "scheduler.joblib"):
        (folder / name).write_bytes(raw)
    for name in ("pytorch_model.bin", "optimizer.pt", "tf_model.ckpt"):  # as torch.save writes them
        torch.save({"weight": Touch(marker)}, folder / name)
    for name in (
        "modeling_evil.py",
        "tokenization_evil.py",
        "configuration_bert.py",
        "sitecustomize.py",
        "__init__.py",
    ):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    return [path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name == ".metadata"]


SUFFIXES = {".pkl", ".bin", ".pth", ".joblib", ".pt", ".ckpt", ".py"}
