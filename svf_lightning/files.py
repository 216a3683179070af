"""Text, JSON and YAML files: written whole, and read with a check of what they hold."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import yaml

from svf_lightning.errors import InputError, damaged, reason

_MOST_NODES = 100_000  # of a YAML file with its aliases written out
_MOST_BYTES = 10_000_000
_DEEPEST = 50  # levels of a YAML file

# What a file must hold: a type, a tuple of shapes that it may have, {name: shape} with "name?" for what may be missing,
# [shape] for a list, or {"*": shape} for a mapping of any names
Shape = Any
_ALL = "the file"
_NAMES: Mapping[type, str] = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping",
    Mapping: "a mapping", NoneType: "null",
}  # fmt: skip


@contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; that file takes its place at the end, or is removed if the end does not come.

    A reader sees the old file or the new one.

    Args:
        path: The file. Its folder is made.
        durable: So it is also after a crash of the machine, which costs the time that the disk takes.

    Raises:
        InputError: The folder or the disk does not take it, or something is there that is no file.
    """
    draft = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "\0" in str(path) or (path.exists() and not path.is_file()):
            raise InputError(
                f"{path} is no file. Allowed: a file, which is replaced, or a new one. Fix: change the path."
            )
        yield draft
        if durable:
            _sync(draft)
        draft.replace(path)
        if durable:
            with suppress(OSError):  # not every file system can
                _sync(path.parent)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else reason(error)
        raise InputError(
            f"{path} cannot be written ({why}). Allowed: a place with room, where you may write. "
            "Fix: make room, or choose another place; what was there before is as it was."
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file whole: a reader sees the old text or the new one.

    Args:
        path: The file. Its folder is made.
        text: All of it.
        durable: So it is also after a crash of the machine.

    Raises:
        InputError: The folder or the disk does not take it.
    """
    with written_whole(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strictly valid JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    return value


def read_json(path: Path, shape: Shape) -> Any:
    """What a JSON file of a run holds; None if there is no such file.

    Args:
        path: The file.
        shape: What it must hold.

    Raises:
        DamagedError: It cannot be read, is not strictly valid JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_number)
        check_shape(value, shape)
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _no_number(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")


def _number(literal: str) -> float:
    return float(literal) if math.isfinite(float(literal)) else _no_number(literal)


def check_shape(value: Any, shape: Shape, where: str = _ALL) -> None:
    """Check what a file holds.

    Args:
        value: JSON values.
        shape: What they must be.
        where: What the error calls them.

    Raises:
        ValueError: They are something else.
    """
    if isinstance(shape, tuple):
        reasons = []
        for part in shape:
            try:
                return check_shape(value, part, where)
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(" and ".join(reasons))
    if isinstance(shape, dict):
        check_shape(value, Mapping, where)
        if any(not isinstance(name, str) for name in value):
            raise ValueError(f"{where} has a name that is no text")
        parts = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        for name, part in parts.items():
            known = name if "*" in shape else name.removesuffix("?")
            if known in value:
                check_shape(value[known], part, known if where == _ALL else f"{where}.{known}")
            elif known == name:
                raise ValueError(f"{where} has no {name}")
    elif isinstance(shape, list):
        check_shape(value, list, where)
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{i}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):  # True is an int for Python
        raise ValueError(f"{where} is {_NAMES.get(type(value), type(value).__name__)}, not {_NAMES[shape]}")
    return None


def read_yaml(path: Path, shape: Shape) -> Any:
    """What a YAML file of a run holds; None if there is no such file.

    Args:
        path: The file.
        shape: What it must hold.

    Raises:
        DamagedError: It cannot be read, or holds something else.
    """
    try:
        node = parse_yaml(path)
        value = None if node is None else yaml.SafeLoader("").construct_document(node)
        check_shape(value, shape)
        json.dumps(value)  # dates, sets and bytes are no settings
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise damaged(path, error) from error


def parse_yaml(path: Path) -> yaml.Node | None:
    """The parts of a YAML file: one document in UTF-8 that has each name once; None for an empty one.

    Raises:
        ValueError: It is something else, or so deep or so large that nobody meant it.
        OSError: It cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error
    if node is not None:
        _check_node(node)
    return node


def _check_node(root: yaml.Node) -> None:
    """Check names and size of what was parsed, before anything is built of it."""
    n_nodes: dict[int, int] = {}  # of each collection with its aliases written out; 0 while it is being counted

    def count(node: yaml.Node, depth: int) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in n_nodes:
            if n_nodes[id(node)] == 0:
                raise ValueError(f"line {node.start_mark.line + 1} contains itself")
            return n_nodes[id(node)]
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        n_nodes[id(node)] = 0
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
            children = [part for pair in node.value for part in pair]
        n_nodes[id(node)] = total = 1 + sum(count(child, depth + 1) for child in children)
        if total > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES:,} values with its aliases written out")
        return total

    count(root, 0)


def _check_names(node: yaml.MappingNode) -> None:
    first: dict[Hashable, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in first:
            raise ValueError(f"line {line} says {key.value!r} again, after line {first[key.value]}")
        first[key.value if isinstance(key, yaml.ScalarNode) else id(key)] = line


def is_file(path: Path) -> bool:
    """True for a file; False also for what cannot be the path of one, such as a name that is too long.

    Raises:
        InputError: Its folder may not be read.
    """
    try:
        return path.is_file()
    except ValueError:  # a null byte
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise InputError(
            f"{path} cannot be read ({reason(error)}). Fix: check the path and its permissions."
        ) from error
