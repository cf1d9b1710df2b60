"""`bertpipe doctor` describes what is there, names what is wrong with what to do, and gives no token away."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bertpipe.cli import main
from bertpipe.config import Config, ModelConfig, RuntimeConfig
from bertpipe.train import doctor, surroundings

TOKEN = "hf_" + "abcDEF123" * 4
NAMES = ["python", "packages", "device", "bf16", "attention", "threads", "memory", "disk", "files", "network", "login"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["doctor", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_says_all_in_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = run(capsys, "--runtime.root", str(tmp_path / "runs"), "--runtime.threads", "1")
    assert code == 0, err
    found = [line.split()[:2] for line in out.splitlines() if "->" not in line]
    assert list(dict.fromkeys(name for _, name in found)) == NAMES
    assert {state for state, _ in found} <= {"ok", "note", "wrong"}
    for part in (
        "torch 2.",
        "bertpipe_packed for bert in",
        "locks, rename, fsync in",
        "3 checkpoints of the model take",
    ):
        assert part in out
    assert TOKEN not in out and list(tmp_path.iterdir()) == []


def test_as_json(tmp_path, capsys):
    code, out, _ = run(capsys, "--json", "--runtime.root", str(tmp_path))
    rows = json.loads(out)
    assert code == 0 and list(dict.fromkeys(row["name"] for row in rows)) == NAMES
    assert all(set(row) == {"name", "state", "text", "advice"} for row in rows)
    assert all(row["advice"] for row in rows if row["state"] != "ok")


def find(cfg: Config, name: str) -> list[surroundings.Finding]:
    return [finding for finding in doctor.examine(cfg) if finding.name == name]


def test_a_root_that_cannot_be_written_ends_with_2(capsys):
    code, out, err = run(capsys, "--runtime.root", "/proc/nowhere")
    assert code == 2 and err == "bertpipe: doctor: bertpipe can't work here: files; what to do stands above\n"
    assert "fatal  files" in out and "set runtime.root to a folder that you may write" in out


def write_package(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("name", "version", "state", "text"),
    [
        ("torch", "2.9.1", "fatal", "torch 2.9.1 is installed, 2.10 is the oldest that is safe"),
        ("accelerate", "1.0.0", "wrong", "accelerate 1.0.0; bertpipe asks for >=1.12"),
        ("accelerate", "1.99.0", "note", "accelerate 1.99.0 (tested: "),
    ],
)
def test_versions(tmp_path, monkeypatch, name, version, state, text):
    write_package(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    found = [finding for finding in doctor._packages(Config()) if finding.state == state]
    assert any(text in finding.text and finding.advice for finding in found)
    if state == "fatal":
        with pytest.raises(doctor.ConfigError, match="can't work here: packages"):
            doctor.settle(found)


def test_settings_that_do_not_fit_the_machine(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    runtime = RuntimeConfig(threads=4_096, require_fast_attention=True)
    found = doctor.examine(Config(runtime=runtime, model=ModelConfig(preset="deberta-base")))
    said = {finding.text: finding for finding in found if finding.name in ("threads", "attention")}
    (crowded, omp, single) = [finding for finding in found if finding.name == "threads"]
    assert crowded.state == "note" and "set runtime.threads" in crowded.advice
    assert "OMP_NUM_THREADS=77 is overruled" in omp.text and single.advice.startswith("unset it")
    (slow,) = [finding for finding in said.values() if finding.name == "attention"]
    assert slow.state == "wrong" and "runs padded" in slow.advice


def test_too_little_room(tmp_path):
    (found,) = surroundings.disk(Config(runtime=RuntimeConfig(root=str(tmp_path), keep_checkpoints=10**9)))
    assert found.state == "wrong" and "larger disk" in found.advice


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_root_in_memory_is_noted():
    (found,) = surroundings.file_system(Config(runtime=RuntimeConfig(root="/dev/shm/bertpipe-never-made/runs")))
    assert (
        found.state == "note" and "gone after a restart" in found.advice and not list(Path("/dev/shm").glob(".bert*"))
    )


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def broken(cfg):
        raise OSError("libcudart.so: cannot open\nshared object")

    def absent(cfg):
        raise ImportError("no module named torch")

    monkeypatch.setattr(doctor, "LOOKS", {"device": broken, "bf16": absent})
    device, bf16 = doctor.examine(Config())
    assert (device.state, bf16.state) == ("wrong", "fatal") and "OSError: libcudart.so: cannot open)" in device.text


# --- the Hub ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(status: int, body: bytes = b"{}", wait: float = 0, **headers: str) -> Iterator[tuple[str, list]]:
    """(address, the (path, Authorization) of each request) of a local server that answers everything alike."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            time.sleep(wait)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def ask(endpoint: str, token: str | None = TOKEN) -> list[surroundings.Finding]:
    return list(surroundings.hub_at(endpoint, lambda: token, False))


def whose(role: str) -> bytes:
    return json.dumps({"name": "ada", "auth": {"accessToken": {"role": role}}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "state", "text"),
    [
        (200, whose("write"), "ok", "ada, by a token of role write"),
        (200, whose("read"), "note", "ada, by a token of role read"),
        (401, b"{}", "wrong", "the Hub refuses the token (401)"),
        (500, b"oops", "note", "the Hub says 500 to who this is"),
    ],
)
def test_who_am_i(status, body, state, text):
    with serving(status, body) as (endpoint, asked):
        network, login = ask(endpoint)
    assert (network.state, login.state, login.text) == ("ok", state, text)
    assert asked == [("/api/whoami-v2", f"Bearer {TOKEN}")]
    assert TOKEN not in "".join(doctor.lines([network, login])) + doctor.as_json([network, login])


def test_without_a_token_nothing_is_sent():
    with serving(401) as (endpoint, asked):
        network, login = ask(endpoint, None)
    assert network.state == "ok" and login.state == "note" and "hf auth login" in login.advice
    assert asked == [("/api/whoami-v2", None)]


def test_the_token_goes_to_no_other_place():
    with serving(200, whose("write")) as (other, asked_there):
        with serving(302, Location=f"{other}/api/whoami-v2") as (endpoint, asked):
            findings = ask(endpoint)
        assert len(asked) == 1 and asked_there == [] and findings[1].text == "the Hub says 302 to who this is"


def test_no_network_is_no_failure(monkeypatch):
    monkeypatch.setattr(surroundings, "SECONDS", 0.2)
    offline, there = surroundings.hub_at("http://127.0.0.1:9", lambda: TOKEN, True)
    assert offline.state == there.state == "ok" and "HF_HUB_OFFLINE" in offline.text
    assert there.text == "a token of the Hub is there; whose it is can't be asked now"
    refused, _ = ask("http://127.0.0.1:9")
    with serving(200, wait=1.0) as (endpoint, _):
        hangs, _ = ask(endpoint)
    stuck = threading.Event()
    never, unknown = surroundings.hub_at("http://127.0.0.1:9", lambda: str(stuck.wait(30)), False)
    stuck.set()
    for finding in (refused, hangs, never):
        assert finding.state == "note" and "does not answer" in finding.text
    assert doctor.settle([offline, there, refused, hangs, never, unknown]) == 0
