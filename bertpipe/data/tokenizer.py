"""The tokenizer stage: train a WordPiece vocabulary (as in Devlin et al. 2019), or adopt a tokenizer and extend it.

    tokenizer.json, tokenizer_config.json    what `AutoTokenizer.from_pretrained(folder)` loads
    vocab.txt                                one piece a line, in id order (WordPiece only)
    report.json                              what it does to text it was not trained on (tokenizer_report.py)

The same corpus and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe import outside
from bertpipe.artifact import identify_files, write_json, writing
from bertpipe.config import Config, TokenizerConfig
from bertpipe.data.corpus import read_documents
from bertpipe.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In BERT's order: ids 0 to 4 of a trained vocabulary."""
SPECIAL_NAMES = ("pad", "unk", "cls", "sep", "mask")
CONTINUING = "##"
HUB_ID = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
REPORT_BYTES = 2_000_000
"""Text the report is measured on, in UTF-8 bytes at most."""
FEED_CHARACTERS = 10_000
"""`tokenizers` holds hundreds of texts at once, so long ones are fed in pieces of about this size."""
SAMPLE_BUCKETS = 1 << 16

Texts = Callable[[], Iterator[str]]


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Fill `out` with the tokenizer and its report; `inputs["corpus"]` is the corpus artifact.

    Raises DataError for a corpus without text or a malformed vocab.txt, ConfigError when `adopt` names nothing usable.
    """
    from bertpipe.data.new_words import add_words
    from bertpipe.data.tokenizer_report import compare, measure

    settings, corpus = cfg.tokenizer, inputs["corpus"]
    if settings.adopt is None:
        texts = draw_sample(corpus, "train", settings.sample_bytes, settings.seed)
        vocabulary = train_vocabulary(texts, settings, cfg.runtime.progress and sys.stderr.isatty())
        tokenizer = _bert_tokenizer(vocabulary, settings)
    else:
        tokenizer = adopt(settings)
    save(tokenizer, out)
    split = "holdout" if any(True for _ in read_documents(corpus, "holdout")) else "train"
    sample = draw_sample(corpus, split, REPORT_BYTES, settings.seed)
    report = measure(out, sample(), settings.model_max_length)
    if settings.add_tokens:
        words = add_words(tokenizer, draw_sample(corpus, "train", settings.sample_bytes, settings.seed)(), settings)
        save(tokenizer, out)
        report = compare(report, measure(out, sample(), settings.model_max_length), words, settings.add_tokens)
        counts["added_words"] = len(words)
    report = {"trained": settings.adopt is None, "measured_on": split, **report}
    for warning in report["warnings"]:
        print(f"warning: tokenizer: {warning}", file=sys.stderr)
    write_json(out / "report.json", report)
    names = ("vocab_size", "tokens_per_word", "characters_per_token", "unknown_rate", "measured_on", "warnings")
    counts.update({name: report[name] for name in names})


# --- the sample -------------------------------------------------------------------------------------------------------


def draw_sample(corpus: Path, split: str, max_bytes: int, seed: int) -> Texts:
    """A seeded sample of a split's documents; returns a function that reads it, once more at each call.

    One pass finds the keyed-hash threshold at which the documents below it reach `max_bytes` of UTF-8, so no more than
    a histogram is held; then documents come in corpus order. The one that meets the budget is cut at white space.
    """
    sizes = np.zeros(SAMPLE_BUCKETS, np.int64)
    for identity, text in read_documents(corpus, split, ("id", "text")):
        sizes[_bucket(identity, seed)] += len(text.encode())
    running = np.cumsum(sizes)
    last = int(np.searchsorted(running, max_bytes, side="right"))  # the bucket that may be taken in part

    def read() -> Iterator[str]:
        room = max_bytes - (int(running[last - 1]) if last else 0)
        for identity, text in read_documents(corpus, split, ("id", "text")):
            bucket = _bucket(identity, seed)
            if bucket == last:
                text = _cut_bytes(text, room)
                room -= len(text.encode())
            if bucket <= last and text:
                yield text

    return read


def _bucket(identity: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {identity}".encode(), digest_size=2).digest(), "little")


def _cut_bytes(text: str, max_bytes: int) -> str:
    """The beginning of `text`, at most `max_bytes` of UTF-8, ending before white space where it can."""
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    short = data[:max_bytes].decode(errors="ignore")
    if not text[len(short)].isspace():
        short = re.sub(r"(?<=\s)\S+\Z", "", short)
    return short


def split_long(text: str, characters: int = FEED_CHARACTERS) -> Iterator[str]:
    """`text` in pieces of at most `characters`, cut after white space wherever there is any."""
    start = 0
    while len(text) - start > characters:
        end = max(text.rfind(" ", start, start + characters), text.rfind("\n", start, start + characters)) + 1
        end = end if end > start else start + characters
        yield text[start:end]
        start = end
    yield text[start:]


# --- training ---------------------------------------------------------------------------------------------------------


def train_vocabulary(texts: Texts, settings: TokenizerConfig, show_progress: bool = False) -> list[str]:
    """WordPiece pieces in id order: special tokens, characters, continuing characters ("##c"), then merges.

    The trainer of `tokenizers` numbers the continuing characters, and cuts the alphabet, in the order of a hash table
    that is seeded anew in every process, and breaks ties between merges by those numbers: two runs differ. So a first
    pass lists and counts the characters, and the second is given them in a fixed order.
    """
    counts: Counter[str] = Counter()
    found = set(_train(_counting(texts(), counts), settings, vocab_size=0))
    if not found:
        raise DataError("the corpus has no text to train a tokenizer on; see corpus.sources")
    normalizer = _normalizer(settings)
    frequencies: Counter[str] = Counter()
    for raw, count in counts.items():
        for character in normalizer.normalize_str(raw):  # BERT's normalisation works character by character
            frequencies[character] += count
    alphabet: list[str] = []
    room = settings.vocab_size - len(SPECIAL_TOKENS)
    by_frequency = sorted((c for c in found if len(c) == 1), key=lambda c: (-frequencies[c], c))
    for character in by_frequency[: settings.limit_alphabet]:
        room -= 1 + (CONTINUING + character in found)
        if room < 0:  # else the trainer would go beyond `vocab_size`
            break
        alphabet.append(character)
    alphabet.sort()
    continuing = [CONTINUING + c for c in alphabet if CONTINUING + c in found]
    pieces = _train(
        texts(),
        settings,
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=show_progress,
    )
    merges = pieces[len(SPECIAL_TOKENS) + len(continuing) + len(alphabet) :]
    return [*SPECIAL_TOKENS, *alphabet, *continuing, *merges]


def _normalizer(settings: TokenizerConfig) -> Any:
    from tokenizers.normalizers import BertNormalizer

    return BertNormalizer(lowercase=settings.lowercase, strip_accents=settings.strip_accents)


def _train(texts: Iterator[str], settings: TokenizerConfig, **options: Any) -> list[str]:
    """Run the trainer of `tokenizers` once; pieces in its id order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = _normalizer(settings)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = (piece for text in texts for piece in split_long(text))
    tokenizer.train_from_iterator(pieces, trainers.WordPieceTrainer(**{"show_progress": False, **options}))
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _counting(texts: Iterator[str], counts: Counter[str]) -> Iterator[str]:
    for text in texts:
        counts.update(text)
        yield text


def _bert_tokenizer(pieces: list[str], settings: TokenizerConfig) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        do_lower_case=settings.lowercase,
        strip_accents=settings.strip_accents,
        model_max_length=settings.model_max_length,
    )


# --- adopting ---------------------------------------------------------------------------------------------------------


def identify(config: TokenizerConfig, cache: Path | None) -> dict[str, Any]:
    """Content identity of an adopted tokenizer for the fingerprint: hashes of its files, or a Hub id and its revision.

    Empty when training. Raises ConfigError when `adopt` is neither a path that exists nor the form of a Hub id, and for
    `add_tokens` without it.
    """
    if config.adopt is None:
        if config.add_tokens:
            raise ConfigError("tokenizer.add_tokens: adds to an adopted tokenizer; set tokenizer.adopt, or vocab_size")
        return {}
    kind, path = _kind(config.adopt)
    if kind == "hub":
        return {"hub": config.adopt, "revision": _revision(config.adopt)}
    files = [path] if kind == "vocabulary" else sorted({f for glob in TOKENIZER_FILES for f in path.glob(glob)})
    return {kind: identify_files(files, cache)}


def _kind(name: str) -> tuple[str, Path]:
    path = Path(name)
    if path.is_file():
        return "vocabulary", path
    if path.is_dir():
        return "folder", path
    if HUB_ID.fullmatch(name):
        return "hub", path
    raise ConfigError(f"tokenizer.adopt: {name} is no file, no folder and no Hub id; give one of the three")


def _revision(name: str) -> str | None:
    """Commit of a Hub tokenizer: of the local copy if there is one, else asked for; None without a network."""
    import httpx2
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    local = try_to_load_from_cache(name, "tokenizer_config.json")
    if isinstance(local, str):
        return Path(local).parent.name
    try:
        return HfApi().model_info(name, timeout=10).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, OSError):
        return None


def adopt(settings: TokenizerConfig) -> Any:
    """Load the tokenizer that `settings.adopt` names, as a `transformers` tokenizer; ConfigError when it can't be used.

    `lowercase` and `strip_accents` apply to a bare vocab.txt alone: the others bring their own.
    """
    from transformers import AutoTokenizer

    assert settings.adopt is not None
    kind, path = _kind(settings.adopt)
    if kind == "vocabulary":
        return _bert_tokenizer(read_vocabulary(path), settings)
    where, revision = (str(path), None) if kind == "folder" else (settings.adopt, _revision(settings.adopt))
    outside.check(where, "tokenizer.adopt", revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"tokenizer.adopt: no tokenizer could be loaded from {settings.adopt}: {reason}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer.adopt: {settings.adopt} has no tokenizer.json (a `fast` tokenizer); convert it")
    missing = [name for name in SPECIAL_NAMES if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise ConfigError(f"tokenizer.adopt: {settings.adopt} has no {', '.join(missing)} token, which BERT needs")
    tokenizer.model_max_length = settings.model_max_length
    return tokenizer


def read_vocabulary(path: Path) -> list[str]:
    """Pieces of a vocab.txt, one a line, id = line number from 0; DataError naming the line that is wrong."""
    pieces: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().rstrip(b"\r\n").split(b"\n"), start=1):
        try:
            piece = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from None
        if not piece or piece in seen:
            problem = f"{piece!r} stands in line {seen[piece]} already" if piece else "empty"
            raise DataError(f"{path}, line {number}: {problem}; a vocabulary has one piece a line, each once")
        seen[piece] = number
        pieces.append(piece)
    missing = [token for token in SPECIAL_TOKENS if token not in seen]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; add each as a line of its own")
    return pieces


# --- the folder -------------------------------------------------------------------------------------------------------


def save(tokenizer: Any, folder: Path) -> None:
    """Write a `transformers` tokenizer as stock files, with vocab.txt beside them where it is WordPiece."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # published tokenizers may carry both, which would cut or fill every document
    backend.no_padding()
    with writing(folder):
        tokenizer.save_pretrained(folder)
    pieces = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if type(backend.model).__name__ == "WordPiece" and [number for _, number in pieces] == list(range(len(pieces))):
        data = "".join(f"{piece}\n" for piece, _ in pieces).encode()
        with writing(folder / "vocab.txt", len(data)):
            (folder / "vocab.txt").write_bytes(data)


def load(folder: Path) -> Tokenizer:
    """The bare tokenizer of a tokenizer artifact, for encoding documents: "[SEP]" in a text is text, not a separator.

    Raises ArtifactError when it can't be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{path}: not there; make it with `bertpipe tokenizer`")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ArtifactError(f"{path}: not readable ({error}); delete the folder, run `bertpipe tokenizer`") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_special_ids(folder: Path) -> tuple[dict[str, int], list[int]]:
    """Ids of pad, unk, cls, sep and mask, and of every special token (sorted), of a tokenizer artifact."""
    tokenizer = load(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named: dict[str, int] = {}
    for name in SPECIAL_NAMES:
        token = settings.get(f"{name}_token")
        number = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else str(token))
        if number is None:
            raise ArtifactError(f"{folder}: its tokenizer has no {name} token; run `bertpipe tokenizer` again")
        named[name] = number
    added = tokenizer.get_added_tokens_decoder()
    return named, sorted({*named.values(), *(number for number, token in added.items() if token.special)})
