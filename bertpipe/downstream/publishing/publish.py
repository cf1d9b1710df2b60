"""Stage: the folder for the Hub, with a model card made from what was measured.

It uploads nothing: push.py does, when `publish.push` asks for it. `model/` in the artifact is what the repository will
hold, filled from an allow-list; the manifest, which names settings and places of this machine, stays outside it.

    model/README.md              the card: front matter with `model-index`, then what, how, data, recipe, scores, limits
    model/config.json ...        the stock folder of the pretrained model, of `publish.task`'s fine-tuned one, or with
                                 `publish.tokenizer` the tokenizer alone
    model/.eval_results/*.yaml   the scores on Hub data sets (https://huggingface.co/docs/hub/eval-results)
    revisions/step-500/...       with `publish.revisions`, the run's checkpoints and its initial weights (revisions.py)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bertpipe.artifact import PARTIAL, discard
from bertpipe.config import Config, named_tasks
from bertpipe.downstream.publishing import card, card_scores, revisions
from bertpipe.downstream.reporting.facts import gather
from bertpipe.downstream.tasks import tasks
from bertpipe.errors import ArtifactError, ConfigError

FOLDER, REVISIONS, RESULTS, CARD = "model", "revisions", ".eval_results", "README.md"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
REQUIRED = ("config.json", "model.safetensors", *TOKENIZER)
OPTIONAL = ("vocab.txt", "special_tokens_map.json")
ALLOWED = (*REQUIRED, *OPTIONAL, CARD)
"""With .eval_results/*.yaml, which are made here, all that ever leaves."""
UNWANTED_KEYS = ("_name_or_path", "name_or_path", "auto_map", "_attn_implementation_internal", "is_local")
"""Of config.json and tokenizer_config.json: places on this machine, and code that would run on another."""


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict) -> None:
    """Build out/model from the pretrained model, from that of the task `publish.task`, or from the tokenizer."""
    settings = cfg.publish
    check_repo(settings.repo)
    source = choose_model(cfg, inputs)
    folder = out / FOLDER
    for place in (folder, out / REVISIONS):
        discard(place)  # of an interrupted run: it is cheaper to make than to check
    folder.mkdir(parents=True)
    copy_model(source, folder, TOKENIZER if settings.tokenizer else REQUIRED)
    facts = gather(cfg, inputs)
    write_card = card.make_tokenizer_card if settings.tokenizer else card.make_card
    (folder / CARD).write_text(write_card(cfg, facts, folder), encoding="utf-8")
    for name, text in ({} if settings.tokenizer else card_scores.eval_results(cfg, facts)).items():
        (folder / RESULTS).mkdir(exist_ok=True)
        (folder / RESULTS / name).write_text(text, encoding="utf-8")
    for name, source in (revisions.collect(cfg, inputs, out / "initial") if settings.revisions else {}).items():
        copy_model(source, out / REVISIONS / name)
        (out / REVISIONS / name / CARD).write_text(card.make_revision_card(cfg, facts, name), encoding="utf-8")
    discard(out / "initial")
    files = sorted(path for place in (folder, out / REVISIONS) for path in place.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # readable by all: `transformers` writes weights with mode 0600
    size = sum(path.stat().st_size for path in files)
    counts.update(repo=settings.repo, files=[str(path.relative_to(out)) for path in files], bytes=size)
    final = out.with_name(out.name.removesuffix(PARTIAL)) / ("" if settings.revisions else FOLDER)
    print(f"publish: {final}: {len(files)} files, {size / 1e6:.1f} MB, as {settings.repo} would hold them")
    if not settings.push:
        print("nothing was uploaded; `bertpipe publish --push` does it")


def check(cfg: Config) -> None:
    """ConfigError for a name the Hub would refuse or a task that isn't fine-tuned; before anything is made."""
    check_repo(cfg.publish.repo)
    task, settings = cfg.publish.task, cfg.finetune
    names = tasks.chosen(named_tasks(settings), settings.data, settings.task)
    if task and task not in names:
        raise ConfigError(f"publish.task: {task!r} is not among finetune.tasks: {', '.join(names) or 'none'}")
    if task and cfg.publish.tokenizer:
        raise ConfigError("publish.tokenizer: publishes the tokenizer alone, so publish.task must be unset")
    if cfg.publish.revisions and (task or cfg.publish.tokenizer):
        other = "publish.task" if task else "publish.tokenizer"
        raise ConfigError(f"publish.revisions: they are those of the pretrained model, so {other} must be unset")


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
    stage = "tokenizer" if cfg.publish.tokenizer else "finetune" if cfg.publish.task else "pretrain"
    if stage not in inputs:
        raise ArtifactError(f"publish: there is no {stage} artifact to publish from; run `bertpipe {stage}` first")
    if not cfg.publish.task:
        return inputs[stage] / "model" if stage == "pretrain" else inputs[stage]
    source = inputs[stage] / cfg.publish.task / "model"
    if not source.is_dir():
        tasks = ", ".join(sorted(path.parent.name for path in inputs[stage].glob("*/model"))) or "none"
        raise ConfigError(f"publish.task: {inputs[stage]} has no model of {cfg.publish.task!r}; it has: {tasks}")
    return source


def copy_model(source: Path, folder: Path, required: tuple[str, ...] = REQUIRED) -> None:
    """Copy the files of the allow-list, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*required, *OPTIONAL):
        path = source / name
        if path.is_symlink():
            raise ArtifactError(f"{path}: a link, which is never published; put the file itself there or rerun")
        if not path.is_file():
            if name in required:
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
