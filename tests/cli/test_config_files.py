"""Configuration files that cannot be meant: one line that says what is wrong with them."""

import re

import pytest

CASES = {
    "an option twice": ("model:\n  d_model: 8\n  d_model: 9\n", r"line 3 says 'd_model' again, after line 2"),
    "Latin-1": ("experiment: {name: café}\n".encode("latin-1"), r"line 1 is not UTF-8"),
    "nothing": ("", r"it holds no settings"),
    "a list": ("- 1\n", r"it holds no settings"),
    "a variable that is not set": ("experiment: {name: '${oc.env:NOT_SET}'}", r"experiment.name is not.*'NOT_SET' not found"),
    "an unknown resolver": ("model: {d_head: '${eval:2*8}'}", r"model.d_head is not usable: Unsupported.*oc.env"),
    "a reference to itself": ("model: {d_model: '${.d_model}'}", r"model.d_model is not usable: Recursive"),
    "a value of another type": ("model: {d_model: [1]}", r"model.d_model is not usable: .*int, null, and was \[1\]"),
    "a huge number": ("model: {d_model: 99999999999999}", r"d_model=99999999999999 is not usable.*<= 2,147,483,647"),
    "more than the memory": ("model: {n_features: 2000000000}", r"the model would take .* GiB of memory are free"),
    "a batch beyond the memory": ("data: {batch_size: 2000000000}", r"a batch would take .* GiB of memory are free"),
    "a seed out of range": ("seed_everything: -1", r"seed_everything=-1.*0 to 4294967295"),
    "an experiment that is a number": ("experiment: 3", r"experiment=3 is not usable.*options by name"),
    "a name above its folder": ("experiment: {name: ../x}", r"experiment.name='../x' is not usable"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_that_cannot_be_meant_is_one_line(command, typed, case):
    content, message = CASES[case]
    (command.folder / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = typed("fit", "--config=a.yaml")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert "Fix: " in result.stderr
    assert command.files() == ["a.yaml"]


def test_two_configurations_are_taken_one_after_the_other(command, typed):
    (command.folder / "a.yaml").write_text("model: {n_features: 12, d_model: 5}\n")
    (command.folder / "b.yaml").write_text("model: {n_features: 0}\n")
    assert "n_features=0 is not usable" in typed("fit", "--config=a.yaml", "--config=b.yaml").stderr
    assert "d_model=-5 is not usable" in typed("fit", "--config=a.yaml", "--model.d_model=-5").stderr
