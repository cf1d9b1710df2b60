"""The tokenizer explorer: what a page needs to cut a sentence as a BERT WordPiece tokenizer does (explorer.js).

Which characters count as control, white space, marks or punctuation is asked of the `tokenizers` library itself, whose
tables are of an older Unicode than a browser's; so the page cuts as the library does, in any browser.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from bertpipe.downstream.reporting.record import read_json

PRIVATE = ("\ue000", "\uf8ff"), ("\U000f0000", "\U000ffffd"), ("\U00100000", "\U0010fffd")
"""The private use areas, whose characters are all alike."""


def explorer(folder: Path) -> dict[str, Any]:
    """What the tokenizer.json in `folder` is made of, as JSON; or {"reason"} where the page can't do the same.
    ArtifactError when it can't be read.

    `vocabulary` has the pieces in the order of their ids, `added` the added tokens that are looked for before
    normalization, `added_after` those after it, as they are then.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {"reason": "there is no tokenizer.json"}
    parts = read_json(path)
    model, cleaner, cutter = (parts.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
    kinds = (model.get("type"), cleaner.get("type"), cutter.get("type"))
    if kinds != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        names = ", ".join(kind or "nothing" for kind in kinds)
        return {"reason": f"it cuts as BERT's WordPiece does, and this tokenizer is another kind ({names})"}
    added = parts.get("added_tokens") or []
    if any(token.get(key) for token in added for key in ("single_word", "lstrip", "rstrip")):
        return {"reason": "some of this tokenizer's added tokens take the white space around them"}
    from tokenizers import Tokenizer

    normalize = Tokenizer.from_file(str(path)).normalizer.normalize_str
    lowercase = cleaner["lowercase"]
    strip = cleaner.get("strip_accents")
    return {
        "vocabulary": sorted(model["vocab"], key=model["vocab"].__getitem__),
        "prefix": model["continuing_subword_prefix"],
        "unknown": model["unk_token"],
        "longest": model["max_input_chars_per_word"],
        "added": [one["content"] for one in added if not one["normalized"]],
        "added_after": [normalize(one["content"]) for one in added if one["normalized"]],
        "lowercase": lowercase,
        "strip_accents": lowercase if strip is None else strip,
        "clean_text": cleaner["clean_text"],
        "handle_chinese_chars": cleaner["handle_chinese_chars"],
        "characters": characters(),
    }


@cache
def characters() -> dict[str, list[int]]:
    """Ranges of code points, first and last in turn, that the library takes for control, white space, nonspacing marks
    and punctuation."""
    from tokenizers import normalizers, pre_tokenizers

    plain = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    clean = normalizers.BertNormalizer(**plain | {"clean_text": True}).normalize_str
    strip = normalizers.BertNormalizer(**plain | {"strip_accents": True}).normalize_str
    cut = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    asked = [chr(code) for code in range(sys.maxunicode + 1) if _may_be_special(chr(code))]
    kinds: dict[str, list[int]] = {"control": [], "space": [], "mark": [], "punctuation": []}
    for one in asked:
        code, pieces = ord(one), len(cut(f"x{one}x"))
        if pieces > 1:
            kinds["punctuation" if pieces == 3 else "space"].append(code)
        if clean(one) == "":
            kinds["control"].append(code)
        if strip(one) == "":
            kinds["mark"].append(code)
    ranges = {kind: _ranges(codes) for kind, codes in kinds.items()}
    if clean(PRIVATE[0][0]) == "":
        ranges["control"] += [ord(end) for area in PRIVATE for end in area]
    return ranges


def _may_be_special(one: str) -> bool:
    """Whether a character is none of a letter, digit or unassigned one."""
    kind = unicodedata.category(one)
    return kind[0] in "CMPSZ" and kind not in ("Cn", "Co", "Cs")


def _ranges(codes: list[int]) -> list[int]:
    """First and last of each run of neighbours among ascending code points."""
    out: list[int] = []
    for code in codes:
        if out and out[-1] == code - 1:
            out[-1] = code
        else:
            out += [code, code]
    return out
