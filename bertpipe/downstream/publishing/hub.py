"""The Hugging Face Hub: who we are there, whether we may write, what a repository holds, and what its errors mean.

    with hub.client() as api:
        ...                                     # calls of huggingface_hub, with time limits
    hub.patiently(action, waits, repo)          # action() again while the Hub is busy, fails or can't be reached

The token comes from the environment (HF_TOKEN) or the file of `hf auth login`; no setting holds one. Every failure is
one HubError: what the Hub said and what to do. The library's own retries are off inside `client`: theirs go over single
requests, ours over a whole push, which looks again at what is there before it goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from bertpipe.errors import ConfigError, HubError, NoHubError
from bertpipe.redaction import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
CONNECT, ANSWER = 15.0, 300.0
"""Seconds to wait for a connection, and for the next bytes in either direction."""
LONGEST = 300.0
"""A busy Hub may ask for a longer pause than this; then we stop and say so."""
MAY_CREATE = ("admin", "write", "contributor")
"""Roles in an organisation that let one write to repositories of one's own in it."""
MEANINGS = {
    400: "it takes the request for wrong",
    401: "the token is not accepted, it may have expired: make one at {tokens}, then set HF_TOKEN or `hf auth login`",
    402: "the account must be paid for to do this",
    403: "the token may not write to {repo}: give it write access at {tokens}, or set publish.repo to a place of yours",
    404: "{repo} is not there, or not for this token: was it deleted or renamed meanwhile?",
    409: "{repo} was changed by someone else meanwhile: look at what it holds now, then run the command again",
    413: "a file is too large for it",
    429: "too many requests: wait some minutes and run the command again",
}
MEANINGS[412] = MEANINGS[409]
FAILS = "it fails: run the command again later (https://status.huggingface.co)"
NO_TOKEN = "the Hub needs to know who you are: set HF_TOKEN, or run `hf auth login`; a token is made at {tokens}"


class PassingError(Exception):
    """The Hub was busy, failed or gave no answer; another time may do."""

    def __init__(self, status: int | None, said: str, seconds: float | None = None):
        super().__init__(said)
        self.status, self.said, self.seconds = status, said, seconds


def waits(seconds: float, first: float = 1.0, longest: float = 30.0) -> list[float]:
    """Pauses before further attempts, each twice the last, until `seconds` are used up."""
    pauses: list[float] = []
    while sum(pauses) + first <= seconds:
        pauses.append(first)
        first = min(2 * first, longest)
    return pauses


@contextlib.contextmanager
def client() -> Iterator[HfApi]:
    """The Hub's client for the calls inside: requests have time limits, and what may pass by is a PassingError.

    Raises HubError where there is no token, and NoHubError in offline mode. The library's warnings are silent
    meanwhile: they quote addresses that carry signatures.
    """
    import huggingface_hub as library
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils import logging

    if is_offline_mode():
        raise NoHubError(f"{endpoint()}: not asked, as HF_HUB_OFFLINE is set; unset it to publish")
    token = library.get_token()
    if not token:
        raise HubError(NO_TOKEN.format(tokens=_tokens()))
    usual = library.get_session()
    kind, hooks, limits = type(usual), usual.event_hooks, type(usual.timeout)
    patient = type("Client", (_Impatient, kind), {})
    options: dict[str, Any] = {"event_hooks": hooks, "follow_redirects": True}
    level = logging.get_verbosity()
    library.set_client_factory(lambda: patient(timeout=limits(ANSWER, connect=CONNECT), **options))
    logging.set_verbosity_error()
    try:
        yield library.HfApi(token=token)
    finally:
        logging.set_verbosity(level)
        library.set_client_factory(lambda: kind(timeout=None, **options))  # as the library makes it


class _Impatient:
    """Mixed into the library's HTTP client: no answer, a busy Hub or a failing one end the attempt at once."""

    def send(self, request: Any, **options: Any) -> Any:
        from huggingface_hub import errors

        try:
            response = super().send(request, **options)  # type: ignore[misc]
            if response.status_code == 429 or response.status_code >= 500:
                response.read()
        except errors.HTTPError as error:
            raise PassingError(None, str(error) or type(error).__name__) from None
        if response.status_code == 429 or response.status_code >= 500:
            raise PassingError(response.status_code, _said(response), _asked(response))
        return response


def patiently(action: Callable[[], T], pauses: Sequence[float], repo: str) -> T:
    """What `action` returns, tried again after each of `pauses` while its failure may pass; else HubError."""
    for attempt, pause in enumerate((*pauses, None), start=1):
        try:
            return action()
        except Exception as error:
            failed = explain(error, repo)
            passing = _passing(error)
            if failed is None:  # none of the Hub's
                raise
            if passing is None or pause is None or (passing.seconds or 0) > LONGEST:
                tried = f" (tried {attempt} times)" if attempt > 1 else ""
                raise type(failed)(f"{failed}{tried}") from None
            pause = max(pause, passing.seconds or 0)
            print(redact(f"publish: {failed}; trying again in {pause:.0f} s"), flush=True)
            time.sleep(pause)
    raise AssertionError("unreachable")


def explain(error: BaseException, repo: str) -> HubError | ConfigError | None:
    """What a failure of a call in `client` means, in one line; None for one that isn't the Hub's."""
    from huggingface_hub import errors

    known = _within(error, (HubError, ConfigError))
    if known is not None:
        return known
    passing = _passing(error)
    if passing is not None and passing.status is None:
        return NoHubError(f"{endpoint()}: can't be reached ({passing.said}): check the network, then run this again")
    answered = _within(error, errors.HfHubHTTPError)
    if passing is not None or answered is not None:
        status = int(passing.status or 0) if passing else int(answered.response.status_code)
        said = passing.said if passing else _said(answered)
        meaning = MEANINGS.get(status, FAILS if status >= 500 else "it refuses")
        said = f" ({said})" if said else ""
        return HubError(f"{endpoint()}: {status}: {meaning.format(repo=repo, tokens=_tokens())}{said}")
    # What huggingface_hub and hf_xet raise over an answer that they can't use, or an upload that failed.
    if isinstance(error, ValueError | RuntimeError | KeyError | OSError):
        return HubError(f"{endpoint()}: the upload failed: {_one_line(str(error) or repr(error))}; run this again")
    return None


def _passing(error: BaseException) -> PassingError | None:
    """What may pass by in a failure: an attempt of ours that ended, or a line that hf_xet, which has its own, lost."""
    found = _within(error, PassingError)
    if found is None and (lost := _within(error, (ConnectionError, TimeoutError))) is not None:
        found = PassingError(None, _one_line(str(lost)) or type(lost).__name__)
    return found


def _within(error: BaseException | None, kind: Any) -> Any:
    """The first of `kind` among an error and what caused it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _said(answer: Any) -> str:
    """The Hub's own words, from a response or an error that holds one: one line of the header or of a JSON body."""
    response = getattr(answer, "response", answer)
    words = response.headers.get("X-Error-Message")
    if not words:
        try:
            body = response.json()
            words = body.get("error") if isinstance(body, dict) else None
        except (ValueError, RuntimeError):  # no JSON, or not read
            words = None
    return _one_line(str(words)) if words else ""


def _one_line(text: str, most: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _asked(response: Any) -> float | None:
    """Seconds that the Hub asks to wait: Retry-After in seconds, or t= of its RateLimit header where none are left."""
    from huggingface_hub.utils import parse_ratelimit_headers

    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def endpoint() -> str:
    """The address of the Hub (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _tokens() -> str:
    return f"{endpoint()}/settings/tokens"


def check_access(api: HfApi, repo: str) -> str:
    """Whose token it is; ConfigError when the repository's owner is someone else, HubError when it may not write."""
    me = api.whoami()
    name, owner = str(me.get("name")), repo.partition("/")[0]
    roles = {str(org.get("name")).casefold(): str(org.get("roleInOrg", "write")) for org in me.get("orgs") or []}
    roles[name.casefold()] = "admin"
    role = roles.get(owner.casefold())
    if "/" not in repo or role is None:
        places = ", ".join(sorted((org["name"] for org in me.get("orgs") or []), key=str))
        also = f" or to one of {places}" if places else ""
        whose = "has no owner" if "/" not in repo else "isn't yours"
        named = repo.rpartition("/")[2]
        raise ConfigError(
            f"publish.repo: {repo!r} {whose}: this token writes to {name}{also}; set it to {name}/{named}"
        )
    token = (me.get("auth") or {}).get("accessToken") or {}
    if role not in MAY_CREATE:
        raise HubError(
            f"{endpoint()}: {name} may only read in {owner}; ask for write access, or set another publish.repo"
        )
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not _covers(token, owner, repo)):
        called = token.get("displayName")
        raise HubError(
            f"{endpoint()}: the token{f' {called!r}' if called else ''} of {name} may not write to {repo}: "
            f"give it write access to repositories of {owner} at {_tokens()}"
        )
    return name


def _covers(token: dict[str, Any], owner: str, repo: str) -> bool:
    """Whether a fine-grained token may write to a repository: by itself, or to all of its owner's."""
    fine = token.get("fineGrained") or {}
    if "repo.write" in (fine.get("global") or []):
        return True
    places = {owner.casefold(), repo.casefold()}
    return any(
        "repo.write" in (scope.get("permissions") or [])
        and str((scope.get("entity") or {}).get("name")).casefold() in places
        for scope in fine.get("scoped") or []
    )


@dataclass(frozen=True)
class Remote:
    """One commit of a repository."""

    commit: str
    private: bool
    files: dict[str, tuple[str, str]]
    """By path ("sha256", digest of the content) of large files, ("git", id of the blob) of others."""


def look(api: HfApi, repo: str, revision: str | None = None) -> Remote | None:
    """What a revision of a repository holds; None where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # the library takes a 401 for it
            raise
        return None
    found = {
        file.rfilename: ("sha256", file.lfs.sha256) if file.lfs else ("git", str(file.blob_id))
        for file in info.siblings or []
    }
    return Remote(str(info.sha), bool(info.private), found)
