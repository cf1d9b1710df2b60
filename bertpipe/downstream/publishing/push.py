"""A publish artifact onto the Hub: one commit of its files, and nothing where the Hub holds them already.

    check(cfg, pauses)             whose token it is and whether it may write, before anything is made
    push(cfg, folder, pauses)      the artifact `folder` -> lines that say what came of it

`main` gets one commit, which the Hub takes only on top of the one looked at before. Checkpoints are commits of the
branch `checkpoints`, which begins at the repository's first commit; each is named by a tag, step-N, once it is whole:
a tag stays where it is, and never shows half a checkpoint or another one's weights. A failed push leaves whole commits
alone, here nothing is touched, and the next push makes what is missing: each step looks first whether it is done.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bertpipe import artifact
from bertpipe.config import Config, PublishConfig
from bertpipe.downstream.publishing import hub, publish
from bertpipe.downstream.publishing.publish import ALLOWED, FOLDER, RESULTS, REVISIONS
from bertpipe.downstream.tasks.tasks import TASKS
from bertpipe.errors import ArtifactError, ConfigError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN, BRANCH = "main", "checkpoints"


class File(NamedTuple):
    """What goes up under one name."""

    path: Path
    sha256: str


Files = dict[str, File]


def check(cfg: Config, pauses: Sequence[float]) -> None:
    """ConfigError or HubError when the push that a run is to end in would be refused; NoHubError where none can say."""
    publish.check(cfg)
    settings = cfg.publish
    with hub.client() as api:
        hub.patiently(lambda: _admit(api, settings), pauses, settings.repo)


def push(cfg: Config, folder: Path, pauses: Sequence[float]) -> list[str]:
    """Push the finished artifact `folder`, trying again after each of `pauses`; HubError says why it can't be done."""
    plan = listed_files(folder)
    with hub.client() as api:
        return push_files(api, cfg.publish, plan, pauses, folder)


def push_files(
    api: HfApi, settings: PublishConfig, plan: dict[str, Files], pauses: Sequence[float], folder: Path
) -> list[str]:
    """The same of the files in `folder` that are to go up, by revision."""
    pushing = _Push(api, settings, plan)
    try:
        return hub.patiently(pushing.attempt, pauses, settings.repo)
    except HubError as error:
        made = f"what is to be pushed stands in {folder}, and `bertpipe publish --push` pushes it"
        raise type(error)(f"{error}; {made}") from None


def listed_files(folder: Path) -> dict[str, Files]:
    """What is to go up by revision, main first: the allow-listed files of the manifest, with their hashes checked."""
    plan: dict[str, Files] = {MAIN: {}}
    for name, facts in artifact.read_manifest(folder)["files"].items():
        place, _, rest = name.partition("/")
        revision, inner = (MAIN, rest) if place == FOLDER else tuple(rest.partition("/")[::2])
        if place not in (FOLDER, REVISIONS) or not is_allowed(inner):
            continue
        path = folder / name
        if path.is_symlink() or not path.is_file() or artifact.hash_file(path) != facts["sha256"]:
            raise ArtifactError(f"{path}: not what the manifest says; delete {folder} and run `bertpipe publish` again")
        plan.setdefault(revision, {})[inner] = File(path, facts["sha256"])
    if not plan[MAIN]:
        raise ArtifactError(f"{folder}: nothing to push in it; delete it and run `bertpipe publish` again")
    return dict(sorted(plan.items(), key=lambda item: (item[0] != MAIN, _step(item[0]))))


def is_allowed(name: str) -> bool:
    """Whether a file of this name may leave."""
    return name in ALLOWED or (fnmatch.fnmatchcase(name, f"{RESULTS}/*.yaml") and name.count("/") == 1)


def _step(revision: str) -> int:
    number = revision.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _admit(api: HfApi, settings: PublishConfig) -> hub.Remote | None:
    """The repository as it stands, None if it is yet to be made; ConfigError, HubError when we may not write to it."""
    hub.check_access(api, settings.repo)
    remote = hub.look(api, settings.repo)
    if remote is not None and settings.private and not remote.private:
        raise ConfigError(
            f"publish.private: {settings.repo} is public; to push what everybody can see, set --publish.private false"
        )
    return remote


@dataclass
class _Push:
    """One push, in as many attempts as it takes."""

    api: HfApi
    settings: PublishConfig
    plan: dict[str, Files]
    parents: dict[str, str] = field(default_factory=dict)
    """By branch, the commit that the next one goes on top of: as it was first seen, or made by us."""
    pushed: list[str] = field(default_factory=list)

    @property
    def repo(self) -> str:
        return self.settings.repo

    def attempt(self) -> list[str]:
        """Make what is missing; lines that say what is there now."""
        if _admit(self.api, self.settings) is None:
            self._create()
        tags = self._tags() if len(self.plan) > 1 else {}
        remote = self._settle(MAIN, MAIN)
        for name in self.plan:
            if name not in (MAIN, *tags):
                self._tag(name)
        where = (
            f"{hub.endpoint()}/{self.repo} ({'private' if remote.private else 'public'}), commit {remote.commit[:12]}"
        )
        if not self.pushed:
            also = ", its checkpoints too" if len(self.plan) > 1 else ""
            return [f"publish: nothing to push: {where} holds these very files already{also}"]
        files = self.plan[MAIN].values()
        size = sum(file.path.stat().st_size for file in files) / 1e6
        verb = "pushed to" if MAIN in self.pushed else "unchanged:"
        lines = [f"publish: {verb} {where}: {len(files)} files, {size:.1f} MB"]
        if steps := [name for name in self.plan if name in self.pushed and name != MAIN]:
            lines.append(f"publish: pushed the checkpoints {', '.join(steps)}: from_pretrained(..., revision=...)")
        return lines

    def _create(self) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        refused: HfHubHTTPError | None = None
        try:
            self.api.create_repo(self.repo, private=self.settings.private)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            refused = error  # there already, made by an attempt whose answer was lost
        if hub.look(self.api, self.repo) is None:
            raise refused or HubError(f"{hub.endpoint()}: {self.repo} was made, but is not there; run this again")

    def _settle(self, branch: str, revision: str) -> hub.Remote:
        """Have `branch` hold the files of `revision`, by one commit or none; the commit that holds them."""
        files = self.plan[revision]
        remote = self._look(branch)
        parent = self.parents.setdefault(branch, remote.commit)
        missing, outdated = _missing(remote, files), _outdated(remote, files)
        if not missing and not outdated:
            if remote.commit != parent:  # by an attempt of ours whose answer was lost
                self._note(branch, revision, remote)
            return remote
        if remote.commit != parent:
            raise HubError(f"{hub.endpoint()}: {hub.MEANINGS[409].format(repo=f'{self.repo} ({branch})')}")
        made = self._look(self._commit(branch, revision, missing, outdated))
        if lacking := _missing(made, files):
            raise HubError(
                f"{hub.endpoint()}: commit {made.commit[:12]} lacks {lacking[0]}; is it in .gitignore there?"
            )
        self._note(branch, revision, made)
        return made

    def _commit(self, branch: str, revision: str, missing: list[str], outdated: list[str]) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = self.plan[revision]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(files[name].path)) for name in missing
        ]
        operations += [CommitOperationDelete(name) for name in outdated]
        message = "Model made with bertpipe" if branch == MAIN else f"Checkpoint {revision}"
        return self.api.create_commit(
            self.repo, operations, commit_message=message, revision=branch, parent_commit=self.parents[branch]
        ).oid

    def _note(self, branch: str, revision: str, made: hub.Remote) -> None:
        self.parents[branch] = made.commit
        self.pushed.append(revision)

    def _look(self, revision: str) -> hub.Remote:
        remote = hub.look(self.api, self.repo, revision)
        if remote is None:
            raise HubError(f"{hub.endpoint()}: 404: {hub.MEANINGS[404].format(repo=self.repo)}")
        return remote

    def _tags(self) -> list[str]:
        """The checkpoints that are there already; ConfigError where one of that name holds something else."""
        refs = self.api.list_repo_refs(self.repo)
        there = [ref.name for ref in (*refs.tags, *refs.branches) if ref.name in self.plan and ref.name != MAIN]
        for name in there:
            if _missing(self._look(name), self.plan[name]):
                raise ConfigError(
                    f"publish.revisions: {self.repo} has a {name} already, of another run; remove it with "
                    f"`hf repos tag delete {self.repo} {name}`, or set another publish.repo"
                )
        if BRANCH not in [ref.name for ref in refs.branches]:
            first = self.api.list_repo_commits(self.repo)[-1]
            self.api.create_branch(self.repo, branch=BRANCH, revision=first.commit_id)
        return there

    def _tag(self, name: str) -> None:
        self.api.create_tag(self.repo, tag=name, revision=self._settle(BRANCH, name).commit)
        if name not in self.pushed:
            self.pushed.append(name)


def _missing(remote: hub.Remote, files: Files) -> list[str]:
    """Names whose content there is not ours."""
    return [
        name for name, file in files.items() if remote.files.get(name) not in (("sha256", file.sha256), _blob(file))
    ]


def _blob(file: File) -> tuple[str, str]:
    """How git names a file's content, for those small enough to be kept by it."""
    size = file.path.stat().st_size
    content = file.path.read_bytes() if size < 1 << 24 else b""
    return ("git", hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


def _outdated(remote: hub.Remote, files: Files) -> list[str]:
    """Names there that a push of another model may have left and that would mislead; all else is left alone."""
    ours = {*ALLOWED, *(f"{RESULTS}/{task}.yaml" for task in TASKS)}
    return sorted((remote.files.keys() & ours) - files.keys())
