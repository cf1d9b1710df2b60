"""A Hub that can't be reached is said at once, in one line; what is in the cache is taken from there."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bertpipe import cli, reach
from bertpipe.errors import ConfigError
from tests.downstream.tuning import write_task
from tests.runs import bertpipe, prepare

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path) -> Path:
    """An empty cache, no proxy, and nothing where the Hub should be; returns the cache's folder."""
    from huggingface_hub import constants

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "AGAIN", 0.0)
    for cached in (reach._fault, reach._say_once):
        cached.cache_clear()
    return tmp_path / "cache"


def put(cache: Path, *files: str) -> None:
    """Files of someone/bert in the layout of the Hub's cache."""
    repository = cache / "models--someone--bert"
    (repository / "snapshots" / "0123").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0123")
    for name in files:
        (repository / "snapshots" / "0123" / name).touch()


@pytest.mark.parametrize("setting", ["tokenizer.adopt", "finetune.model"])
def test_a_stage_says_it_in_one_line(setting, tmp_path):
    """The library would ask for two minutes, and say so in thirty lines."""
    write_task(tmp_path / "glue", "sst2")
    config = ["--config", prepare(tmp_path), "--runtime.root", tmp_path / "runs"]
    assert bertpipe("corpus", *config).returncode == 0
    away = {"HF_ENDPOINT": NOWHERE, "HF_HUB_OFFLINE": None, "HF_HOME": str(tmp_path / "home")} | dict.fromkeys(PROXIES)
    more = ["--finetune.tasks", "sst2", "--finetune.data", tmp_path / "glue", f"--{setting}", "someone/bert"]
    done = bertpipe(setting.partition(".")[0], *config, *more, check=False, **away)
    said = (
        f"bertpipe: {setting}: 'someone/bert' is no folder and not in this machine's cache of the Hub, and {NOWHERE} "
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{said}can't be reached (Connection refused); name a folder")


@pytest.mark.parametrize(
    "command", [["embed", "--out", "v.npy", "--input", "t.txt"], ["attention", "a text"], ["export", "--out", "o"]]
)
def test_a_command_names_its_own_flag(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("a text\n")
    assert cli.main([*command, "--model", "someone/bert"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bertpipe: --model: 'someone/bert' is no folder and not in") and err.count("\n") == 1


def test_what_is_in_the_cache_is_taken_from_there(no_hub, capsys):
    put(no_hub, "config.json", "vocab.txt", "model.safetensors")
    for _ in range(2):
        reach.check("someone/bert", "model.init", None, weights=True)
    err = capsys.readouterr().err
    assert err.count("so someone/bert comes from the cache; quicker: HF_HUB_OFFLINE=1") == err.count("\n") == 1
    with pytest.raises(
        ConfigError, match=r"model\.init: 'someone/roberta' is no folder and not in this machine's cache"
    ):
        reach.check("someone/roberta", "model.init", None, weights=True)


def test_a_tokenizer_alone_in_the_cache_is_no_model(no_hub):
    put(no_hub, "config.json", "tokenizer.json")
    reach.check("someone/bert", "tokenizer.adopt", None, weights=False)
    with pytest.raises(ConfigError, match=r"model\.init: 'someone/bert' is no folder and not in"):
        reach.check("someone/bert", "model.init", None, weights=True)


def test_of_several_processes_one_says_it(no_hub, monkeypatch, capsys):
    put(no_hub, "model.safetensors")
    monkeypatch.setenv("RANK", "1")
    reach.check("someone/bert", "model.init", None, weights=True)
    assert capsys.readouterr().err == ""


def test_the_note_has_no_credential(no_hub, monkeypatch, capsys):
    from huggingface_hub import constants

    put(no_hub, "model.safetensors")
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:topsecret@127.0.0.1:9")
    reach.check("someone/bert", "model.init", None, weights=True)
    err = capsys.readouterr().err
    assert "://***@127.0.0.1:9 can't be reached" in err and "topsecret" not in err


def test_offline_nothing_is_asked(monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(reach, "connect", lambda *_: pytest.fail("asked"))
    reach.check("someone/bert", "model.init", None, weights=True)


def test_one_failure_is_asked_about_again(monkeypatch):
    answers = iter(["Connection reset by peer", ""])
    monkeypatch.setattr(reach, "connect", lambda host, port: next(answers))
    reach.check("someone/bert", "model.init", None, weights=True)
    assert not list(answers)


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"http_proxy": "http://127.0.0.1:1"}, False),
        ({"all_proxy": "http://127.0.0.1:1"}, False),
        ({"https_proxy": "http://127.0.0.1:1"}, True),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}, True),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "*"}, True),
    ],
)
def test_what_a_proxy_is_asked_for_is_left_to_it(variables, asked, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) if asked else contextlib.nullcontext():
        reach.check("someone/bert", "model.init", None, weights=True)


@pytest.mark.parametrize("endpoint", ["https://host:abc", f"http://{'a' * 70}.example", "http://", "nothing"])
def test_an_odd_endpoint_is_one_line(endpoint, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(ConfigError, match=f"and {endpoint} can't be reached"):
        reach.check("someone/bert", "model.init", None, weights=True)


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that lets no connection in: its queue is full."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        while True:
            filler = opened.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(server.getsockname())
            except TimeoutError:
                break
        yield server.getsockname()[1]


def test_many_addresses_that_do_not_answer_share_one_time(monkeypatch):
    """Else each of them would have all of it."""
    monkeypatch.setattr(reach, "SECONDS", 0.2)
    with silent() as port:
        there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))] * 8
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: there)
        assert reach.connect("hub.example", port) == "no answer in 0.2 s"


def test_a_server_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert reach.connect("127.0.0.1", server.getsockname()[1]) == ""
