"""No version with a known hole in what we read: refused at the start, and never asked for or pinned."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from bertpipe import floors
from bertpipe.errors import ConfigError

ROOT = Path(__file__).parents[2]


def lowest() -> dict[str, str]:
    """The oldest version that pyproject.toml allows of each dependency."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {
        requirement.name.lower(): next(s.version for s in requirement.specifier if s.operator == ">=")
        for requirement in map(Requirement, listed)
    }


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if "==" in line}


@pytest.mark.parametrize("versions", [lowest, pinned])
@pytest.mark.parametrize("name", floors.FLOORS)
def test_ranges_and_pins_lie_above_the_floors(name, versions):
    assert Version(versions()[name]) >= Version(floors.FLOORS[name][0])


def test_the_floors_are_those_of_the_advisories():
    assert {name: floor for name, (floor, _) in floors.FLOORS.items()} == {
        "torch": "2.10",
        "transformers": "5.3",
        "pyarrow": "14.0.1",
        "pyyaml": "5.4",
    }
    assert all(re.search(r"CVE-\d{4}-\d+", reason) for _, reason in floors.FLOORS.values())


VERSIONS = ["2.9.1", "2.10", "2.10.0", "2.10.1+cu128", "2.13.0a0+git1", "3", "2.5.1", "14.0.1", "14.0.0"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("floor", ["2.10", "5.3", "14.0.1"])
def test_versions_are_ordered_as_pip_orders_them(version, floor):
    assert (floors.numbers(version) < floors.numbers(floor)) == (Version(version).release < Version(floor).release)


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package for others to find it by."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_old_version_is_one_line_before_anything_is_imported(tmp_path):
    name, version = "transformers", "5.2.9"
    install(tmp_path, name, version)
    (tmp_path / "text.txt").write_text("some text for a corpus\n" * 9)
    more = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "bertpipe.cli", "corpus", "--corpus.sources", str(tmp_path / "text.txt")]
    command += ["--runtime.root", str(tmp_path / "runs")]
    done = subprocess.run(command, env=more, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"bertpipe: {name} {version} is installed, \S+ is the oldest .*CVE.*; upgrade it\n", done.stderr
    )
    assert not list((tmp_path / "runs").glob("corpus-*"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(floors.FLOORS, "no-such-package", ("1.0", "nothing"))
    with pytest.raises(ConfigError, match=r"no-such-package is not installed; pip install 'no-such-package>=1.0'"):
        floors.check()


def test_this_environment_passes():
    floors.check()
