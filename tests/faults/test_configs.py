"""Configurations of any kind: what is legal runs, everything else is one line, exit code 2, and nothing is written."""

import dataclasses
import itertools
import json
import math

import pytest
import yaml
from helpers.permissions import obey_permissions
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from svf_lightning.toy import ToyData
from svf_lightning.toy.options import ToyOptions

SHORT = ("--trainer.max_steps=2", "--data.batch_size=8", "--report=false", "--trainer.logger=false")
AFTER_ONE_ANOTHER = settings(
    max_examples=30, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

FILES = {
    "a variable that is not set": "experiment: {name: '${oc.env:NOT_SET_AT_ALL}'}",
    "a resolver that is not there": "model: {d_head: '${eval:2*8}'}",
    "another resolver that is not there": "experiment: {name: '${now:%Y}'}",
    "a reference to itself": "model: {d_model: '${.d_model}'}",
    "references in a circle": "model: {d_model: '${.d_head}', d_head: '${.d_model}'}",
    "a reference to nothing": "model: {d_model: '${.nothing}'}",
    "half a reference": "model: {d_model: '${.nothing'}",
    "a missing value": "model: {d_model: '???'}",
    "Latin-1": "experiment: {name: café}".encode("latin-1"),
    "UTF-16": "model: {d_model: 8}".encode("utf-16"),
    "bytes of an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a tag that runs code": "model: !!python/object/apply:os.mkdir [canary]",
    "a tag that makes an object": "model: {d_model: !!python/name:os.system }",
    "a tag of its own": "model: {d_model: !mine 3}",
    "aliases by the million": "a: &a [1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
    "an alias of itself": "model: &m {a: *m}\n",
    "an alias of nothing": "model: *m\n",
    "a part twice": "model: {d_model: 8}\nmodel: {d_model: 9}",
    "an option twice": "model:\n  d_model: 8\n  d_model: 9\n",
    "a tab": "model:\n\td_model: 8\n",
    "nothing": "",
    "a comment": "# nothing\n",
    "a list": "- 1\n",
    "a number": "3\n",
    "a word": "hello\n",
    "null": "null\n",
    "two documents": "model: {d_model: 8}\n---\nmodel: {d_model: 9}\n",
    "a null byte": "model: {d_model: 8}\0",
    "a very long name": "model:\n  ? " + "k" * 5000 + "\n  : 3\n",
    "a very long value": "model: {d_model: " + "9" * 5000 + "}",
    "lists in lists": "model: " + "[" * 3000 + "]" * 3000,
    "mappings in mappings": "model: " + "{a: " * 500 + "1" + "}" * 500,
    "a number as a name": "3: 4\n",
    "null as a name": "~: 4\n",
    "a list as a name": "? [1, 2]\n: 3\n",
    "a part that is a list": "model: [1, 2]\n",
    "a part that is null": "model: null\n",
    "a part that is a word": "experiment: hello\n",
    "an experiment that is null": "experiment: null\n",
    "an experiment that is a number": "experiment: 0\n",
    "an experiment that is true": "experiment: true\n",
    "a part that is not there": "modle: {d_model: 3}\n",
    "another file": "config: other.yaml\n",
    "itself": "config: config.yaml\n",
    "callbacks that are a number": "trainer: {callbacks: 3}",
    "a callback that is a function": "trainer: {callbacks: [{class_path: os.mkdir, init_args: {path: canary}}]}",
    "a callback that is not there": "trainer: {callbacks: [{class_path: nowhere.Nothing}]}",
    "a logger that is a process": "trainer: {logger: {class_path: subprocess.Popen, init_args: {args: [mkdir, canary]}}}",
    "a seed that is no number": "seed_everything: .nan\n",
    "a negative seed": "seed_everything: -1\n",
    "a seed beyond 32 bits": "seed_everything: 99999999999999999999\n",
    "a claim without a metric": "experiment: {claims: [{claim: yes}]}\n",
    "a claim with half a threshold": "experiment: {claims: [{claim: a, figure: b, metric: c, relation: '<'}]}\n",
    "a name above its folder": "experiment: {name: ..}\n",
    "a name of two folders": "experiment: {name: a/b}\n",
    "an absolute name": "experiment: {name: /tmp/canary}\n",
    "a name with a line break": 'experiment: {name: "a\\nb"}\n',
    "a name with a control character": 'experiment: {name: "a\\x1b[2Jb"}\n',
    "a name with a null byte": 'experiment: {name: "a\\0b"}\n',
    "a name of 300 characters": f"experiment: {{name: {'n' * 300}}}\n",
    "no name": 'experiment: {name: ""}\n',
    "capture of every zeroth step": "capture: {every_n_steps: 0}\n",
    "capture in chunks of nothing": "capture: {chunk: 0}\n",
}


def is_refused(result, folder, before):
    lines = result.stderr.strip().splitlines()
    one_line = result.returncode == 2 and len(lines) == 1 and "Fix: " in lines[0] and len(lines[0]) < 1500
    return one_line and not result.stdout and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_meant_is_one_line(typed, command, injected, case):
    content = FILES[case]
    path = command.folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(command.folder.rglob("*"))
    for name in ("fit", "replay"):
        result = typed(name, "--config", "config.yaml", *(SHORT if name == "fit" else ()))
        wrong = not is_refused(result, command.folder, before)
        injected(f"configuration that cannot be meant, {name}", wrong=wrong, message=result.stderr, what=result.stderr)


WHAT_IS_NO_FILE = ("folder", "nowhere.yaml", "", "/dev/null", "to_nowhere", "to_itself", "n" * 300, "a\0b", "folder/")


@pytest.mark.parametrize("given", WHAT_IS_NO_FILE)
def test_what_is_no_file_is_one_line(typed, command, injected, given):
    (command.folder / "folder").mkdir()
    (command.folder / "to_nowhere").symlink_to("nowhere")
    (command.folder / "to_itself").symlink_to("to_itself")
    before = sorted(command.folder.rglob("*"))
    for option in ("--config", "--ckpt_path"):
        result = typed("fit", f"{option}={given}", *SHORT)
        wrong = not is_refused(result, command.folder, before)
        injected(f"{option} that is no file", wrong=wrong, message=result.stderr, what=f"{given!r} {result.stderr}")


def test_a_file_that_may_not_be_read_is_one_line(forked, injected):
    path = forked.folder / "config.yaml"
    path.write_text("model: {d_model: 8}")
    path.chmod(0)
    before = sorted(forked.folder.rglob("*"))
    process = forked.start("fit", "--config=config.yaml", *SHORT, before=obey_permissions)
    process.wait()
    wrong = process.returncode != 2 or len(process.output("err").strip().splitlines()) != 1
    wrong = wrong or sorted(forked.folder.rglob("*")) != before
    injected("configuration that may not be read", wrong=wrong, message=process.output("err"))


# ---- every option with every kind of value ---------------------------------------------------------------------------


def options():
    """Options of model and data with their types, from the classes themselves."""
    import inspect
    from typing import get_type_hints

    for field, hint in get_type_hints(ToyOptions).items():
        if field in {f.name for f in dataclasses.fields(ToyOptions)}:
            yield f"model.{field}", hint
    for name, hint in get_type_hints(ToyData.__init__).items():
        if name in inspect.signature(ToyData).parameters:
            yield f"data.{name}", hint


LINKED = {"data.n_features", "data.n_instances", "model.context_length"}  # follow others; not options themselves
TYPES = {name: hint for name, hint in options() if name not in LINKED}
HUGE = "9" * 30
NEVER = (
    ".nan",
    "[.nan]",
    ".inf",
    "-.inf",
    "-1",
    "[-1]",
    "{a: 1}",
    "[[[1]]]",
    "9" * 30,
    "1e400",
    "'no such word'",
    "[a]",
)


def may_be(name, value):
    """A number is a number: a huge one lets the run diverge, which says so; a negative logit repels."""
    return (value == HUGE and "float" in str(TYPES[name])) or (name, value) == ("model.target_logit", "-1")


@pytest.mark.parametrize("name", TYPES)
def test_values_that_no_option_can_have_are_one_line(typed, command, injected, name):
    before = sorted(command.folder.rglob("*"))
    for value in NEVER:
        if may_be(name, value):
            continue
        result = typed("fit", f"--{name}={value}", *(one for one in SHORT if not one.startswith(f"--{name}=")))
        wrong = not is_refused(result, command.folder, before)
        injected("option with a value that none can have", wrong=wrong, message=result.stderr, what=f"{name}={value}")


# ---- legal configurations run, arbitrary ones do not end in a traceback ----------------------------------------------


def check_runs(result):
    assert result.returncode == 0, result.stderr


positive = st.floats(1e-3, 10)


def one_or_each(values, n):
    return st.one_of(values, st.lists(values, min_size=n, max_size=n))


@st.composite
def legal(draw):
    """A small legal configuration of model and data."""
    n = draw(st.integers(1, 3))
    d_model = draw(st.integers(2, 6))
    n_features = draw(st.integers(max(4, d_model), 9))
    template = draw(st.sampled_from(["single", "linear", "many_to_one", "zero"]))
    has_head = template != "zero"
    rope = draw(st.booleans()) and has_head
    optimizer = draw(st.sampled_from(["adam", "adamw"]))
    freeze = draw(st.sampled_from(["none", "features", "head"])) if has_head else "none"
    model = {
        "n_features": n_features,
        "d_model": d_model,
        "n_instances": n,
        "importance": draw(one_or_each(st.floats(0.5, 1), n)),
        "init_features": draw(st.sampled_from(["random", "tight_frame", "cone"])),
        "cone_strength": draw(one_or_each(st.floats(0, 2), n)),
        "init_feature_norm": draw(positive),
        "d_head": 2 * draw(st.integers(1, 3)),
        "n_heads": draw(st.integers(1, 2)),
        "init_head_scale": draw(positive),
        "rope": rope,
        "rope_base": draw(st.floats(2, 1e5)),
        "template": template,
        "n_pairs": draw(st.integers(1, 2)),
        "target_logit": draw(one_or_each(positive, n)),
        "target_position": draw(st.sampled_from(["independent", "decay", "nearest"])) if rope else "independent",
        "lambda_attn": draw(one_or_each(st.floats(0, 10), n)),
        "freeze": freeze,
        "optimizer": optimizer,
        "learning_rate": draw(one_or_each(st.floats(1e-5, 1e-2), n)),
        "weight_decay": draw(st.floats(0, 0.1)) if optimizer == "adamw" else 0.0,
        "lr_schedule": draw(st.sampled_from(["constant", "cosine", "linear"])),
        "n_observed": draw(st.integers(0, 4)),
        "n_attended": 0,
    }
    data = {
        "context_length": draw(st.integers(1, 4)),
        "feature_probability": draw(one_or_each(st.floats(0.05, 1), n)),
        "frequency_decay": draw(one_or_each(st.floats(0, 1.5), n)),
        "feature_correlation": draw(one_or_each(st.floats(0, 0.95), n)),
        "streams": draw(st.sampled_from(["shared", "separate"])),
        "held_out_batches": draw(st.integers(1, 3)),
    }
    return {"model": model, "data": data, "seed_everything": draw(st.integers(0, 2**32 - 1))}


def test_legal_configurations_build_the_model_and_run(typed, command, injected):
    numbers = itertools.count()

    @seed(0)
    @AFTER_ONE_ANOTHER
    @given(legal())
    def check(config):
        path = command.folder / f"{next(numbers)}.yaml"
        path.write_text(yaml.safe_dump(config))
        result = typed("fit", "--config", path.name, *SHORT, f"--run_dir={path.stem}")
        injected("legal configuration", wrong=result.returncode != 0, what=f"{config} {result.stderr[-500:]}")
        summary = json.loads((command.folder / path.stem / "summary.json").read_text())
        assert summary["steps"] == 2

    check()


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
anything = st.recursive(
    st.one_of(numbers, words), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip
parts = st.sampled_from(["model", "data", "trainer", "experiment", "capture", "seed_everything", "run_dir", "report"])


def test_arbitrary_configurations_are_one_line_or_run(typed, command, injected):
    numbers_of_files = itertools.count()
    leaf = st.sampled_from([*TYPES, "experiment.name", "capture.every_n_steps", "trainer.max_steps"])

    @seed(0)
    @settings(AFTER_ONE_ANOTHER, max_examples=120)
    @given(st.one_of(anything, st.dictionaries(parts, anything, max_size=3), st.tuples(leaf, anything)))
    def check(config):
        if isinstance(config, tuple):
            part, name = config[0].split(".")
            config = {part: {name: config[1]}}
        path = command.folder / f"{next(numbers_of_files)}.yaml"
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        before = sorted(command.folder.rglob("*"))
        result = typed("fit", "--config", path.name, *SHORT, "--model.n_attended=0")
        runs = result.returncode in (0, 1) and "Traceback" not in result.stderr
        wrong = not runs and not is_refused(result, command.folder, before)
        injected("arbitrary configuration", wrong=wrong, message=result.stderr, what=f"{config} {result.stderr[-500:]}")

    check()
    assert math.isfinite(next(numbers_of_files))
