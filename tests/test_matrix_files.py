"""Matrices in files: what is read, and what is refused without being run."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from svf_lightning.errors import InputError
from svf_lightning.matrix_files import FORMATS, read_matrices


def read(path):
    return read_matrices("init_features", path, "one matrix [3, 4]")


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8"])
def test_a_npy_file_is_one_matrix_without_a_name(tmp_path, dtype):
    matrix = np.arange(12, dtype=dtype).reshape(3, 4)
    np.save(tmp_path / "m.npy", matrix)
    found = read(tmp_path / "m.npy")
    assert list(found) == [""]
    np.testing.assert_array_equal(found[""].numpy(), matrix)
    assert found[""].numpy().dtype == matrix.dtype


def test_a_safetensors_file_is_its_matrices_by_name(tmp_path):
    matrices = {"W_Q": torch.randn(3, 4), "W_K": torch.randn(2, 5, dtype=torch.float64)}
    save_file(matrices, tmp_path / "m.safetensors")
    found = read(str(tmp_path / "m.safetensors"))
    assert set(found) == {"W_Q", "W_K"}
    assert all(torch.equal(found[name], matrix) for name, matrix in matrices.items())


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "m.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save({"W": Bomb()}, tmp_path / "m.pt")
    for name in ("m.npy", "m.pt"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100], ids=["missing", "empty", "garbage"])
def test_a_file_that_cannot_be_read_is_one_line_with_the_option_the_path_and_what_is_allowed(tmp_path, suffix, content):
    path = tmp_path / f"m{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(f"init_features: {path} cannot be read (")
    assert "Allowed: one matrix [3, 4]. Fix: " in text
    assert "\n" not in text


def test_another_format_is_refused_by_its_name(tmp_path):
    (tmp_path / "m.csv").write_text("1,2\n")
    with pytest.raises(InputError, match=r"m\.csv cannot be read \(it is no \.npy or \.safetensors file\)"):
        read(tmp_path / "m.csv")
