"""Stage: the folder that would be pushed to the Hub, with a model card made from what was measured.

A dry run: nothing is uploaded. `model/` in the artifact is that folder, filled from an allow-list; the manifest, which
names settings and places of this machine, stays outside it.

    model/README.md              the card: front matter with `model-index`, then what, how, data, recipe, scores, limits
    model/config.json ...        the stock folder of the pretrained model, or of `publish.task`'s fine-tuned one
    model/.eval_results/*.yaml   the scores on Hub data sets (https://huggingface.co/docs/hub/eval-results)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bertpipe.artifact import PARTIAL, discard
from bertpipe.config import Config, named_tasks
from bertpipe.downstream import card, tasks
from bertpipe.downstream.facts import gather
from bertpipe.errors import ArtifactError, ConfigError

FOLDER = "model"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("vocab.txt", "special_tokens_map.json")
"""With README.md and .eval_results/*.yaml, which are made here, all that ever leaves."""
UNWANTED_KEYS = ("_name_or_path", "name_or_path", "auto_map", "_attn_implementation_internal", "is_local")
"""Of config.json and tokenizer_config.json: places on this machine, and code that would run on another."""


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict) -> None:
    """Build out/model from the pretrained model, or from that of the task `publish.task`."""
    check_repo(cfg.publish.repo)
    source = choose_model(cfg, inputs)
    folder = out / FOLDER
    discard(folder)  # of an interrupted run: it is cheaper to make than to check
    folder.mkdir(parents=True)
    copy_model(source, folder)
    facts = gather(cfg, inputs)
    (folder / "README.md").write_text(card.make_card(cfg, facts), encoding="utf-8")
    for name, text in card.eval_results(cfg, facts).items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        (folder / ".eval_results" / name).write_text(text, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # readable by all: `transformers` writes weights with mode 0600
    size = sum(path.stat().st_size for path in files)
    counts.update(repo=cfg.publish.repo, files=[str(path.relative_to(folder)) for path in files], bytes=size)
    final = out.with_name(out.name.removesuffix(PARTIAL)) / FOLDER
    print(f"publish (dry run): {final}: {len(files)} files, {size / 1e6:.1f} MB, as {cfg.publish.repo} would hold them")
    print("nothing was uploaded")


def check(cfg: Config) -> None:
    """ConfigError for a name the Hub would refuse or a task that isn't fine-tuned; before anything is made."""
    check_repo(cfg.publish.repo)
    task, settings = cfg.publish.task, cfg.finetune
    names = tasks.chosen(named_tasks(settings), settings.data, settings.task)
    if task and task not in names:
        raise ConfigError(f"publish.task: {task!r} is not among finetune.tasks: {', '.join(names) or 'none'}")


def check_repo(repo: str) -> None:
    """ConfigError when the Hub would refuse the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"publish.repo: {error}") from None


def choose_model(cfg: Config, inputs: dict[str, Path]) -> Path:
    """The stock folder to publish; ArtifactError says which command makes it when it is missing."""
    stage = "finetune" if cfg.publish.task else "pretrain"
    if stage not in inputs:
        raise ArtifactError(f"publish: there is no {stage} artifact to publish from; run `bertpipe {stage}` first")
    if not cfg.publish.task:
        return inputs[stage] / "model"
    source = inputs[stage] / cfg.publish.task / "model"
    if not source.is_dir():
        tasks = ", ".join(sorted(path.parent.name for path in inputs[stage].glob("*/model"))) or "none"
        raise ConfigError(f"publish.task: {inputs[stage]} has no model of {cfg.publish.task!r}; it has: {tasks}")
    return source


def copy_model(source: Path, folder: Path) -> None:
    """Copy the files of the allow-list."""
    for name in (*REQUIRED, *OPTIONAL):
        path = source / name
        if path.is_symlink():
            raise ArtifactError(f"{path}: a link, which is never published; put the file itself there or rerun")
        if not path.is_file():
            if name in REQUIRED:
                raise ArtifactError(f"{path}: missing, so the model can't be published; delete the artifact and rerun")
            continue
        if name in ("config.json", "tokenizer_config.json"):
            _copy_config(path, folder / name)
        else:
            shutil.copyfile(path, folder / name)

    if not (folder / "vocab.txt").exists():
        _write_vocabulary(folder)


def _write_vocabulary(folder: Path) -> None:
    """vocab.txt, for tools that read nothing newer, from a WordPiece tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
    pieces = sorted(model.get("vocab", {}), key=model.get("vocab", {}).get) if model.get("type") == "WordPiece" else []
    if pieces and model["vocab"][pieces[-1]] == len(pieces) - 1:  # a line number is an id, so ids must have no gap
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


def _copy_config(source: Path, target: Path) -> None:
    config = json.loads(source.read_text(encoding="utf-8"))
    kept: dict[str, Any] = {key: value for key, value in config.items() if key not in UNWANTED_KEYS}
    if kept == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
