"""Tensors into a file: the bytes of safetensors itself, whatever the disk makes of the writes."""

import errno
import fcntl
import hashlib
import io
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertpipe.train import tensor_file

SHAPES = ((), (0,), (1,), (3, 5), (0, 4), (2, 0, 3), (7, 1, 2), (701,))
LARGE = 3 * tensor_file.BUFFER // 4  # float32 elements: three buffers


def example(large: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype in many shapes, names that JSON escapes, one tensor that isn't contiguous, one that ends a buffer."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f'{number % 3}é"\\//{dtype}{shape}': torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, dtype in enumerate(tensor_file.DTYPES)
        for shape in SHAPES
    }
    tensors["gradient"] = torch.ones(3, requires_grad=True)
    return tensors | {"large": torch.randn(large, generator=generator), "wide": torch.randn(9, generator=generator)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"one": "é"}])
@pytest.mark.parametrize("large", [0, LARGE, LARGE + 1, 1_000_003])
def test_the_bytes_are_those_of_safetensors(tmp_path, metadata, large):
    """And its digest is theirs, its tensors those that were given."""
    tensors = example(large)
    save_file(tensors, tmp_path / "theirs", metadata)
    digest = tensor_file.write(tmp_path / "ours", tensors, metadata)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(ours).hexdigest()
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o644
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("tensors", [{}, {"none": torch.zeros(0)}, {"one": torch.tensor(3)}])
def test_hardly_any_tensors(tmp_path, tensors):
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    tensor_file.write(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_and_shared_memory(tmp_path):
    """A transposed tensor is written as it reads; one that shares its memory is written for itself."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "turned": base.t(), "row": base[1], "same": base}
    tensor_file.write(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_no_checkpoint_has(tmp_path):
    with pytest.raises(KeyError, match="complex64"):
        tensor_file.write(tmp_path / "file", {"z": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "file").exists()


class _Disk(io.FileIO):
    """A file whose writes are short by turns, or that has no direct writes; keeps what was asked of it."""

    refuses = False
    asked: ClassVar[list[tuple[int, bool]]] = []

    def write(self, data):
        direct = bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & tensor_file.DIRECT)
        self.asked.append((len(data), direct))
        if self.refuses and direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        if self.refuses is None and not direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data if len(self.asked) % 2 else data[: len(data) // 2 // 512 * 512 or len(data)])


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr(Path, "open", lambda path, mode, **_: _Disk(path, mode.replace("b", "")))
    monkeypatch.setattr(_Disk, "asked", [])
    return _Disk


def supports_direct(folder) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | tensor_file.DIRECT))
    except OSError:
        return False
    return bool(tensor_file.DIRECT)


@pytest.mark.parametrize("refuses", [False, True])
def test_short_writes_and_a_disk_without_direct_ones(tmp_path, disk, monkeypatch, refuses):
    """What is left is written on; what can't go past the page cache goes through it."""
    monkeypatch.setattr(disk, "refuses", refuses)
    tensors = example(LARGE + 1)
    tensor_file.write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert len(disk.asked) > 5
    if supports_direct(tmp_path):
        assert [direct for _, direct in disk.asked].count(True) >= (1 if refuses else 3)


def test_a_write_that_is_refused_for_good_is_an_error(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(disk, "refuses", None)
    with pytest.raises(OSError, match="Invalid argument"):
        tensor_file.write(tmp_path / "file", {"one": torch.zeros(3)})


def test_large_files_go_past_the_page_cache(tmp_path, disk):
    """All but the end of a file, which fills no buffer."""
    if not supports_direct(tmp_path):
        pytest.skip("this file system has no direct writes")
    tensor_file.write(tmp_path / "file", {"one": torch.zeros(LARGE)})
    whole = [direct for length, direct in disk.asked if length == tensor_file.BUFFER]
    assert whole and all(whole)
    assert not disk.asked[-1][1]
