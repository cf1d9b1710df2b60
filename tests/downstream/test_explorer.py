"""The tokenizer explorer cuts as the tokenizer does: its own JavaScript, in a browser, beside `tokenizers`."""

import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bertpipe.downstream.reporting import pages
from bertpipe.downstream.reporting.explorer import characters, explorer
from tests.browser import chromium, opened

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "",
    " \t\n\r ",
    "The animal didn't cross the street because it was too tired.",
    "naïve café — Ångström, ÀÉÎÕÜ àéîõü, İstanbul ıI, ẞß, Ǆ ǆ, ﬁne ﬂy",
    "e\u0301 e\u0323\u0301 \u0301alone o\u0308\u0304\u0327 \u1e69 \u0344 ṩ",
    "ΟΔΥΣΣΕΥΣ Σίσυφος ὈΔΥΣΣΕΎΣ ᾳᾼ ϓ",
    "Съешь ещё этих мягких французских булок, Йод, Ёж",
    "שָׁלוֹם עוֹלָם וְיָפֶה",
    "السَّلامُ عَلَيْكُم ورحمة الله ﷺ",
    "हिन्दी में किताब पढ़ता है। क़लम",
    "ภาษาไทยไม่มีช่องว่าง น้ำ",
    "中文字符和English混排，日本語のカタカナとひらがな、ガギグ、한국어도요。㐀𠀀𪜀豈\u2f800",
    "각 값 힣 ᄀ\u1161\u11a8",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🫠🪿 ☺️ ❤️‍🔥 ©®™",
    "a\u0000b\u0001c\u0007d\u000be\u000cf\u0085g\u00adh\u200bi\u200dj\u2028k\u2029l\ufeffm\ufffdn\ue000o\U0010fffdp",
    "a\u00a0b\u1680c\u2003d\u202fe\u205ff\u3000g\u180eh",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101,
    "𝒳" * 100 + " " + "𝒳" * 101,
    "[MASK] [mask] [MASK][MASK]x[MASK] [MAS K] [[MASK]] [UNK] [CLS] ##ing # #",
    "<script>alert('x')</script> <b>bold</b> &lt;&amp; </textarea> {{7*7}} ${1} `tick` \\u{41} \\d+ (a|b)*",
    "$1.50+2=3.50 ~^`|<>=_@#%& ¡¿«»„“”‘’–—…·§¶†‡•‰′″‹›※⁂ ٪؟، 。「」『』",
    "snake_case camelCase kebab-case 3.14159 1,000,000 １２３ Ⅻ ½ ² ₂ ∑∞≈ ← ⇒ € £",
    "ÅÅÅ Å\u212b Ω\u2126 K\u212a ﬀ ŉ ǰ ΐ ΰ և ẖ ẘ",
    "\U00011938 \U000105c9 \U000113c5 𑄮 𑇏 𝅗𝅥 \U0001d15f ཱི ಕೀ ொ",
    "PyTorch numpyNUMPY Größe extra token EXTRA TOKEN extra  token café au lait CAFÉ AU LAIT",
]


def drawn(count: int) -> list[str]:
    """More, put together at random from what the others hold."""
    draw, pool = random.Random(0), [part for sentence in SENTENCES for part in sentence]
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    return [
        "".join(draw.choice(pool if draw.random() < 0.5 else words) + draw.choice(["", " "]) for _ in range(30))
        for _ in range(count)
    ]


TEXTS = SENTENCES + drawn(80)
SETTINGS = {
    "uncased": {},
    "cased": {"lowercase": False},
    "lower, accents kept": {"strip_accents": False},
    "cased, accents stripped": {"lowercase": False, "strip_accents": True},
    "raw": {"clean_text": False, "handle_chinese_chars": False},
}


def write_tokenizer(path: Path, settings: dict) -> Tokenizer:
    """A WordPiece tokenizer that has most characters of TEXTS, some of their words and added tokens of both kinds."""
    normalizer, cutter = normalizers.BertNormalizer(**settings), pre_tokenizers.BertPreTokenizer()
    words = {word for text in TEXTS for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = sorted({letter for word in words for letter in word})
    kept = [letter for number, letter in enumerate(letters) if number % 7]
    some = sorted(word for word in words if 1 < len(word) < 40)[::3]
    pieces = [*SPECIAL, *kept, *(f"##{x}" for x in kept), *some, *(f"##{word[1:]}" for word in some[::2])]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cutter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("extra token", normalized=True), AddedToken("Café au", normalized=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def write_page(folder: Path) -> Path:
    """The explorer alone, as page.html.jinja has it."""
    data = json.dumps(explorer(folder)).replace("<", "\\u003c")
    page = f"""<!doctype html><meta charset="utf-8"><textarea id="explorer-text"></textarea>
        <p id="explorer-count"></p><p id="explorer-pieces"></p>
        <script type="application/json" id="explorer-data">{data}</script>
        <script>{(pages.TEMPLATES / "explorer.js").read_text(encoding="utf-8")}</script>"""
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


CUT = "texts => texts.map(text => document.getElementById('explorer-text').tokenize(text).flat())"


@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_are_those_of_the_tokenizer(browser, tmp_path, name):
    tokenizer = write_tokenizer(tmp_path, SETTINGS[name])
    singles = [chr(code) for code in range(0x3100) if not 0xD800 <= code < 0xE000]
    texts = [*TEXTS, *([" ".join(f"x{one}x" for one in singles)] if name in ("uncased", "raw") else [])]
    expected = [encoded.tokens for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
    with opened(browser, write_page(tmp_path)) as found:
        shown = found.page.evaluate(CUT, texts)
        assert not found.said
    for text, pieces, wanted in zip(texts, shown, expected, strict=True):
        assert pieces == wanted, text[:200]
    flat = [piece for pieces in expected for piece in pieces]
    assert (
        "[MASK]" in flat and "[CLS]" in flat and "extra token" in flat and 0.02 < flat.count("[UNK]") / len(flat) < 0.7
    )


@pytest.mark.slow
def test_every_character(browser, tmp_path):
    tokenizer = write_tokenizer(tmp_path, {})
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    texts = [" ".join(every[at : at + 4_096]) for at in range(0, len(every), 4_096)]
    normal = [tokenizer.normalizer.normalize_str(text) for text in texts]
    with opened(browser, write_page(tmp_path)) as found:
        shown = found.page.evaluate(
            "texts => texts.map(text => document.getElementById('explorer-text').normalize(text))", texts
        )
    assert shown == normal


def test_characters_are_asked_of_the_library():
    found = characters()
    assert set(found) == {"control", "space", "mark", "punctuation"}
    for kind, one in (("control", "\u200b"), ("control", "\ue123"), ("space", "\u3000"), ("mark", "\u0301")):
        assert any(first <= ord(one) <= last for first, last in zip(*[iter(found[kind])] * 2, strict=True))
    assert all(first <= last for ranges in found.values() for first, last in zip(*[iter(ranges)] * 2, strict=True))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model", {"type": "BPE", "vocab": {}, "merges": []}, "BPE, BertNormalizer, BertPreTokenizer"),
        ("normalizer", {"type": "NFC"}, "WordPiece, NFC, BertPreTokenizer"),
        ("normalizer", None, "WordPiece, nothing, BertPreTokenizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "WordPiece, BertNormalizer, Whitespace"),
        ("added_tokens", [{"id": 0, "content": "[MASK]", "lstrip": True}], "white space"),
    ],
)
def test_other_kinds_of_tokenizer_are_left_out(tmp_path, key, value, reason):
    write_tokenizer(tmp_path, {})
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts | {key: value}))
    found = explorer(tmp_path)
    assert set(found) == {"reason"} and reason in found["reason"]


def test_without_a_tokenizer(tmp_path):
    assert explorer(tmp_path) == {"reason": "there is no tokenizer.json"}
