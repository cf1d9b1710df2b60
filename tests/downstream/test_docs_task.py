"""The docs task: balanced, split by file, without names and without repeats; on made-up and on installed packages."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.data.docstrings import STDLIB, SourceFile
from bertpipe.downstream.finetuning.baselines import BASELINES
from bertpipe.downstream.tasks import docs_task
from bertpipe.downstream.tasks.docs_task import Package, Paragraph, build, prose
from bertpipe.downstream.tasks.tasks import load
from bertpipe.errors import DataError

WORDS = [
    "value",
    "array",
    "returned",
    "given",
    "function",
    "shape",
    "caller",
    "object",
    "name",
    "order",
    "list",
    "file",
    "class",
    "method",
    "text",
    "result",
]


def sentence(seed: int) -> str:
    return " ".join(["Some", *random.Random(seed).choices(WORDS, k=14)]) + "."


def write_packages(folder: Path, names: list[str], num_files: int = 8, per_file: int = 7) -> list[SourceFile]:
    """Packages of source files with `per_file` paragraphs of documentation each; the first is the largest."""
    files = []
    for number, name in enumerate(names):
        for file in range(num_files):
            path = folder / name / f"module{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            body = "\n\n".join(sentence(hash((number, file, row))) for row in range(per_file))
            path.write_text(f'"""{body}"""\n' + "# filler\n" * (len(names) - number) * 100)
            files.append(SourceFile(name, f"{name}/{path.name}", path, path.stat().st_size))
    return files


@pytest.fixture(scope="module")
def installed():
    """The task as this environment gives it."""
    return load("docs")


# --- the installed packages -------------------------------------------------------------------------------------------


def test_installed_classes_are_equal_in_number(installed):
    for split in installed.values():
        counts = Counter(split.labels.tolist())
        assert sorted(counts) == list(range(len(split.label_names)))
        assert len(set(counts.values())) == 1
    assert len(installed["train"].label_names) == docs_task.NUM_CLASSES
    assert len(installed["train"]) <= docs_task.NUM_CLASSES * docs_task.TRAIN
    assert len(installed["validation"]) >= 100 * docs_task.NUM_CLASSES, "too few to tell two models apart"


def test_installed_files_are_on_one_side(installed):
    train, validation = ({name.split("#")[0] for name in split.ids} for split in installed.values())
    assert train and validation and not train & validation


def test_installed_ids_agree_with_labels(installed):
    for split in installed.values():
        assert [name.split("/")[0].removesuffix(".py") for name in split.ids] == [
            split.label_names[label] for label in split.labels
        ]


def test_installed_texts_hide_the_names(installed):
    names = [name.casefold() for name in installed["train"].label_names]
    assert not {STDLIB, "bertpipe"} & set(names)
    for split in installed.values():
        for (text,) in split.texts:
            assert docs_task.MIN_CHARS // 2 < len(text) <= docs_task.MAX_CHARS * 2
            assert not [name for name in names if len(name) > 3 and name in text.casefold()], text


def test_installed_task_is_hard_but_can_be_learnt(installed):
    labels = installed["validation"].labels
    accuracy = {name: np.mean(BASELINES[name].predict(installed, 0) == labels) for name in ("majority", "tfidf")}
    assert accuracy["majority"] == pytest.approx(1 / docs_task.NUM_CLASSES)
    assert 2 * accuracy["majority"] < accuracy["tfidf"] < 0.9


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_largest_packages_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_task, "ENOUGH", 20)
    names = [STDLIB, "bertpipe", *"hgfedcba"]
    packages = docs_task.read(write_packages(tmp_path, names))
    assert list(packages) == list("cdefgh"), "six, in alphabetical order, without the standard library and ourselves"
    assert all(len(package.paragraphs) == 20 for package in packages.values())


def test_large_packages_with_little_prose_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_task, "ENOUGH", 20)
    files = write_packages(tmp_path, ["silent"], num_files=1) + write_packages(tmp_path, list("abcdef"))
    assert list(docs_task.read(files)) == list("abcdef")


def test_each_file_gives_a_few_paragraphs(tmp_path):
    packages = docs_task.read(write_packages(tmp_path, ["one"], num_files=3, per_file=40))
    assert Counter(row.file for row in packages["one"].paragraphs) == {
        f"one/module{file}.py": docs_task.PER_FILE for file in range(3)
    }


def test_every_process_makes_the_same_task(tmp_path):
    """Whatever the order of sets and of the file list: what is compared must be the same examples."""
    write_packages(tmp_path, list("abc"))
    code = """
import random, sys
from pathlib import Path
from bertpipe.data.docstrings import SourceFile
from bertpipe.downstream.tasks import docs_task
root = Path(sys.argv[1])
files = [SourceFile(p.parent.name, f"{p.parent.name}/{p.name}", p, p.stat().st_size) for p in root.rglob("*.py")]
random.shuffle(files)
for name, split in docs_task.build(docs_task.read(files)).items():
    print(name, split.ids, split.texts, split.labels.tolist())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


# --- what is a paragraph ----------------------------------------------------------------------------------------------

GOOD = "Return the sorted values of the given array,\nin the order in which they were first seen by the caller."


def test_prose_is_joined_to_one_line():
    assert prose(GOOD) == GOOD.replace("\n", " ")
    assert prose("    " + GOOD.replace("\n", "\n    ")) == GOOD.replace("\n", " ")


@pytest.mark.parametrize(
    "block",
    [
        "Return the values.",
        GOOD * 6,
        GOOD.replace(",\n", ",\n    "),
        "- " + GOOD,
        "values : array of floats\n" + GOOD,
        ":param values: " + GOOD,
        ".. note:: " + GOOD,
        GOOD + "\n>>> sort([3, 1, 2]) returns the list.",
        "|" + GOOD + "|",
        GOOD.removesuffix("."),
        GOOD.lower(),
        "X = {(1, 2): 3.14, (4, 5): 6.28} + [7, 8, 9, 10, 11, 12] * 13 - 14 / 15 % 16 << 17 ^ 18 & 19 | 20.",
        "",
        " \n ",
    ],
)
def test_not_prose(block):
    assert prose(block) is None


# --- names ------------------------------------------------------------------------------------------------------------


def packages_of(*names: str, aliases: tuple[str, ...] = ()) -> dict[str, Package]:
    return {name: Package([], set(aliases)) for name in names}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Uses NumPy and numpy.linalg.", "Uses library and library.linalg."),
        ("A PyTorch model, or torchvision.", "A library model, or library."),
        ("As in scikit-learn, sklearn, scikit learn or SCIKIT_LEARN.", "As in library, library, library or library."),
        ("Pass np.array or a pandas one.", "Pass library.array or a pandas one."),
        ("The norm of F. Smith; np is an alias.", "The norm of F. Smith; np is an alias."),
        ("Each Transformer and transformers.", "Each library and library."),
        ("Grip the pip, not the pipe.", "Grip the library, not the pipe."),
    ],
)
def test_names_are_blanked(before, after):
    packages = packages_of("numpy", "torch", "sklearn", "transformers", "pip", aliases=("numpy np", "pandas pd"))
    assert docs_task.blanker(packages)(before) == after


def test_aliases_come_from_the_documentation(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(f'"""{GOOD}\n\n    >>> import numpy.linalg as la, os\n    >>> import numpy as np\n"""\n')
    packages = docs_task.read([SourceFile("numpy", "numpy/m.py", path, 1)])
    assert docs_task.blanker(packages)("Use la.norm, np.array, or pa.array.") == (
        "Use library.norm, library.array, or pa.array."
    )


# --- the splits -------------------------------------------------------------------------------------------------------

package_rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=8, max_size=40)


@given(st.lists(package_rows, max_size=4))
def test_splits_of_anything(packages):
    """Balanced, split by file, without repeats and without texts of two packages; or a DataError."""
    packages = [[(file, 25 * number + text) for file, text in rows] for number, rows in enumerate(packages)]
    made = {
        f"pkg{number}": Package(
            [
                Paragraph(f"pkg{number}", f"pkg{number}/{file}.py", row, sentence(text))
                for row, (file, text) in enumerate(rows)
            ],
            set(),
        )
        for number, rows in enumerate(packages)
    }
    try:
        splits = build(made)
    except DataError as error:
        assert "two or more installed packages" in str(error) and "\n" not in str(error)
        return
    train, validation = splits["train"], splits["validation"]
    texts = train.texts + validation.texts
    assert len(set(texts)) == len(texts)
    assert not {name.split("#")[0] for name in train.ids} & {name.split("#")[0] for name in validation.ids}
    for split in splits.values():
        assert len(split) > 0
        assert set(Counter(split.labels.tolist()).values()) == {len(split) // len(packages)}
    owners = {sentence(text): set() for rows in packages for _, text in rows}
    for number, rows in enumerate(packages):
        for _, text in rows:
            owners[sentence(text)].add(number)
    labels = np.concatenate([train.labels, validation.labels]).tolist()
    assert all(owners[text] == {label} for (text,), label in zip(texts, labels, strict=True))


def test_repeats_are_dropped():
    """A text with other digits or capitals is the same text, wherever it stands; each text stands on one side."""

    def package(name: str, first: int) -> Package:
        texts = [f"{sentence(first + row % 12)[:-1]} {row}." for row in range(36)]
        texts[12:24] = map(str.upper, texts[12:24])
        return Package([Paragraph(name, f"{name}/{row}.py", 0, text) for row, text in enumerate(texts)], set())

    splits = build({"a": package("a", 0), "b": package("b", 100)})
    assert {name: len(split) for name, split in splits.items()} == {"train": 2 * 8, "validation": 2 * 4}
    words = [text.casefold().rstrip("0123456789.") for split in splits.values() for (text,) in split.texts]
    assert len(set(words)) == len(words) == 24


def test_a_third_is_for_validation():
    rows = {
        name: [Paragraph(name, f"{name}/{row // 3}.py", row, sentence(1000 * number + row)) for row in range(90)]
        for number, name in enumerate("ab")
    }
    splits = build({name: Package(paragraphs, set()) for name, paragraphs in rows.items()})
    assert (len(splits["train"]), len(splits["validation"])) == (120, 60)


@pytest.mark.parametrize("names", [[], ["lonely"]])
def test_too_few_packages(tmp_path, names):
    with pytest.raises(DataError, match="needs two or more installed packages"):
        build(docs_task.read(write_packages(tmp_path, names)))
