"""Names that come from data, manifests or settings stay inside their folder or are refused in one line."""

import json
import os
from pathlib import Path

import pytest

from bertpipe import artifact
from bertpipe.cli import main
from bertpipe.config import Config
from bertpipe.config_files import read_config, read_preset
from bertpipe.downstream.publishing import publish
from bertpipe.downstream.tasks import tasks
from bertpipe.errors import ArtifactError, BertpipeError, ConfigError

NAMES = ["../outside.txt", "sub/../../outside.txt", "/etc/passwd", "./a.txt", "sub//a.txt", "", ".", "..", "a\0.txt"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "outside.txt").write_text("secret")
    made = tmp_path / "corpus-0123456789ab"
    with artifact.committing(made, fingerprint="f") as (out, _):
        (out / "a.txt").write_text("a")
        (out / "sub").mkdir()
        (out / "sub" / "b.txt").write_text("b")
    assert artifact.verify(made) == []
    return made


def listing(folder: Path, **files: dict) -> None:
    """Add rows to a manifest."""
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"] |= files
    path.write_text(json.dumps(manifest))


def row(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": artifact.hash_file(path)}


@pytest.mark.parametrize("name", [*NAMES, "file:///etc/passwd"])
def test_a_manifest_can_t_name_files_elsewhere(name, folder):
    """Even with the right size and hash, which would tell whoever wrote it what the file holds."""
    target = folder / name.replace("\0", "")
    listing(folder, **{name: row(target if target.is_file() else folder / "a.txt")})
    (problem,) = artifact.verify(folder)
    if name.startswith("file:"):
        assert problem.startswith(str(folder)), "a path of three folders that aren't there"
    else:
        assert problem == f"{folder / 'manifest.json'}: {name!r} is no path below the folder"


def test_links_in_an_artifact_are_refused(folder):
    outside = folder.parent / "outside.txt"
    (folder / "link.txt").symlink_to(outside)
    listing(folder, **{"link.txt": row(outside)})
    assert artifact.verify(folder) == [f"{folder / 'manifest.json'}: 'link.txt' is a link, or lies behind one"]
    (folder / "link.txt").unlink()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("c")
    (folder / "linked").symlink_to(elsewhere)
    listing(folder, **{"link.txt": row(outside), "linked/c.txt": row(elsewhere / "c.txt")})
    problems = artifact.verify(folder)
    assert f"{folder / 'manifest.json'}: 'linked/c.txt' is a link, or lies behind one" in problems


def test_an_artifact_behind_a_link_is_still_one(folder, tmp_path):
    """A root on another disk is the user's business."""
    (tmp_path / "runs").symlink_to(folder.parent)
    assert artifact.verify(tmp_path / "runs" / folder.name) == []


def test_names_that_differ_in_case_alone_are_refused(folder):
    (folder / "A.txt").write_text("A")
    listing(folder, **{"A.txt": row(folder / "A.txt")})
    assert artifact.verify(folder) == [f"{folder / 'manifest.json'}: 'A.txt' and 'a.txt' differ in case alone"]


def test_the_command_refuses_such_an_artifact(folder, capsys):
    listing(folder, **{"../outside.txt": row(folder.parent / "outside.txt")})
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"bertpipe: {folder / 'manifest.json'}: '../outside.txt' is no path")


HOSTILE = ["../x", "..", "/etc/passwd", "file:///etc/passwd", "a/../../b", "SST2", "sst2/", "a\0b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_tasks_presets_and_repositories_are_known_names(name):
    with pytest.raises(ConfigError, match=r"finetune.tasks: no task called"):
        tasks.get(name)
    with pytest.raises(ConfigError, match=r"model.preset: "):
        read_preset(name)
    if "/" in name or "\0" in name or name == "..":
        with pytest.raises(ConfigError, match=r"publish.repo: "):
            publish.check_repo(name)
    with pytest.raises(ConfigError, match=r"publish.task: "):
        publish.check(Config(publish={"task": name}, finetune={"tasks": ["sst2"]}))


def test_a_preset_outside_its_folder_is_no_preset(tmp_path):
    (tmp_path / "evil.yaml").write_text("model_type: bert\n")
    with pytest.raises(ConfigError, match="is not one of albert-base, "):
        read_preset(os.path.relpath(tmp_path / "evil", Path("configs/model").resolve()))


@pytest.mark.parametrize("name", ["../x", "/nowhere/x", "file:///etc/passwd", "a/../../b"])
def test_a_tokenizer_or_checkpoint_that_is_no_name_is_one_line(name):
    from transformers import AutoModelForMaskedLM

    from bertpipe.data import tokenizer
    from bertpipe.model import encoders

    with pytest.raises(ConfigError, match=r"^tokenizer.adopt: "):
        tokenizer.adopt(Config(tokenizer={"adopt": name}).tokenizer)
    with pytest.raises(ConfigError, match=r"^model.init: "):
        encoders.load(AutoModelForMaskedLM, name, "model.init")


@pytest.mark.parametrize("source", ["file:///etc/hostname.txt", "hub:file:///etc/x", "../no-such-*.txt"])
def test_a_source_that_is_no_path_is_one_line(source, tmp_path):
    from bertpipe.data import sources

    cfg = Config(corpus={"sources": source})
    with pytest.raises(BertpipeError, match=r"^corpus.sources: "):
        sources.list_units(cfg.corpus)


def test_a_nul_in_a_setting_is_refused(tmp_path):
    config = tmp_path / "c.yaml"
    for text, key in ((r'runtime: {root: "a\0b"}', "runtime.root"), (r'corpus: {sources: ["a\0"]}', "corpus.sources")):
        config.write_text(text)
        with pytest.raises(ConfigError, match=rf"^{key}: holds a NUL character"):
            read_config([config], [])


@pytest.mark.parametrize(
    "text", ["[]", "3", '"x"', '{"files": 3}', '{"files": {"a.txt": 3}}', '{"files": {"a.txt": {}}}']
)
def test_a_manifest_of_another_shape_is_one_line(text, folder):
    (folder / artifact.MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest.json: not a manifest of ours"):
        artifact.verify(folder)
