"""A small finished run for report and publish: real stock models, invented figures of a realistic shape."""

import json
import math
import random
import sys
from pathlib import Path

import pytest

from bertpipe import artifact

TEXT = (
    "the value of the function is returned to the caller as a new array of the given shape and type . "
    "return a list of all names in this module that do not start with an underscore . "
    "the default encoding is used when no other is named by the file or the user ."
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ["numpy", "scipy", "torch"]
# Text from data that would run as a script or break a table if the page or the card did not escape it.
HOSTILE = "<script>alert('x')</script>|`</script>"
HOSTILE_NAME = "<img src=x onerror=alert(2)>|`"
NO_TEXT = {"documents_in": 0, "documents_out": 0, "skipped": {}}


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path):
    """A WordPiece tokenizer of the words of TEXT and its letters, saved as the tokenizer stage saves it."""
    from transformers import BertTokenizer

    letters = sorted(set(TEXT) - {" "})
    pieces = SPECIAL + letters + [f"##{letter}" for letter in letters] + sorted(set(TEXT.split()) - set(letters))
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return tokenizer


def _config(vocab_size: int, **extra):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **extra
    )


def _corpus(out: Path, counts: dict) -> None:
    total = {
        "documents_in": 1_230,
        "documents_out": 1_200,
        "train_documents": 1_188,
        "holdout_documents": 12,
        "skipped": {"duplicate": 21, "too_short": 9},
        "characters": 512_000,
        "bytes": 513_400,
    }
    row = {**total, "problems": [f"a.jsonl:7: {HOSTILE}"]}
    _write(out / "ledger.json", {"total": total, "sources": {f"data/{HOSTILE}*.jsonl": row, HOSTILE_NAME: NO_TEXT}})
    counts.update(documents_in=1_230, documents_out=1_200)


def _tokenizer(out: Path, counts: dict) -> None:
    tokenizer = write_tokenizer(out)
    report = {
        "trained": True,
        "measured_on": "holdout",
        "vocab_size": len(tokenizer),
        "documents": 12,
        "tokens_per_word": 1.31,
        "characters_per_token": 3.9,
        "unknown_rate": 0.0012,
        "over_length_rate": 0.25,
        "document_tokens": {"16": 2, "64": 3, "128": 7},
        "word_characters": {"1": 160, "2": 90, "3": 120, "4": 75, "10": 9},
        "word_tokens": {"1": 8_000, "2": 900, "3": 300, "4": 80, "8": 1},
        "longest_tokens": ["underscore", "encoding", HOSTILE],
        "examples": ["num ##py", "d ##type", "in ##it ##ial ##is ##er"],
        "warnings": [],
    }
    _write(out / "report.json", report)
    counts.update(vocab_size=len(tokenizer))


def _shards(out: Path, counts: dict) -> None:
    splits = {
        "train": {"documents": 1_188, "sentences": 9_400, "tokens": 151_000},
        "holdout": {"documents": 12, "sentences": 95, "tokens": 1_500},
    }
    _write(out / "shards.json", {"splits": splits, "dtype": "uint16"})
    counts.update(splits=splits)


STEPS = 240


def _metrics() -> tuple[list[dict], list[dict]]:
    draw = random.Random(0)
    metrics, speed = [], []
    for step in range(1, STEPS + 1):
        loss = 3.1 + 5.0 * math.exp(-step / 40) + draw.gauss(0, 0.06)
        metrics.append(
            {
                "step": step,
                "epoch": step // 120,
                "tokens": step * 8_050,
                "loss": loss,
                "accuracy": 0.47 * (1 - math.exp(-step / 70)) + draw.gauss(0, 0.006),
                "lr": 2e-3 * min(step / 24, (STEPS - step) / (STEPS - 24)),
                "grad_norm": 0.8 + 1.5 * math.exp(-step / 30) + abs(draw.gauss(0, 0.1)),
                "fill": 0.982 + draw.gauss(0, 0.003),
            }
        )
        if step % 40 == 0:
            metrics.append(
                {
                    "step": step,
                    "eval_loss": 3.15 + 5.0 * math.exp(-step / 40),
                    "eval_accuracy": 0.465 * (1 - math.exp(-step / 70)),
                    "eval_perplexity": math.exp(3.15 + 5.0 * math.exp(-step / 40)),
                    "eval_unigram_cross_entropy": 5.94,
                }
            )
        if step % 10 == 0:
            speed.append(
                {
                    "step": step,
                    "seconds": step * 0.75,
                    "tokens_per_second": 10_700 + draw.gauss(0, 200),
                    "data_wait_share": abs(draw.gauss(0.01, 0.004)),
                    "mfu": 0.6 + draw.gauss(0, 0.01),
                    "memory_bytes": 900_000_000,
                }
            )
    return metrics, speed


def _pretrain(out: Path, counts: dict) -> None:
    import torch
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = write_tokenizer(out / "model")
    model = BertForMaskedLM(_config(len(tokenizer)))
    model.save_pretrained(out / "model")
    metrics, speed = _metrics()
    _write_lines(out / "metrics.jsonl", metrics)
    _write_lines(out / "speed.jsonl", speed)
    last = next(row for row in reversed(metrics) if "eval_loss" in row)
    counts.update({key: value for key, value in last.items() if key != "step"})
    counts.update(
        parameters=model.num_parameters(),
        steps=STEPS,
        tokens=STEPS * 8_050,
        train_seconds=180.0,
        world_size=1,
        device="cpu",
        precision="fp32",
        threads=2,
        attention="bertpipe_packed",
    )


def _runs(metric: str, levels: dict[str, float]) -> list[dict]:
    draw = random.Random(1)
    return [
        {
            "init": init,
            "seed": seed,
            "scores": {metric: level + (draw.gauss(0, 0.012) if init in ("model", "scratch") else 0)},
            "best_epoch": 3,
            "wall_seconds": 41.0,
        }
        for init, level in levels.items()
        for seed in ((1, 2, 3) if init in ("model", "scratch") else (1,))
    ]


def _summary(runs: list[dict], metric: str) -> dict:
    summary = {}
    for init in dict.fromkeys(run["init"] for run in runs):
        values = sorted(run["scores"][metric] for run in runs if run["init"] == init)
        summary[init] = {
            "median": values[len(values) // 2],
            "lowest": values[0],
            "highest": values[-1],
            "num_runs": len(values),
        }
    return summary


def _finetune(out: Path, counts: dict) -> None:
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    tasks = {}
    plans = {
        "docs": (
            "classification",
            "accuracy",
            LABELS,
            {"model": 0.61, "scratch": 0.47, "majority": 0.17, "tfidf": 0.64},
        ),
        "cola": (
            "classification",
            "matthews_correlation",
            ["unacceptable", "acceptable"],
            {"model": 0.21, "scratch": 0.02},
        ),
        "stsb": ("regression", "pearson_spearman", [], {"model": 0.72, "scratch": 0.14}),
    }
    for name, (kind, metric, labels, levels) in plans.items():
        tokenizer = write_tokenizer(out / name / "model")
        ids = dict(enumerate(labels)) or {0: "similarity"}
        model = BertForSequenceClassification(
            _config(len(tokenizer), id2label=ids, label2id={label: index for index, label in ids.items()})
        )
        model.save_pretrained(out / name / "model")
        runs = _runs(metric, levels)
        tasks[name] = {
            "kind": kind,
            "metric": metric,
            "labels": labels or None,
            "num_train": 8_551,
            "num_validation": 1_043,
            "truncated": 12,
            "runs": runs,
            "summary": _summary(runs, metric),
            "model": f"{name}/model",
            "model_seed": max((run for run in runs if run["init"] == "model"), key=lambda run: run["scores"][metric])[
                "seed"
            ],
        }
    _write(out / "scores.json", {"tasks": tasks})
    counts.update(tasks=list(tasks))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> dict[str, Path]:
    """Published folders of corpus, tokenizer, shards, pretrain and finetune, by stage name. Read only."""
    root = tmp_path_factory.mktemp("runs")
    fill = {"corpus": _corpus, "tokenizer": _tokenizer, "shards": _shards, "pretrain": _pretrain, "finetune": _finetune}
    folders: dict[str, Path] = {}
    parents: dict[str, str] = {}
    for stage, make in fill.items():
        mark = artifact.fingerprint(stage, 1, {}, parents)
        folders[stage] = root / f"{stage}-{mark[:12]}"
        facts = {"stage": stage, "fingerprint": mark, "settings": {}, "parents": dict(parents)}
        facts["raw"] = {"sources": [[{"bytes": 513_400, "sha256": "ab" * 32}]]} if stage == "corpus" else {}
        with artifact.committing(folders[stage], **facts) as (out, counts):
            make(out, counts)
        parents = {stage: mark}
    return folders


@pytest.fixture(scope="session")
def trial(tmp_path_factory) -> Path:
    """A folder with a small checkpoint, model/, and small tasks, glue/: what tests/downstream/tuning.py runs on."""
    from tests.downstream import tuning

    folder = tmp_path_factory.mktemp("trial")
    tuning.write_checkpoint(folder / "model")
    for name in tuning.COLUMNS:
        tuning.write_task(folder / "glue", name)
    return folder


@pytest.fixture
def online(monkeypatch):
    """Lets this process talk to a server of the test's, with the token of its one user."""
    from huggingface_hub import constants

    from tests.hub import TOKEN

    def connect(server):
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        return server

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the server is a thread: at 5 ms every answer waits for its turn
    yield connect
    sys.setswitchinterval(usual)
