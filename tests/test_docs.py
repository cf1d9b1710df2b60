"""What README and docs/ say holds: commands run and print what is shown, links lead somewhere, names are real."""

import ast
import contextlib
import dataclasses
import fnmatch
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from bertpipe import troubleshooting
from bertpipe.cli import main
from bertpipe.config import Config
from bertpipe.config_files import section_in
from tests import pages
from tests.pages import PAGES, ROOT, Block

DOCS = {page.stem: page for page in PAGES if page != pages.README}
SECTION_KEY = re.compile(rf"(?:{'|'.join(Config.model_fields)})(?:\.[a-z_]+)+")
SCRIPTS = (  # flags of both, of run_mlm.py and of run_glue.py, beside TrainingArguments
    """model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision token trust_remote_code
    dataset_name dataset_config_name max_seq_length overwrite_cache pad_to_max_length max_train_samples max_eval_samples
    train_file validation_file""",
    """model_type config_overrides dtype low_cpu_mem_usage validation_split_percentage preprocessing_num_workers
    mlm_probability line_by_line streaming""",
    "task_name max_predict_samples test_file ignore_mismatched_sizes",
)
ENDINGS = ("json", "jsonl", "py", "html", "md")
"""Of files that are called as a section is."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pages.checkpoint(tmp_path_factory.mktemp("docs") / "checkpoint")


@pytest.fixture(scope="module")
def started(tmp_path_factory, checkpoint) -> Path:
    """The folder of a reader who has gone through getting-started.md."""
    folder = stand(tmp_path_factory.mktemp("started"), checkpoint)
    follow(DOCS["getting-started"], folder)
    return folder


def stand(folder: Path, checkpoint: Path) -> Path:
    """A reader's folder, in which a folder bears the Hub's name of the checkpoint that the pages take."""
    pages.reader(folder)
    (folder / "google-bert").mkdir()
    (folder / "google-bert" / "bert-base-uncased").symlink_to(checkpoint)
    return folder


def follow(page: Path, folder: Path) -> str:
    """Do what a page says: write its files, run its commands, compare what they print with what it shows."""
    printed, everything = "", ""
    with contextlib.chdir(folder):
        for block in pages.blocks(page):
            if block.kind == "file":
                pages.write_file(block, folder)
            elif block.kind == "text":
                missing = [line for line in block.lines if not shown(line, printed)]
                assert not missing, f"{page.name}:{block.line}: {missing} not in\n{printed}"
            elif block.kind == "commands" and not block.note:
                printed = "".join(quietly(line, folder) for line in block.lines)
                everything += printed
    return everything


def quietly(line: str, folder: Path) -> str:
    """Run a command; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            pages.run(line, folder)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{out.getvalue()}") from None
    return out.getvalue()


def shown(line: str, printed: str) -> bool:
    """Whether a line is among those printed; `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in line.split("..."))
    return any(re.fullmatch(pattern, other.rstrip()) for other in printed.splitlines())


def test_getting_started(started):
    assert (started / "fill.py").is_file() and len(list((started / "runs").glob("finetune-*"))) == 1


@pytest.mark.parametrize("name", sorted(set(DOCS) - {"getting-started", "artifacts"}))
def test_page(name, tmp_path, checkpoint):
    follow(DOCS[name], stand(tmp_path, checkpoint))


def test_artifacts(started):
    """The page's commands run where something was made; every file of an artifact has a row, every manifest key too."""
    page = DOCS["artifacts"]
    follow(page, started)
    rows = {title: first_column(text) for title, text in sections(page)}
    for stage in ("corpus", "tokenizer", "shards", "pretrain", "finetune", "report", "publish"):
        folder = next((started / "runs").glob(f"{stage}-????????????"))
        manifest = json.loads((folder / "manifest.json").read_text())
        assert set(manifest) == set(rows["Manifest"])
        unknown = [f for f in manifest["files"] if not any(fnmatch.fnmatch(f, row) for row in rows[stage])]
        assert not unknown, f"{stage}: {unknown} not in {rows[stage]}"


def sections(page: Path) -> list[tuple[str, str]]:
    """(title, text) of a page's headings of the second order."""
    _, *parts = re.split(r"(?m)^## ", page.read_text(encoding="utf-8"))
    return [(part.partition("\n")[0], part) for part in parts]


def first_column(text: str) -> list[str]:
    """What stands in backticks in the first column of a text's tables."""
    return re.findall(r"`([^`]+)`", "\n".join(re.findall(r"(?m)^\|([^|]*)\|", text)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_says_why(page):
    """Every comment above commands is one of the two kinds, and a test that is named runs a command like these."""
    comments = re.findall(r"<!-- (.*?) -->", page.read_text(encoding="utf-8"))
    noted = [block for block in pages.blocks(page) if block.note]
    assert Counter(comments) == Counter(block.note for block in noted), "a comment that stands above no commands"
    for block in noted:
        kind, _, what = block.note.partition(" run: " if "not run" in block.note else " by ")
        assert what in pages.REASONS if kind == "not" else run_by(what, block), f"{page.name}:{block.line}"


def run_by(test: str, block: Block) -> bool:
    readme = pages.commands(pages.README)
    return (ROOT / test).is_file() and all(line in readme for line in block.lines)


def test_few_are_not_run():
    """So that a new one is seen: why, and how many commands."""
    noted = [block for page in PAGES for block in pages.blocks(page) if block.note.startswith("not run")]
    count = Counter()
    for block in noted:
        count[block.note.removeprefix("not run: ")] += len(block.lines)
    assert count == {"GPU": 6, "minutes": 3, "network": 2, "Slurm": 1}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in pages.anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index_and_the_index_in_readme():
    listed = pages.links(DOCS["README"])
    assert [name for name in DOCS if f"{name}.md" not in listed and name != "README"] == []
    assert "docs/README.md" in pages.links(pages.README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_are_named_are_there(page):
    """In backticks, and in flags."""
    text = page.read_text(encoding="utf-8")
    named = [m[0] for quoted in re.findall(r"`([^`\n]+)`", text) if (m := SECTION_KEY.match(quoted))]
    named += re.findall(rf"--({SECTION_KEY.pattern})", text)
    for path in (path for path in named if path.rpartition(".")[2] not in ENDINGS):
        *outer, key = path.split(".")
        assert key in section_in_config(outer), f"{page.name}: {path}"


def section_in_config(path: list[str]) -> set[str]:
    """Keys of a section, or of one that a setting holds."""
    section = section_in(*path)
    return set(section.model_fields) if section else set()


def test_every_flag_of_the_scripts_has_a_row():
    """Those of TrainingArguments as installed, and of the scripts as of 2026."""
    from transformers import TrainingArguments

    page = dict(sections(DOCS["coming-from-run_mlm-and-run_glue"]))
    rows = {title: [flag.removeprefix("--") for flag in first_column(text)] for title, text in page.items()}
    for flags in rows.values():
        assert [flag for flag, count in Counter(flags).items() if count > 1] == []
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert fields - set(rows["TrainingArguments"]) == set()
    both, mlm, glue = (set(re.findall(r"\w+", names)) for names in SCRIPTS)
    assert (both | mlm) - set(rows["Flags of run_mlm.py"]) == set()
    assert (both | glue) - set(rows["Flags of run_glue.py"]) == set()


def messages() -> list[str]:
    """Every piece of text in the package's code, as it stands between what is filled in."""
    found = []
    for path in (ROOT / "bertpipe").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found


def quoted() -> list[str]:
    """The error lines of troubleshooting.md."""
    return re.findall(r"(?m)^\*\*`(.+?)`\*\*", DOCS["troubleshooting"].read_text(encoding="utf-8"))


def test_errors_are_those_of_the_code():
    """Each piece between `...` of each line stands in the source, so a message that changes is changed here as well."""
    lines = quoted()
    assert len(lines) >= 25 and len(set(lines)) == len(lines)
    pieces = messages()
    for line in lines:
        parts = [part for part in line.split("...") if re.search(r"\w", part)]
        assert sum(map(len, parts)) >= 12, f"{line}: says too little"
        for part in parts:
            assert any(part in piece for piece in pieces), f"{part!r} of {line!r} is in no message"


MISTAKES = {  # a command, and how the line begins that the page explains it by
    "pretrain --train.step 3": "...: unknown",
    "pretrain --train.steps": "... needs a value",
    "pretrain --config broken.yaml": "...: not valid YAML",
    "pretrain --runtime.project hf_abcdefghijklmnopqrstuvwxyzabcdefgh": "...: holds a credential",
    "pretrain --corpus.sources one.txt --train.slot_tokens 64": "train.slot_tokens",
    "pretrain --corpus.sources one.txt --train.budget 1x": "",
    "shards --corpus.sources one.txt": "... needs ..., which is not there",
    "corpus --corpus.sources nothing/*.txt": "corpus.sources: ...matches no file",
    "corpus --corpus.sources empty": "corpus.sources: ...is a folder",
    "corpus --corpus.sources my.csv": "...: not a kind of file",
    "corpus --corpus.sources short.txt": "corpus.sources: no document",
    "corpus --corpus.sources one.txt": "corpus.holdout",
    "corpus --corpus.sources keys.jsonl": "no key",
    "corpus --corpus.sources latin.txt": "...: not UTF-8",
    "publish --corpus.sources one.txt --finetune.tasks [] --publish.push true": "...: not asked",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_is_found_on_the_page(command, tmp_path, monkeypatch, capsys):
    """The line that a real mistake prints matches the entry meant for it, and one that has none matches none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    files = {"broken.yaml": b"a: [", "my.csv": b"a", "short.txt": b"a", "one.txt": b"a b " * 20}
    for name, content in (files | {"keys.jsonl": b'{"body": ""}', "latin.txt": b"\xe9" * 40}).items():
        (tmp_path / name).write_bytes(content)
    assert main(command.split(" ")) == 2
    line = capsys.readouterr().err
    found = [entry for entry in quoted() if re.search(".*".join(map(re.escape, entry.split("..."))), line)]
    assert [entry for entry in found if entry.startswith(MISTAKES[command])] == found, line
    assert bool(found) == bool(MISTAKES[command]), line
    named = re.search(r"\(more: (.+)#([\w-]+)\)\n$", line)
    assert bool(named) == bool(found), line
    if named:
        by_anchor = {title.lower().replace(" ", "-"): text for title, text in sections(Path(named[1]))}
        assert all(f"**`{entry}`**" in by_anchor[named[2]] for entry in found), line


def test_an_error_with_a_long_text_names_its_page_at_once():
    """Searched with `.*` between the parts of each entry, this took years."""
    text = "a value that needs more, but is no document at byte " * 20_000
    message = f"report.fill_mask[0]: needs exactly one [MASK], got {text}"
    assert troubleshooting.more_about(message).endswith("#settings")
    assert troubleshooting.more_about(text) is None


def test_an_error_in_a_folder_that_is_gone_names_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert troubleshooting.more_about("--steps needs a value; usage: bertpipe").endswith("#settings")
