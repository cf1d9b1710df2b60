"""Pages from the folders of runs alone: one run, several side by side, one that is still going, a damaged record."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bertpipe import cli
from bertpipe.config import Config
from bertpipe.downstream.reporting import from_runs, side_by_side
from bertpipe.downstream.reporting.facts import collect
from bertpipe.downstream.reporting.figures import make_figures
from bertpipe.downstream.reporting.run_figures import run_figures
from tests.downstream.test_report import HOSTILE, Page

PHASES = [{"share": 0.75, "sequence_length": 32}, {"share": 0.25, "sequence_length": 64, "slot_tokens": 8192}]
WARMUP = [{"steps": 20, "slots": 1}]


def copy_run(source: Path, root: Path, name: str, settings: dict, **changes) -> Path:
    """A pretrain or finetune artifact with other settings, and other values in its manifest."""
    folder = root / name
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"config": Config.model_validate(settings).model_dump(mode="json")} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def interrupt(folder: Path, lines: int) -> Path:
    """The same run as it stood after some lines of its record, the last of them half written."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("counts", "files", "wall_seconds", "environment"):
        del manifest[name]
    (folder / "recipe.json").write_text(json.dumps(manifest))
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "model")
    for name, kept in (("metrics.jsonl", lines), ("speed.jsonl", lines // 10 - 1)):
        whole = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(whole[:kept]) + whole[kept][:20])
    return folder.rename(folder.with_name(folder.name + ".partial"))


@pytest.fixture(scope="module")
def root(finished_run, tmp_path_factory) -> Path:
    """Runs a, b (another rate, phases), c (still going), and d, a finetune artifact."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"steps": 240, "sequence_length": 64, "slot_tokens": 4096, "slots_per_step": 2}
    first = {"train": train, "report": {"title": f"First {HOSTILE}", "fill_mask": "the [MASK] of the function ."}}
    second = first | {"optim": {"lr": 5e-4}, "train": train | {"phases": PHASES, "batch_warmup": WARMUP}}
    pretrain = finished_run["pretrain"]
    copy_run(pretrain, folder, "pretrain-aaaaaaaaaaaa", first)
    copy_run(pretrain, folder, "pretrain-bbbbbbbbbbbb", second, parents={"shards": "other"})
    interrupt(copy_run(pretrain, folder, "pretrain-cccccccccccc", first | {"corpus": {"sources": HOSTILE}}), 100)
    copy_run(finished_run["finetune"], folder, "finetune-dddddddddddd", first | {"finetune": {"lr": 1e-4}})
    copy_run(finished_run["finetune"], folder, "finetune-eeeeeeeeeeee", first)
    return folder


@pytest.fixture(scope="module")
def beside(root, tmp_path_factory) -> tuple[str, Page, list[str]]:
    out = tmp_path_factory.mktemp("out") / "page.html"
    lines = from_runs.write([next(root.glob(f"*-{letter * 12}*")) for letter in "abcde"], out)
    html = out.read_text(encoding="utf-8")
    return html, Page(html), lines


def words(page: Page) -> str:
    return " ".join(page.text.split())


def opened(folder: Path) -> dict:
    return side_by_side.read(folder, from_runs.open_run(folder).manifest)


def test_one_run_has_the_page_of_the_stage(root, finished_run, tmp_path):
    """Settings, sentences and all from the manifest; parents are found beside it."""
    lines = from_runs.write([root / "pretrain-aaaaaaaaaaaa"], tmp_path / "page.html")
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'page.html'}: {root / 'pretrain-aaaaaaaaaaaa'};")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = words(page)
    assert f"First {HOSTILE}" in text and "1.93 M" in text and "function ." in text
    assert "<code>bertpipe corpus</code>" in (tmp_path / "page.html").read_text() and "explorer-text" in page.ids
    beside_it = {stage: folder for stage, folder in finished_run.items() if stage != "finetune"}
    assert from_runs.open_run(finished_run["pretrain"]).inputs == beside_it
    assert from_runs.open_run(finished_run["finetune"]).inputs == finished_run


def test_a_run_that_is_still_going(root, tmp_path, capsys):
    """Says so, with its step, on the page and in the terminal; the half line at the end of its record is none."""
    out = tmp_path / "page.html"
    assert cli.main(["report", str(root / "pretrain-cccccccccccc.partial"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("cccc.partial: still going, or interrupted: step 98 of 240\n") and "read" not in said
    text = words(Page(out.read_text(encoding="utf-8")))
    assert re.search(
        r"Still going , or interrupted: step 98 of 240 \(41 %\)\. Its record was last written at [\d-]+ [\d:]+ UTC , "
        r"this page at [\d-]+ [\d:]+ UTC\.",
        text,
    )
    assert "comes with the end of the run" in text and "No sentences" not in text
    facts = collect({}, {"pretrain": root / "pretrain-cccccccccccc.partial"}, "")
    assert not facts["broken"] and facts["curves"]["train"]["step"][-1] == 98
    assert facts["pretrain"]["eval_loss"] == facts["curves"]["eval"]["eval_loss"][-1] and "2.15 nats" not in text


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_has_only_begun(root, tmp_path, stage):
    folder = tmp_path / f"{stage}-ffffffffffff.partial"
    folder.mkdir()
    manifest = json.loads(next(root.glob(f"{stage}-*[!l]/manifest.json")).read_text())
    (folder / "recipe.json").write_text(json.dumps({key: manifest[key] for key in ("stage", "fingerprint", "config")}))
    for folders in ([folder], [folder, next(root.glob(f"{stage}-*[!l]"))]):
        lines = from_runs.write(folders, tmp_path / "page.html")
        assert any("ffffffffffff.partial: still going, or interrupted" in line for line in lines)
        assert "till going" in words(Page((tmp_path / "page.html").read_text(encoding="utf-8")))


def test_the_folder_may_have_got_its_other_name(root):
    """A run that ends while one types, or one whose `.partial` was left out."""
    assert from_runs.open_run(root / "pretrain-aaaaaaaaaaaa.partial").folder == root / "pretrain-aaaaaaaaaaaa"
    assert from_runs.open_run(root / "pretrain-cccccccccccc").folder == root / "pretrain-cccccccccccc.partial"


def test_runs_side_by_side(beside, root):
    html, page, lines = beside
    text = words(page)
    assert "5 runs side by side" in text and "C is still going , or was interrupted: step 98 of 240" in text
    assert lines[1].endswith("pretrain-cccccccccccc.partial: still going, or interrupted: step 98 of 240")
    for path in root.iterdir():
        assert str(path) in text
    assert "different hold-out texts" in text, "b was made from other shards"
    figures = re.search(
        r"Run Steps Tokens Hold-out loss Below unigram.*?A 240 1\.93 M 3\.162 2\.778 .*?C 98 789 k", text
    )
    assert figures, text[:3_000]
    assert HOSTILE not in html and "alert('x')" in text
    assert html.count("<script") == html.count("</script>")


def test_only_settings_that_differ_are_shown(beside):
    section = words(beside[1]).partition("Settings that differ")[2].partition("Artifacts")[0]
    shown = re.findall(r"\b(?:[a-z]+\.)+[a-z_]+\b", section)
    assert shown == ["corpus.sources", "optim.lr", "train.phases", "train.batch_warmup", "finetune.lr"]
    assert "optim.lr 0.002 0.0005 0.002 0.002 0.002" in section
    assert f"finetune.lr – – – 0.0001 {Config().finetune.lr}" in section


def test_the_same_runs_differ_in_nothing(root, tmp_path):
    again = shutil.copytree(root / "pretrain-aaaaaaaaaaaa", tmp_path / "pretrain-again")
    lines = from_runs.write([root / "pretrain-aaaaaaaaaaaa", again], tmp_path / "page.html")
    text = words(Page((tmp_path / "page.html").read_text(encoding="utf-8")))
    assert "None: these runs are of one recipe." in text and "hold-out texts" not in text and len(lines) == 1


def test_scores_with_their_spread(beside, root):
    scores = json.loads((root / "finetune-dddddddddddd" / "scores.json").read_text())["tasks"]
    text = words(beside[1])
    for task in scores.values():
        row = task["summary"]["model"]
        shown = f"{row['median']:.3f} [{row['lowest']:.3f}, {row['highest']:.3f}] (3)"
        assert f"pretrained {shown} {shown}" in text
    data = run_figures([opened(path) | {"name": "D", "colour": "run0"} for path in sorted(root.glob("finetune-d*"))])
    dots, strokes = data["scores"]["data"]
    assert len(dots["x"]) == sum(run["init"] == "model" for task in scores.values() for run in task["runs"])
    assert sorted(strokes["x"]) == sorted(task["summary"]["model"]["median"] for task in scores.values())


def test_curves_by_steps_tokens_and_hours(root):
    run = opened(root / "pretrain-aaaaaaaaaaaa") | {"name": "A", "colour": "run0"}
    figures = run_figures([run])
    assert set(figures) == {"loss", "accuracy", "throughput", "mfu", "data_wait", "fill", "grad_norm"}
    training, held, floor = figures["loss"]["data"]
    assert list(held["y"]) == run["curves"]["eval"]["eval_loss"] and len(training["y"]) == 240
    x = held["meta"]["x"]
    assert list(x["step"]) == [40, 80, 120, 160, 200, 240]
    assert list(x["tokens"]) == [step * 8_050 for step in x["step"]]
    assert list(x["hours"]) == pytest.approx([step * 0.75 / 3600 for step in x["step"]], abs=1e-6)
    assert set(floor["y"]) == {5.94} and floor["meta"]["x"]["tokens"][-1] == 240 * 8_050
    assert list(held["text"]) == [*[""] * 5, "A"] and training["mode"] == "lines"


def test_runs_share_the_floor_that_is_theirs(root):
    """One line for runs of one hold-out, one for each other; as far as the longest run."""
    runs = [opened(root / f"pretrain-{letter * 12}") | {"name": letter.upper(), "colour": "run0"} for letter in "aba"]
    short = opened(root / "pretrain-cccccccccccc.partial") | {"name": "C", "colour": "run3"}
    runs[1]["pretrain"]["eval_unigram_cross_entropy"] = 7.0
    lines = {trace["name"]: trace for trace in run_figures([*runs, short])["loss"]["data"]}
    floors = {name: (trace["y"][0], trace["x"][1]) for name, trace in lines.items() if "unigram" in name}
    assert floors == {"A, A, C unigram": (5.94, 240), "B unigram": (7.0, 240)}


def test_a_point_after_the_last_line_of_speed_has_no_hour(root):
    x = opened(root / "pretrain-cccccccccccc.partial")["curves"]["train"]["x"]
    assert x["step"][-1] == 98 and x["hours"][90:] == [None] * 8
    assert x["hours"][89] == pytest.approx(90 * 0.75 / 3600, abs=1e-6)


def test_phases(root):
    """Lengths, slots, tokens and losses of each, from the record; lines in the plots where they begin."""
    folder = root / "pretrain-bbbbbbbbbbbb"
    facts = collect(json.loads((folder / "manifest.json").read_text())["config"], {"pretrain": folder}, "")
    short, long = facts["phases"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    speed = [json.loads(line)["tokens_per_second"] for line in (folder / "speed.jsonl").open()]
    assert (short["first"], short["last"], long["first"], long["last"]) == (1, 180, 181, 240)
    assert (short["sequence_length"], short["slot_tokens"], short["slots"]) == (32, 4096, [1, 2])
    assert (long["sequence_length"], long["slot_tokens"], long["slots"]) == (64, 8192, [2, 2])
    assert (short["tokens"], long["tokens"]) == (180 * 8_050, 60 * 8_050)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert short["loss"] == pytest.approx(sum(losses[step] for step in range(163, 181)) / 18)
    held = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert (short["eval_loss"], long["eval_loss"]) == (held[160], held[240])
    assert short["tokens_per_second"] == pytest.approx((sorted(speed[:18])[8] + sorted(speed[:18])[9]) / 2)
    figures = make_figures(facts)
    for name in ("loss", "lr", "fill", "throughput", "mfu", "data_wait"):
        layout = figures[name]["layout"]
        assert [shape["x0"] for shape in layout["shapes"]] == [180]
        assert [note["text"] for note in layout["annotations"]] == ["32 tokens", "64 tokens"]
    run = opened(folder) | {"name": "B", "colour": "run1"}
    (mark,) = [trace for trace in run_figures([run])["loss"]["data"] if trace.get("mode") == "markers+text"]
    assert list(mark["x"]) == [181] and list(mark["text"]) == ["64 tokens"]


def test_phases_of_a_run_that_has_not_reached_them(root, tmp_path):
    folder = interrupt(shutil.copytree(root / "pretrain-bbbbbbbbbbbb", tmp_path / "pretrain-bbbbbbbbbbbb"), 100)
    from_runs.write([folder], tmp_path / "page.html")
    text = words(Page((tmp_path / "page.html").read_text(encoding="utf-8")))
    assert "1 1 to 180, so far 98 32 tokens 1 to 2 of 4,096 789 k" in text and "181 to" not in text


def test_broken_lines_of_several_runs_are_counted(root, tmp_path, capsys):
    folder = shutil.copytree(root / "pretrain-aaaaaaaaaaaa", tmp_path / "pretrain-damaged")
    lines = (folder / "speed.jsonl").read_text().splitlines()
    (folder / "speed.jsonl").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:], '{"step": 250, "tok']))
    out = tmp_path / "page.html"
    assert cli.main(["report", str(root / "pretrain-aaaaaaaaaaaa"), str(folder), f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "note: lines of the record that can't be read and are left out: 2\n" in said
    for place in (f"{folder / 'speed.jsonl'}:4:", f"{folder / 'speed.jsonl'}:{len(lines) + 1}:"):
        assert place in said and place in words(Page(out.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: None, "no such folder; report takes pretrain and finetune artifacts"),
        (lambda folder: folder.mkdir(), "neither manifest.json nor recipe.json here, so this is no run"),
        (lambda folder: write_manifest(folder, {"stage": "corpus"}), "a corpus, not a run"),
        (lambda folder: write_manifest(folder, {}), "a folder without a stage, not a run"),
        (lambda folder: (folder.mkdir(), (folder / "manifest.json").write_text("{")), "not readable as JSON"),
        (lambda folder: folder.write_text("a file"), "no such folder"),
        (lambda folder: write_manifest(folder, {"stage": "pretrain", "counts": None}), "counts of its manifest is no"),
        (lambda folder: write_manifest(folder, {"stage": "pretrain", "config": {"train": []}}), "config.train of its"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, make, complaint):
    make(tmp_path / "runs")
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert complaint in said and str(tmp_path / "runs") in said and said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def write_manifest(folder: Path, values: dict) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(values))


def test_the_command_without_runs_is_the_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "--corpus.sources", "none/*.txt"]) == 2
    assert "none/*.txt" in capsys.readouterr().err
    assert cli.main(["report", "--out", "page.html"]) == 2
    assert "required: RUN" in capsys.readouterr().err
    assert cli.main(["report", "runs", "--title", "x"]) == 2
    assert "unrecognized arguments: --title x" in capsys.readouterr().err


def test_the_page_goes_where_one_stands(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from_runs.write([root / "finetune-dddddddddddd"])
    from_runs.write([root / "finetune-dddddddddddd", root / "finetune-eeeeeeeeeeee"])
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "runs-side-by-side.html"}


def test_the_folder_may_be_this_one(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    monkeypatch.chdir(root / "finetune-dddddddddddd")
    assert cli.main(["report", ".", str(root / "finetune-dddddddddddd"), "--out", str(out)]) == 0  # the same run
    assert f"{out}: {root / 'finetune-dddddddddddd'}; " in capsys.readouterr().out
    assert cli.main(["report", "/", "--out", str(out)]) == 2
    assert "/: neither manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "complaint"), [(".", "'.' is a folder"), ("none/a.html", "no folder 'none'")])
def test_a_page_that_can_not_be_written_is_told_of_first(root, tmp_path, monkeypatch, capsys, name, complaint):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(root / "finetune-dddddddddddd"), "--out", name]) == 2
    assert complaint in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [0, 200, None])
def test_a_run_with_a_damaged_model_is_shown_without_its_fillings(root, tmp_path, capsys, cut):
    folder = shutil.copytree(root / "pretrain-aaaaaaaaaaaa", tmp_path / "pretrain-aaaaaaaaaaaa")
    weights = folder / "model" / "model.safetensors"
    weights.unlink() if cut is None else weights.write_bytes(weights.read_bytes()[:cut])
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert f"note: no fill-mask: {folder / 'model'}: no model can be loaded from it; `bert" in capsys.readouterr().out
    assert "First" in (tmp_path / "page.html").read_text(encoding="utf-8")
    (folder / "model" / "tokenizer.json").write_text('{"model": ')
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert "tokenizer.json: not readable as JSON" in capsys.readouterr().err
