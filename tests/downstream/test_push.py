"""Pushing to a Hub of our own, whatever it answers: it holds one whole commit or none, and nothing here is touched."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.downstream.publishing import hub, push
from bertpipe.errors import ArtifactError, BertpipeError, ConfigError, HubError, NoHubError
from tests.hub import DROP, LOSE, OWNER, SIGNATURE, TOKEN, Fault, Hub, contents, serve

REPO = f"{OWNER}/tiny"
ANSWERS = (401, 403, 404, 409, 412, 429, 500, 503, DROP, LOSE)
PASSES = (429, 500, 503, DROP, LOSE)
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# tiny\n"


def configure(**publish) -> Config:
    return Config.model_validate({"publish": {"repo": REPO, **publish}})


def write(folder: Path, *steps: int, mark: str = "a", results: tuple[str, ...] = ("cola",)) -> Path:
    """A publish artifact of small files, with a revision for each of `steps`."""
    with artifact.committing(folder, stage="publish") as (out, _):
        for place in ("model", *(f"revisions/step-{step}" for step in steps)):
            inside = out / place
            (inside / ".eval_results").mkdir(parents=True)
            (inside / "README.md").write_text(CARD + place)
            (inside / "config.json").write_text('{"model_type": "bert"}')
            (inside / "tokenizer.json").write_text("{}")
            (inside / "model.safetensors").write_bytes(hashlib.sha256(f"{place}{mark}".encode()).digest() * 64)
            for name in results if place == "model" else ():
                (inside / ".eval_results" / f"{name}.yaml").write_text("- value: 1\n")
    return folder


@pytest.fixture
def server(online):
    with serve(Hub()) as running:
        yield online(running)


def whole(server: Hub, folder: Path, repo: str = REPO) -> bool:
    """Whether the Hub's main branch holds just what the artifact holds, on top of its first commit."""
    found = {name: content for name, content in server.repositories[repo].files().items() if name != ".gitattributes"}
    return found == contents(folder / "model")


def check_held(server: Hub, folder: Path) -> None:
    """One whole commit or none, on main and on each revision that has a name."""
    repo = server.repositories.get(REPO)
    if repo is None:
        return
    assert len(repo.history("main")) in (1, 2)
    assert list(repo.files()) == [".gitattributes"] or whole(server, folder)
    for name in repo.tags:
        weights = repo.files(name)["model.safetensors"]
        assert weights == (folder / "revisions" / name / "model.safetensors").read_bytes()


def check_done(server: Hub, folder: Path) -> None:
    repo = server.repositories[REPO]
    assert whole(server, folder) and len(repo.history("main")) == 2
    steps = {path.name for path in (folder / "revisions").glob("*")}
    assert set(repo.tags) == steps
    if steps:
        assert len(repo.history("checkpoints")) == 1 + len(steps)
    check_held(server, folder)


def test_one_commit_and_nothing_more_the_second_time(server, tmp_path):
    folder = write(tmp_path / "publish-1")
    (line,) = push.push(configure(), folder, [])
    repo = server.repositories[REPO]
    commit = repo.branches["main"]
    assert f"pushed to {server.url}/{REPO} (private), commit {commit[:12]}: 5 files" in line
    check_done(server, folder)
    assert repo.private
    asked = len(server.requests)
    (line,) = push.push(configure(), folder, [])
    assert "nothing to push" in line and commit[:12] in line and repo.branches["main"] == commit
    assert not any(request.startswith(("POST", "PUT")) for request in server.requests[asked:])


def test_a_changed_model_is_one_commit_more_and_takes_old_scores_away(server, tmp_path):
    push.push(configure(), write(tmp_path / "publish-1", results=("cola", "sst2")), [])
    repo = server.repositories[REPO]
    repo.commit("main", {**repo.files(), "notes.md": b"by hand", ".eval_results/theirs.yaml": b"- value: 2\n"})
    changed = write(tmp_path / "publish-2", mark="b", results=("sst2",))
    push.push(configure(), changed, [])
    assert len(repo.history("main")) == 4
    assert set(repo.files()) == {
        "notes.md",
        ".gitattributes",
        ".eval_results/theirs.yaml",
        *contents(changed / "model"),
    }
    assert ".eval_results/cola.yaml" not in repo.files()


def test_only_what_is_listed_leaves(server, tmp_path):
    folder = write(tmp_path / "publish-1")
    for name in (".env", "optimizer.pt", ".eval_results/secret.txt", "model.safetensors.bak"):
        (folder / "model" / name).write_text("canary")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (".env", ".eval_results/../.env", ".eval_results/a/b.yaml"):  # whatever a manifest says
        manifest["files"][f"model/{name}"] = {"bytes": 6, "sha256": hashlib.sha256(b"canary").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    push.push(configure(), folder, [])
    assert set(server.repositories[REPO].files()) == {
        ".gitattributes", "README.md", "config.json", "tokenizer.json", "model.safetensors", ".eval_results/cola.yaml"
    }  # fmt: skip
    assert b"canary" not in server.seen and b"Y2FuYXJ5" not in server.seen and TOKEN.encode() not in server.seen


@pytest.mark.parametrize("damage", ["changed", "link", "gone"])
def test_a_damaged_artifact_is_not_pushed(server, tmp_path, damage):
    folder = write(tmp_path / "publish-1")
    path = folder / "model" / "config.json"
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(b"{}")
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"config\.json: not what the manifest says"):
        push.push(configure(), folder, [])
    assert server.requests == []


def sweep(server: Hub, folder: Path, answers, requests: int, pauses) -> None:
    """Push with each request answered in each of these ways, then once more."""
    before, settings = contents(folder), configure().publish
    with hub.client() as api:

        def attempt(pauses) -> None:
            push.push_files(api, settings, push.listed_files(folder), pauses, folder)

        for number, answer in itertools.product(range(1, requests + 1), answers):
            server.repositories.clear()
            server.large.clear()
            server.fault = Fault(number, answer)
            case = f"request {number}: {answer}"
            try:
                attempt(pauses)
                failed = None
            except BertpipeError as error:
                failed = str(error)
            assert server.fault.times == 0, f"{case} was never reached"
            server.fault = None
            check_held(server, folder)
            assert not pauses or failed is None, f"{case}: {failed}"
            if failed is not None:
                assert "\n" not in failed and TOKEN not in failed and SIGNATURE not in failed, case
                assert "`bertpipe publish --push` pushes it" in failed and server.url in failed, case
                attempt([])
            check_done(server, folder)
    assert contents(folder) == before


def asked(server: Hub, folder: Path) -> int:
    """How many requests a push takes that nothing goes wrong with."""
    push.push(configure(), folder, [])
    check_done(server, folder)
    return len(server.requests)


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_any_request_is_answered_a_rerun_finishes(server, tmp_path, answer):
    folder = write(tmp_path / "publish-1")
    requests = asked(server, folder)
    assert requests >= 10
    sweep(server, folder, [answer], requests, [])


@pytest.mark.parametrize("answer", PASSES)
def test_what_passes_is_waited_for(server, tmp_path, answer, capsys):
    folder = write(tmp_path / "publish-1")
    sweep(server, folder, [answer], asked(server, folder), [0])
    said = capsys.readouterr().out
    assert "trying again in 0 s" in said and TOKEN not in said and SIGNATURE not in said


def test_checkpoints_become_tags_whatever_goes_wrong(server, tmp_path):
    folder = write(tmp_path / "publish-1", 0, 20)
    sweep(server, folder, [409, LOSE], asked(server, folder), [])


@pytest.mark.slow
def test_checkpoints_and_every_answer(server, tmp_path):
    folder = write(tmp_path / "publish-1", 0, 5, 20)
    requests = asked(server, folder)
    sweep(server, folder, ANSWERS, requests, [])
    sweep(server, folder, PASSES, requests, [0])


@pytest.mark.parametrize(("answer", "words"), [
    (401, "401: the token is not accepted"), (403, "403: the token may not write to tester/tiny"),
    (404, "404: tester/tiny is not there"), (409, "409: tester/tiny was changed by someone else"),
    (429, "429: too many requests"), (500, "500: it fails"), (DROP, "can't be reached"),
])  # fmt: skip
def test_a_failure_that_stays_is_one_line_that_says_what_to_do(server, tmp_path, answer, words, capsys):
    folder = write(tmp_path / "publish-1")
    server.fault = Fault(1, answer, times=99)
    with pytest.raises(HubError) as raised:
        push.push(configure(), folder, [0, 0])
    line = str(raised.value)
    assert words in line and "\n" not in line and str(folder) in line
    assert len(server.requests) == (3 if answer in PASSES else 1)
    assert ("tried 3 times" in line) == (answer in PASSES)
    assert isinstance(raised.value, NoHubError) == (answer == DROP)


def test_a_busy_hub_is_given_the_time_it_asks_for_within_reason(server, tmp_path, capsys):
    folder = write(tmp_path / "publish-1")
    server.fault = Fault(2, 429, headers={"Retry-After": "1"})
    push.push(configure(), folder, [0])
    assert "trying again in 1 s" in capsys.readouterr().out
    server.fault = Fault(2, 429, headers={"RateLimit": '"api";r=0;t=3000'})
    with pytest.raises(HubError, match="429: too many requests"):
        push.push(configure(), folder, [0, 0])


def test_pauses_double_and_end():
    assert hub.waits(0) == [] and hub.waits(7) == [1, 2, 4] and hub.waits(8) == [1, 2, 4]
    assert sum(hub.waits(600)) <= 600 and max(hub.waits(600)) == 30


def test_a_commit_of_someone_else_is_never_pushed_over(server, tmp_path):
    folder = write(tmp_path / "publish-1")
    push.push(configure(), folder, [])
    repo = server.repositories[REPO]
    changed = write(tmp_path / "publish-2", mark="b")

    def push_theirs(request: str) -> None:
        if "/preupload/" in request:  # between our look and our commit
            repo.commit("main", {**repo.files(), "theirs.md": repo.files().get("theirs.md", b"") + b"new"})

    server.meanwhile = push_theirs
    for pauses in ([], [0, 0]):
        with pytest.raises(
            HubError, match=r"tester/tiny was changed by someone else meanwhile: look at what it holds now"
        ):
            push.push(configure(), changed, pauses)
        assert repo.files()["model.safetensors"] == (folder / "model/model.safetensors").read_bytes()
    server.meanwhile = lambda request: None
    push.push(configure(), changed, [])
    assert repo.files()["model.safetensors"] == (changed / "model/model.safetensors").read_bytes()
    assert repo.files()["theirs.md"] == b"newnew"


def test_nor_one_that_came_while_we_waited(server, tmp_path):
    folder, changed = write(tmp_path / "publish-1"), write(tmp_path / "publish-2", mark="b")
    push.push(configure(), folder, [])
    repo, asked = server.repositories[REPO], len(server.requests)

    def fail_and_push_theirs(request: str) -> None:
        if "/commit/" in request:
            server.fault = Fault(1, 500)
            repo.commit("main", {**repo.files(), "theirs.md": b"new"})

    server.meanwhile = fail_and_push_theirs
    with pytest.raises(HubError, match=r"tester/tiny \(main\) was changed by someone else meanwhile"):
        push.push(configure(), changed, [0, 0, 0])
    assert sum("/commit/" in request for request in server.requests[asked:]) == 1
    assert set(repo.files()) == {".gitattributes", "theirs.md", *contents(folder / "model")}


def test_a_checkpoint_of_another_run_is_not_taken_for_ours(server, tmp_path):
    push.push(configure(), write(tmp_path / "publish-1", 0, 20), [])
    repo = server.repositories[REPO]
    before = dict(repo.branches)
    with pytest.raises(ConfigError, match=r"has a step-0 already, of another run; remove it with `hf repos tag delete"):
        push.push(configure(), write(tmp_path / "publish-2", 0, 20, mark="b"), [])
    assert repo.branches == before
    (line,) = push.push(configure(), write(tmp_path / "publish-3", 0, 20), [])
    assert "nothing to push" in line and "its checkpoints too" in line
    lines = push.push(configure(), write(tmp_path / "publish-4", 0, 20, 40), [])
    assert "unchanged" in lines[0] and "pushed the checkpoints step-40:" in lines[1] and "step-40" in repo.tags


WRITE = {"fineGrained": {"scoped": [{"entity": {"type": "user", "name": OWNER}, "permissions": ["repo.write"]}]}}
READ = {"fineGrained": {"scoped": [{"entity": {"type": "user", "name": OWNER}, "permissions": ["repo.content.read"]}]}}
ONE = {"fineGrained": {"scoped": [{"entity": {"type": "model", "name": REPO}, "permissions": ["repo.write"]}]}}
OTHER = {"fineGrained": {"scoped": [{"entity": {"type": "model", "name": "tester/x"}, "permissions": ["repo.write"]}]}}


@pytest.mark.parametrize(("account", "repo", "wrong"), [
    (Hub(), REPO, None),
    (Hub(), "Tester/tiny", None),
    (Hub(), "tiny", r"publish\.repo: 'tiny' has no owner: this token writes to tester; set it to tester/tiny"),
    (Hub(), "someone/tiny", r"publish\.repo: 'someone/tiny' isn't yours: .* writes to tester; set it to tester/tiny"),
    (Hub(orgs=(("lab", "write"),)), "lab/tiny", None),
    (Hub(orgs=(("lab", "contributor"),)), "lab/tiny", None),
    (Hub(orgs=(("lab", "read"),)), "lab/tiny", "tester may only read in lab"),
    (Hub(orgs=(("lab", "write"),)), "other/tiny", "isn't yours: this token writes to tester or to one of lab"),
    (Hub("read"), REPO, r"the token 'test' of tester may not write to tester/tiny: give it write .*/settings/tokens"),
    (Hub("fineGrained", **WRITE), REPO, None),
    (Hub("fineGrained", **ONE), REPO, None),
    (Hub("fineGrained", **READ), REPO, "may not write to tester/tiny"),
    (Hub("fineGrained", **OTHER), REPO, "may not write to tester/tiny"),
])  # fmt: skip
def test_who_may_write_where_is_known_before_anything_is_made(online, account, repo, wrong):
    with serve(account) as server:
        online(server)
        if wrong is None:
            push.check(configure(repo=repo), [])
        else:
            with pytest.raises((ConfigError, HubError), match=wrong):
                push.check(configure(repo=repo), [])
        assert not server.repositories and all(request.startswith("GET") for request in server.requests)


def test_a_public_repository_takes_no_private_model(server, tmp_path):
    server.create(REPO)
    with pytest.raises(ConfigError, match=r"tester/tiny is public; .* set --publish.private false"):
        push.check(configure(), [])
    folder = write(tmp_path / "publish-1")
    with pytest.raises(ConfigError, match="tester/tiny is public"):
        push.push(configure(), folder, [])
    (line,) = push.push(configure(private=False), folder, [])
    assert "(public)" in line
    server.repositories.clear()
    push.push(configure(private=False), folder, [])
    assert not server.repositories[REPO].private


def test_without_a_token_or_the_network_one_line_says_so(server, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"set HF_TOKEN, or run `hf auth login`; a token is made at .*/settings/tokens"):
        push.check(configure(), [])
    (tmp_path / "login").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    push.check(configure(), [])  # that of the login
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match="401: the token is not accepted"):
        push.check(configure(), [])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NoHubError, match=r"http://127.0.0.1:9: can't be reached \(.*refused.*\).* \(tried 2 times\)"):
        push.check(configure(), [0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NoHubError, match="not asked, as HF_HUB_OFFLINE is set"):
        push.check(configure(), [])


def test_the_librarys_own_client_is_back_afterwards(server):
    from huggingface_hub import get_session

    before = type(get_session())
    with hub.client():
        assert type(get_session()) is not before
        assert get_session().timeout.connect == hub.CONNECT
    assert type(get_session()) is before and get_session().timeout.connect is None
    assert os.environ["HF_TOKEN"] == TOKEN
