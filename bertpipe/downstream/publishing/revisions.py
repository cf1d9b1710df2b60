"""The checkpoints of a pretraining run as revisions of its repository: step-0, the initial weights, and those kept.

The initial weights are not kept by a run: they are made again from the seed, by the code that made them. Torch promises
the same random numbers only within one version, so with another one than the run's they are left out, aloud.
"""

from __future__ import annotations

from pathlib import Path

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.errors import ArtifactError


def collect(cfg: Config, inputs: dict[str, Path], scratch: Path) -> dict[str, Path]:
    """The stock folder of each revision, in order of steps; `scratch` is where the initial weights are made."""
    run = inputs["pretrain"]
    found = {
        f"step-{int(folder.name.removeprefix('step-'))}": folder / "model"
        for folder in sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8 + "*"))
    }
    if not found:
        raise ArtifactError(f"publish.revisions: {run} has no checkpoints; run `bertpipe pretrain` again to make some")
    reason = _unlike(artifact.read_manifest(run))
    if reason:
        print(f"publish: step-0 is left out: {reason}", flush=True)
        return found
    make_initial(cfg, inputs, scratch)
    return {"step-0": scratch, **found}


def _unlike(manifest: dict) -> str:
    """Why the weights that a run began with can't be made again here; nothing where they can."""
    then, now = manifest.get("environment", {}).get("torch"), artifact.environment().get("torch")
    if then != now:
        return f"the run had torch {then}, this is {now}, whose random numbers may differ"
    if manifest.get("counts", {}).get("extended_changes"):
        return "the run went on from one with another recipe (train.extend_changed)"
    return ""


def make_initial(cfg: Config, inputs: dict[str, Path], folder: Path) -> None:
    """Write the model that pretraining began with, as a stock folder with its tokenizer."""
    from bertpipe.data.mixture import open_train
    from bertpipe.model import encoders
    from bertpipe.model.objectives import OBJECTIVES
    from bertpipe.train.checkpoint import save_model
    from bertpipe.train.pretrain import prepare_tokenizer

    tokenizer, added = prepare_tokenizer(cfg, inputs)
    shards = open_train(inputs["shards"], cfg.train.source_weights)
    length, seed = cfg.train.sequence_length, cfg.train.seed
    auto_class = OBJECTIVES[cfg.train.objective].auto_class
    model = encoders.build(cfg.model, shards.vocab_size, shards.special_ids, length, seed, auto_class, added)
    save_model(model, tokenizer, folder)
