"""`bertpipe export`: the graph's outputs are the stock model's on any batch, for every head; nothing half is left."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.cli import main
from bertpipe.downstream.using import finished, onnx_folder
from bertpipe.errors import ArtifactError
from tests.downstream.conftest import TEXT
from tests.downstream.heads import HEADS, write_head

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ROOT = Path(__file__).parents[2]
WORDS = TEXT.split()
SAME_CLASS = ("multi-label", "one label", "regression")  # as text-classification
FAMILIES = {
    "roberta": lambda n, sizes: tr.RobertaForMaskedLM(tr.RobertaConfig(vocab_size=n, **sizes)),
    "modernbert": lambda n, sizes: tr.ModernBertForMaskedLM(
        tr.ModernBertConfig(
            vocab_size=n,
            local_attention=8,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
            **sizes,
        )
    ),
}


def outputs(folder, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    given = {entry.name: batch[entry.name] for entry in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def check(folder, model, tokenizer, choices: int = 0) -> None:
    """The exported outputs equal the model's on one short text, and on several of unlike lengths."""
    for texts in (["the value"], [" ".join(WORDS[:n]) for n in (1, 30, 7)]):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        if choices:
            batch = {name: value[:, None].repeat(1, choices, 1) for name, value in batch.items()}
        with torch.no_grad():
            expected = model(**batch)
        found = outputs(folder, {name: value.numpy() for name, value in batch.items()})
        real = batch["attention_mask"].bool().numpy()
        for name, value in found.items():
            theirs = expected[name].numpy()
            pairs = (value[real], theirs[real]) if theirs.shape[: real.ndim] == real.shape else (value, theirs)
            np.testing.assert_allclose(*pairs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)


def slow_but(first: str, names: Iterable[str]) -> list:
    """Parameters; an export takes five seconds."""
    return [name if name == first else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("head", slow_but("token-classification", [head for head in HEADS if head not in SAME_CLASS]))
def test_the_graph_gives_what_the_stock_model_gives(tmp_path, head, capsys):
    source, folder = write_head(tmp_path / "model", head), tmp_path / "onnx"
    assert main(["export", "--model", str(source), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"for {head}" in said and str(folder) in said
    assert not list(tmp_path.glob("*.partial"))
    model = getattr(tr, HEADS[head][0]).from_pretrained(source).eval()
    check(folder, model, tr.AutoTokenizer.from_pretrained(folder), choices=3 * (head == "multiple-choice"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == [HEADS[head][0]]


def test_the_lines_of_the_readme(tmp_path, monkeypatch):
    """What they give is the stock model's answer."""
    source = write_head(tmp_path / "model", "fill-mask")
    onnx_folder.export(finished.load(str(source)), tmp_path / "my-onnx")
    code = (ROOT / "README.md").read_text().partition("import onnxruntime")
    lines = "".join(code[1:]).partition("```")[0].replace("the [MASK] of the city is old.", "the [MASK] value")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)
    model, tokenizer = tr.BertForMaskedLM.from_pretrained(source).eval(), tr.AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        expected = model(**tokenizer("the [MASK] value", return_tensors="pt")).logits
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", slow_but("", FAMILIES))
def test_other_families(tmp_path, family):
    source = write_head(tmp_path / "model", "fill-mask")
    tokenizer = tr.AutoTokenizer.from_pretrained(source)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = FAMILIES[family](len(tokenizer), sizes | {"max_position_embeddings": 66}).eval()
    model.save_pretrained(source)
    onnx_folder.export(finished.load(str(source)), tmp_path / "onnx")
    check(tmp_path / "onnx", model, tokenizer)


def test_a_graph_that_differs_is_not_kept(tmp_path, monkeypatch):
    """Nor is what another command makes beside it touched: a run that is going on, another export."""
    (tmp_path / "onnx.partial").mkdir()
    source = write_head(tmp_path / "model", "text-classification")
    loaded = finished.load(str(source))
    write = onnx_folder._write

    def broken(model, folder):
        write(model, folder)
        with torch.no_grad():
            model.model.classifier.bias += 0.01  # torch gives something else from here on

    monkeypatch.setattr(onnx_folder, "_write", broken)
    with pytest.raises(ArtifactError, match="differ from torch's"):
        onnx_folder.export(loaded, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "onnx.partial"]


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    source = write_head(tmp_path / "model", "feature-extraction")

    def failure(*arguments: str) -> str:
        assert main(["export", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bertpipe: ")]
        return line

    assert "--out" in failure("--model", str(source))
    assert "is there already" in failure("--model", str(source), "--out", str(source))
    assert "no folder" in failure("--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    config = json.loads((source / "config.json").read_text())
    for other in ("BertLMHeadOfMine", "BertLMHeadModel", 3):
        (source / "config.json").write_text(json.dumps(config | {"architectures": [other]}))
        assert f"a {other}; of use here are" in failure("--model", str(source), "--out", str(tmp_path / "out"))
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    assert "its head is not whole (classifier.bias" in failure("--model", str(source), "--out", str(tmp_path / "out"))
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'bertpipe[onnx]'" in failure("--model", str(source), "--out", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
