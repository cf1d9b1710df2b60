"""The `bertpipe` command: bertpipe COMMAND [--config FILE] [--section.key value].

Parses before anything heavy is imported. Exit codes: 0 done; 2 stopped for the reason in the one line printed; 130
Ctrl-C or SIGTERM; 1 a mistake of ours, with its traceback. Under torchrun and accelerate each process has them; a
launcher itself ends with 1 whenever one of its processes did not end with 0.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from bertpipe import __version__, artifact, home, setting_help, troubleshooting
from bertpipe.commands import OWN, SUMMARIES, names_runs, quiet_libraries, report_runs
from bertpipe.config import Config
from bertpipe.config_files import read_config, takes_several
from bertpipe.errors import BertpipeError, ConfigError, NoHubError
from bertpipe.pipeline import MULTI_PROCESS, STAGES, Pipeline, is_main, several_processes, wanted
from bertpipe.redaction import redact

USAGE = "bertpipe COMMAND [--config FILE ...] [--section.key value ...]"
ALONE = {"--runtime.profile": "3", "--publish.push": "true"}
"""What `--profile` and `--push` mean without a value."""
COMMANDS = {
    "corpus": "read raw text: clean, deduplicate, hold out",
    "tokenizer": "train a WordPiece tokenizer on it, or adopt one",
    "shards": "turn the documents into memory-mapped token ids",
    "pretrain": "train a BERT by masked language modelling",
    "finetune": "fine-tune and score it on tasks",
    "report": "write one HTML page about all of it; of runs side by side: bertpipe report RUN RUN ...",
    "publish": "build the folder and model card for the Hub; --push uploads them, in one commit",
    "all": "every stage in turn, skipping what is done",
    "plan": "say which stages are done, stale or missing",
    "estimate": "say the memory, tokens, FLOPs and hours of pretraining (--measure times a few steps)",
    "replay": "rebuild the batch of one step of a pretraining run, with its losses and its text: --step K",
    "doctor": "look at versions, devices, disk, network and login; say what to do (--json prints it as JSON)",
    "completion": "print a script that completes commands and settings: bertpipe completion bash",
    **SUMMARIES,
}

SWITCHES = {"estimate": "--measure", "doctor": "--json"}
"""Flags without a value."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. One of several processes ends here, at once, and so does one whose tracker
    was given up, as that may have left something that waits for ever.

    Taking its group down would wait for the others, and the interpreter's own end races with gloo's threads: one that
    lets go of a tensor in that moment aborts the process, after all work is done (seen once in some hundred runs).
    Records, trackers and loader workers have been closed by then, by those who opened them.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _guarded(sys.argv[1:] if argv is None else argv)
    except Exception:  # a mistake of ours
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        code = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    trackers = sys.modules.get("bertpipe.train.trackers")  # not imported by every command
    if several_processes() or (trackers is not None and trackers.given_up):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # full, or closed from the start and None
                stream.flush()
        os._exit(code)
    return code


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM ends any stage as Ctrl-C does; training stops after a step instead (train/signals.py)."""
    raise KeyboardInterrupt


def _guarded(argv: list[str]) -> int:
    """Run a command; what the user did becomes one line and an exit code."""
    try:
        code = _main(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BertpipeError as error:
        more = troubleshooting.more_about(str(error))
        print(f"bertpipe: {redact(str(error))}{f' (more: {more})' if more else ''}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that can't be written, a full disk outside of a stage
        print(f"bertpipe: {redact(_storage(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("bertpipe: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _storage(error: OSError) -> str:
    """An OSError as one line; with the bytes free and what to do where the disk is full or fails."""
    number = artifact.storage_errno(error)
    if number is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {artifact.storage_fault(number, Path(str(error.filename)))}"


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"bertpipe {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {hint}")
    if command == "completion":
        from bertpipe import completion

        if len(rest) != 1 or rest[0].startswith("-"):
            print("usage: bertpipe completion SHELL\nPrints the script; SHELL is bash, zsh, fish, tcsh or powershell.")
            return 0 if rest and rest[0] in ("-h", "--help") else 2
        print(completion.script(rest[0], COMMANDS, SWITCHES))
        return 0
    own = report_runs if command == "report" and names_runs(rest) else OWN.get(command)
    if own is not None:
        if several_processes():
            raise ConfigError(f"{command} runs in one process; launch several for {' and '.join(MULTI_PROCESS)} only")
        return own(rest)
    if "-h" in rest or "--help" in rest:
        sections = (*STAGES[command].reads, "runtime") if command in STAGES else tuple(Config.model_fields)
        text = f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}. Settings of other sections may be given too."
        print(setting_help.text(command, sections, text))
        return 0
    if command == "publish" and "--dry-run" in rest:  # whatever a file says
        rest = [*(argument for argument in rest if argument not in ("--dry-run", "--push")), "--publish.push=false"]
    switch = SWITCHES.get(command, "") in rest
    files, flags = _split([argument for argument in rest if argument != SWITCHES.get(command)])
    step = _take_step(flags) if command == "replay" else 0
    cfg = read_config(files, flags)
    quiet_libraries()
    if command == "estimate":
        return _estimate(cfg, switch)
    if command == "doctor":
        return _doctor(cfg, switch)
    pipeline = Pipeline(cfg)
    if command == "plan":
        return _plan(pipeline)
    if command == "replay":
        return _replay(pipeline, step)
    if several_processes() and command not in MULTI_PROCESS:
        raise ConfigError(f"{command} runs in one process; launch several for {' and '.join(MULTI_PROCESS)} only")
    stages = wanted(cfg) if command == "all" else (command,)
    for name in stages:  # mistakes in any stage's settings are found before the first one runs
        pipeline.check(name)
    if cfg.publish.push and is_main():
        _check_push(cfg, stages)
    for name in stages:
        _run(pipeline, name)
    if command == "all" and is_main():
        _close(pipeline)
    if cfg.publish.push and "publish" in stages:
        _push(pipeline)
    return 0


def _split(argv: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Config files and flags. A flag may be followed by several values, as an unquoted glob gives them."""
    files: list[Path] = []
    flags: list[tuple[str, str]] = []
    position = 0
    while position < len(argv):
        name, equals, value = argv[position].partition("=")
        position += 1
        if not name.startswith("--"):
            raise ConfigError(f"unexpected argument {name!r}; usage: {USAGE}")
        name = {"--profile": "--runtime.profile", "--push": "--publish.push"}.get(name, name)
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if not values and name in ALONE:
            values = [ALONE[name]]
        if not values:
            raise ConfigError(f"{name} needs a value; usage: {USAGE}")
        if name == "--config":
            files += [Path(home.expanded(v)) for v in values]
        else:
            if len(values) > 1 and not takes_several(*name[2:].split(".")):
                raise ConfigError(f"{name} takes one value, got {len(values)}: {', '.join(values)}")
            text = values[0] if len(values) == 1 else "[" + ", ".join(f'"{v}"' for v in values) + "]"
            flags.append((name[2:], text))
    return files, flags


def _run(pipeline: Pipeline, name: str) -> None:
    folder = pipeline.locate(name)
    made = pipeline.run(name)
    if is_main():
        print(f"{name}: {'made' if made else 'done already,'} {folder}", flush=True)
        if name in ("pretrain", "finetune") and pipeline.cfg.runtime.trackers and not made:
            print("note: runtime.trackers hear of a run while it trains, so nothing of this one is sent", flush=True)


def _check_push(cfg: Config, stages: tuple[str, ...]) -> None:
    """Raise what would make a push fail, before hours are spent on what is to be pushed.

    A stage that others follow may run where there is no network: it says so and goes on.
    """
    from bertpipe.downstream.publishing import hub, push

    if not {"pretrain", "finetune", "publish"} & set(stages):
        return
    if len(stages) > 1 and "publish" not in stages:
        raise ConfigError("publish.push: a model from elsewhere is published only fine-tuned; set publish.task")
    try:
        push.check(cfg, hub.waits(min(cfg.runtime.hub_patience, 7)))
    except NoHubError as error:
        if "publish" in stages:
            raise
        print(f"note: whether the push at the end will be accepted is not known: {redact(str(error))}", flush=True)


def _push(pipeline: Pipeline) -> None:
    from bertpipe.downstream.publishing import hub, push

    pauses = hub.waits(pipeline.cfg.runtime.hub_patience)
    for line in push.push(pipeline.cfg, pipeline.locate("publish"), pauses):
        print(redact(line), flush=True)


def _close(pipeline: Pipeline) -> None:
    """What to look at after `bertpipe all`."""
    from bertpipe.downstream.reporting.report import fill_mask_lines

    page = pipeline.locate("report") / "report.html"
    for line in fill_mask_lines(page.with_suffix(".json"))[:3]:
        print(line)
    print(f"report: {page.resolve()}")


def _plan(pipeline: Pipeline) -> int:
    states = {name: pipeline.state(name) for name in wanted(pipeline.cfg)}
    for name, (state, detail) in states.items():
        print(f"{name:<10} {state:<8} {detail}")
    return 0


def _estimate(cfg: Config, measure: bool) -> int:
    from bertpipe.train import estimate

    print("\n".join(estimate.lines(cfg, measure)))
    return 0


def _doctor(cfg: Config, as_json: bool) -> int:
    from bertpipe.train import doctor

    findings = doctor.examine(cfg)
    print("\n".join(doctor.lines(findings)) if not as_json else doctor.as_json(findings))
    return doctor.settle(findings)


def _take_step(flags: list[tuple[str, str]]) -> int:
    """The value of --step, taken out of `flags`."""
    steps = [value for name, value in flags if name == "step"]
    flags[:] = [flag for flag in flags if flag[0] != "step"]
    if len(steps) != 1 or not steps[0].isdecimal():
        raise ConfigError("replay needs one step: bertpipe replay --config FILE --step 41")
    return int(steps[0])


def _replay(pipeline: Pipeline, step: int) -> int:
    from bertpipe.train import replay

    run = pipeline.locate("pretrain")
    unfinished = run.with_name(run.name + artifact.PARTIAL)
    inputs = {name: pipeline.locate(name) for name in STAGES["pretrain"].needs(pipeline.cfg)}
    out = pipeline.root / f"replay-{run.name.removeprefix('pretrain-')}-step-{step}.jsonl"
    for line in replay.replay(pipeline.cfg, inputs, run if run.is_dir() else unfinished, step, out):
        print(line, flush=True)
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            "From raw text to a fine-tuned BERT, ready for the Hugging Face Hub.",
            "",
            *lines,
            "",
            "bertpipe COMMAND --help lists a command's settings. Flags override files, files override defaults.",
            "Exit codes: 0 done, 2 stopped for the reason in the one line printed, 130 interrupted, 1 anything else.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
