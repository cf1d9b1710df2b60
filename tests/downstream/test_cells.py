"""Runs are kept: a rerun makes only what is missing, and what it makes has the bits of the first time."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bertpipe import artifact
from bertpipe.config import RuntimeConfig
from bertpipe.downstream.finetuning import cells, grid
from bertpipe.downstream.finetuning.cells import take
from bertpipe.errors import ArtifactError
from bertpipe.train.place import Place
from tests.crashes import KILLED, count_changes, in_child, killed_at
from tests.downstream.tuning import cells as cells_of
from tests.downstream.tuning import config, contents, scores, tune, write_task

SEEDS = 4
AUTO = Place(RuntimeConfig(device="cpu"), "auto").precision


@pytest.fixture(scope="module")
def made(trial, tmp_path_factory) -> Path:
    """A root with the artifact and the cells of one task and some seeds."""
    root = tmp_path_factory.mktemp("made")
    tune(trial, root, seeds=SEEDS)
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    """A copy of it whose artifacts are gone: only cells are left to begin with."""
    shutil.copytree(made / "cells", tmp_path / "cells")
    return tmp_path


def artifact_of(root: Path) -> Path:
    """The finished one."""
    (found,) = [path for path in root.glob("finetune-*") if not path.name.endswith(artifact.PARTIAL)]
    return found


@pytest.mark.parametrize(
    ("wider", "num_new"),
    [
        ({"seeds": SEEDS + 1}, 1),
        ({"seeds": [7, 1, 3]}, 1),
        ({"seeds": 2}, 0),
        ({"seeds": 2, "lr": [1e-2, 3e-3]}, 2),
        ({"seeds": 2, "epochs": [2, 1], "batch_size": [12, 8]}, 6),
        ({"seeds": 2, "tasks": ["sst2", "cola"]}, 2),
        ({"seeds": 2, "baselines": ["majority", "tfidf"]}, 2),
        ({"seeds": 2, "weight_decay": 0.1}, 2),
    ],
)
def test_only_what_is_new_is_made(trial, root, capsys, wider, num_new):
    before = cells_of(root)
    folder = tune(trial, root, **{"seeds": SEEDS} | wider)
    after = cells_of(root)
    assert len(before) == SEEDS and {name: after.get(name) for name in before} == before
    assert len(after) - len(before) == num_new
    assert artifact.read_manifest(folder)["counts"]["runs_made"] == num_new
    printed = capsys.readouterr().out
    if {"seeds"} == {*wider} and wider["seeds"] == SEEDS + 1:
        assert "made again" not in printed, "the best model so far was kept"
    assert sum(line.startswith("run ") for line in printed.splitlines()) == num_new


def test_auto_is_what_it_comes_to(trial, tmp_path):
    """A folder of cells may be shared by machines where it comes to something else."""
    first, second = (tune(trial, tmp_path, seeds=1, precision=how) for how in (AUTO, "auto"))
    assert first != second and artifact.read_manifest(second)["counts"]["runs_made"] == 0


def test_a_task_folder_dropped_beside_the_others_costs_that_task_alone(trial, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(trial / "model", start / "model")
    write_task(start / "glue", "cola")
    first = tune(start, tmp_path / "runs", tasks="all", seeds=1)
    before = cells_of(tmp_path / "runs")
    write_task(start / "glue", "rte")
    second = tune(start, tmp_path / "runs", tasks="all", seeds=1)
    assert (list(scores(first)), list(scores(second))) == (["cola"], ["cola", "rte"])
    assert artifact.read_manifest(second)["counts"]["runs_made"] == 1
    assert before.items() <= cells_of(tmp_path / "runs").items()


def test_the_same_seed_twice_gives_the_same_bits(trial, made, tmp_path):
    """Weights, predictions, scores and records; in one process, with other runs before it."""
    again = tune(trial, tmp_path, seeds=[1, 2, 3, 4])
    first, second = (contents(folder / "sst2") for folder in (artifact_of(made), again))
    assert first == second
    assert {"model/model.safetensors", "runs/model-seed-4/predictions-test.jsonl"} <= first.keys()
    assert len({first[f"runs/model-seed-{seed}/metrics.jsonl"] for seed in range(1, SEEDS + 1)}) == SEEDS


def best_of(root: Path) -> int:
    return scores(artifact_of(root))["sst2"]["model_seed"]


def others(made: Path) -> list[int]:
    """Seeds without the best one: the best of these was dropped."""
    return [seed for seed in range(1, SEEDS + 1) if seed != best_of(made)]


def test_a_model_that_was_dropped_is_made_again_bit_for_bit(trial, made, root, tmp_path_factory, capsys):
    assert len(list((root / "cells").glob("*-model"))) == 1
    before = cells_of(root)
    narrower = tune(trial, root, seeds=others(made))
    assert "is made again, for its model" in capsys.readouterr().out
    fresh = tune(trial, tmp_path_factory.mktemp("fresh"), seeds=others(made))
    assert contents(narrower / "sst2") == contents(fresh / "sst2")
    assert cells_of(root) == before, "the cell itself stays; only its model is new"
    assert artifact.verify(narrower) == []


def test_a_run_that_comes_out_otherwise_is_not_passed_off_as_the_first(trial, made, root):
    """As after another number of threads: the cell says what it predicted, and its model would say something else."""
    for folder in (root / "cells").glob("*"):
        path = folder / "predictions-test.jsonl"
        if path.is_file():
            path.write_text(path.read_text().replace("positive", "negative").replace("[", "[1", 1))
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": artifact.hash_file(path)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"predictions-test.jsonl: made again.*delete .*cells/sst2-") as caught:
        tune(trial, root, seeds=others(made))
    shutil.rmtree(str(caught.value).partition("delete ")[2].partition(" and run")[0])
    tune(trial, root, seeds=others(made))


def test_the_artifact_stands_without_its_cells(trial, made, tmp_path):
    root = shutil.copytree(made, tmp_path / "root")
    shutil.rmtree(root / "cells")
    folder = artifact_of(root)
    assert artifact.verify(folder) == []
    again = tune(trial, root, seeds=[4, 3, 2, 1])
    assert contents(again / "sst2" / "model") == contents(folder / "sst2" / "model")
    assert len(cells_of(root)) == SEEDS


def test_files_are_shared_where_the_disk_can_and_copied_where_not(made, tmp_path):
    for cell in (made / "cells").glob("*"):
        for path in artifact.list_files(cell):
            assert path.stat().st_nlink == 2, f"{path}: one in the cell, one in the artifact"
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == made.stat().st_dev:
        pytest.skip("no second file system to copy to")
    cell, target = next(iter(made.glob("cells/*-model"))), elsewhere / f"bertpipe-test-{os.getpid()}"
    try:
        take(cell, target)
        assert contents(target) == contents(cell)
    finally:
        shutil.rmtree(target)


def cell_of(trial: Path, root: Path, seed: int) -> cells.Cell:
    """The cell of a run, as the stage names it."""
    from bertpipe.downstream.tasks import tasks

    settings = config(trial, root).finetune
    data = tasks.identify(["sst2"], settings.data)["sst2"]
    model = artifact.identify_model(settings.model, None)
    run = grid.Run("model", seed, grid.point_of(settings))
    return cells.cell(root, tasks.get("sst2"), data, model, run, settings)


def test_a_run_that_another_command_makes_is_left_to_it(trial, root):
    """Both commands want seed 9; the lock is held by an open file, in another process or in this one."""
    taken = cell_of(trial, root, 9)
    with taken.committing() as (scratch, _):
        (scratch / "half").write_text("of it")
        with pytest.raises(ArtifactError, match=rf"{taken.folder}.partial: in use by process {os.getpid()} on .*wait"):
            tune(trial, root, seeds=[1, 9])
        assert (scratch / "half").is_file() and not taken.is_done
        artifact.write_json(scratch / "scores.json", {})
    assert taken.outcome == {}


def test_a_model_that_another_command_drops_is_no_model(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "root")
    kept = next(iter(root.glob("cells/*-model")))
    cell = cells.Cell("sst2", grid.Run("model", 1, None), None, "", kept.with_name(kept.name.removesuffix("-model")))
    (kept.parent / f"{kept.name}.dropped").mkdir()  # of one that was killed as it dropped an earlier one
    assert cell.take_model(tmp_path / "model") and (tmp_path / "model" / "config.json").is_file()
    cell.drop_model()
    assert not cell.take_model(tmp_path / "model") and list(root.glob("cells/*-model*")) == []


@pytest.mark.parametrize(("unit", "victim"), [("", "predictions-validation.jsonl"), ("-model", "model/config.json")])
def test_a_damaged_cell_is_one_line_that_says_what_to_do(trial, made, root, unit, victim):
    name = next(iter((root / "cells").glob("*-model"))).name.removesuffix("-model")
    path = root / "cells" / f"{name}{unit}" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        tune(trial, root, seeds=SEEDS)
    folder = root / "cells" / f"{name}{unit}"
    assert (
        str(caught.value)
        == f"{path}: content differs from the manifest's sha256; delete {folder} and run the command again"
    )
    shutil.rmtree(folder)
    assert contents(tune(trial, root, seeds=SEEDS) / "sst2") == contents(artifact_of(made) / "sst2")


def crash(trial: Path, folder: Path, every: int) -> int:
    """kill -9 at every `every`th change to the disk, then the same command: the artifact of the undisturbed run, and
    no finished run made twice. At how many points."""
    wanted = contents(tune(trial, folder / "undisturbed") / "sst2")
    root = folder / "root"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()

    def work() -> None:
        tune(trial, root)

    fresh()
    changes = count_changes(root, work)
    assert {"os.rename", "os.link", "os.rmdir", "fsync", "write"} <= {*changes}
    points = range(every // 2, len(changes), every)
    for number in points:
        fresh()
        assert killed_at(root, work, number, torn=number % 2 == 0) == KILLED
        finished = cells_of(root)
        assert in_child(work) == 0, f"change {number} of {len(changes)}, {changes[number]}"
        assert finished.items() <= cells_of(root).items(), f"made twice after change {number}, {changes[number]}"
        assert contents(artifact_of(root) / "sst2") == wanted and artifact.verify(artifact_of(root)) == []
        assert len(list(root.glob("cells/*-model"))) == 1 and not list(root.glob("cells/*.partial"))
    return len(points)


def test_a_kill_costs_the_run_it_hits(trial, tmp_path):
    assert crash(trial, tmp_path, every=100) > 1


@pytest.mark.torture
def test_a_kill_anywhere_costs_the_run_it_hits(trial, tmp_path):
    assert crash(trial, tmp_path, every=2) > 50
