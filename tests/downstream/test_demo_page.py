"""`bertpipe demo`: what the page shows is what the stock model says, in a real browser and by a real process."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.cli import main
from bertpipe.downstream.using import demo_page, finished
from bertpipe.errors import ConfigError, DataError
from tests.browser import chromium, opened
from tests.downstream.conftest import HOSTILE, TEXT
from tests.downstream.heads import HEADS, write_head

LONG = " ".join([TEXT] * 9)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict[str, finished.Finished]:
    made = {head: write_head(tmp_path_factory.mktemp(head), head) for head in HEADS}
    return {head: finished.load(str(folder)) for head, folder in made.items()}


def logits(one: finished.Finished, *texts: str, **more) -> torch.Tensor:
    """The stock model's, for one example that is tokenized as its users would."""
    model = getattr(tr, type(one.model).__name__).from_pretrained(one.name).eval()
    with torch.no_grad():
        return model(**one.tokenizer(*texts, return_tensors="pt", truncation=True, max_length=64, **more)).logits[0]


def test_fill_mask_shows_the_likeliest_tokens(heads):
    one = heads["fill-mask"]
    found, note = demo_page.answer(one, "the [MASK] value")
    shares = logits(one, "the [MASK] value")[2].softmax(-1)
    best = shares.argsort(descending=True)[: demo_page.TOP].tolist()
    assert list(found) == one.tokenizer.convert_ids_to_tokens(best) and note == ""
    np.testing.assert_allclose(list(found.values()), shares[best], rtol=1e-5)


def test_classes_labels_and_numbers(heads):
    for texts in (("the value is used",), ("the value is used", "no other encoding")):
        found, _ = demo_page.answer(heads["text-classification"], *texts, *[""] * (2 - len(texts)))
        shares = logits(heads["text-classification"], *texts).softmax(-1)
        assert found == pytest.approx(dict(zip(("bad", "so so", "good"), shares.tolist(), strict=True)), rel=1e-5)
    found, _ = demo_page.answer(heads["multi-label"], "the value", "")
    assert list(found.values()) == pytest.approx(logits(heads["multi-label"], "the value").sigmoid().tolist(), rel=1e-5)
    (share,) = demo_page.answer(heads["one label"], "the value", "")[0].values()
    assert share == pytest.approx(float(logits(heads["one label"], "the value").sigmoid()), rel=1e-5)
    number, _ = demo_page.answer(heads["regression"], "the value", "")
    assert number == pytest.approx(float(logits(heads["regression"], "the value")), rel=1e-5)


def test_classes_of_one_name_are_told_apart(heads, monkeypatch):
    one = heads["text-classification"]
    monkeypatch.setattr(one.model.config, "id2label", {0: "bad", 1: "good", 2: "good"})
    found, _ = demo_page.answer(one, "the value is used", "")
    assert list(found) == ["bad (0)", "good (1)", "good (2)"]
    assert list(found.values()) == pytest.approx(logits(one, "the value is used").softmax(-1).tolist(), rel=1e-5)


def test_each_word_has_the_tag_of_its_first_token(heads):
    one, text = heads["token-classification"], "the encodings,  the value valued"
    found, note = demo_page.answer(one, text)
    assert "".join(piece for piece, _ in found) == text and note == ""
    encoding = one.tokenizer(text, return_offsets_mapping=True)
    tags, begins = logits(one, text).argmax(-1).tolist(), {0, 4, 13, 16, 20, 26}
    starts, at = {}, 0
    for piece, tag in found:
        starts[at], at = tag, at + len(piece)
    for (begin, end), tag in zip(encoding["offset_mapping"], tags, strict=True):
        if begin in begins and end > begin:
            covering = starts[max(start for start in starts if start <= begin)]
            expected = one.model.config.id2label[tag].partition("-")[2] or None
            assert covering == expected, (text[begin:end], found)


def test_an_entity_of_several_words_is_one_piece():
    words = [("New", "B-place"), (" ", None), ("York", "I-place"), (" ", None), ("Oslo", "B-place"), (", ", None)]
    assert demo_page._joined([*words, ("now", None), (" ", None), ("Ada", "I-name")]) == [
        ("New York", "place"),
        (" ", None),
        ("Oslo", "place"),
        (", now ", None),
        ("Ada", "name"),
    ]


def test_the_answer_is_a_slice_of_the_context(heads):
    one, question, context = heads["question-answering"], "which value", "the default encoding is used"
    found, note = demo_page.answer(one, question, context)
    encoding = one.tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    places, whose = encoding.pop("offset_mapping")[0].tolist(), encoding.sequence_ids(0)
    with torch.no_grad():
        out = one.model(**encoding)
    start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
    mine = [i for i, text in enumerate(whose) if text == 1]
    score, a, b = max((start[a] + end[b], a, b) for a in mine for b in mine if a <= b)
    answers = [row for row in found if row[0] != "no answer"]
    assert answers[0] == [context[places[a][0] : places[b][1]], round(score, 2)] and note == ""
    assert ["no answer", round(start[0] + end[0], 2)] in found
    _, note = demo_page.answer(one, question, LONG)
    assert re.fullmatch(r"\d+ windows", note)
    (only,), _ = demo_page.answer(one, question, "\x00")  # of no token
    assert only[0] == "no answer"


def test_what_is_too_long_is_cut_aloud(heads):
    _, note = demo_page.answer(heads["text-classification"], LONG, "")
    assert re.search(r"\d+ tokens, the model takes 64: the rest is cut", note)


def test_a_long_text_is_tagged_in_windows(heads):
    found, note = demo_page.answer(heads["token-classification"], LONG)
    assert "".join(piece for piece, _ in found) == LONG and re.fullmatch(r"\d+ windows", note)


@pytest.mark.parametrize(
    ("head", "texts", "said"),
    [
        ("fill-mask", ("",), "text is empty"),
        ("fill-mask", ("no blank",), r"needs one \[MASK\], it has 0"),
        ("fill-mask", ("[MASK] [MASK]",), "it has 2"),
        ("text-classification", (" \n", "a second"), "text is empty"),
        ("question-answering", ("which", ""), "context is empty"),
        ("question-answering", ("which", "a " * 30_000), "context is 60,000 characters long; 50,000 will do"),
        ("token-classification", ("a \ud800",), "text is not UTF-8"),
    ],
)
def test_bad_text_is_told_of(heads, head, texts, said):
    with pytest.raises(DataError, match=said):
        demo_page.answer(heads[head], *texts)


def test_what_can_not_be_shown_is_refused(heads, monkeypatch, capsys):
    for head in ("multiple-choice", "feature-extraction"):
        with pytest.raises(ConfigError, match="has no page; there is one for fill-mask"):
            demo_page.page_of(heads[head])
    folder = heads["fill-mask"].name
    with socket.socket() as taken:
        taken.bind((demo_page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--model", folder, "--port", str(port)]) == 2
    assert f"--port: {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert main(["demo", "--model", folder, "--port", "65536"]) == 2
    assert "'65536' is no port: 0 to 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--model", folder]) == 2
    assert "pip install 'bertpipe[demo]'" in capsys.readouterr().err


TYPED = {
    "fill-mask": (["the [MASK] value"], lambda found: next(iter(found))),
    "text-classification": (["the value " + HOSTILE, ""], lambda found: max(found, key=found.get)),
    "token-classification": (["the value " + HOSTILE], lambda found: max((piece for piece, _ in found), key=len)),
    "question-answering": (["which value", "the default encoding " + HOSTILE], lambda found: found[0][0]),
}


def test_people_type_and_read(heads, tmp_path):
    """Every page in a browser: no request to elsewhere, no script out of a text, mistakes as a message."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with chromium() as browser:
        for head, (texts, shown) in TYPED.items():
            with demo_page.running(heads[head]) as address, opened(browser, address) as found:
                boxes = found.page.locator("textarea:enabled")
                boxes.nth(0).fill("")
                found.page.get_by_role("button", name="Run").click()
                found.page.get_by_text("is empty").first.wait_for()
                for number, text in enumerate(texts):
                    boxes.nth(number).fill(text)
                found.page.get_by_role("button", name="Run").click()
                expected = shown(demo_page.answer(heads[head], *texts)[0]).strip()
                shows = "text => document.querySelector('#result').innerText.includes(text)"
                found.page.wait_for_function(shows, arg=expected, timeout=30_000)
                assert [url for url in found.asked if not url.startswith((address, "data:", "blob:"))] == []
                assert [line for line in found.said if "alert" in line or "Error" in line] == []


def test_the_command_serves_until_ctrl_c(heads):
    pytest.importorskip("gradio", reason="gradio is not installed")
    code = "import sys; from bertpipe.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--model", heads["fill-mask"].name]
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as demo:
        assert demo.stdout is not None and demo.stderr is not None
        line = demo.stdout.readline()
        address = re.search(r"fill-mask: (http://127\.0\.0\.1:\d+) ", line)
        assert address, line + demo.stderr.read()
        with urllib.request.urlopen(address[1], timeout=60) as reply:
            assert b"gradio" in reply.read()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
        assert demo.stderr.read() == ""
