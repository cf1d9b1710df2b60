"""The attention page: its numbers are the stock model's, its texts never run, and a reader can work it."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bertpipe.cli import main
from bertpipe.downstream.reporting import attention_page
from bertpipe.errors import ConfigError
from tests.browser import PHONE, chromium, opened
from tests.downstream.conftest import TEXT, write_tokenizer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
SIZES |= {"initializer_range": 0.6, "max_position_embeddings": 66}
IDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
EUROPEAN = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32}
KINDS = {
    "bert": lambda n: tr.BertConfig(vocab_size=n, **SIZES),
    "roberta": lambda n: tr.RobertaConfig(vocab_size=n, **SIZES),
    "albert": lambda n: tr.AlbertConfig(vocab_size=n, embedding_size=16, **SIZES),
    "electra": lambda n: tr.ElectraConfig(vocab_size=n, embedding_size=16, **SIZES),
    "distilbert": lambda n: tr.DistilBertConfig(
        vocab_size=n, dim=24, n_layers=2, n_heads=3, hidden_dim=32, max_position_embeddings=66, initializer_range=0.6
    ),
    "modernbert": lambda n: tr.ModernBertConfig(
        vocab_size=n, local_attention=8, **IDS, **SIZES | {"num_hidden_layers": 4}
    ),
    "eurobert": lambda n: tr.EuroBertConfig(vocab_size=n, mask_token_id=4, **EUROPEAN, **SIZES),
    "deberta-v2": lambda n: tr.DebertaV2Config(vocab_size=n, position_biased_input=False, **RELATIVE, **SIZES),
    "big_bird": lambda n: tr.BigBirdConfig(vocab_size=n, attention_type="block_sparse", **SIZES),
    "mpnet": lambda n: tr.MPNetConfig(vocab_size=n, **SIZES),  # a family that is trained nowhere here
}
SENTENCE = "the default encoding is used when no other is named"
WORDS = ["[CLS]", *SENTENCE.split(), "[SEP]"]


def write_model(folder: Path, kind: str, size: int | None = None) -> Path:
    """A stock encoder with random weights that make uneven attention, beside a tokenizer of 64 tokens at most."""
    number = len(write_tokenizer(folder))
    torch.manual_seed(0)
    tr.AutoModel.from_config(KINDS[kind](size or number)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("bert"), "bert")


def reference(folder: Path, *texts: str) -> np.ndarray:
    """The stock model's own attentions, from ids that are put together by hand."""
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = [[vocabulary.index(word) for word in text.split()] for text in texts]
    ids = [[2, *words[0], 3], *([*more, 3] for more in words[1:])]
    model = tr.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    if model.config.model_type == "big_bird":  # as the stock class does for short texts, but not the first
        model.set_attention_type("original_full")
    given = {"input_ids": torch.tensor([[number for part in ids for number in part]])}
    if len(texts) > 1 and model.config.model_type == "bert":
        given["token_type_ids"] = torch.tensor([[0] * len(ids[0]) + [1] * len(ids[1])])
    with torch.no_grad():
        return torch.cat(model(**given, output_attentions=True).attentions).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_stock_model(tmp_path, kind):
    folder = write_model(tmp_path, kind)
    found = attention_page.attend(str(folder), SENTENCE)
    expected = reference(folder, SENTENCE)
    assert found.tokens == WORDS and found.special.tolist() == [True, *[False] * 10, True]
    assert found.weights.shape == expected.shape == (4 if kind == "modernbert" else 2, 3, 12, 12)
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)
    assert expected.std() > 0.02


def test_a_pair_is_told_apart(bert):
    found = attention_page.attend(str(bert), SENTENCE, "the user")
    assert found.tokens == [*WORDS, "the", "user", "[SEP]"] and found.special.sum() == 3
    np.testing.assert_allclose(found.weights, reference(bert, SENTENCE, "the user"), atol=1e-6)


def read_page(html: str) -> dict:
    """The page's numbers as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    data = json.loads(text)
    shape = (data["layers"], data["heads"], len(data["tokens"]), len(data["tokens"]))
    data["weights"] = unpack(data["weights"]).reshape(shape)
    return data


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2") / 65_535


def test_the_page_holds_them_to_four_digits(bert):
    found = attention_page.attend(str(bert), SENTENCE)
    html = attention_page.render(found)
    data = read_page(html)
    np.testing.assert_allclose(data["weights"], found.weights, atol=1e-5)
    np.testing.assert_allclose(data["entropy"], attention_page.entropies(found.weights), atol=1e-4)
    np.testing.assert_allclose(data["distance"], attention_page.distances(found.weights), atol=1e-4)
    (positions,) = data["positions"]
    similarity = 2 * unpack(positions["values"]).reshape(66, 66) - 1
    np.testing.assert_allclose(similarity, found.positions[0].similarity, atol=2e-5)
    for layer, head in ((0, 0), (1, 2)):
        row = html.partition(f"layer {layer + 1}, head {head + 1}</button></th>")[2].partition("</tr>")[0]
        assert f">{attention_page.entropies(found.weights)[layer, head]:.4f}<" in row
        assert f">{attention_page.distances(found.weights)[layer, head]:.4f}<" in row


def test_entropy_and_distance(bert):
    weights = attention_page.attend(str(bert), SENTENCE).weights
    by_hand = np.array([[np.mean([entropy(row) for row in head]) for head in layer] for layer in weights])
    np.testing.assert_allclose(attention_page.entropies(weights), by_hand, atol=1e-6)
    apart = [
        np.mean([sum(p * abs(i - j) for j, p in enumerate(row)) for i, row in enumerate(head)])
        for layer in weights
        for head in layer
    ]
    np.testing.assert_allclose(attention_page.distances(weights).ravel(), apart, atol=1e-6)
    known = np.stack([np.eye(8), np.full((8, 8), 1 / 8), np.roll(np.eye(8), 1, axis=0)])[None]
    np.testing.assert_allclose(attention_page.entropies(known)[0], [0, math.log(8), 0], atol=1e-12)
    np.testing.assert_allclose(attention_page.distances(known)[0], [0, 63 / 24, 14 / 8], atol=1e-12)
    first = np.arange(8) == 0
    np.testing.assert_allclose(attention_page.shares(known, first)[0], [1 / 8] * 3, atol=1e-12)


# --- positions --------------------------------------------------------------------------------------------------------


def test_learned_positions(tmp_path):
    for kind, first in (("bert", 0), ("roberta", 2), ("mpnet", 2)):
        folder = write_model(tmp_path / kind, kind)
        (found,) = attention_page.positions(tr.AutoModel.from_pretrained(folder))
        rows = tr.AutoModel.from_pretrained(folder).embeddings.position_embeddings.weight.detach().numpy()[first:]
        assert found.kind == "learned" and len(rows) == 66 - first
        np.testing.assert_allclose(found.similarity, cosine_similarity(rows), atol=1e-6)


def test_sinusoidal_positions():
    model = tr.DistilBertModel(tr.DistilBertConfig(dim=32, n_heads=2, n_layers=1, sinusoidal_pos_embds=True))
    model.embeddings.position_embeddings.weight.data.copy_(torch.tensor(attention_page.sinusoids(512, 32)))
    (found,) = attention_page.positions(model)
    assert found.kind == "sinusoidal" and found.similarity.shape == (512, 512)
    angles = np.array([7 / 10_000 ** (2 * pair / 32) for pair in range(16)])
    assert found.similarity[11, 4] == pytest.approx(np.cos(angles).mean())
    assert attention_page.sinusoids(9, 6)[5, 3] == pytest.approx(math.cos(5 / 10_000 ** (2 / 6)))
    model.embeddings.position_embeddings.weight.data[3] += 0.1
    assert attention_page.positions(model)[0].kind == "learned"


def test_rotary_positions_are_what_the_stock_rotation_does():
    """The mean over the directions of one basis, which is the mean over all of them: trace / size."""
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    model = tr.ModernBertModel(tr.ModernBertConfig(vocab_size=40, **IDS, **SIZES | {"num_hidden_layers": 4}))
    found = {positions.layers: positions for positions in attention_page.positions(model)}
    assert {p.kind for p in found.values()} == {"rotary"} and set(found) == {"full attention", "sliding attention"}
    basis = torch.eye(8).reshape(1, 8, 1, 8).expand(1, 8, 66, 8)  # [batch, directions, positions, size of a head]
    for layers, positions in found.items():
        cos, sin = model.rotary_emb(basis, torch.arange(66)[None], layers.replace(" ", "_"))
        turned, _ = apply_rotary_pos_emb(basis, basis, cos, sin)
        expected = torch.einsum("bdis,bdjs->ij", turned, turned) / 8
        np.testing.assert_allclose(positions.similarity, expected.numpy(), atol=1e-5)
    different = [p.similarity[0, 40] for p in found.values()]
    assert abs(different[0] - different[1]) > 1e-3


def test_a_model_without_such_positions_says_so(tmp_path):
    html = attention_page.render(attention_page.attend(str(write_model(tmp_path, "deberta-v2")), SENTENCE))
    assert "no position embeddings" in html and read_page(html)["positions"] == []


# --- input ------------------------------------------------------------------------------------------------------------


def test_a_text_of_600_tokens_is_cut_and_said_so(bert, tmp_path, capsys):
    words = (TEXT.split() * 20)[:598]
    out = tmp_path / "page.html"
    assert main(["attention", "--model", str(bert), " ".join(words), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 layers x 3 heads, 64 tokens, the first of 600: the others were not read" in said
    html = out.read_text()
    assert "The text has 600 tokens; it was cut to the 64 that fit" in html
    np.testing.assert_allclose(read_page(html)["weights"], reference(bert, " ".join(words[:62])), atol=1e-5)
    assert main(["attention", "--model", str(bert), SENTENCE, "--max-length", "7", "--out", str(out)]) == 0
    assert "7 tokens, the first of 12" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_has_a_largest_size(bert, monkeypatch):
    monkeypatch.setattr(attention_page, "NUMBERS", 6 * 400 + 5)
    found = attention_page.attend(str(bert), TEXT)
    assert found.weights.shape[-1] == 20 and found.num_tokens > 40
    with pytest.raises(ConfigError, match="--max-length: 21 tokens, a page holds 20 of this model's 6 heads"):
        attention_page.attend(str(bert), TEXT, max_length=21)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([""], "the text is empty"),
        (["  \n"], "the text is empty"),
        (["a", "--second", " "], "--second is empty"),
        (["\x01"], "no token of the text is left: 2 tokens"),
        (["a \udcff"], "the text is not UTF-8"),
        (["a", "--max-length", "2"], "no token of the text is left: 3 tokens, cut to 2"),
        (["a", "--max-length", "65"], "--max-length: 65 tokens, the model takes 64; give at most 64"),
        (["a", "--max-length", "0"], "'0' is not a whole number from 1 on"),
        ([], "required: TEXT"),
        (["a", "--model", "./nowhere"], "./nowhere"),
    ],
)
def test_mistakes_are_one_line(bert, tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["attention", "--model", str(bert), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [complaint in line for line in said if line.startswith("bertpipe:")] == [True]
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "t5": (lambda n: tr.T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), "a decoder"),
    "fnet": (lambda n: tr.FNetConfig(vocab_size=n, **SIZES), "a fnet model gives no attentions"),
    "longformer": (
        lambda n: tr.LongformerConfig(vocab_size=n, attention_window=8, **SIZES, **IDS),
        "a longformer model gives no attentions from each token to each other; take an encoder such as bert",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_without_such_attentions_are_refused(tmp_path, kind):
    config, complaint = REFUSED[kind]
    tr.AutoModel.from_config(config(len(write_tokenizer(tmp_path)))).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        attention_page.attend(str(tmp_path), SENTENCE)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_model(tmp_path, "bert", size=30)
    with pytest.raises(ConfigError, match=r"index out of range.*with its own tokenizer"):
        attention_page.attend(str(folder), SENTENCE)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        attention_page.attend(str(folder), SENTENCE)


# --- in a browser -----------------------------------------------------------------------------------------------------

HOSTILE = [
    "</script><script>window.ran=1;alert(1)</script>",
    "<img/src=x/onerror=window.ran=2>",
    "{{7*7}}",
    "<!--<script>",
    '"onmouseover="window.ran=3',
    "](javascript:alert(4))",
    "größer",
    "שלום",
    "it",
]


def write_hostile(folder: Path) -> Path:
    """A model whose words are markup, as a tokenizer trained on anyone's text may have."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *HOSTILE]
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    tr.BertModel(tr.BertConfig(vocab_size=len(pieces), **SIZES | {"initializer_range": 0.3})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, attention_page.Attended]:
    folder = tmp_path_factory.mktemp("<b>hostile")
    attended = attention_page.attend(str(write_hostile(folder)), " ".join(HOSTILE))
    attention_page.write(attended, folder / "page.html")
    return folder / "page.html", attended


def test_markup_is_escaped(hostile):
    path, attended = hostile
    html = path.read_text(encoding="utf-8")
    assert attended.tokens == ["[CLS]", *HOSTILE, "[SEP]"] == read_page(html)["tokens"]
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html and "<!--" not in html and "<b>" not in html and "onerror=window" in html
    assert not re.search(r"(?:src|href)=[\"'](?!#)", html)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


DRAWN = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(data.filter((_, at) => at % 4 === 3)).size;
})"""


def lines_of(page) -> list[list[str]]:
    return page.eval_on_selector_all(
        ".arrows line", "all => all.map(one => ['y1', 'y2', 'opacity'].map(name => one.getAttribute(name)))"
    )


def test_the_page_in_a_browser(browser, hostile):
    """Drawn whole, silent, asking for nothing; words, heads, layers and directions can be chosen."""
    path, attended = hostile
    with opened(browser, path) as found:
        page = found.page
        drawn = page.evaluate(DRAWN)
        assert len(drawn) == 6 + 1 + 1 and min(drawn) > 10  # small ones, the chosen head, the positions
        assert page.locator("#words button").all_inner_texts() == attended.tokens
        before = lines_of(page)
        word = page.locator("#words button").nth(9)
        word.click()
        assert word.get_attribute("aria-pressed") == "true"
        after = lines_of(page)
        assert before != after and {y for y, _, _ in after} == {str(9.5 * 21)}
        best = int(attended.weights[0, 0, 9].argmax())
        told = f"Layer 1, head 1: entropy {attention_page.entropies(attended.weights)[0, 0]:.2f} nats"
        caption = page.locator("#chosen figcaption")
        assert caption.inner_text().startswith(told)
        share = f"{attended.tokens[best]} {100 * attended.weights[0, 0, 9, best]:.1f} %"
        assert f"“it” attends to {share}" in caption.inner_text()
        page.get_by_label("who attends to it").check()
        assert {y for _, y, _ in lines_of(page)} == {str(9.5 * 21)}
        page.get_by_label("head 3", exact=True).click()
        assert page.locator("#chosen figure").count() == 2
        page.locator("#layer").select_option(index=1)
        titles = page.locator("#chosen b").all_inner_texts()
        assert titles == ["Layer 2, head 1", "Layer 2, head 3"]
        page.locator(".layers button").nth(4).click()
        assert page.locator("#chosen b").all_inner_texts() == ["Layer 2, head 2"]
        page.locator(".arrows text", has_text="größer").first.click()
        assert page.locator("#words button[aria-pressed=true]").inner_text() == "größer"
        assert page.evaluate("window.ran") is None
        assert found.said == [] and found.asked == [path.as_uri()]


def test_the_page_by_keyboard(browser, hostile):
    path, attended = hostile
    with opened(browser, path) as found:
        page = found.page
        page.locator(".layers button").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.locator("#chosen b").inner_text() == "Layer 2, head 2"
        page.locator("#chosen canvas").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        weight = attended.weights[1, 1, 2, 1]
        assert abs(weight - attended.weights[1, 1, 1, 2]) > 0.01
        assert page.locator("#chosen output").inner_text() == f"{HOSTILE[1]} → {HOSTILE[0]}: {weight:.4f}"
        page.keyboard.press("Enter")
        assert page.locator("#words button[aria-pressed=true]").inner_text() == HOSTILE[1]
        assert HOSTILE[1] in page.locator("#status").inner_text()
        page.keyboard.press("ArrowRight")  # the map still has the keyboard
        assert f"→ {HOSTILE[1]}:" in page.locator("#chosen output").inner_text()
        page.locator("[data-positions] canvas").focus()
        page.keyboard.press("ArrowRight")
        similarity = attended.positions[0].similarity[0, 1]
        said = page.locator("[data-positions] output").inner_text()
        assert float(said.rpartition(" ")[2]) == pytest.approx(similarity, abs=2e-4)
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, select, canvas[tabindex], svg[role]')]"
            ".filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim())).length"
        )
        assert unnamed == 0 and found.said == []


def test_dark_and_on_a_phone(browser, hostile):
    path, _ = hostile
    with opened(browser, path, viewport=PHONE, has_touch=True, color_scheme="dark") as found:
        page = found.page
        colour = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(colour) == "rgb(20, 23, 26)"
        pixels = "document.querySelector('.layers canvas').toDataURL()"
        dark = page.evaluate(pixels)
        page.emulate_media(color_scheme="light")
        page.wait_for_function(f"before => {pixels} !== before", arg=dark)  # painted in the browser's next frame
        assert page.evaluate(colour) == "rgb(251, 251, 249)"
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert min(page.evaluate(DRAWN)) > 10
        page.locator("#words button").nth(9).tap()
        assert "“it” attends to" in page.locator("#chosen figcaption").inner_text()
        assert found.said == []


def test_the_policy_lets_no_other_script_run(browser, hostile):
    """Even if something were not escaped: a script, a handler, a picture from elsewhere."""
    with opened(browser, hostile[0]) as found:
        found.page.evaluate(
            "() => { const added = document.createElement('script'); added.textContent = 'window.ran = 5';"
            "document.body.append(added); document.body.insertAdjacentHTML('beforeend',"
            "'<img src=x onerror=window.ran=6><img src=http://127.0.0.1:9/a.png>'); }"
        )
        found.page.wait_for_function("document.images.length === 2 && [...document.images].every((i) => i.complete)")
        assert found.page.evaluate("window.ran") is None
        refused = [line for line in found.said if "Content Security Policy" in line]
        assert len(refused) >= 4  # the script, two pictures, a handler
