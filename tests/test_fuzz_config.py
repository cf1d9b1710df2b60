"""Any settings file: a config that reads back the same, or one line that names the file, flag or key; nothing else.

Case N is a pure function of N: a YAML text from a grammar that knows the sections, keys and kinds of value and gets
each of them wrong now and then; then bytes of it may be damaged.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import Config
from bertpipe.config_files import read_config
from bertpipe.errors import ConfigError
from tests.fuzz import SHORT, tiers

SECTIONS = {name: list(field.annotation.model_fields) for name, field in Config.model_fields.items()}
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
SCALARS = """0 1 2 -1 7 64 100 0.5 1e-4 1E5 .5 1. 1_000 0x10 0o17 010 1:30 .nan .inf -.inf nan NaN no NO off yes on y n
    true false ~ null "" '' text auto docs adamw mlm ../up /etc/passwd a/*.txt 2026-11-22 = <<
    "no" "1e-4" "é" "\\ud800"
    !!str 3 !!int "3" !!float "1e-4" !!binary aGk= !!python/object/apply:os.system !!python/name:os.system !unknown
    !!set !!timestamp 2001-01-01 !!bool yes 99999999999999999999999 1e999 -0.0 % @ ` | > ? & * ! "[" """.split()  # noqa: SIM905
VALUES = (
    "[]", "{}", "[1, 2]", "[0.9, 0.98]", "[a, b]", "[[1]]", "{a: 1}", "{hidden_act: gelu}", "[null]", "[{}]",
    "[{share: 1, sequence_length: 64}]", "[{share: x}]", "[{steps: 3, slots: 2}]", "{class_path: os.system}",
    "{class_path: bertpipe.config.Phase, init_args: {share: 1}}", "!!python/object/apply:os.system [touch pwned]",
    "!!python/object/new:os.system [touch pwned]", "{? [a] : 1}", "{? {a: 1} : 2}", "&a [*a]", "*undefined",
    "|\n  text", "@file", "${runtime.root}", "$HOME", "file.yaml", "x.json", "-", "--", "--config", "[" * 60,
    "{a: " * 60,
)  # fmt: skip


def value(rng: random.Random) -> str:
    return rng.choice(SCALARS) if rng.random() < 0.7 else rng.choice(VALUES)


def sensible(rng: random.Random, section: str, key: str) -> str:
    """The default, as YAML: what must be taken."""
    return yaml.safe_dump(getattr(Config(), section).model_dump(mode="json")[key], default_flow_style=True).split(
        "\n..."
    )[0]


def make_text(rng: random.Random) -> str:
    """Sections of keys and values, mostly by their right names."""
    lines = []
    for section in rng.sample(list(SECTIONS), rng.randint(1, 3)):
        lines.append(f"{section if rng.random() < 0.97 else section[:-1]}:")
        for key in rng.sample(SECTIONS[section], min(len(SECTIONS[section]), rng.randint(1, 4))):
            shown = sensible(rng, section, key) if rng.random() < 0.6 else value(rng)
            lines.append(f"  {key if rng.random() < 0.97 else key + 'z'}: {shown.strip()}")
    if rng.random() < 0.05:
        lines.append(rng.choice(lines))  # twice
    return "\n".join(lines) + "\n"


def damage(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return (
            data[:at]
            + rng.choice([b"\0", b"\xff", b"\t", b": ", b"\n", b"\xef\xbb\xbf", b"- ", b"%", b"\x85"])
            + data[at:]
        )
    return data[:at] + data[at:][::-1]


def as_yaml(cfg: Config) -> str:
    """JSON in ASCII, escaped as YAML does it."""
    text = json.dumps(cfg.model_dump(mode="json"), ensure_ascii=False)
    return re.sub("[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", text)


def check(path: Path, flags: Sequence[tuple[str, str]] = (), times: int = 2) -> Config | None:
    """The config, which reads back the same, or None where it is refused in one line that says where."""
    results: list[Config | str] = []
    for _ in range(times):
        try:
            results.append(read_config([path], flags))
        except ConfigError as error:
            results.append(str(error))
    result = results[0]
    assert results == [result] * times
    if isinstance(result, str):
        assert "\n" not in result and len(result) < 1_000, result[:3_000]
        places = (rf"{re.escape(str(path))}(:\d+)?: ", r"--[\w.]+: ", rf"({'|'.join(map(re.escape, KEYS))})[\w.]*: ")
        assert any(re.match(place, result) for place in places) or re.match(r"--\S* is a section", result), result
        return None
    again = path.with_name("again.yaml")
    again.write_text(as_yaml(result))
    assert read_config([again], []) == result
    return result


@tiers
def test_any_file_is_a_config_that_reads_back_or_one_line(memory_path, monkeypatch, cases):
    monkeypatch.chdir(memory_path)  # where a payload would leave its file
    path = memory_path / "c.yaml"
    taken = 0
    for number in range(cases):
        rng = random.Random(number)
        data = make_text(rng).encode()
        if rng.random() < 0.15:
            data = damage(rng, data)
        path.write_bytes(data)
        try:
            taken += check(path, times=1 + (number % 10 == 0)) is not None
        except Exception as error:
            error.add_note(f"case {number}: {data!r}")
            raise
    assert not (memory_path / "pwned").exists()
    assert cases / 10 < taken < cases * 9 / 10, "the grammar should make good files and bad ones"


@settings(deadline=None, max_examples=SHORT // 5)
@given(st.sampled_from(KEYS), st.text(max_size=30) | st.sampled_from([*SCALARS, *VALUES]))
def test_any_flag(tmp_path_factory, key, text):
    path = tmp_path_factory.getbasetemp() / "empty.yaml"
    path.write_text("")
    check(path, [(key, text)])


@settings(deadline=None, max_examples=SHORT // 5)
@given(
    st.dictionaries(
        st.sampled_from([*SECTIONS, "trian"]) | st.integers() | st.none(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from([k.split(".")[1] for k in KEYS]) | st.text(max_size=5), inner, max_size=3
                )
            ),
            max_leaves=8,
        ),
        max_size=3,
    )
)
def test_any_tree(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="backslashreplace")
    check(path)


BOMB = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    "text",
    [
        f"x0: &x0 [lol, lol]\n{BOMB}",
        "train: {phases: [&a [b, b], " + ", ".join(["&b [*a, *a, *a, *a, *a, *a, *a, *a, *a]"] * 9) + "]}",
        f"model:\n  overrides:\n    x0: &x0 [lol, lol]\n{re.sub('(?m)^', '    ', BOMB)}",
        "shards: {language: '" + "x" * (1 << 20) + "'}",
        "train: {steps: " + "9" * (1 << 20) + "}",
        "train: {steps: '" + "x" * (1 << 20) + "'}",
        "x" * (1 << 20),
        "a: " * 20_000,
        "[" * 20_000,
        "{" * 20_000,
        "- " * 20_000,
        "train: &a {steps: 3}\noptim: *a\n",
        "train: &a {steps: 3}\nshards: {<<: *a}\n",
        "train: &a\n  phases: [*a]\n",
        "model: {overrides: &a {b: *a}}\n",
        "train: {steps: 3}\n---\ntrain: {steps: 4}\n",
        "\ufeff" + "train: {steps: 3}",
        "",
        "\0",
        "? [train]\n: {steps: 3}\n",
        "? {train: 1}\n: {steps: 3}\n",
        "train: {? [a, b] : 3}\n",
        "train:\n\tsteps: 3\n",
        "%YAML 9.9\n---\ntrain: {steps: 3}\n",
        "runtime: {root: ../../../../etc}\n",
        "true: 1\n",
        "no: {steps: 1}\n",
        "train: {no: 1}\n",
        "1: 2\n",
        "train: {seed: 18446744073709551616}\n",
        "optim: {lr: 1e-4, eps: 1.e-6, betas: [0.9, '0.98']}\n",
    ],
    ids=lambda text: re.sub(r"\W+", " ", text[:30]) or "empty",
)
def test_what_is_built_to_break_a_reader(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    check(path)


@pytest.mark.parametrize("kind", ["folder", "bytes", "latin-1", "loop"])
def test_what_is_no_text_file(tmp_path, kind):
    path = tmp_path / "c.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(random.Random(0).randbytes(500) if kind == "bytes" else "train: {steps: ä}".encode("latin-1"))
    assert check(path) is None
