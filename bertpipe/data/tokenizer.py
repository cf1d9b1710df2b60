"""The tokenizer stage: train a WordPiece vocabulary (BERT's, Devlin et al. 2019) or adopt a tokenizer.

Leaves a folder that `AutoTokenizer.from_pretrained` loads, vocab.txt beside it, and report.json: what the tokenizer
does to text it was not trained on. The same corpus and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.artifact import identify_files, write_json
from bertpipe.config import Config, TokenizerConfig
from bertpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In BERT's order: ids 0 to 4 of a trained vocabulary."""
CONTINUING = "##"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
REPORT_BYTES = 2_000_000
FEED_CHARACTERS = 10_000
"""`tokenizers` holds hundreds of texts at once, so long documents are fed in pieces of about this size."""
SAMPLE_BUCKETS = 1 << 16

Texts = Callable[[], Iterator[str]]


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict) -> None:
    """Fill `out` with the tokenizer and its report; `inputs["corpus"]` is the corpus artifact.

    Raises DataError on a corpus without text or a malformed vocab.txt, ConfigError when `adopt` names nothing usable.
    """
    from bertpipe.data.tokenizer_report import measure

    settings, corpus = cfg.tokenizer, inputs["corpus"]
    if settings.adopt is None:
        texts = sample(corpus, "train", settings.sample_bytes, settings.seed)
        tokenizer = _bert_tokenizer(train_vocabulary(texts, settings), settings)
    else:
        tokenizer = adopt(settings)
    save(tokenizer, out)
    held_out = any(True for _ in _row_groups(corpus, "holdout"))
    report = measure(load(out), sample(corpus, "holdout" if held_out else "train", REPORT_BYTES, settings.seed))
    report = {"trained": settings.adopt is None, "measured_on": "holdout" if held_out else "train", **report}
    for warning in report["warnings"]:
        print(f"warning: tokenizer: {warning}", file=sys.stderr)
    write_json(out / "report.json", report)
    names = ("vocab_size", "tokens_per_word", "characters_per_token", "unknown_rate", "measured_on", "warnings")
    counts.update({name: report[name] for name in names})
