"""Damaged checkpoints: refused, or what they hold is the same."""

import random
import zipfile

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import train

from svf_lightning.errors import InputError
from svf_lightning.run.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    writer = pl.callbacks.ModelCheckpoint(folder / "checkpoints", save_last=True)
    train(folder, 2, [writer], trainer={"enable_checkpointing": True})
    return folder / "checkpoints" / "last.ckpt"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def regions(path):
    """Positions of the bytes by what they are: members' contents, what lies between, the directory at the end."""
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        contents = set()
        for member in archive.infolist():
            at = member.header_offset
            start = at + 30 + sum(int.from_bytes(raw[i : i + 2], "little") for i in (at + 26, at + 28))
            contents |= set(range(start, start + member.file_size))
        directory = range(archive.start_dir, len(raw))
    between = set(range(archive.start_dir)) - contents
    return {"contents": sorted(contents), "headers and padding": sorted(between), "directory": list(directory)}


def read(path, raw, whole):
    """(silently wrong, message) of a damaged file."""
    path.write_bytes(raw)
    try:
        return not same(read_checkpoint(path), whole), ""
    except InputError as error:
        return "\n" in str(error), str(error)


@pytest.mark.parametrize(("region", "n"), [("contents", 300), ("headers and padding", 300), ("directory", 1000)])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, checkpoint, injected, region, n):
    raw, whole = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    rng = random.Random(0)
    places = [(at, bit) for at in regions(checkpoint)[region] for bit in range(8)]
    for at, bit in rng.sample(places, n):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << bit
        wrong, message = read(tmp_path / "damaged.ckpt", bytes(damaged), whole)
        if region == "contents":
            wrong = wrong or not message  # every byte of them has a checksum
        injected(f"single-bit flip in a checkpoint: {region}", wrong=wrong, message=message, what=f"{at}, bit {bit}")


def test_a_mark_that_makes_a_tensor_a_folder_is_refused(tmp_path, checkpoint, injected):
    """torch gives such a tensor whatever is in memory, and no checksum covers the mark."""
    raw, whole = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    with zipfile.ZipFile(checkpoint) as archive:
        at = archive.start_dir
        for member in archive.infolist():
            damaged = bytearray(raw)
            damaged[at + 38] ^= 0x10
            at += 46 + len(member.filename) + len(member.extra) + len(member.comment)
            wrong, message = read(tmp_path / "damaged.ckpt", bytes(damaged), whole)
            injected("member of a checkpoint marked as a folder", wrong=wrong or not message, message=message)


def test_a_file_that_was_cut_or_has_holes_is_refused(tmp_path, checkpoint, injected):
    raw, whole = checkpoint.read_bytes(), read_checkpoint(checkpoint)
    rng = random.Random(0)
    for length in rng.sample(range(len(raw)), 150):
        wrong, message = read(tmp_path / "damaged.ckpt", raw[:length], whole)
        injected("checkpoint that ends early", wrong=wrong or not message, message=message, what=str(length))
    for at in range(0, len(raw), 512):  # a sector that was never written
        holed = raw[:at] + bytes(len(raw[at : at + 512])) + raw[at + 512 :]
        wrong, message = read(tmp_path / "damaged.ckpt", holed, whole)
        injected("checkpoint with a sector of zeros", wrong=wrong, message=message, what=str(at))
