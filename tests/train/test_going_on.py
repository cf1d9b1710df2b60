"""Which tokenizers a checkpoint goes on with: its own, or its own with words added."""

import pytest
import transformers as tr

from bertpipe.config import TokenizerConfig
from bertpipe.data import new_words
from bertpipe.data import tokenizer as stage
from bertpipe.errors import ConfigError
from bertpipe.train.pretrain import check_tokenizer, load_tokenizer

OLD = [*stage.SPECIAL_TOKENS, "a", "b", "##a", "##b", "ab"]


def folder(path, pieces, *words):
    """A tokenizer artifact with `words` added to `pieces`."""
    config = TokenizerConfig(adopt="x", add_tokens=max(1, len(words)), min_frequency=1)
    tokenizer = stage._bert_tokenizer(pieces, config)
    if words:
        assert set(new_words.add_words(tokenizer, [" ".join(words)], config)) == set(words)
    stage.save(tokenizer, path)
    return path


def test_the_same_vocabulary_adds_nothing(tmp_path):
    own = folder(tmp_path / "own", OLD)
    assert check_tokenizer(str(own), load_tokenizer(own)) == []


def test_added_words_come_with_their_old_pieces(tmp_path):
    own, new = folder(tmp_path / "own", OLD), folder(tmp_path / "new", OLD, "abba", "ba", "q")
    tokenizer = load_tokenizer(new)
    added = dict(zip(range(10, 13), check_tokenizer(str(own), tokenizer), strict=True))
    # abba is ab ##b ##a, ba is b ##a, q was unknown
    expected = {"abba": [9, 8, 7], "ba": [6, 7], "q": [1]}
    assert added == {tokenizer.convert_tokens_to_ids(word): pieces for word, pieces in expected.items()}


@pytest.mark.parametrize("pieces", [[*OLD[:-1], "x"], OLD[:-1], [*OLD[:-2], OLD[-1], OLD[-2]], [*OLD[:-1], "x", "ab"]])
def test_another_vocabulary_is_refused(pieces, tmp_path):
    own, other = folder(tmp_path / "own", OLD), folder(tmp_path / "other", pieces)
    with pytest.raises(ConfigError, match=r"^model\.init: .* has another vocabulary .*--tokenizer\.adopt"):
        check_tokenizer(str(own), load_tokenizer(other))


def test_a_checkpoint_without_a_tokenizer_can_not_be_checked(tmp_path):
    tr.BertConfig().save_pretrained(tmp_path / "own")
    assert check_tokenizer(str(tmp_path / "own"), load_tokenizer(folder(tmp_path / "new", OLD, "abba"))) == []
