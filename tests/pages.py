"""The project's pages, README and docs/, read for tests: commands, files and output, links; and a reader's folder.

A command is a line indented by four spaces (in README one with `.venv/bin/` in it); a comment line right above its
block, `<!-- not run: WHY -->` with a row of REASONS or `<!-- run by tests/FILE -->`, says that it is not run from the
page. A fenced block whose first line is a comment with a file's name is that file; one of `text` is what the commands
above it print, `...` standing for anything.
"""

from __future__ import annotations

import contextlib
import glob
import random
import re
import runpy
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bertpipe.cli import main
from bertpipe.commands import OWN, names_runs
from tests.runs import WORDS, sentence

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
REASONS = ("network", "GPU", "Slurm", "minutes", "changes the shell")
SMALL = (
    "--corpus.holdout 0.2 --corpus.min_chars 5 --train.steps 3 --train.slot_tokens 512 --train.slots_per_step 2 "
    "--train.sequence_length 64 --train.eval_every 3 --finetune.epochs 1 --finetune.seeds 1 --finetune.max_length 64 "
    "--runtime.threads 1 --runtime.progress false"
)
"""Flags behind a command's own, which make it a matter of a second."""


@dataclass(frozen=True)
class Block:
    """Lines of a page that belong together."""

    kind: str
    """commands, file or text."""
    lines: tuple[str, ...]
    line: int
    """Where it begins in the page, from 1."""
    note: str = ""
    """What the comment above says: `not run: ...` or `run by ...`."""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found, note = [], ""
    numbered = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in numbered:
        if opened := re.fullmatch(r"```(\w*)", line):
            inside = []
            for _, line in numbered:
                if line == "```":
                    break
                inside.append(line)
            kind = "text" if opened[1] == "text" else "file" if inside and file_name(inside[0]) else "other"
            found.append(Block(kind, tuple(inside), number, note))
            note = ""
        elif line.startswith("    "):
            inside = [line]
            for _, line in numbered:
                if not line.startswith("    "):
                    break
                inside.append(line)
            joined = "\n".join(inside).replace("\\\n", " ").splitlines()
            wanted = [text.strip() for text in joined if page != README or ".venv/bin/" in text]
            found.append(Block("commands", tuple(wanted), number, note))
            note = ""
        elif line.strip():
            comment = re.fullmatch(r"<!-- (not run: .*|run by .*) -->", line)
            note = comment[1] if comment else ""
    return [block for block in found if block.lines]


def file_name(line: str) -> str:
    """The file that a block's first line names: `# my-run.yaml`; else empty."""
    named = re.match(r"# ([\w./-]+\.\w+)$", line)
    return named[1] if named else ""


def commands(page: Path) -> list[str]:
    """Every command of a page, joined where it goes on."""
    return [line for block in blocks(page) if block.kind == "commands" for line in block.lines]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in re.findall(r"(?m)^#+ (.*)$", text)]
    return {title.replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Where a page's links lead."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


def reader(folder: Path) -> Path:
    """Make `folder` one that a reader may stand in: the project's folders, texts, a table, tasks, a checkpoint."""
    rng = random.Random(0)
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "texts").mkdir(parents=True)
    for number in range(80):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(sentence(rng) for _ in range(rng.randint(2, 9))))
    (folder / "glue" / "mrpc").mkdir(parents=True)
    for split, size in (("train", 40), ("validation", 20)):
        pairs = [(sentence(rng), sentence(rng)) for _ in range(size)]
        table = {"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs], "label": [0, 1] * (size // 2)}
        pq.write_table(pa.table(table), folder / "glue" / "mrpc" / f"{split}.parquet")
    rows = [f'"{sentence(random.Random(n))}","{sentence(random.Random(-n))}",{"ab"[n % 2]}' for n in range(40)]
    (folder / "my.csv").write_text("\n".join(["title,body,topic", *rows]) + "\n")
    return folder


def checkpoint(folder: Path) -> Path:
    """A tiny stock checkpoint with its tokenizer, of the words of `sentence`."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    words = [word for part in WORDS for word in part.split()]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{x}" for x in letters), *words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=512)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def write_file(block: Block, folder: Path) -> None:
    path = folder / file_name(block.lines[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(block.lines) + "\n", encoding="utf-8")


def run(line: str, folder: Path) -> None:
    """Run a command of a page in `folder`, where the caller stands; ours, `bertpipe`, in this process."""
    words = []
    for raw in shlex.split(line, posix=False):
        (word,) = shlex.split(raw)
        words += (raw == word and "*" in word and sorted(glob.glob(word))) or [word]  # noqa: PTH207
    if ">" in words:
        *line_itself, _, target = shlex.split(line)
        with Path(target).open("w") as file, contextlib.redirect_stdout(file):
            run(shlex.join(line_itself), folder)
        return
    program, *rest = words
    if program == ".venv/bin/bertpipe":
        own = rest[0] in (*OWN, "estimate", "doctor", "completion") or (rest[0] == "report" and names_runs(rest[1:]))
        small = [] if own else shlex.split(SMALL)
        code = main([*rest, *small])
        assert code == 0, f"{line}: exit code {code}"
    elif program == ".venv/bin/python":
        runpy.run_path(rest[0], run_name="__main__")
    else:
        done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, f"{line}: exit code {done.returncode}"
