"""Column files, written and read: as the shared tasks have them, and one clear line for what is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.config import TaskConfig
from bertpipe.downstream.tasks import own_task, tasks
from bertpipe.downstream.tasks.conll_files import columns, written
from bertpipe.errors import DataError

PATH = Path("train.conll")
CONLL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n"
)


def test_as_in_conll_2003():
    assert columns(PATH, CONLL) == {
        "tokens": [["EU", "rejects"], ["Peter", "Blackburn"]],
        "2": [["NNP", "VBZ"], ["NNP", "NNP"]],
        "3": [["B-NP", "B-VP"], ["B-NP", "I-NP"]],
        "ner_tags": [["B-ORG", "O"], ["B-PER", "I-PER"]],
    }


def test_as_in_wnut_17():
    """Tabs, Windows lines, words with spaces of other kinds in them, blank lines that aren't quite, several of them."""
    text = "@paul\tO\r\n#tag\tO\r\n\r\n\t\r\n\nnew\u3000york\tB-location\r\na b\tO\r\n"
    assert columns(PATH, text) == {
        "tokens": [["@paul", "#tag"], ["new\u3000york", "a b"]],
        "ner_tags": [["O", "O"], ["B-location", "O"]],
    }


def test_words_alone_and_a_delimiter():
    assert columns(PATH, "a\nb\n\nc") == {"tokens": [["a", "b"], ["c"]]}
    assert columns(PATH, "a b|O\n", "|") == {"tokens": [["a b"]], "ner_tags": [["O"]]}
    assert columns(PATH, "") == {"tokens": []}


WORD = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=4)
SENTENCE = st.lists(st.tuples(WORD, st.sampled_from(["O", "B-x", "I-x"])), min_size=1, max_size=4)


@given(st.lists(SENTENCE, min_size=1, max_size=5))
def test_what_is_written_is_read_back(sentences):
    words, tags = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    assert columns(PATH, written(words, tags)) == {"tokens": words, "ner_tags": tags}
    assert columns(PATH, written(words, tags, tags))["2"] == tags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n", "train.conll: line 2: 1 fields where the first line has 2; give each word its tags"),
        ("a O\n\nb O O\n", "train.conll: line 3: 3 fields where the first line has 2"),
        ("a\tO\n\tO\n", "train.conll: line 2: 1 fields where the first line has 2"),
    ],
)
def test_a_line_with_other_fields_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        columns(PATH, text)


def test_a_task_of_ones_own(tmp_path):
    """Training from columns, validation from JSON lines; another column as the label, a part held out."""
    (tmp_path / "train.conll").write_text(CONLL)
    row = {"tokens": ["Blackburn", "."], "ner_tags": ["B-PER", "O"]}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    own = {"kind": "tokens", "text": "tokens", "label": "ner_tags", "name": "mine"}

    def load(**more):
        return tasks.load("mine", None, TaskConfig(**own | more))

    splits = load(data={"train": str(tmp_path / "train.conll"), "validation": str(tmp_path / "dev.jsonl")})
    assert splits["train"].texts == [("EU", "rejects"), ("Peter", "Blackburn")]
    assert splits["train"].label_names == ("O", "B-ORG", "B-PER", "I-ORG", "I-PER")
    assert [labels.tolist() for labels in splits["validation"].labels] == [[2, 0]]
    (tmp_path / "all.conll").write_text(f"{CONLL}\na DT B-NP O\nman NN I-NP O\n\nan DT B-NP O\nold JJ I-NP O\n")
    splits = load(data=str(tmp_path / "all.conll"), label="3", validation_share=0.25)
    assert len(splits["train"]) == 3 and len(splits["validation"]) == 1
    row["ner_tags"] = ["B-PER", "B-SHIP"]
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"dev\.jsonl: row 0, word 1: column 'ner_tags': the tag 'B-SHIP' is not among"):
        load(data={"train": str(tmp_path / "train.conll"), "validation": str(tmp_path / "dev.jsonl")})
    assert own_task.name_of(TaskConfig(**own, data="x.conll")) == "mine"
