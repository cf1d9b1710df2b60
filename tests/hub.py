"""A Hub of our own, in memory, for tests: what huggingface_hub asks of the real one to push a model and load it again.

    with serve(Hub()) as hub:
        hub.environment           variables for a process that shall talk to it
        hub.requests              "POST /api/repos/create" and so on, in order
        hub.fault = Fault(3, 500) the third request from now on is answered so; or dropped; or done, and the answer lost

Commits name their parent, are taken whole or not at all, and are refused (412) where the branch has moved. Private
repositories are shown to their owner's tokens alone. Standard library and PyYAML.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

OWNER, TOKEN = "tester", "hf_" + "aTokenForTests" * 3
SIGNATURE = "aSignatureThatOpensTheStore"
DATE = "2026-01-01T00:00:00.000Z"
DROP, LOSE = "drop", "lose the answer"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class RefusedError(Exception):
    """An answer with an error; `code` is what the Hub writes into X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Fault:
    """From request `first` on, counted from 1, the next `times` go wrong."""

    first: int
    answer: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    private: bool
    commits: dict[str, tuple[str | None, dict[str, bytes]]] = field(default_factory=dict)
    """By id (parent, content of each path)."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        mark = hashlib.sha1(repr((parent, sorted(files.items()))).encode()).hexdigest()
        self.commits[mark] = (parent, files)
        self.branches[branch] = mark
        return mark

    def resolve(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision)
        if found or revision in self.commits:
            return found or revision
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[str]:
        """Ids of the commits, the newest first."""
        found: str | None = self.resolve(revision)
        ids = []
        while found is not None:
            ids.append(found)
            found = self.commits[found][0]
        return ids

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)][1]


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(path: str, content: bytes) -> dict[str, Any]:
    if not is_large(path):
        return {"size": len(content), "oid": blob(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    large = {"size": len(content), "sha256": digest, "oid": digest, "pointerSize": len(pointer)}
    return {"size": len(content), "oid": blob(pointer), "lfs": large}


class Hub:
    def __init__(self, role: str = "write", orgs: tuple[tuple[str, str], ...] = (), **token: Any):
        access = {"displayName": "test", "role": role, **token}
        self.me = {"type": "user", "name": OWNER, "auth": {"type": "access_token", "accessToken": access}}
        self.me["orgs"] = [{"type": "org", "name": name, "roleInOrg": inside} for name, inside in orgs]
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.seen = b""
        """Everything that was sent, to look for what should not have been."""
        self.fault: Fault | None = None
        self.meanwhile: Callable[[str], None] = lambda request: None
        """Called with each request before it is answered: what others do at that moment."""
        self.lock = threading.RLock()
        self.url = ""

    @property
    def environment(self) -> dict[str, str | None]:
        off = {"HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, **off}

    def create(self, name: str, private: bool = False, **files: bytes) -> Repository:
        made = self.repositories[name] = Repository(private)
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return made

    def misfortune(self) -> Fault | None:
        """What shall happen to the request that has just come."""
        fault = self.fault
        if fault is None:
            return None
        fault.first -= 1
        if fault.first <= 0 and fault.times > 0:
            fault.times -= 1
            return fault
        return None

    # --- what can be asked; each returns JSON, or bytes with headers ---

    def whoami(self, body: bytes) -> Any:
        return self.me

    def create_repository(self, body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or OWNER
        if owner not in (OWNER, *(org["name"] for org in self.me["orgs"])):
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.repositories:
            raise RefusedError(409, "You already created this model repo")
        self.create(name, asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}", "name": name}

    def validate(self, body: bytes) -> Any:
        text = json.loads(body)["content"]
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        results = front.get("model-index") or []
        if not isinstance(results, list) or not isinstance(front.get("license", ""), str):
            raise RefusedError(400, "invalid metadata")
        return {"errors": [], "warnings": []}

    def info(self, repo: Repository, body: bytes, name: str, revision: str = "main") -> Any:
        head = repo.resolve(revision)
        rows = [(path, describe(path, content)) for path, content in sorted(repo.commits[head][1].items())]
        siblings = [{"rfilename": path, "blobId": row.pop("oid"), **row} for path, row in rows]
        return {"_id": "1", "id": name, "modelId": name, "sha": head, "private": repo.private, "siblings": siblings}

    def refs(self, repo: Repository, body: bytes, name: str) -> Any:
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
        return {"branches": heads, "tags": tags, "converts": []}

    def commits(self, repo: Repository, body: bytes, name: str, revision: str) -> Any:
        row = {"title": "", "message": "", "date": DATE, "authors": []}
        return [{"id": mark, **row} for mark in repo.history(revision)]

    def branch(self, repo: Repository, body: bytes, name: str, branch: str) -> Any:
        if branch in repo.branches:
            raise RefusedError(409, "Reference already exists")
        repo.branches[branch] = repo.resolve(json.loads(body).get("startingPoint", "main"))
        return {}

    def tag(self, repo: Repository, body: bytes, name: str, revision: str) -> Any:
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise RefusedError(409, "Tag reference exists already")
        repo.tags[tag] = repo.resolve(revision)
        return {}

    def preupload(self, repo: Repository, body: bytes, name: str, revision: str) -> Any:
        there = repo.files(revision)
        rows = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            row = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in there:
                known = describe(path, there[path])
                row["oid"] = known.get("lfs", known)["oid"]
            rows.append(row)
        return {"files": rows}

    def batch(self, repo: Repository, body: bytes, name: str) -> Any:
        objects = []
        for wanted in json.loads(body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.large:
                place = f"{self.url}/large/{wanted['oid']}"
                row["actions"] = {
                    "upload": {"href": f"{place}?signature=secret"},
                    "verify": {"href": f"{place}/verify"},
                }
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, digest: str) -> Any:
        if hashlib.sha256(body).hexdigest() != digest:
            raise RefusedError(400, "content differs from its name")
        self.large[digest] = body
        return {}

    def verify(self, body: bytes, digest: str) -> Any:
        if digest not in self.large:
            raise RefusedError(404, "no such object")
        return {}

    def commit(self, repo: Repository, body: bytes, name: str, branch: str) -> Any:
        head, *rest = (json.loads(line) for line in body.splitlines())
        if branch not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if head["value"].get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(branch))
        for line in rest:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise RefusedError(400, "a large file is missing")
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        mark = repo.commit(branch, files)
        return {"success": True, "commitOid": mark, "commitUrl": f"{self.url}/{name}/commit/{mark}"}

    def tree(self, repo: Repository, body: bytes, name: str, revision: str, folder: str = "") -> Any:
        files = {path: content for path, content in repo.files(revision).items() if path.startswith(folder)}
        if folder and not files:
            raise RefusedError(404, "no such folder", "EntryNotFound")
        return [{"type": "file", "path": path, **describe(path, content)} for path, content in files.items()]

    def resolve(self, repo: Repository, body: bytes, name: str, revision: str, path: str) -> Any:
        mark = repo.resolve(revision)
        content = repo.commits[mark][1].get(path)
        if content is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        row = describe(path, content)
        digest = row.get("lfs", row)["oid"]
        headers = {"X-Repo-Commit": mark, "ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return content, headers | {"X-Linked-Etag": f'"{digest}"'}


NAME = r"([^/]+/[^/]+)"
OPEN = [("GET", r"/api/whoami-v2", Hub.whoami), ("POST", r"/api/repos/create", Hub.create_repository)]
OPEN += [("POST", r"/api/validate-yaml", Hub.validate)]
OPEN += [("PUT", r"/large/(\w+)", Hub.upload), ("POST", r"/large/(\w+)/verify", Hub.verify)]
OF_A_REPOSITORY = [
    ("GET", rf"/api/models/{NAME}", Hub.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Hub.info),
    ("GET", rf"/api/models/{NAME}/refs", Hub.refs),
    ("GET", rf"/api/models/{NAME}/commits/(.+)", Hub.commits),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Hub.tree),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Hub.branch),
    ("POST", rf"/api/models/{NAME}/tag/(.+)", Hub.tag),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's second packet waits 40 ms
    hub: Hub

    def log_message(self, *arguments: Any) -> None: ...

    def handle_one(self) -> None:
        hub = self.hub
        body = self.body()
        if self.path == "/api/agent-harnesses":  # asked once a process, whatever it does next: no part of a push
            return self.answer(404, {}, {})
        with hub.lock:
            hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
            hub.seen += self.path.encode() + body
            hub.meanwhile(hub.requests[-1])
            fault = hub.misfortune()
            if fault is not None and fault.answer != LOSE:
                return self.drop() if fault.answer == DROP else self.answer(fault.answer, {}, fault.headers)
            try:
                found = self.route(unquote(urlsplit(self.path).path), body)
                content, headers = found if isinstance(found, tuple) else (found, {})
                status = 200
            except RefusedError as refused:
                message = {"X-Error-Message": str(refused)} if refused.code else {}
                status, content, headers = (
                    refused.status,
                    {"error": str(refused)},
                    {"X-Error-Code": refused.code} | message,
                )
        return self.drop() if fault is not None else self.answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def route(self, path: str, body: bytes) -> Any:
        hub, method = self.hub, "GET" if self.command == "HEAD" else self.command
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for verb, pattern, answer in OPEN:
            if verb == method and (found := re.fullmatch(pattern, path)):
                if not known and not path.startswith("/large/"):
                    raise RefusedError(401, "Invalid username or password.")
                return answer(hub, body, *found.groups())
        for verb, pattern, answer in OF_A_REPOSITORY:
            if verb == method and (found := re.fullmatch(pattern, path)):
                repo = hub.repositories.get(found[1])
                if repo is None or (repo.private and not known):
                    raise RefusedError(404 if known else 401, "Repository not found", "RepoNotFound")
                if method == "POST" and not known:
                    raise RefusedError(401, "Invalid username or password.")
                return answer(hub, repo, body, *(group for group in found.groups() if group is not None))
        raise RefusedError(404, f"this Hub has no {method} {path}")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: Any, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer on a free port of 127.0.0.1 until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
