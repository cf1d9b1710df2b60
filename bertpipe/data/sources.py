"""Where text comes from: one row of SOURCES a kind of `corpus.sources` entry.

A source lists its *parts* (an input file, a shard of a Hub data set, a file with docstrings), reads one part into
documents, and says in a few values what its content is a function of. Parts are gathered into units of work.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bertpipe.artifact import identify_files
from bertpipe.config import CorpusConfig, listed
from bertpipe.data import docstrings
from bertpipe.data.readers import FORMATS, Bad, Document, read_file, split_name
from bertpipe.errors import DataError

UNIT_BYTES = 4 << 20
"""Small parts are read together, up to this many bytes on disk, so that a million small files make no million units."""


class Part(NamedTuple):
    """A piece of a source: what its reader needs to find it, and its bytes on disk (0 when not known)."""

    place: Any
    bytes: int


class Unit(NamedTuple):
    """Parts of one source that one worker reads in one go."""

    source: int
    """Index in the list of sources."""
    spec: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0].place}{more}"


class Source(NamedTuple):
    """One kind of source."""

    accepts: Callable[[str], bool]
    """Whether an entry of corpus.sources is of this kind."""
    parts: Callable[[str, CorpusConfig], list[Part]]
    """Its parts in order. Raises DataError when there are none."""
    read: Callable[[Any, CorpusConfig], Iterator[Document | Bad]]
    """Documents and bad records of one part, by its place."""
    identify: Callable[[str, Path | None], dict]
    """What its content is a function of; the path is a cache of file hashes."""
    lenient: bool = False
    """Bad records are always counted and passed over, as they are no fault of the user's."""


def list_specs(config: CorpusConfig) -> list[str]:
    """The entries of corpus.sources."""
    specs = listed(config.sources)
    if not specs:
        raise DataError(f"corpus.sources is empty; name {_CHOICES}")
    return specs


def source_of(spec: str) -> Source:
    """The row of SOURCES that an entry of corpus.sources belongs to: the first that accepts it."""
    return next(source for source in SOURCES.values() if source.accepts(spec))


def list_units(config: CorpusConfig) -> list[Unit]:
    """All units of work, in source order."""
    units = []
    for index, spec in enumerate(list_specs(config)):
        gathered: list[Part] = []
        size = 0
        for part in source_of(spec).parts(spec, config):
            if gathered and (part.bytes == 0 or size + part.bytes > UNIT_BYTES):
                units.append(Unit(index, spec, tuple(gathered)))
                gathered, size = [], 0
            gathered.append(part)
            size += part.bytes
        if gathered:
            units.append(Unit(index, spec, tuple(gathered)))
    return units


# --- files ------------------------------------------------------------------------------------------------------------


def list_files(spec: str) -> list[Path]:
    """Files that a glob matches, sorted. DataError when there is none, or one of a kind that isn't read."""
    # A file whose name holds glob characters is meant literally when it is there.
    matches = [spec] if Path(spec).is_file() else glob.glob(spec, recursive=True)  # noqa: PTH207 (absolute too)
    paths = [Path(match) for match in sorted(matches) if not Path(match).is_dir()]
    if not paths:
        endings = ", ".join(FORMATS)
        what = "is a folder" if Path(spec).is_dir() else "matches no file"
        example = f", such as '{spec}/*.txt'" if Path(spec).is_dir() else ""
        raise DataError(f"corpus.sources: {spec!r} {what}; give {_CHOICES}{example} ({endings})")
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path}: not a regular file (a pipe, a device or a dangling link); leave it out of {spec!r}"
            )
        split_name(path)
    return paths


def _file_parts(spec: str, config: CorpusConfig) -> list[Part]:
    # An empty file still has to be a part of known size, hence the 1.
    return [Part(path, max(1, path.stat().st_size)) for path in list_files(spec)]


def _identify_files(spec: str, cache: Path | None) -> dict:
    return {"files": identify_files(list_files(spec), cache)}


# --- docstrings -------------------------------------------------------------------------------------------------------


def _docs_parts(spec: str, config: CorpusConfig) -> list[Part]:
    return [Part(file, max(1, file.bytes)) for file in docstrings.list_files()]


def _read_docs(file: docstrings.SourceFile, config: CorpusConfig) -> Iterator[Document | Bad]:
    texts = docstrings.parse_file(file.path)
    if texts is None:
        yield Bad(f"{file.name}: not Python that this version parses")
        return
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            yield Bad(f"{file.name}: docstring {number}: half a character (lone surrogate)")
        else:
            yield Document(text, file.name, group=file.name)


def _identify_docs(spec: str, cache: Path | None) -> dict:
    return {"docs": docstrings.identify()}


# --- Hub data sets ----------------------------------------------------------------------------------------------------


class HubShard(NamedTuple):
    """Shard `number` of `num_shards` of a data set's stream."""

    name: str
    config: str | None
    split: str
    revision: str | None
    number: int
    num_shards: int

    def __str__(self) -> str:
        return f"hub:{self.name} ({self.split}, shard {self.number} of {self.num_shards})"


def parse_hub(spec: str) -> tuple[str, str | None, str, str | None]:
    """(name, config or None, split, revision or None) of `hub:NAME[@REVISION][:CONFIG[:SPLIT]]`."""
    name, *rest = spec.removeprefix("hub:").split(":")
    name, _, revision = name.partition("@")
    if not name or len(rest) > 2:
        raise DataError(f"corpus.sources: {spec!r} is not hub:NAME[@REVISION][:CONFIG[:SPLIT]]")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train", revision or None


def _resolve_revision(name: str, revision: str | None) -> str | None:
    """The commit that `revision` (None: the newest) stands for; as given when the Hub can't be asked."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if Path(name).is_dir():
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx2.HTTPError, OSError):
        return revision  # loading it will say what is wrong


def _stream(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # of many kinds: no such name, config or split, no network, no access
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"corpus.sources: hub:{name}: the data set can't be opened ({reason})") from None


def _hub_parts(spec: str, config: CorpusConfig) -> list[Part]:
    name, subset, split, revision = parse_hub(spec)
    revision = _resolve_revision(name, revision)
    num_shards = _stream(name, subset, split, revision).num_shards
    return [Part(HubShard(name, subset, split, revision, number, num_shards), 0) for number in range(num_shards)]


def _read_hub(shard: HubShard, config: CorpusConfig) -> Iterator[Document | Bad]:
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else every closed stream sleeps 5 s
    stream = _stream(shard.name, shard.config, shard.split, shard.revision)
    key = config.text_key
    if shard.num_shards > 1:
        stream = stream.shard(num_shards=shard.num_shards, index=shard.number)
    try:
        for row, record in enumerate(stream):
            text = record.get(key)
            if isinstance(text, str):
                yield Document(text, shard.name)
            else:
                what = f"is {type(text).__name__}" if key in record else f"is missing; there are {sorted(record)}"
                yield Bad(f"{shard}: row {row}: the text under {key!r} (corpus.text_key) {what}, not a string")
    except Exception as error:  # the network, or a damaged file behind it: not a bad record, so never just counted
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"{shard}: reading stopped ({reason}); finished shards are kept: run again") from None


def _identify_hub(spec: str, cache: Path | None) -> dict:
    name, subset, split, revision = parse_hub(spec)
    identity: dict[str, Any] = {
        "hub": name,
        "config": subset,
        "split": split,
        "revision": _resolve_revision(name, revision),
    }
    if Path(name).is_dir():  # a data set in a local folder
        identity["files"] = identify_files((path for path in sorted(Path(name).rglob("*")) if path.is_file()), cache)
    return identity


_CHOICES = "a glob of files, hub:NAME[:CONFIG[:SPLIT]], or docs"

SOURCES: dict[str, Source] = {
    "docs": Source(lambda spec: spec == "docs", _docs_parts, _read_docs, _identify_docs, lenient=True),
    "hub": Source(lambda spec: spec.startswith("hub:"), _hub_parts, _read_hub, _identify_hub),
    "files": Source(lambda spec: True, _file_parts, read_file, _identify_files),
}
