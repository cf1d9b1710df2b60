"""Commands of `bertpipe` with arguments of their own in place of settings.

A command is a row of SUMMARIES, of OWN, and of ARGUMENTS unless it has none. Parses before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import NoReturn

from bertpipe import artifact
from bertpipe.config import RuntimeConfig
from bertpipe.errors import ArtifactError, ConfigError

SUMMARIES = {
    "compare": "two finetune artifacts on the tasks they share, example by example: bertpipe compare A B",
    "embed": "turn texts into vectors, or into a folder for sentence-transformers: bertpipe embed --model FOLDER ...",
    "attention": "a page of whom each word attends to: bertpipe attention --model FOLDER 'a text'",
    "demo": "a page on this machine to try a checkpoint, by its head: bertpipe demo --model FOLDER",
    "export": "write a checkpoint as ONNX, checked against torch: bertpipe export --model FOLDER --out FOLDER",
    "dashboard": "open what trackio or TensorBoard recorded of runs, in the browser: bertpipe dashboard [FOLDER]",
    "verify": "re-hash an artifact folder against its manifest: bertpipe verify FOLDER ...",
}


class Arguments(argparse.ArgumentParser):
    """The arguments of a command that reads no settings; a mistake in them is one line, as everywhere."""

    def __init__(self, command: str, description: str, summary: str = ""):
        summary = summary or SUMMARIES[command]
        text = f"{summary[0].upper()}{summary[1:]}. {description}"
        super().__init__(prog=f"bertpipe {command}", description=text, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` lists its arguments")


def _compare_arguments() -> Arguments:
    arguments = Arguments("compare", "A and B are finetune artifacts, or folders of one task or of one run in them.")
    arguments.add_argument("first", type=Path, metavar="A")
    arguments.add_argument("second", type=Path, metavar="B")
    arguments.add_argument("--resamples", type=_natural, default=10_000, help="of the paired bootstrap (10,000)")
    arguments.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    arguments.add_argument("--html", type=_file, metavar="FILE", help="write the table as a page")
    arguments.add_argument("--json", type=_file, metavar="FILE", help="write all figures as JSON")
    return arguments


def _compare(argv: list[str]) -> int:
    given = ARGUMENTS["compare"]().parse_args(argv)
    quiet_libraries()
    from bertpipe.downstream.reporting import compare

    first, second = given.first, given.second
    rows = compare.compare(first, second, given.resamples, given.seed)
    print("\n".join(compare.table(first, second, rows)))
    compare.write(first, second, rows, given.html, given.json)
    return 0


def _embed_arguments() -> Arguments:
    arguments = Arguments("embed", "One of --out, --sentence-transformers and --score is needed, or several.")
    add = arguments.add_argument
    add("--model", required=True, help="checkpoint folder or Hub id; one of sentence-transformers' brings its pooling")
    add("--input", type=Path, metavar="FILE", help="texts: .txt (a line each), .jsonl, .csv or .parquet")
    add("--column", default="text", help="of the texts in .jsonl, .csv and .parquet (text)")
    add("--out", type=_file, metavar="FILE.npy", help="write their vectors, float32 [texts, size]")
    add("--pooling", choices=("mean", "cls"), help="mean of all tokens, or the first token (mean)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=None, help="make each vector's length 1")
    add("--max-length", type=_natural, help="longest text in tokens, the rest is cut (the model's)")
    add("--sentence-transformers", type=Path, metavar="FOLDER", help="write a folder SentenceTransformer(FOLDER) loads")
    add("--score", metavar="TASK", help="rank the pairs of a task by the cosine of their vectors: stsb")
    add("--data", metavar="FOLDER", help="of the task, as finetune.data")
    add("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="of the computation (fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (auto)")
    return arguments


def _embed(argv: list[str]) -> int:
    arguments = ARGUMENTS["embed"]()
    given = arguments.parse_args(argv)
    if (given.input is None) != (given.out is None):
        arguments.error("--input and --out go together")
    if not (given.out or given.sentence_transformers or given.score):
        arguments.error("nothing to do: give --input and --out, --sentence-transformers or --score")
    quiet_libraries()
    from bertpipe.downstream.using import embed
    from bertpipe.train.place import Place

    place = Place(RuntimeConfig(device=given.device), given.precision)
    embedder = embed.Embedder(given.model, place, given.pooling, given.normalize, given.max_length)
    if folder := given.sentence_transformers:
        embedder.write(folder)
        print(f"{folder}: SentenceTransformer({str(folder)!r}) loads it", flush=True)
    for line in embed.score_pairs(embedder, given.score, given.data) if given.score else ():
        print(line, flush=True)
    if given.out:
        print(embed.embed_file(embedder, given.input, given.column, given.out))
    return 0


def _attention_arguments() -> Arguments:
    arguments = Arguments("attention", "Every layer and head of a stock encoder, in one self-contained HTML file.")
    add = arguments.add_argument
    add("--model", required=True, help="checkpoint folder or Hub id")
    add("text", metavar="TEXT")
    add("--second", metavar="TEXT", help="the second text of a pair")
    add("--out", type=_file, default=Path("attention.html"), metavar="FILE.html", help="the page (attention.html)")
    add("--max-length", type=_natural, help="longest text in tokens, the rest is cut (what model and page take)")
    return arguments


def _attention(argv: list[str]) -> int:
    given = ARGUMENTS["attention"]().parse_args(argv)
    quiet_libraries()
    from bertpipe.downstream.reporting import attention_page

    attended = attention_page.attend(given.model, given.text, given.second, given.max_length)
    print(attention_page.write(attended, given.out))
    return 0


def _demo_arguments() -> Arguments:
    arguments = Arguments("demo", "Needs the extra: pip install 'bertpipe[demo]'. Ctrl-C ends it.")
    arguments.add_argument(
        "--model", required=True, help="checkpoint folder or Hub id; its head says what the page does"
    )
    arguments.add_argument("--port", type=_port, help="of 127.0.0.1, 0 for any (the first free one from 7860 on)")
    return arguments


def _demo(argv: list[str]) -> int:
    given = ARGUMENTS["demo"]().parse_args(argv)
    quiet_libraries()
    from bertpipe.downstream.using import demo_page, finished

    model = finished.load(given.model)

    def ready(address: str) -> None:
        print(f"{model.name}, {model.task}: {address} (Ctrl-C ends it)", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        demo_page.serve(model, given.port, ready)
    return 0


def _export_arguments() -> Arguments:
    arguments = Arguments("export", "Needs the extra: pip install 'bertpipe[onnx]'. Any batch size and length will do.")
    arguments.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    arguments.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made by it; must not be there")
    return arguments


def _export(argv: list[str]) -> int:
    given = ARGUMENTS["export"]().parse_args(argv)
    quiet_libraries()
    from bertpipe.downstream.using import finished, onnx_folder

    print(onnx_folder.export(finished.load(given.model), given.out))
    return 0


def _dashboard_arguments() -> Arguments:
    arguments = Arguments("dashboard", "Served on this machine alone (127.0.0.1), until Ctrl-C.")
    add = arguments.add_argument
    folder = "a run, or the folder that holds them (runs)"
    add("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help=folder)
    add("--with", choices=("trackio", "tensorboard"), help="which of them, where both recorded (trackio)")
    add("--port", type=_port, help="of 127.0.0.1, 0 for any (the first free one from 7860 on, TensorBoard's from 6006)")
    add("--no-open", action="store_true", help="open no browser; where there is no display none is opened")
    return arguments


def _dashboard(argv: list[str]) -> int:
    given = vars(ARGUMENTS["dashboard"]().parse_args(argv))
    from bertpipe.train import dashboard

    dashboard.run(given["folder"], given["with"], given["port"], not given["no_open"])
    return 0


def _port(text: str) -> int:
    """A number of a port, or 0."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _report_arguments() -> Arguments:
    text = "A RUN is a pretrain or finetune artifact, or the .partial folder of one still going."
    arguments = Arguments("report", text, "one page from the folders of runs alone, several side by side")
    arguments.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    text = "the page (report.html of one run, runs-side-by-side.html of several)"
    arguments.add_argument("--out", type=_file, metavar="FILE.html", help=text)
    return arguments


def names_runs(argv: list[str]) -> bool:
    """Whether the arguments of `report` are folders of runs, not settings."""
    return bool(argv) and (not argv[0].startswith("-") or any(one.split("=")[0] == "--out" for one in argv))


def report_runs(argv: list[str]) -> int:
    """`bertpipe report RUN RUN ...`"""
    given = _report_arguments().parse_args(argv)
    quiet_libraries()
    from bertpipe.downstream.reporting import from_runs

    print("\n".join(from_runs.write(given.runs, given.out)))
    return 0


def _file(text: str) -> Path:
    """A file to write, in a folder that is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def _natural(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _verify(argv: list[str]) -> int:
    if not argv or any(argument.startswith("-") for argument in argv):
        print("usage: bertpipe verify FOLDER ...\nRe-hashes every file of artifacts against their manifest.json.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    damaged = []
    for folder in map(Path, argv):
        problems = artifact.verify(folder)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            damaged.append(f"{problems[0]}{more}; delete {folder} and make it again")
        else:
            print(f"{folder}: {len(artifact.read_manifest(folder)['files'])} files match the manifest")
    if damaged:
        raise ArtifactError("; ".join(damaged))
    return 0


def quiet_libraries() -> None:
    """Settings of libraries that must be there before their first import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


ARGUMENTS = {
    "compare": _compare_arguments,
    "embed": _embed_arguments,
    "attention": _attention_arguments,
    "demo": _demo_arguments,
    "export": _export_arguments,
    "dashboard": _dashboard_arguments,
}
OWN = {
    "compare": _compare,
    "embed": _embed,
    "attention": _attention,
    "demo": _demo,
    "export": _export,
    "dashboard": _dashboard,
    "verify": _verify,
}
