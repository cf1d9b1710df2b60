"""The page shows what was measured, escapes what it shows, asks for nothing outside itself and bears missing parts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bertpipe.config import Config
from bertpipe.downstream.finetuning import published
from bertpipe.downstream.reporting import report
from bertpipe.downstream.reporting.figures import make_figures, smooth
from bertpipe.downstream.reporting.record import MAX_POINTS, columns
from bertpipe.errors import ArtifactError, ConfigError
from tests.downstream.test_understanding import classified, rated, write_run

HOSTILE = "<script>alert('x')</script>|`</script>"  # as in the finished run's ledger and vocabulary
SENTENCES = ["the [MASK] of the function is returned .", "return a [MASK] of names .", "no [MASK] <b>here</b> ."]
CFG = Config.model_validate({"report": {"title": f"A run {HOSTILE}", "fill_mask": SENTENCES}})


LINKING = ("src", "href", "srcset", "action", "data", "poster", "background")


class Page(HTMLParser):
    """What a browser would see: the text outside scripts and styles, the scripts, and every link."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.scripts, self.ids, self.links = "", [], set(), []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.links += [
            value for key, value in attributes if key in ("src", "href", "srcset", "action", "data", "poster")
        ]
        if tag in ("script", "style"):
            self.open.append(tag)
            self.scripts.append({"tag": tag, "type": values.get("type"), "body": ""})

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.scripts[-1]["body"] += data
        else:
            self.text += " " + data


def _strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def make(out: Path, inputs: dict[str, Path], cfg: Config = CFG) -> tuple[str, Page, dict]:
    counts: dict = {}
    out.mkdir(parents=True, exist_ok=True)
    report.run(cfg, inputs, out, counts)
    html = (out / "report.html").read_text(encoding="utf-8")
    return html, Page(html), _strict((out / "report.json").read_text(encoding="utf-8"))


def understood_run(finished_run: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same run with predictions; texts and names of classes are hostile."""
    shutil.copytree(finished_run["finetune"], folder / "finetune")
    names = ("numpy", f"{HOSTILE}<b>", "torch")
    lines, scores = classified(300, 1, names)
    for line in lines:
        line["text"] = [f"{HOSTILE} {line['text'][0]}"]
    write_run(folder / "finetune", "docs", lines, scores, seed=2, labels=names)
    write_run(folder / "finetune", "stsb", *rated(300))
    return finished_run | {"finetune": folder / "finetune"}


@pytest.fixture(scope="module")
def understood(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("understood")
    return make(folder / "out", understood_run(finished_run, folder))


@pytest.fixture(scope="module")
def made(finished_run, tmp_path_factory):
    return make(tmp_path_factory.mktemp("report"), finished_run)


def test_page_shows_what_was_measured(made, finished_run):
    _, page, facts = made
    text = " ".join(page.text.split())
    for section in ("pretraining", "fill-mask", "scores", "corpus", "tokenizer", "packing", "config", "artifacts"):
        assert section in page.ids
    figures = facts["pretrain"]
    assert figures["gap"] == pytest.approx(5.94 - figures["eval_loss"])
    for shown in (f"{figures['eval_loss']:.3f}", "5.940", f"{figures['gap']:.3f}", "1.93 M", "3 min 00 s", "900.0 MB"):
        assert shown in text
    assert "1,230 documents in = 1,200 out + 30 skipped" in text
    assert "does not balance" not in text
    for shown in (
        "1,188 9,400 151,000",
        "num ##py",
        "underscore",
        "TF-IDF + logistic regression",
        "learning_rate: 0.002",
    ):
        assert (shown in text) == (shown != "learning_rate: 0.002")
    assert "muon_lr: 0.02" in text
    for stage, folder in finished_run.items():
        assert str(folder) in text and stage in text
    assert "transformers" in facts["environment"] and facts["environment"]["torch"] in text
    summary = facts["finetune"]["docs"]["summary"]["model"]
    assert f"{summary['median']:.3f} [{summary['lowest']:.3f}, {summary['highest']:.3f}] 3" in text


def test_page_asks_for_nothing_outside_itself(made):
    from plotly.offline import get_plotlyjs

    html, page, _ = made
    library = get_plotlyjs()
    assert html.count(library) == 1
    rest = html.replace(library, "")
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?://|@import|url\(|//cdn", rest)
    assert "default-src 'none'" in rest


def test_text_from_data_stays_text(made):
    from plotly.offline import get_plotlyjs

    html, page, _ = made
    assert HOSTILE not in html and "<b>here</b>" not in html and "<img" not in html.replace(get_plotlyjs(), "")
    assert "alert('x')" in page.text, "the ledger, the longest pieces and the title show it"
    kinds = [script["type"] for script in page.scripts if script["tag"] == "script"]
    assert kinds.count(None) == 3, "plotly and the page's own scripts"
    assert set(kinds) == {None, "application/json"}
    assert not any("alert('x')" in script["body"] for script in page.scripts)


def test_mistakes_are_shown_and_stay_text(understood, made):
    html, page, facts = understood
    assert set(facts["understanding"]) == {"docs", "stsb"}, "cola left no predictions"
    new = set(make_figures(facts)) - set(make_figures(made[2]))
    assert new == {
        *(f"task0_{name}" for name in ("confusion", "length", "loss", "epochs")),
        *(f"task1_{name}" for name in ("scatter", "length", "loss", "epochs")),
    }
    assert "understanding" in page.ids and {f"figure-{name}" for name in new} <= page.ids
    assert "understanding" not in made[1].ids
    text = " ".join(page.text.split())
    docs = facts["understanding"]["docs"]
    for row in docs["mistakes"]:
        assert f"{row['id']} {HOSTILE} {row['text'][0][len(HOSTILE) + 1 :]}" in text
        assert f"{100 * row['probability']:.1f} %" in text
    for row in docs["per_class"]:
        figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        assert " ".join((row["class"], *figures, f"{row['support']}")) in text
    assert HOSTILE not in html and html.count("<b>") == made[0].count("<b>")
    heat = make_figures(facts)["task0_confusion"]["data"][0]
    assert heat["y"][1].startswith("&lt;script&gt;"), "plotly takes tags for its own"
    assert sum(map(sum, heat["customdata"])) == 300
    assert not any("alert('x')" in script["body"] for script in page.scripts)


def test_quartiles_failed_runs_the_grid_and_published_scores_are_shown(finished_run, tmp_path):
    folder = tmp_path / "finetune"
    shutil.copytree(finished_run["finetune"], folder)
    scores = json.loads((folder / "scores.json").read_text())
    scores["tasks"]["cola"]["summary"]["model"] |= {"lower_quartile": 0.1234, "upper_quartile": 0.2345, "num_failed": 2}
    scores["tasks"]["cola"]["published"] = published.of("cola") + published.of("mrpc")
    point = {"init": "model", "lr": 3e-5, "batch_size": 16, "epochs": 4, "chosen": True, "median": 0.3142}
    point |= {"lower_quartile": 0.2, "upper_quartile": 0.4, "num_runs": 5, "num_failed": 1}
    scores["tasks"]["stsb"]["grid"] = [point, point | {"lr": 1e-4, "chosen": False, "median": 0.2718}]
    (folder / "scores.json").write_text(json.dumps(scores))
    before = make(tmp_path / "before", {"finetune": finished_run["finetune"]})[1].text
    text = make(tmp_path / "out", {"finetune": folder})[1].text
    assert "[0.123, 0.234]" in text and "2 runs failed" in " ".join(text.split())
    assert "3e-05 16 4 0.314 [0.200, 0.400] 1 of 5" in " ".join(text.split())
    assert "BERT-base dev 0.563 Sanh et al. 2019" in " ".join(text.split()) and "0.886*" in text
    assert all(word not in before for word in ("quartile", "failed", "As published", "The grid"))


def test_figures_have_labelled_axes_and_every_seed(made):
    _, page, facts = made
    figures = make_figures(facts)
    expected = {"loss", "accuracy", "lr", "grad_norm", "throughput", "data_wait", "mfu", "fill", "scores"}
    assert set(figures) == expected | {"word_tokens", "word_characters", "document_tokens"}
    for name, figure in figures.items():
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert figure["layout"]["yaxis"].get("title", {}).get("text") or figure["layout"]["yaxis"]["ticktext"]
        assert f"figure-{name}" in page.ids
    shown = [_strict(script["body"]) for script in page.scripts if script["type"] == "application/json"]
    assert len(shown) == len(figures) + 1, "and the tokenizer explorer's data"
    lines = {trace["name"]: trace for trace in figures["loss"]["data"]}
    assert set(lines["unigram cross-entropy"]["y"]) == {5.94}
    assert list(lines["hold-out"]["x"]) == [40, 80, 120, 160, 200, 240]
    dots = sum(len(trace["x"]) for trace in figures["scores"]["data"] if "text" in trace)
    assert dots == sum(len(task["runs"]) for task in facts["finetune"].values())


def test_pair_objectives_plot_like_with_like(finished_run, tmp_path):
    """The hold-out loss is of masked tokens alone, so the curve beside it is too; the pairs have plots of their own."""
    folder = tmp_path / "pretrain"
    shutil.copytree(finished_run["pretrain"], folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for row in rows:
        if "loss" in row:
            row |= {"mlm_loss": row["loss"], "mlm_accuracy": row["accuracy"], "sop_loss": 0.5, "sop_accuracy": 0.75}
            row["loss"] += row["sop_loss"]
        else:
            row |= {"eval_sop_loss": 0.625, "eval_sop_accuracy": 0.7}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page, facts = make(tmp_path / "out", {"pretrain": folder})
    figures = make_figures(facts)
    single = make_figures(make(tmp_path / "single", {"pretrain": finished_run["pretrain"]})[2])
    assert figures["loss"] == single["loss"] and figures["accuracy"] == single["accuracy"]
    assert set(figures) - set(single) == {"pair_loss", "pair_accuracy"} and "figure-pair_loss" in page.ids
    for name, unit, expected in (("loss", 1, (0.5, 0.625, 0.693147)), ("accuracy", 100, (0.75, 0.7, 0.5))):
        lines = {trace["name"]: set(trace["y"]) for trace in figures[f"pair_{name}"]["data"]}
        for curve, value in zip(("training", "hold-out", "a coin"), expected, strict=True):
            (shown,) = lines[curve]
            assert shown == pytest.approx(unit * value)
    assert "Sentence order: pairs told right." in page.text


def test_fill_mask_equals_the_model(finished_run):
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = finished_run["pretrain"] / "model"
    rows = report.fill_masks(folder, SENTENCES)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    for row, sentence in zip(rows, SENTENCES, strict=True):
        batch = tokenizer(sentence, return_tensors="pt")
        where = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        with torch.no_grad():
            best = model(**batch).logits[0, where].softmax(-1).topk(5)
        assert [item["probability"] for item in row["fillings"]] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [item["token"] for item in row["fillings"]] == tokenizer.convert_ids_to_tokens(best.indices.tolist())


@pytest.mark.parametrize(
    ("sentence", "complaint"),
    [
        ("no blank", "exactly one"),
        ("[MASK] [MASK]", "exactly one"),
        ("[MASK] " + "the " * 100, "tokens, the model takes 64"),
    ],
)
def test_bad_fill_mask_sentence_is_named(finished_run, sentence, complaint):
    with pytest.raises(ConfigError, match=rf"report\.fill_mask\[1\].*{complaint}"):
        report.fill_masks(finished_run["pretrain"] / "model", ["a [MASK]", sentence])


def test_fill_mask_lines(made, tmp_path):
    _, _, facts = made
    (tmp_path / "report.json").write_text(json.dumps(facts))
    lines = report.fill_mask_lines(tmp_path / "report.json")
    assert len(lines) == 3
    top = facts["fill_mask"][0]["fillings"][0]
    assert lines[0].startswith(SENTENCES[0]) and f"{top['token']} {100 * top['probability']:.0f} %" in lines[0]
    with pytest.raises(ArtifactError, match="bertpipe report"):
        report.fill_mask_lines(tmp_path / "none.json")


@pytest.mark.parametrize("present", [(), ("corpus",), ("corpus", "tokenizer", "shards"), ("pretrain",), ("finetune",)])
def test_half_a_run_says_what_is_missing(finished_run, tmp_path, present):
    html, _, facts = make(tmp_path, {stage: finished_run[stage] for stage in present})
    assert facts["missing"] == [stage for stage in finished_run if stage not in present]
    for stage in set(facts["missing"]):
        assert f"<code>bertpipe {stage}</code>" in html
    for stage in present:
        assert f"<code>bertpipe {stage}</code>" not in html


def test_optional_keys_may_be_missing(finished_run, tmp_path):
    inputs = {}
    for stage in ("corpus", "tokenizer", "shards", "pretrain", "finetune"):
        inputs[stage] = tmp_path / stage
        shutil.copytree(finished_run[stage], inputs[stage])
        (inputs[stage] / "manifest.json").write_text("{}")
    (inputs["corpus"] / "ledger.json").write_text('{"total": {}, "sources": {"a": {}}}')
    (inputs["tokenizer"] / "report.json").write_text("{}")
    (inputs["shards"] / "shards.json").write_text('{"splits": {"train": {}}}')
    (inputs["pretrain"] / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "eval_loss": 1.5}\n')
    (inputs["pretrain"] / "speed.jsonl").unlink()
    (inputs["finetune"] / "scores.json").write_text('{"tasks": {"a": {"runs": [{"init": "model"}]}, "b": {}}}')
    _, _, facts = make(tmp_path / "out", inputs)
    assert facts["curves"]["train"]["loss"] == [None]


def test_unbalanced_ledger_is_pointed_at(finished_run, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(finished_run["corpus"], folder)
    row = {"documents_in": 10, "documents_out": 8, "skipped": {"empty": 1}}
    (folder / "ledger.json").write_text(json.dumps({"total": row, "sources": {"a": row}}))
    assert "does not balance" in make(tmp_path / "out", {"corpus": folder})[1].text


def test_broken_lines_are_left_out_and_counted(finished_run, tmp_path, capsys):
    """Whatever is wrong with them; what can be read is shown."""
    folder = tmp_path / "pretrain"
    shutil.copytree(finished_run["pretrain"], folder)
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    bad = (b'{"step": 7, "loss"', b"", b"\xff\xfe\x00", b"[1, 2]", b'{"step": "eight", "loss": 3.0}', b"[" * 100_000)
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], *bad, *lines[2:-1], b'{"step": 241, "lo']))
    _, page, facts = make(tmp_path / "out", {"pretrain": folder})
    named = [line.split(": ")[0] for line in facts["broken"]]
    assert named == [f"{folder / 'metrics.jsonl'}:{number}" for number in (3, 4, 5, 6, 7, 8, len(lines) + len(bad))]
    assert "7 lines of the records can't be read and are left out." in " ".join(page.text.split())
    assert all(line[:80] in page.text for line in facts["broken"])
    said = capsys.readouterr().out
    assert "can't be read and are left out: 7\n" in said and named[0] in said and "and 4 more" in said
    assert facts["curves"] == make(tmp_path / "whole", {"pretrain": finished_run["pretrain"]})[2]["curves"]


def test_long_curves_are_averaged():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 5_001)]
    out = columns(rows, ("step", "loss", "absent"))
    assert set(out) == {"step", "loss"}
    assert len(out["step"]) == 1_000 <= MAX_POINTS
    assert out["step"][:2] == [5, 10] and out["step"][-1] == 5_000
    assert out["loss"][:2] == [3.0, 8.0]


def test_smoothing_lags_nowhere():
    line = [float(value) for value in range(300)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([1.0, None, 3.0]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("gap", "words"), [(2.0, "reads context"), (0.2, "begun"), (0.01, "little more"), (-0.5, "0.50 above")]
)
def test_verdict_follows_the_gap(gap, words):
    assert words in report.verdict({"eval_loss": 4.0, "gap": gap})


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (report.integer, 12345, "12,345"),
        (report.integer, None, "–"),
        (report.fixed, float("nan"), "–"),
        (report.fixed, -0.25, "−0.250"),
        (report.percent, 0.1234, "12.3 %"),
        (report.compact, 109_500_000, "110 M"),
        (report.compact, 9_999, "9,999"),
        (report.byte_size, 1_500_000, "1.5 MB"),
        (report.duration, 7_500, "2 h 05 min"),
        (report.duration, 59.6, "1 min 00 s"),
        (report.duration, 3.21, "3.2 s"),
    ],
)
def test_numbers_as_people_read_them(show, value, text):
    assert show(value) == text
