"""The embedded default: the installed packages' documentation, the same every time, never our own."""

from __future__ import annotations

import itertools
import json

import numpy
import rich

from bertpipe.data import docstrings

NESTED = '''"""Module."""
import x

class A:
    """Class.

    Example:
        code()
    """

    value = """not a docstring"""

    def method(self):
        "Single quotes."
        def inner():
            """Inner."""

if x:
    async def chosen():
        """In an if."""
elif y:
    def other(): """In an elif."""
else:
    def last(): """In an else."""
try:
    def tried(): """In a try."""
except E:
    def caught(): """In a handler."""
finally:
    def final(): """In a finally."""
for a in b:
    with c:
        while d:
            match e:
                case 1:
                    class Deep: """Deep."""
f = lambda: """no"""
g = """no""" if h else """no"""
def empty(): """"""
def joined(): f"""no {f}"""
def bytestring(): b"""no"""
'''


def test_docstrings_are_found_wherever_definitions_stand_in_the_order_of_lines(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(NESTED)
    assert docstrings.parse_file(path) == [
        "Module.",
        "Class.\n\nExample:\n    code()",
        "Single quotes.",
        "Inner.",
        "In an if.",
        "In an elif.",
        "In an else.",
        "In a try.",
        "In a handler.",
        "In a finally.",
        "Deep.",
    ]


def test_a_file_that_does_not_parse_has_none(tmp_path):
    path = tmp_path / "x.py"
    for data in (b"print 'python 2'", b"\0", b"# coding: nonsense\n", b"\xff", b"(" * 10_000, b"-" * 200_000 + b"1"):
        path.write_bytes(data)
        assert docstrings.parse_file(path) is None
    assert docstrings.parse_file(tmp_path / "missing.py") is None


def test_other_encodings_and_bad_escapes_are_read_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "x.py"
    path.write_bytes('# coding: latin-1\n"""caf\xe9 \\d"""'.encode("latin-1"))
    assert docstrings.parse_file(path) == ["café \\d"]
    assert not recwarn.list


def test_files_are_the_standard_library_and_the_installed_packages_without_tests_and_ourselves():
    files = docstrings.list_files()
    names = [file.name for file in files]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"python/json/__init__.py", "python/os.py", "rich/panel.py", "numpy/linalg/__init__.py"} <= set(names)
    assert not [name for name in names if {"bertpipe", "test", "tests"} & set(name.split("/")[:-1])]
    by_name = {file.name: file for file in files}
    assert by_name["python/json/__init__.py"].package == docstrings.STDLIB
    assert by_name["rich/panel.py"].path.samefile(rich.__path__[0] + "/panel.py")
    assert by_name["rich/panel.py"].bytes == by_name["rich/panel.py"].path.stat().st_size


def test_docstrings_of_one_package_are_its_own_and_the_same_again():
    first = list(docstrings.read_docstrings(["rich"]))
    assert first == list(docstrings.read_docstrings(["rich"]))
    assert {item.package for item in first} == {"rich"}
    assert [item.file for item in first] == sorted(item.file for item in first)
    assert "draws a border around its contents" in " ".join(item.text for item in first)


def test_the_standard_library_comes_with_its_prose():
    read = itertools.islice(docstrings.read_docstrings([docstrings.STDLIB]), 300)
    assert {item.package for item in read} == {docstrings.STDLIB}
    path = {file.name: file.path for file in docstrings.list_files()}["python/json/__init__.py"]
    assert (docstrings.parse_file(path) or [""])[0] == (json.__doc__ or "").strip()


def test_packages_have_their_bytes():
    packages = docstrings.list_packages()
    assert packages[docstrings.STDLIB] > 1_000_000 and packages["numpy"] > 1_000_000
    assert "bertpipe" not in packages


def test_identity_names_versions_and_files_and_can_be_written():
    identity = json.loads(json.dumps(docstrings.identify()))
    assert identity == docstrings.identify()
    assert f"numpy=={numpy.__version__}" in identity["distributions"]
    assert [name for name, _ in identity["files"]] == [file.name for file in docstrings.list_files()]
