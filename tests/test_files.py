"""Files are written whole or not at all, and read with a check of what they hold."""

import json

import pytest
import yaml

from svf_lightning.errors import DamagedError, InputError
from svf_lightning.files import check_shape, parse_yaml, read_json, read_yaml, write_json, write_text, written_whole


def test_a_file_is_replaced_at_once_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        write_text(path, text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    write_text(tmp_path / ("n" * 255), "text")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / ("n" * 256), "text")


def test_a_draft_that_is_not_finished_is_removed(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def stop_halfway():
        with written_whole(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.txt": "before"}


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(InputError, match="is no file"):
        write_text(tmp_path, "text")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5, float("inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5, None]}


SHAPE = {"name": str, "size?": (int, float), "parts": [{"x": int}], "words?": {"*": str}}
RIGHT = {"name": "a", "parts": [{"x": 1}]}


@pytest.mark.parametrize(
    "more", [{}, {"size": 2}, {"size": 2.5}, {"words": {"any name": "b"}}, {"parts": []}, {"else": None}]
)
def test_what_has_the_shape_is_taken(more):
    check_shape({**RIGHT, **more}, SHAPE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the file is null, not a mapping"),
        ({"parts": []}, "the file has no name"),
        ({**RIGHT, "name": 3}, "name is a whole number, not text"),
        ({**RIGHT, "size": True}, "size is true or false, not a whole number"),
        ({**RIGHT, "parts": [{"x": 1}, {"x": "1"}]}, r"parts\[1\].x is text, not a whole number"),
        ({**RIGHT, "words": {"b": 1}}, "words.b is a whole number, not text"),
        ({3: 4}, "a name that is no text"),
    ],
)
def test_what_has_another_shape_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        check_shape(value, SHAPE)


def test_json_is_strict(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, dict) is None
    for text in ('{"x": NaN}', '{"x": 1e999}', "[1]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DamagedError, match=r"a.json cannot be read \(.*\)\. Fix: the file is damaged"):
            read_json(path, dict)


def test_yaml_says_each_name_once_in_one_document_of_a_size_that_can_be_meant(tmp_path):
    path = tmp_path / "a.yaml"
    assert read_yaml(path, dict) is None
    path.write_text("a: &a {b: 1}\nc: *a\n")
    assert read_yaml(path, dict) == {"a": {"b": 1}, "c": {"b": 1}}
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdef", "bcdefg", strict=True)]
    for text, message in {
        "a: 1\nb: 2\na: 3\n": "line 3 says 'a' again, after line 1",
        "\n".join(lines): "more than 100,000 values",
        "a: &a [*a]\n": "contains itself",
        "[" * 200 + "]" * 200: "nested too deeply",
        "a: 1\n---\nb: 2\n": "another document",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_yaml(path)
    path.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        parse_yaml(path)


def test_the_settings_that_the_package_brings_can_be_read():
    from svf_lightning.preset_files import defaults_path

    paths = sorted(defaults_path().parent.rglob("*.yaml"))
    assert paths
    for path in paths:
        assert read_yaml(path, dict) == yaml.safe_load(path.read_text())
