"""Damaged files of a run: one line and exit code 2, or what was read is right; nothing is overwritten."""

import json
import random
import shutil

import pytest
import yaml
from helpers.command_line import ForkedCommand, run_dir_of

from svf_lightning.errors import InputError
from svf_lightning.run.directory import read_config
from svf_lightning.run.summary import read_summary
from svf_lightning.trajectory import open_trajectory

TINY = ("--trainer.max_steps=6", "--data.batch_size=8", "--model.n_instances=2", "--report=false")
NO_MEDIA = "--trainer.logger.init_args.log_media=false"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    command = ForkedCommand(folder)
    return run_dir_of(command("fit", "--run_dir=run", *TINY, NO_MEDIA), command)


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "work" / "run", symlinks=True)


def contents(folder):
    """Every file and what it holds, but W&B's logs."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "wandb" not in path.parts
    }


def is_one_line(result):
    lines = result.stderr.strip().splitlines()
    return result.returncode == 2 and len(lines) == 1 and "Fix: " in lines[0] and not result.stdout


# ---- the trajectory, from Python -------------------------------------------------------------------------------------


def read_trajectory(folder, whole):
    """(silently wrong, message) of a damaged trajectory."""
    try:
        return not open_trajectory(folder).load().identical(whole), ""
    except InputError as error:
        text = str(error)
        return "\n" in text or "Fix: " not in text, text


def metadata_files(run_dir):
    return sorted(path for path in (run_dir / "trajectory.zarr").rglob(".z*") if path.is_file())


def chunk_files(run_dir):
    return sorted(p for p in (run_dir / "trajectory.zarr").rglob("*") if p.is_file() and not p.name.startswith("."))


def test_a_flipped_bit_in_metadata_is_noticed(run_dir, injected):
    whole, rng = open_trajectory(run_dir).load(), random.Random(0)
    for path in metadata_files(run_dir):
        raw = path.read_bytes()
        for at in rng.sample(range(8 * len(raw)), 60 if path.name == ".zmetadata" else 4):
            damaged = bytearray(raw)
            damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            wrong, message = read_trajectory(run_dir, whole)
            injected("single-bit flip in a trajectory's metadata", wrong=wrong, message=message, what=f"{path} {at}")
        path.write_bytes(raw)


def test_metadata_that_were_cut_or_are_missing_are_noticed_or_not_needed(run_dir, injected):
    whole, rng = open_trajectory(run_dir).load(), random.Random(0)
    for path in metadata_files(run_dir):
        raw = path.read_bytes()
        for length in (0, 1, rng.randrange(len(raw)), len(raw) - 1):
            path.write_bytes(raw[:length])
            wrong, message = read_trajectory(run_dir, whole)
            injected("trajectory's metadata that end early", wrong=wrong, message=message, what=f"{path} {length}")
        path.unlink()
        wrong, message = read_trajectory(run_dir, whole)
        injected("trajectory's metadata that are missing", wrong=wrong, message=message, what=str(path))
        path.write_bytes(raw)


@pytest.mark.parametrize("name", [".zmetadata", ".zattrs", "step/.zarray", "instance-f4/.zattrs"])
def test_metadata_of_another_structure_are_noticed(run_dir, injected, name):
    """In all files that say the same, so that none contradicts another."""
    whole, path = open_trajectory(run_dir).load(), run_dir / "trajectory.zarr" / name
    consolidated = run_dir / "trajectory.zarr" / ".zmetadata"
    raw = {file: file.read_bytes() for file in (path, consolidated)}
    before = json.loads(path.read_text())
    keys = [None, *(before if name != ".zmetadata" else ["metadata"])]
    for key in keys:
        for value in (None, 3, -1, "text", [], {}, [[]], ["step"] * 9, {"a": 1}, True, 10**30):
            changed = value if key is None else {**before, key: value}
            path.write_text(json.dumps(changed))
            if path != consolidated:
                together = json.loads(raw[consolidated])
                together["metadata"][name] = changed
                consolidated.write_text(json.dumps(together))
            try:
                open_trajectory(run_dir).load()
                message, wrong = "", False
            except InputError as error:
                message, wrong = str(error), "\n" in str(error)
            injected("trajectory's metadata of another structure", wrong=wrong, message=message, what=f"{key} {value}")
    for file, content in raw.items():
        file.write_bytes(content)
    assert open_trajectory(run_dir).load().identical(whole)


def test_a_chunk_that_was_cut_is_noticed(run_dir, injected):
    whole, rng = open_trajectory(run_dir).load(), random.Random(0)
    for path in chunk_files(run_dir):
        raw = path.read_bytes()
        for length in (0, 3, 15, 16, rng.randrange(len(raw)), len(raw) - 1):
            path.write_bytes(raw[:length])
            wrong, message = read_trajectory(run_dir, whole)
            injected("chunk that ends early", wrong=wrong or not message, message=message, what=f"{path} {length}")
        path.write_bytes(raw)


def test_a_flipped_bit_anywhere_in_a_chunk_is_noticed(run_dir, injected):
    whole, rng = open_trajectory(run_dir).load(), random.Random(0)
    sizes = [8 * byte + bit for byte in (*range(4, 8), *range(12, 16)) for bit in range(8)]
    for path in chunk_files(run_dir):
        raw = path.read_bytes()
        for at in (*rng.sample(sizes, 4), *(rng.randrange(8 * len(raw)) for _ in range(12))):
            damaged = bytearray(raw)
            damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            wrong, message = read_trajectory(run_dir, whole)
            injected("single-bit flip in a chunk", wrong=wrong or not message, message=message, what=f"{path} {at}")
        path.write_bytes(raw)


# ---- the commands ----------------------------------------------------------------------------------------------------


def _edit(run_dir, name, change):
    path = run_dir / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


SUMMARIES = {
    "a status alone": '{"status": "finished"}',
    "NaN": '{"status": "finished", "steps": 6, "seconds": NaN, "metrics": {}, "claims": []}',
    "infinity": '{"status": "finished", "steps": 6, "seconds": 1e999, "metrics": {}, "claims": []}',
    "a list": "[]",
    "a number": "3",
    "text": '"finished"',
    "null": "null",
    "true": "true",
    "half a file": '{"status": "fin',
    "nothing": "",
    "deep lists": "[" * 100_000,
    "claims that are text": '{"status": "finished", "steps": 6, "seconds": 1, "metrics": {}, "claims": ["yes"]}',
    "a claim without words": '{"status": "finished", "steps": 6, "seconds": 1, "metrics": {}, "claims": [{}]}',
    "metrics that are a list": '{"status": "finished", "steps": 6, "seconds": 1, "metrics": [], "claims": []}',
    "steps in words": '{"status": "finished", "steps": "six", "seconds": 1, "metrics": {}, "claims": []}',
}
SETTINGS = {
    "a list": "- 1\n",
    "a number": "3\n",
    "text": "hello\n",
    "a part that is a number": "model: 3\n",
    "a part that is a list": "trainer: [1]\n",
    "steps in words": "trainer: {max_steps: six}\n",
    "a date": "model: {n_features: 2020-01-01}\n",
    "an impossible date": "model: {n_features: 2020-13-45}\n",
    "numbers as names": "3: 4\n",
    "a name twice": "model: {a: 1}\nmodel: {a: 2}\n",
    "a tag": "model: !!python/object/apply:os.mkdir [canary]\n",
    "an alias of itself": "model: &a {b: *a}\n",
    "aliases by the million": "a: &a [1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "half a file": "model: {a: \n",
    "deep lists": "model: " + "[" * 5000,
}


@pytest.mark.parametrize("command_name", ["report", "publish"])
@pytest.mark.parametrize("case", SUMMARIES)
def test_a_summary_of_another_kind_is_one_line(run_dir, typed, injected, case, command_name):
    (run_dir / "summary.json").write_text(SUMMARIES[case])
    before = contents(run_dir)
    result = typed(command_name, "run")
    wrong = not is_one_line(result) or contents(run_dir) != before
    injected(f"summary.json of another kind, {command_name}", wrong=wrong, message=result.stderr, what=case)


@pytest.mark.parametrize("command_name", ["report", "publish"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_another_kind_are_one_line(run_dir, typed, injected, case, command_name):
    (run_dir / "config.yaml").write_text(SETTINGS[case])
    before = contents(run_dir)
    result = typed(command_name, "run")
    wrong = not is_one_line(result) or contents(run_dir) != before or (run_dir.parent / "canary").exists()
    injected(f"config.yaml of another kind, {command_name}", wrong=wrong, message=result.stderr, what=case)


VALUES = (None, True, 3, -1.5, "text", [], {}, [1], {"a": 1})


def leaves(value, path=()):
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from leaves(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


def replaced(value, path, other):
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], other)
    return copy


def test_any_value_of_a_summary_may_be_another(run_dir, injected):
    """What is accepted can be shown: the readers of the page and of a sweep's table take it."""
    from svf_lightning.pages.run import _claims

    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    names = list(summary["metrics"])[:2]
    summary["metrics"] = {name: summary["metrics"][name] for name in names}
    for place in leaves(summary):
        for value in VALUES:
            path.write_text(json.dumps(replaced(summary, place, value)))
            try:
                read = read_summary(run_dir)
                _claims(read)
                [metric["mean"] for metric in read["metrics"].values()]
                message, wrong = "", False
            except InputError as error:
                message, wrong = str(error), "\n" in str(error)
            injected("summary.json with another value", wrong=wrong, message=message, what=f"{place} {value}")


def test_any_value_of_the_settings_may_be_another(run_dir, injected):
    from svf_lightning.commands.publish import _Run

    path = run_dir / "config.yaml"
    settings, trajectory = yaml.safe_load(path.read_text()), open_trajectory(run_dir).load()
    for place in leaves(settings):
        if len(place) > 3:
            continue
        for value in VALUES:
            path.write_text(yaml.safe_dump(replaced(settings, place, value)))
            try:
                run = _Run(run_dir, read_config(run_dir), {}, trajectory)
                run.logger_settings()
                list(run.rows())
                message, wrong = "", False
            except InputError as error:
                message, wrong = str(error), "\n" in str(error)
            injected("config.yaml with another value", wrong=wrong, message=message, what=f"{place} {value}")


def damage(run_dir, kind):
    store = run_dir / "trajectory.zarr"
    chunk = next(iter(sorted((store / "instance-f4").glob("0*"))))
    if kind == "a chunk that was cut":
        chunk.write_bytes(chunk.read_bytes()[:-7])
    elif kind == "a chunk of zeros":
        chunk.write_bytes(bytes(chunk.stat().st_size))
    elif kind == "metadata that were cut":
        (store / ".zmetadata").write_bytes((store / ".zmetadata").read_bytes()[:900])
    elif kind == "metadata that are empty":
        (store / ".zmetadata").write_bytes(b"")
    elif kind == "no metadata":
        (store / ".zmetadata").unlink()
    elif kind == "another shape":
        _edit(store, "instance-f4/.zarray", lambda array: {**array, "chunks": [128, 2, 2]})
    elif kind == "no rows":
        _edit(store, ".zmetadata", _without_rows)
    elif kind == "a store that is a file":
        shutil.rmtree(store)
        store.write_text("")
    elif kind == "a link to nowhere":
        shutil.rmtree(store)
        store.symlink_to("nowhere")
    elif kind == "a link to itself":
        shutil.rmtree(store)
        store.symlink_to("trajectory.zarr")
    elif kind == "no store":
        shutil.rmtree(store)


def _without_rows(consolidated):
    for name, entry in consolidated["metadata"].items():
        attributes = consolidated["metadata"].get(name.replace(".zarray", ".zattrs"), {})
        if name.endswith(".zarray") and attributes["_ARRAY_DIMENSIONS"][:1] == ["step"]:
            entry["shape"][0] = 0
    return consolidated


DAMAGES = (
    "a chunk that was cut", "a chunk of zeros", "metadata that were cut", "metadata that are empty", "no metadata",
    "another shape", "no rows", "a store that is a file", "a link to nowhere", "a link to itself", "no store",
)  # fmt: skip
READERS = {
    "report": ("report", "run"),
    "report of two runs": ("report", "run", "whole"),
    "figures": ("figures", "run", "images", "--format=csv"),
    "publish": ("publish", "run"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_trajectory_is_one_line_for_every_command_that_reads_it(
    run_dir, finished, typed, injected, kind, reader
):
    (run_dir.parent / "whole").symlink_to(finished)
    damage(run_dir, kind)
    before = contents(run_dir.parent)
    result = typed(*READERS[reader])
    wrong = not is_one_line(result) or contents(run_dir.parent) != before
    injected(f"damaged trajectory, {reader}", wrong=wrong, message=result.stderr, what=f"{kind}: {result.stderr}")


@pytest.mark.parametrize("kind", ["metadata that were cut", "metadata that are empty", "another shape"])
def test_a_training_does_not_go_on_from_a_damaged_trajectory(run_dir, forked, injected, kind):
    damage(run_dir, kind)
    before = contents(run_dir)
    result = forked("fit", "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_steps=9", "--report=false")
    wrong = not is_one_line(result) or contents(run_dir) != before
    injected("damaged trajectory, fit --ckpt_path", wrong=wrong, message=result.stderr, what=result.stderr)


def test_a_damaged_checkpoint_is_one_line_for_every_command_that_loads_it(run_dir, typed, injected):
    path = run_dir / "checkpoints" / "last.ckpt"
    raw, rng = path.read_bytes(), random.Random(0)
    for command_name in ("fit", "test", "validate"):
        for _ in range(8):
            damaged = bytearray(raw)
            damaged[rng.randrange(2000, 16000)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            before = contents(run_dir.parent)
            result = typed(command_name, "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_steps=9")
            if result.returncode == 0:  # the flip was in the padding
                continue
            wrong = not is_one_line(result) or contents(run_dir.parent) != before
            injected(f"damaged checkpoint, {command_name}", wrong=wrong, message=result.stderr)
