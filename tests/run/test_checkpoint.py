"""Checkpoints are read whole or refused, and nothing in them is run."""

import io
import pickle
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import train

from svf_lightning.errors import InputError
from svf_lightning.run.checkpoint import has_training_state, read_checkpoint


def saved_by_a_training(folder, **options):
    writer = pl.callbacks.ModelCheckpoint(folder / "checkpoints", save_last=True, **options)
    train(folder, 2, [writer], trainer={"enable_checkpointing": True})
    return folder / "checkpoints" / "last.ckpt"


def test_a_checkpoint_holds_what_torch_reads_from_it(tmp_path):
    path = saved_by_a_training(tmp_path)
    saved, plain = read_checkpoint(path), torch.load(path, weights_only=True)
    assert saved.keys() == plain.keys()
    assert saved["global_step"] == 2
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in plain["state_dict"].items())


def test_weights_alone_are_told_from_the_state_of_a_training(tmp_path):
    assert has_training_state(read_checkpoint(saved_by_a_training(tmp_path / "whole")))
    assert not has_training_state(read_checkpoint(saved_by_a_training(tmp_path / "part", save_weights_only=True)))


class _Runs:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewritten(checkpoint, **changes):
    """The same archive with members replaced (by the end of their names) or written in another way."""
    raw = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as before, zipfile.ZipFile(raw, "w") as after:
        for member in before.infolist():
            content = before.read(member)
            for ending, other in changes.get("members", {}).items():
                content = other if member.filename.endswith(ending) else content
            after.writestr(member.filename, content, changes.get("compression", zipfile.ZIP_STORED))
    return raw.getvalue()


def of(value):
    raw = io.BytesIO()
    torch.save(value, raw)
    return raw.getvalue()


STATE = {"W": torch.ones(3)}
UNREADABLE = {
    "an empty file": lambda path, canary: b"",
    "text": lambda path, canary: b"epoch: 3\n",
    "a file that ends in the middle": lambda path, canary: path.read_bytes()[:5000],
    "a file without its first bytes": lambda path, canary: path.read_bytes()[100:],
    "torch's format before zip": lambda path, canary: legacy({"state_dict": STATE, "global_step": 1}),
    "a number": lambda path, canary: of(3),
    "no weights": lambda path, canary: of({"global_step": 1}),
    "weights that are a list": lambda path, canary: of({"state_dict": [STATE["W"]], "global_step": 1}),
    "weights that are text": lambda path, canary: of({"state_dict": {"W": "1"}, "global_step": 1}),
    "no step": lambda path, canary: of({"state_dict": STATE}),
    "a step that is no number": lambda path, canary: of({"state_dict": STATE, "global_step": "1"}),
    "a negative step": lambda path, canary: of({"state_dict": STATE, "global_step": -1}),
    "compressed members": lambda path, canary: rewritten(path, compression=zipfile.ZIP_DEFLATED),
    "a tensor with too few bytes": lambda path, canary: rewritten(path, members={"data/0": b"1234"}),
    "a pickle that runs code": lambda path, canary: pickle.dumps(_Runs(canary)),
    "an archive whose pickle runs code": lambda path, canary: rewritten(
        path, members={"data.pkl": pickle.dumps(_Runs(canary), protocol=2)}
    ),
}


def legacy(value):
    raw = io.BytesIO()
    torch.save(value, raw, _use_new_zipfile_serialization=False)
    return raw.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved_by_a_training(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_whole_checkpoint_is_refused_in_one_line_and_nothing_is_run(tmp_path, checkpoint, case):
    canary, path = tmp_path / "canary", tmp_path / "other.ckpt"
    path.write_bytes(UNREADABLE[case](checkpoint, canary))
    with pytest.raises(InputError, match=r"other.ckpt cannot be read \(.+\). Allowed: .+ Fix: .+\.$") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not canary.exists()


def test_a_folder_and_a_missing_file_are_no_checkpoints(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.ckpt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_checkpoint(path)
