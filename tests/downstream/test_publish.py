"""What would be pushed: only allow-listed files, a card that the Hub's own library reads back, and code that runs."""

import contextlib
import io
import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMultipleChoice, BertForQuestionAnswering

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.downstream.publishing import card, card_scores, publish
from bertpipe.downstream.reporting.facts import gather
from bertpipe.errors import ArtifactError, ConfigError

STOCK = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
CANARY = "hf_canaryCANARYcanary"


def configure(**sections) -> Config:
    publishing = {"repo": "someone/tiny-bert"} | sections.pop("publish", {})
    return Config.model_validate({"publish": publishing, **sections})


def make(cfg: Config, inputs: dict[str, Path], out: Path) -> tuple[Path, ModelCard, dict]:
    counts: dict = {}
    out.mkdir(parents=True, exist_ok=True)
    publish.run(cfg, inputs, out, counts)
    folder = out / "model"
    return folder, ModelCard((folder / "README.md").read_text(encoding="utf-8")), counts


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def own_run(finished_run, tmp_path) -> dict[str, Path]:
    """A copy of the finished run that a test may damage."""
    return {stage: Path(shutil.copytree(folder, tmp_path / "own" / stage)) for stage, folder in finished_run.items()}


def test_only_allow_listed_files_leave(own_run, tmp_path):
    source = own_run["pretrain"] / "model"
    secret = tmp_path / "id_rsa"
    secret.write_text(CANARY)
    for name in (".env", "optimizer.pkl", "training_args.bin", "modeling_evil.py", "README.md", ".eval_results/x.yaml"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(CANARY)
    (source / "special_tokens_map.json.bak").symlink_to(secret)
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "left_by_an_interrupted_run.bin").write_text(CANARY)
    folder, _, counts = make(configure(), own_run, out)
    assert names(folder) == STOCK | {".eval_results/cola.yaml", ".eval_results/stsb.yaml"}
    assert {f"model/{name}" for name in names(folder)} == set(counts["files"])
    for path in folder.rglob("*"):
        if path.is_file():
            assert CANARY not in path.read_bytes().decode("latin-1")
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors"])
def test_a_link_never_leaves(own_run, tmp_path, name):
    (tmp_path / "secret").write_text(CANARY)
    (own_run["pretrain"] / "model" / name).unlink()
    (own_run["pretrain"] / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=f"{name}: a link"):
        make(configure(), own_run, tmp_path / "out")


def test_remote_code_and_places_are_taken_out_of_configs(own_run, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        path = own_run["pretrain"] / "model" / name
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "/home/me/run"}))
        folder, _, _ = make(configure(), own_run, tmp_path / name)
        assert json.loads((folder / name).read_text()) == config


def test_vocabulary_file_is_made_when_missing(own_run, tmp_path):
    path = own_run["pretrain"] / "model" / "vocab.txt"
    expected = path.read_bytes()
    path.unlink()
    folder, _, _ = make(configure(), own_run, tmp_path / "out")
    assert (folder / "vocab.txt").read_bytes() == expected


def test_card_says_what_was_measured(finished_run, tmp_path):
    folder, made, _ = make(configure(), finished_run, tmp_path)
    data = made.data
    assert (data.language, data.license, data.library_name) == ("en", "apache-2.0", "transformers")
    assert data.pipeline_tag == "fill-mask" and data.base_model is None and "bert" in data.tags
    assert data.model_name == "tiny-bert"
    found = {(result.dataset_type, result.dataset_config, result.metric_type): result for result in data.eval_results}
    counts = json.loads((finished_run["pretrain"] / "manifest.json").read_text())["counts"]
    for metric in ("loss", "perplexity", "accuracy"):
        assert found[("bertpipe-corpus", None, metric)].metric_value == pytest.approx(
            counts[f"eval_{metric}"], abs=1e-6
        )
    scores = json.loads((finished_run["finetune"] / "scores.json").read_text())["tasks"]
    for name, task in scores.items():
        dataset = "bertpipe-docs" if name == "docs" else "nyu-mll/glue"
        result = found[(dataset, name, task["metric"])]
        spread = task["summary"]["model"]
        assert result.metric_value == pytest.approx(spread["median"], abs=1e-6)
        assert result.metric_args["seeds"] == [1, 2, 3]
        assert result.metric_args["lowest"] == pytest.approx(spread["lowest"], abs=1e-6)
    body = made.text
    for stage in finished_run.values():
        assert stage.name.partition("-")[2] in body, "the fingerprint"
    assert "5.940 nats" in body and "1,230 documents in = 1,200 out + 30 skipped" in body
    assert (
        "muon_lr: 0.02" in body and "3 min 00 s" in body and f"on cpu ({artifact.environment()['processor']})" in body
    )
    assert (
        f"sources' contents is `{artifact.digest({'sources': [[{'bytes': 513_400, 'sha256': 'ab' * 32}]]})[:16]}`"
        in body
    )
    for name in STOCK - {"README.md"}:
        assert f"| {name} | `{artifact.hash_file(folder / name)}` |" in body
    curve = gather(configure(), finished_run)["curves"]["train"]["loss"]
    assert f"| training loss at the end | {curve[-1]:.3f} nats" in body
    assert r"&lt;img src=x onerror=alert(2)&gt;\|\`" in body and "<img" not in body and "<script" not in body


def test_card_of_a_fine_tuned_model(finished_run, tmp_path):
    cfg = configure(publish={"task": "cola"}, finetune={"data": "somewhere"})
    folder, made, _ = make(cfg, finished_run, tmp_path)
    assert made.data.pipeline_tag == "text-classification" and made.data.datasets == ["nyu-mll/glue"]
    assert {result.dataset_config for result in made.data.eval_results} == {"cola"}
    assert "Labels: unacceptable, acceptable." in made.text and "local copy" in made.text
    task = json.loads((finished_run["finetune"] / "scores.json").read_text())["tasks"]["cola"]
    best = task["summary"]["model"]["highest"]
    assert f"seed {task['model_seed']}, the best on the validation set ({best:.3f})" in made.text
    assert "Fine-tuning took 2 min 03 s for 3 runs of this model." in made.text
    assert names(folder) == STOCK | {".eval_results/cola.yaml"}
    assert (folder / "config.json").read_bytes() == (finished_run["finetune"] / "cola/model/config.json").read_bytes()


def test_eval_results_are_what_the_hub_parses(finished_run, tmp_path):
    folder, _, _ = make(configure(), finished_run, tmp_path)
    scores = json.loads((finished_run["finetune"] / "scores.json").read_text())["tasks"]
    for name in ("cola", "stsb"):
        (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / f"{name}.yaml").read_text()))
        assert (entry.dataset_id, entry.task_id) == ("nyu-mll/glue", name)
        assert entry.value == pytest.approx(scores[name]["summary"]["model"]["median"], abs=1e-6)
        assert entry.source_url == "https://huggingface.co/someone/tiny-bert"


def test_results_name_the_split_that_they_are_of():
    places = {
        ("mnli", "accuracy"): ("mnli", "validation_matched", "accuracy"),
        ("mnli", "mismatched_accuracy"): ("mnli", "validation_mismatched", "accuracy"),
        ("mnli", "ax_matthews_correlation"): ("ax", "test", "matthews_correlation"),
        ("mrpc", "f1"): ("mrpc", "validation", "f1"),
        ("mrpc", "test_f1"): ("mrpc", "test", "f1"),
        ("swag", "accuracy"): ("regular", "validation", "accuracy"),
        ("docs", "macro_f1"): ("docs", "validation", "macro_f1"),
    }
    for (task, metric), place in places.items():
        assert card_scores.measured_on(task, metric) == place


def test_a_model_for_multiple_choice_is_said_to_be_one_and_its_lines_run(own_run, tmp_path):
    finetuned = own_run["finetune"]
    scores = json.loads((finetuned / "scores.json").read_text())
    scores["tasks"] = {"swag": scores["tasks"]["docs"] | {"kind": "choices", "labels": ["0", "1", "2", "3"]}}
    (finetuned / "scores.json").write_text(json.dumps(scores))
    shutil.copytree(finetuned / "docs", finetuned / "swag")
    config = BertConfig.from_pretrained(finetuned / "docs" / "model", num_labels=1)
    BertForMultipleChoice(config).save_pretrained(finetuned / "swag" / "model")
    cfg = configure(publish={"task": "swag"}, finetune={"tasks": "swag"})
    folder, made, _ = make(cfg, own_run, tmp_path / "out")
    assert made.data.pipeline_tag == "multiple-choice" and made.data.datasets == ["allenai/swag"]
    assert "multiple choice model for the task swag" in made.text
    (code,) = re.findall(r"```python\n(.*?)\n```", made.text, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("someone/tiny-bert", str(folder)), {})
    assert printed.getvalue().strip() in ("0", "1")


def test_the_lines_of_a_model_that_answers_questions_run(own_run, tmp_path):
    finetuned = own_run["finetune"]
    scores = json.loads((finetuned / "scores.json").read_text())
    scores["tasks"] = {"squad": scores["tasks"]["docs"] | {"kind": "answers", "labels": None}}
    (finetuned / "scores.json").write_text(json.dumps(scores))
    shutil.copytree(finetuned / "docs", finetuned / "squad")
    config = BertConfig.from_pretrained(finetuned / "docs" / "model", num_labels=2)
    BertForQuestionAnswering(config).save_pretrained(finetuned / "squad" / "model")
    folder, made, _ = make(configure(publish={"task": "squad"}, finetune={"tasks": "squad"}), own_run, tmp_path / "out")
    assert made.data.pipeline_tag == "question-answering" and made.data.datasets == ["rajpurkar/squad"]
    (code,) = re.findall(r"```python\n(.*?)\n```", made.text, flags=re.DOTALL)
    exec(code.replace("someone/tiny-bert", str(folder)), {})


def test_places_of_this_machine_stay_here(finished_run, tmp_path):
    secret = tmp_path / "secret-place"
    (secret / "start").mkdir(parents=True)
    cfg = configure(
        corpus={"sources": [f"{secret}/wiki-*.parquet", "hub:org/text:en"]},
        tokenizer={"adopt": f"{secret}/vocab.txt"},
        model={"init": f"{secret}/start"},
        finetune={"data": f"{secret}/glue"},
        runtime={"root": str(secret)},
    )
    folder, made, _ = make(cfg, finished_run, tmp_path / "out")
    assert "wiki-" in made.text and "adopt: vocab.txt" in made.text
    assert made.data.datasets == ["org/text"] and made.data.base_model is None
    assert {r.dataset_type for r in made.data.eval_results if r.task_type == "fill-mask"} == {"org/text"}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes().decode("latin-1")
            assert "secret-place" not in content and str(tmp_path) not in content


def test_base_model_is_a_hub_id(finished_run, tmp_path):
    _, made, _ = make(configure(model={"init": "google-bert/bert-base-uncased"}), finished_run, tmp_path)
    assert made.data.base_model == "google-bert/bert-base-uncased"
    assert "from the checkpoint google-bert/bert-base-uncased" in made.text


def test_missing_model_names_the_command(finished_run, tmp_path):
    with pytest.raises(ArtifactError, match="run `bertpipe pretrain` first"):
        make(configure(), {"corpus": finished_run["corpus"]}, tmp_path)
    with pytest.raises(ArtifactError, match="run `bertpipe finetune` first"):
        make(configure(publish={"task": "cola"}), {"pretrain": finished_run["pretrain"]}, tmp_path)
    with pytest.raises(ConfigError, match=r"publish\.task: .*'mnli'; it has: cola, docs, stsb"):
        make(configure(publish={"task": "mnli"}), finished_run, tmp_path)
    with pytest.raises(ConfigError, match=r"publish\.repo"):
        make(configure(publish={"repo": "a/b/c"}), finished_run, tmp_path)


def test_missing_weights_are_named(own_run, tmp_path):
    (own_run["pretrain"] / "model" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing"):
        make(configure(), own_run, tmp_path / "out")


def test_card_of_the_model_alone(finished_run, tmp_path):
    folder, made, _ = make(configure(), {"pretrain": finished_run["pretrain"]}, tmp_path)
    assert names(folder) == STOCK
    assert {result.task_type for result in made.data.eval_results} == {"fill-mask"}


def test_says_where_and_that_nothing_was_uploaded(finished_run, tmp_path, capsys):
    make(configure(), finished_run, tmp_path / "publish-0123.partial")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'publish-0123' / 'model'}:" in said and "nothing was uploaded" in said


def test_limits_follow_the_facts(finished_run):
    cfg = configure()
    facts = gather(cfg, finished_run)
    text = " ".join(card.limits(cfg, facts))
    assert "1,932,000 tokens" in text and "learnt to use context" in text and "beyond 128" in text
    assert "chosen on the validation set" in text and "cola (12)" in text and "single seed" not in text
    facts["pretrain"] |= {"gap": 0.05, "tokens": 5_000_000_000}
    for task in facts["finetune"].values():
        task["runs"], task["truncated"] = task["runs"][:1], 0
    text = " ".join(card.limits(cfg, facts))
    assert "little beyond word frequencies" in text and "Small:" not in text and "cut:" not in text
    assert "single seed: docs, cola, stsb" in text


@given(st.text(alphabet=st.sampled_from("a|`<>*[]\\&\n#-") | st.characters(codec="utf-8")))
def test_escaped_text_starts_no_markup(text):
    out = card.escape(text)
    assert "<" not in out and ">" not in out and "\n" not in out
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]|]", out)
