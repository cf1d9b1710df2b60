"""Checkpoints: what they hold, which are kept and used, and what is refused."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from bertpipe import artifact
from bertpipe.errors import ArtifactError
from bertpipe.train import checkpoint, checkpoint_files
from bertpipe.train.checkpoint import Checkpoints, save_model
from bertpipe.train.optim import Optimizer
from tests import saved
from tests.model.test_attention import CONFIGS, make

FIFTH = "step-00000005"


@pytest.fixture
def three(tmp_path) -> Checkpoints:
    """Checkpoints of steps 3, 4 and 5, of which two are kept."""
    checkpoints, model, optimizer = saved.make(tmp_path)
    saved.save_steps(checkpoints, model, optimizer, 3, 4, 5)
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_folder_is_what_save_model_writes(kind, tmp_path):
    """Byte for byte, for every family, from a snapshot, while the model is set to packed attention."""
    model = make(kind)
    tokenizer = saved.make_tokenizer(tmp_path)
    optimizer = Optimizer(model, saved.RECIPE)
    packed = model.config._attn_implementation
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, tokenizer)
    for step in (1, 2):  # the tokenizer's files come from memory the second time
        checkpoints.save(step, model, optimizer, {})
    checkpoints.wait()
    assert model.config._attn_implementation == packed
    save_model(model, tokenizer, tmp_path / "model")
    for path in checkpoints.steps():
        assert {p.name for p in (path / "model").iterdir()} == {p.name for p in (tmp_path / "model").iterdir()}
        for file in (path / "model").iterdir():
            assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes(), file
            assert file.stat().st_mode & 0o777 == 0o644
    again = make(kind)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    Checkpoints.restore(checkpoints.steps()[0], again, Optimizer(again, saved.RECIPE))
    assert saved.equal(again.state_dict(), model.state_dict())


def test_what_is_restored_is_what_was_there_at_the_call(tmp_path):
    """Training goes on in place while the thread writes, and so does the caller's state."""
    checkpoints, model, optimizer = saved.make(tmp_path)
    saved.advance(model, optimizer, 1)
    gate = threading.Event()
    commit = checkpoints._commit
    checkpoints._commit = lambda *args: (gate.wait(), commit(*args))
    state = saved.state(1)
    checkpoints.save(1, model, optimizer, state)
    state["positions"]["metrics"] = 99
    saved.advance(model, optimizer, 2)
    model.config.hidden_size = 12345
    assert checkpoints.steps() == []
    gate.set()
    checkpoints.wait()
    step, tensors = saved.restored(checkpoints.newest())
    assert step == 1 and saved.equal(tensors, saved.oracle(1)[1])
    assert json.loads((checkpoints.newest() / "model" / "config.json").read_text())["hidden_size"] == 8


def test_one_write_at_a_time(tmp_path):
    checkpoints, model, optimizer = saved.make(tmp_path, keep=9)
    writing = []
    commit = checkpoints._commit

    def watched(*args):
        writing.append(1)
        assert len(writing) == 1, "two at once"
        commit(*args)
        writing.pop()

    checkpoints._commit = watched
    saved.save_steps(checkpoints, model, optimizer, *range(1, 7))
    assert len(checkpoints.steps()) == 6


def test_tied_weights_are_copied_once(tmp_path):
    model = saved.make_model()
    copies = checkpoint.copy_tensors(model.state_dict())
    tied = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    assert len({copies[name].data_ptr() for name in tied}) == 1
    assert copies[tied[0]].data_ptr() != model.get_parameter(tied[0]).data_ptr()
    with torch.no_grad():
        before = copies[tied[0]].clone()
        model.get_parameter(tied[0]).zero_()
    assert torch.equal(copies[tied[0]], before)


def test_a_model_from_an_old_file_with_gamma_and_beta_resumes(tmp_path):
    """transformers turns the names back when it saves such a model; a checkpoint keeps those in memory."""
    saved.make_model().save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(file).items()}
    assert len(old.keys() - load_file(file).keys()) == 4
    save_file(old, file, {"format": "pt"})
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "old")
    checkpoints, _, _ = saved.make(tmp_path)
    optimizer = Optimizer(model, saved.RECIPE)
    saved.advance(model, optimizer, 1)
    checkpoints.save(1, model, optimizer, saved.state(1))
    checkpoints.wait()
    step, tensors = saved.restored(checkpoints.newest())
    assert step == 1 and saved.equal(tensors, saved.tensors(model, optimizer))
    stock = BertForMaskedLM.from_pretrained(checkpoints.newest() / "model")
    assert saved.equal(stock.state_dict(), model.state_dict())


# Which are kept, which is used


def test_the_newest_by_step_are_kept_and_used_whatever_their_times(tmp_path):
    """F13: time stamps scrambled before each save, the clock back by a year, a step with nine digits."""
    checkpoints, model, optimizer = saved.make(tmp_path, keep=3)
    for step in (7, 8, 9, 10, 123456789, 123456790):
        for age, path in enumerate(checkpoints.steps()):  # the oldest looks the newest
            os.utime(path, (2e9 - 1e7 * age,) * 2)
            os.utime(path / "manifest.json", (2e9 - 1e7 * age,) * 2)
        checkpoints.save(step, model, optimizer, saved.state(step))
        checkpoints.wait()
    assert names(checkpoints) == ["step-00000010", "step-123456789", "step-123456790"]
    os.utime(checkpoints.folder / "step-123456790", (1, 1))
    assert checkpoints.newest().name == "step-123456790"


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_never_fewer_than_two_are_kept(tmp_path, keep):
    checkpoints, model, optimizer = saved.make(tmp_path, keep=keep)
    saved.save_steps(checkpoints, model, optimizer, 1, 2, 3, 4)
    assert names(checkpoints) == ["step-00000003", "step-00000004"]


def test_what_it_did_not_write_stays(three, tmp_path):
    """F15: unknown names, folders without its manifest, another run's lower steps; older ones of its own go."""
    folder = three.folder
    (folder / "notes").mkdir()
    (folder / "step-1").mkdir()
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "mine.txt").write_text("kept")
    (folder / "step-00000009.backup").mkdir()
    (folder / "step-00000004.partial.txt").write_text("kept")
    other, model, optimizer = saved.make(tmp_path / "other", run="another")
    saved.save_steps(other, model, optimizer, 2)
    shutil.copytree(other.newest(), folder / "step-00000002")
    shutil.copytree(folder / "step-00000004", folder / "step-00000000")
    stage = folder / "step-00000003"
    with artifact.committing(stage, kind="something", run=saved.RUN):
        pass
    before = set(names(three))
    checkpoints, model, optimizer = saved.make(tmp_path)
    saved.save_steps(checkpoints, model, optimizer, 6, 7)
    gone = {"step-00000004", "step-00000005"}
    assert set(names(checkpoints)) == before - gone | {"step-00000006", "step-00000007"}
    assert (folder / "step-00000001" / "mine.txt").read_text() == "kept"


def test_another_runs_checkpoint_is_refused(three, tmp_path):
    """F15: a higher step of another run in the folder stops the start, is left as it is and never overwritten."""
    other, model, optimizer = saved.make(tmp_path / "other", run="another")
    saved.save_steps(other, model, optimizer, 9)
    stray = Path(shutil.copytree(other.newest(), three.folder / "step-00000009"))
    content = {path: path.read_bytes() for path in artifact.list_files(stray)}
    with pytest.raises(ArtifactError, match=r"step-00000009: belongs to another run; move it out of "):
        three.newest()
    checkpoints, model, optimizer = saved.make(tmp_path)
    checkpoints.save(9, model, optimizer, {})
    with pytest.raises(ArtifactError, match=r"step-00000009: belongs to another run"):
        checkpoints.wait()
    assert content == {path: path.read_bytes() for path in artifact.list_files(stray)}
    assert Checkpoints(three.folder, 2, None).newest() == stray, "no run named: any is read"


def test_adopted_into_another_run(three, tmp_path):
    """As train.extend_from does: the copy is the new run's, the original still the old one's."""
    copied = checkpoint_files.adopt(three.newest(), tmp_path / "longer" / "checkpoints", "longer")
    checkpoints, model, optimizer = saved.make(tmp_path / "longer", run="longer")
    assert checkpoints.newest() == copied and saved.manifest(copied)["adopted_from"] == saved.RUN
    assert three.newest().name == FIFTH
    saved.save_steps(checkpoints, model, optimizer, 6, 7)
    assert names(checkpoints) == ["step-00000006", "step-00000007"]


def test_a_file_put_into_a_checkpoint_stays(three, tmp_path):
    (three.folder / "step-00000004" / "notes.txt").write_text("kept")
    checkpoints, model, optimizer = saved.make(tmp_path)
    saved.save_steps(checkpoints, model, optimizer, 6, 7)
    assert names(checkpoints) == ["step-00000004", "step-00000006", "step-00000007"]


def test_leftovers_are_cleared_and_nothing_else(three, tmp_path):
    folder = three.folder
    for name in ("step-00000006.0123abcd.partial", "step-00000006.partial", "step-00000004.ffffffff.partial"):
        shutil.copytree(folder / FIFTH, folder / name)
    (folder / "step-00000000.00000000.partial").write_bytes(b"dummy")
    (folder / "my.partial").mkdir()
    checkpoints, model, optimizer = saved.make(tmp_path)
    assert checkpoints.newest().name == FIFTH
    checkpoints.check_room(model, optimizer)
    assert names(checkpoints) == ["my.partial", "step-00000004", FIFTH]


# Damage


def damaged(three: Checkpoints, name: str, change) -> None:
    path = three.folder / FIFTH / name
    content = path.read_bytes()
    path.write_bytes(change(content))


def test_a_damaged_one_does_not_count_as_kept(three, tmp_path, capsys):
    """5 is damaged, the run goes on from 4: nothing whole is deleted before two whole ones stand."""
    damaged(three, "optimizer.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    checkpoints, model, optimizer = saved.make(tmp_path)
    assert checkpoints.newest().name == "step-00000004"
    error = capsys.readouterr().err
    assert error.startswith("checkpoint passed over: ") and f"{FIFTH}/optimizer.safetensors: content differs" in error
    saved.save_steps(checkpoints, model, optimizer, 6)
    assert names(checkpoints) == ["step-00000004", FIFTH, "step-00000006"]
    saved.save_steps(checkpoints, model, optimizer, 7)
    assert names(checkpoints) == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_the_step_of_a_damaged_one_is_saved_again(three, tmp_path, capsys, name):
    damaged(three, name, lambda content: content[:30])
    checkpoints, model, optimizer = saved.make(tmp_path)
    assert checkpoints.newest().name == "step-00000004"
    saved.save_steps(checkpoints, model, optimizer, 5)
    step, tensors = saved.restored(checkpoints.newest())
    assert step == 5 and saved.equal(tensors, saved.oracle(5)[5])
    kept = [name for name in names(checkpoints) if name.startswith("damaged-step-00000005.")]
    assert len(kept) == (name == "manifest.json"), "only what can't be told to be ours is kept"
    assert names(checkpoints)[len(kept) :] == ["step-00000004", FIFTH]


def test_all_damaged_is_an_error_not_a_new_start(three, tmp_path, capsys):
    (three.folder / FIFTH / "manifest.json").unlink()
    (three.folder / "step-00000004" / "state.json").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        three.newest()
    message = str(caught.value)
    assert "no checkpoint there is whole" in message and f"{FIFTH}/manifest.json: missing" in message
    assert "state.json: 2 bytes, the manifest says" in message and "delete the folder to train from step 0" in message
    assert "\n" not in message
    shutil.rmtree(three.folder)
    assert three.newest() is None


def test_the_same_step_again_changes_nothing(three, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in artifact.list_files(three.folder)}
    checkpoints, model, optimizer = saved.make(tmp_path)
    saved.save_steps(checkpoints, model, optimizer, 5)
    assert before == {path: path.stat().st_mtime_ns for path in artifact.list_files(three.folder)}


def test_one_written_before_there_were_runs_is_still_read(three, tmp_path):
    content = saved.manifest(three.folder / FIFTH)
    del content["run"], content["digest"]
    artifact.write_json(three.folder / FIFTH / "manifest.json", content)
    assert three.newest().name == FIFTH


# Tensors that are not this model's


def edited(three: Checkpoints, name: str, change) -> Path:
    path = three.newest()
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    return path


WORDS = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.transform.dense.bias"


MODEL, OPTIMIZER = "model/model.safetensors", "optimizer.safetensors"
MOMENT = f"{BIAS}//exp_avg"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MODEL, lambda t: t.pop(WORDS), f"{WORDS} is missing"),
        (MODEL, lambda t: t.update(more=torch.zeros(1)), "more is no tensor of this model"),
        (
            MODEL,
            lambda t: t.update({BIAS: torch.zeros(9)}),
            rf"{BIAS} is F32 \[9\], the model's is F32",
        ),
        (MODEL, lambda t: t.update({BIAS: t[BIAS].half()}), rf"{BIAS} is F16 \[8\]"),
        (
            OPTIMIZER,
            lambda t: t.update({"x//exp_avg": torch.zeros(1)}),
            "x//exp_avg is no tensor of this",
        ),
        (OPTIMIZER, lambda t: t.update({BIAS: torch.zeros(8)}), f"{BIAS} is no tensor of this"),
        (
            OPTIMIZER,
            lambda t: t.update({MOMENT: torch.zeros(3)}),
            r"F32 \[3\], the model's is",
        ),
        (OPTIMIZER, lambda t: t.update({MOMENT: t[MOMENT].double()}), "is F64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(three, name, change, message):
    path = edited(three, name, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        saved.restored(path)
    assert str(path / name) in str(caught.value)


def test_a_model_of_another_size_is_refused(three):
    model = saved.make_model(hidden=12)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtifactError, match=r"is F32 \[.*8\], the model's is F32 \[.*12\]"):
        Checkpoints.restore(three.newest(), model, Optimizer(model, saved.RECIPE))
    assert saved.equal(before, model.state_dict()), "nothing is loaded by halves"


ENDS = """
import sys
from pathlib import Path
from tests import saved
checkpoints, model, optimizer = saved.make(Path(sys.argv[1]))
saved.advance(model, optimizer, 1)
checkpoints.save(1, model, optimizer, saved.state(1))
raise RuntimeError("the end")
"""


def test_an_interpreter_that_ends_writes_to_the_end(tmp_path):
    """By an exception, with nobody waiting."""
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError: the end" in done.stderr
    checkpoints = saved.make(tmp_path)[0]
    assert names(checkpoints) == ["step-00000001"]
    step, tensors = saved.restored(checkpoints.newest())
    assert step == 1 and saved.equal(tensors, saved.oracle(1)[1])


def test_a_state_that_json_can_not_hold_is_refused_when_it_is_saved(tmp_path):
    checkpoints, model, optimizer = saved.make(tmp_path)
    checkpoints.save(1, model, optimizer, {"seconds": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoints.wait()
    assert names(checkpoints) == []
