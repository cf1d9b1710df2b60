"""The folder format of the sentence-transformers library, read and written by hand: users need not have it.

    modules.json                    Transformer, Pooling, perhaps Normalize
    1_Pooling/config.json           which pooling
    sentence_bert_config.json       the longest input
    config.json model.safetensors tokenizer.json ...    a stock folder

The names are those that every version of the library reads (2 to 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe import outside
from bertpipe.artifact import making, write_json
from bertpipe.errors import ConfigError
from bertpipe.model import encoders

OFFERED = ("mean", "cls")
LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class SentenceModel:
    """What such a folder says of its vectors."""

    model: str
    """Where its stock folder is; itself, if it is none of the library's."""
    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None


def read(model: str) -> SentenceModel:
    """Of a folder or Hub id; for a plain checkpoint mean pooling. ConfigError for what isn't offered."""
    outside.check(model, "--model")
    modules = outside.read_json(model, "modules.json", "--model")[1]
    if modules is None:
        return SentenceModel(model)
    try:
        kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    except (TypeError, KeyError):
        raise ConfigError(f"--model: {model}: modules.json is not a list of modules, each with type and path") from None
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(f"--model: {model}: modules.json has {', '.join(sorted(unknown))}, which isn't offered")
    if kinds.get("Transformer"):
        raise ConfigError(f"--model: {model}: its transformer lies in {kinds['Transformer']}; name that folder")
    pooling = _read(model, f"{Path(kinds.get('Pooling', '1_Pooling')).name}/config.json")
    settings = _read(model, "sentence_bert_config.json")
    prompt = _read(model, "config_sentence_transformers.json").get("default_prompt_name")
    if settings.get("do_lower_case") or prompt:
        what = f"the prompt {prompt!r}" if prompt else "do_lower_case"
        raise ConfigError(f"--model: {model}: {what} is not offered; write it into the texts and remove it")
    return SentenceModel(model, _pooling(model, pooling), "Normalize" in kinds, settings.get("max_seq_length"))


def _pooling(model: str, config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode") or [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = [LEGACY.get(mode, mode) for mode in ([modes] if isinstance(modes, str) else modes)] or ["mean"]
    if len(modes) != 1 or modes[0] not in OFFERED:
        raise ConfigError(
            f"--model: {model}: pooling {' and '.join(modes)} isn't offered; give --pooling {' or '.join(OFFERED)}"
        )
    return modes[0]


def _read(model: str, file: str) -> dict[str, Any]:
    """A JSON object of a folder or Hub id; empty where there is none."""
    value = outside.read_json(model, file, "--model")[1]
    return value if isinstance(value, dict) else {}


def write(folder: Path, model: Any, tokenizer: Any, pooling: str, normalize: bool, max_length: int) -> None:
    """Write `folder` whole, or not at all; ConfigError if it is there already."""
    if folder.exists():
        raise ConfigError(f"--sentence-transformers: {folder} is there already; name another or remove it")
    with making(folder) as partial:
        (partial / "1_Pooling").mkdir(parents=True)
        encoders.save(model, partial)
        tokenizer.save_pretrained(partial)
        steps = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
        modules = [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate(steps)
        ]
        if normalize:
            (partial / "2_Normalize").mkdir()
        write_json(partial / "modules.json", modules)
        write_json(partial / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        chosen = {key: mode == pooling for key, mode in LEGACY.items()}
        size = {"word_embedding_dimension": model.config.hidden_size}
        write_json(partial / "1_Pooling" / "config.json", size | chosen)
