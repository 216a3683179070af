"""Pages of damaged and degenerate runs: they open, claim nothing that did not happen, and run no string.

Numbers are written into a trajectory without a training. A page is judged by its text: JSON without a NaN, elements
that are closed, no script but its own, and of each change the count of instances in which it happened, which is worked
out here once more.
"""

import json
import re

import numpy as np
import pytest
import yaml
from helpers.page_text import Page, strings
from helpers.trajectories import CLAIMS, changed, heads, store, toy

from svf_lightning.errors import InputError
from svf_lightning.metrics.dynamics import alignment_by_chance, least_overlap, overlap_by_chance
from svf_lightning.pages.run import write_run_page
from svf_lightning.quantities import Panel, Quantity
from svf_lightning.registry import BUILT_IN
from svf_lightning.run.claims import Claim
from svf_lightning.trajectory import open_trajectory

EVIL = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>\"'&<b>"
MAKE = {"toy": toy, "heads": heads}
NAMES = {kind: [str(name) for name in make().data_vars] for kind, make in MAKE.items()}
CONTINUOUS = {k: [n for n in NAMES[k] if MAKE[k]()[n].dtype.kind == "f"] for k in MAKE}
NO_NUMBER = re.compile(r"\b(nan|NaN|None|inf|Infinity|undefined)\b")


def level(rises):
    """The level of the runs of tests/helpers/trajectories.py, from the definition: D = R = 5, one pair, N = 9."""
    if rises:
        chance = alignment_by_chance(5, 5, 1).matched
        return max(chance.extreme, (chance.mean + 1) / 2)
    return min(overlap_by_chance(5, 9, 2).extreme, least_overlap(5, 9) / 2)


def happened(values, rises):
    """In how many instances a curve [step, instance] reaches its level, by a loop over instances."""
    count = 0
    for curve in values.astype(float).T:
        if not np.isfinite(curve).all():
            continue
        if len(curve) < 3:
            continue
        last = curve[-max(3, int(np.ceil(len(curve) / 10))) :]
        rough = np.median(np.abs(np.diff(curve, 2))) / np.sqrt(6)
        noise = 1.4826 * max(rough, np.median(np.abs(last - np.median(last))))
        way = (curve[-1] - curve[0]) * (1 if rises else -1)
        reached = curve[-1] >= level(True) if rises else curve[-1] <= level(False)
        count += bool(reached and way > 5 * noise)
    return count


def complaints(folder):
    """What is wrong with the page of a run directory; empty for a page that is right."""
    dataset = open_trajectory(folder)
    page = Page(write_run_page(folder))
    wrong = []
    if page.open:
        wrong.append(f"not closed: {page.open}")
    if page.tags.count("img") or len(page.words) == 0:
        wrong.append("markup from data")
    if shown := NO_NUMBER.findall(" ".join([*page.words, *page.tables])):
        wrong.append(f"shows {shown}")
    for name, source, rises in (
        ("dynamics/t_align", "alignment/matched", True),
        ("dynamics/t_ortho", "orthogonality/attended_vs_rest", False),
    ):
        title, text = BUILT_IN[name].title.lower(), page.text.lower()  # a sentence begins with a capital
        said = set(re.findall(rf"{re.escape(title)} \(\w+\): in (\d+) of", text))
        has_sizes = rises or "W" in dataset  # the level of the overlap follows from the number of features
        if source not in dataset or dataset.sizes["step"] < 2 or not has_sizes:
            expected = set()
        else:
            k = happened(dataset[source].values, rises)
            expected = {str(k)} if k else set()
        if said != expected:
            wrong.append(f"{name}: says {said}, is {expected}")
        if not expected and re.search(rf"{re.escape(title)}(?! \(\w+\): did not happen)", text):
            wrong.append(f"{name}: is mentioned, and did not happen")
    return wrong


def report(injected, fault, folder, what):
    """A page is right, or its command ends with one line that says what is wrong."""
    try:
        wrong = complaints(folder)
    except InputError as error:
        injected(fault, message=str(error), what=what)
        return
    injected(fault, wrong=bool(wrong), what=f"{what}: {wrong}")


CASES = [(kind, name) for kind in MAKE for name in NAMES[kind]]
OF_NUMBERS = [(kind, name) for kind in MAKE for name in CONTINUOUS[kind]]


@pytest.mark.parametrize(("kind", "name"), OF_NUMBERS)
def test_a_quantity_that_is_no_number_or_huge(injected, tmp_path, kind, name):
    for fault, value, at in (
        ("NaN in all of a quantity", np.nan, slice(None)),
        ("NaN in a quantity's last row", np.nan, slice(-1, None)),
        ("inf in a quantity", np.inf, slice(2, 3)),
        ("-inf in a quantity", -np.inf, slice(-1, None)),
        ("huge values of a quantity", 3e38, slice(1, None)),
    ):
        dataset = MAKE[kind]()
        values = dataset[name].values.copy()
        values[at] = value
        folder = store(tmp_path / str(len(list(tmp_path.iterdir()))), changed(dataset, name, values))
        report(injected, fault, folder, name)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_quantity_that_is_missing_or_constant(injected, tmp_path, kind, name):
    dataset = MAKE[kind]()
    report(injected, "quantity left out", store(tmp_path / "missing", dataset.drop_vars(name)), name)
    still = changed(dataset, name, np.broadcast_to(dataset[name].values[:1], dataset[name].shape))
    report(injected, "quantity that is constant", store(tmp_path / "constant", still), name)
    zero = changed(dataset, name, np.zeros(dataset[name].shape))
    report(injected, "quantity that is 0", store(tmp_path / "zero", zero), name)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4])
def test_few_rows(injected, tmp_path, kind, n_rows):
    report(injected, "few rows", store(tmp_path / "first", MAKE[kind]().isel(step=slice(n_rows))), f"{kind} {n_rows}")
    last = MAKE[kind]().isel(step=slice(-n_rows, None))
    report(injected, "few rows", store(tmp_path / "last", last), f"the last {n_rows} of {kind}")


@pytest.mark.parametrize("kind", MAKE)
def test_a_run_that_diverged_from_any_row_on(injected, tmp_path, kind):
    for row in range(MAKE[kind]().sizes["step"])[:: 8 if kind == "toy" else 1]:
        dataset = MAKE[kind]()
        for name in CONTINUOUS[kind]:
            values = dataset[name].values.copy()
            values[row:] = np.nan
            dataset = changed(dataset, name, values)
        report(injected, "all NaN from a row on", store(tmp_path / str(row), dataset), f"{kind}, row {row}")


def test_random_curves(injected, tmp_path):
    """Curves of every course: the page counts those that reach their level, and no other."""
    rng = np.random.default_rng(0)
    for i in range(40):
        dataset = toy(n_steps=int(rng.integers(2, 60)), n_instances=int(rng.integers(2, 6)))
        for name in ("alignment/matched", "orthogonality/attended_vs_rest"):
            shape = dataset[name].shape
            course = rng.choice(["noise", "walk", "ramp"])
            ends = rng.uniform(0, 1, (2, shape[1])) ** rng.choice([1, 4])
            share = np.linspace(0, 1, shape[0])[:, None] ** rng.choice([0.1, 1, 5])
            values = ends[0] + (ends[1] - ends[0]) * share
            if course == "walk":
                values += np.cumsum(rng.normal(0, 0.02, shape), 0)
            elif course == "noise":
                values = ends[0] + rng.normal(0, 0.1, shape)
            dataset = changed(dataset, name, values.clip(0, 1))
        report(injected, "curves of any course", store(tmp_path / str(i), dataset), f"draw {i}")


HOSTILE = dict.fromkeys(("label", "meaning", "symbol", "unit", "source", "needs", "column"), EVIL)  # fmt: skip


@pytest.mark.parametrize("field", [*HOSTILE, "panel", "dims", "change", "name"])
def test_hostile_words_in_a_quantity(injected, tmp_path, field):
    dataset = toy()
    name = EVIL if field == "name" else "mine/value"
    given = {field: EVIL} if field in HOSTILE else {}
    if field == "panel":
        given = {"panel": Panel(EVIL, EVIL, EVIL)}
    if field == "change":
        given = {"change": Quantity("dynamics/mine", EVIL, EVIL, symbol=EVIL, unit=EVIL)}
    dims = (EVIL.replace("/", ""),) if field == "dims" else ()
    quantity = Quantity(name, dims=dims, **given)
    shape = (dataset.sizes["step"], dataset.sizes["instance"], *(3 for _ in dims))
    numbers = np.cumsum(np.ones(shape, dtype=np.float32), 0)
    dataset = dataset.assign({name: (("step", "instance", *dims), numbers)})
    folder = store(tmp_path / "run", dataset, quantities={**BUILT_IN, name: quantity})
    wrong = complaints(folder)
    page = Page(write_run_page(folder))
    # plotly reads some tags; the slider's script escapes what it shows
    ours = re.compile(r"<b>(\d+|(query|key) \d+|attended)</b>")
    read = [ours.sub("", text) for text in strings(page.data["figures"])]
    wrong += [f"plotly reads {text!r}" for text in read if re.search(r"<(script|img|b)\b", text)]
    injected(f"hostile string: a quantity's {field}", wrong=bool(wrong), what=str(wrong))


def test_hostile_words_in_settings_claims_names_and_files(injected, tmp_path):
    claims = [Claim(claim=EVIL, figure=EVIL, metric="loss/total", relation="<", threshold=1.0)]
    config = {"experiment": {"name": EVIL}, "model": {EVIL: EVIL, "d_model": [EVIL, {EVIL: EVIL}]}}
    for what, options in (
        ("experiment", {"name": EVIL}),
        ("claim", {"claims": claims}),
        ("settings", {"config": config}),
        ("status", {}),
        ("versions", {}),
        ("run directory", {}),
    ):
        folder = store(tmp_path / (EVIL.replace("/", "") if what == "run directory" else what), toy(), **options)
        summary = json.loads((folder / "summary.json").read_text())
        if what == "status":
            summary["status"] = EVIL
        if what == "versions":
            summary["versions"] = {EVIL: EVIL}
        (folder / "summary.json").write_text(json.dumps(summary))
        report(injected, f"hostile string: {what}", folder, what)


@pytest.mark.parametrize("field", ["prompt_text", "checkpoint"])
def test_hostile_words_in_a_replay(injected, tmp_path, field):
    for n_steps in (1, 5):
        dataset = heads(n_steps=n_steps)
        if field == "prompt_text":
            text = (EVIL + " x" * 40)[:28]
            dataset = dataset.assign_coords(prompt_text=("prompt", np.array([text] * dataset.sizes["prompt"])))
        else:
            dataset = dataset.assign({field: ("step", np.array([EVIL] * n_steps))})
        report(injected, f"hostile string: {field}", store(tmp_path / str(n_steps), dataset), field)


def _without(summary, key):
    return {name: value for name, value in summary.items() if name != key}


DAMAGE = {
    "no claims": lambda s: {**s, "claims": []},
    "no metrics": lambda s: {**s, "metrics": {}},
    "an unknown status": lambda s: {**s, "status": "lost"},
    "a claim without a number": lambda s: {**s, "claims": [{**s["claims"][0], "measured": None}]},
    "a claim without words": lambda s: {**s, "claims": [{"holds": True}]},
    "a claim that is a number": lambda s: {**s, "claims": [3]},
    "claims that are null": lambda s: {**s, "claims": None},
    "a list": lambda s: [],
    "null": lambda s: None,
    "a word": lambda s: "finished",
    "seconds that are null": lambda s: {**s, "seconds": None},
    "steps that are a word": lambda s: {**s, "steps": "many"},
    "versions that are null": lambda s: {**s, "versions": None},
    **{
        f"no {key}": (lambda s, key=key: _without(s, key))
        for key in ("claims", "status", "steps", "seconds", "versions")
    },
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_summary_that_is_damaged(injected, tmp_path, what):
    folder = store(tmp_path / "run", toy(), claims=CLAIMS)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(DAMAGE[what](summary)))
    report(injected, "summary.json with other content", folder, what)


def test_a_summary_or_a_configuration_that_is_cut_off_anywhere(injected, tmp_path):
    folder = store(tmp_path / "run", toy(), claims=CLAIMS)
    for name in ("summary.json", "config.yaml"):
        whole = (folder / name).read_text()
        for n in np.linspace(0, len(whole) - 2, 12).astype(int):
            (folder / name).write_text(whole[:n])
            report(injected, f"{name} cut off", folder, f"after {n} characters")
        (folder / name).write_text(whole)


@pytest.mark.parametrize("content", [[], 3, "x", {"model": 3}, {"experiment": None}, {"experiment": 3}, {"model": [1]}])
def test_a_configuration_with_other_content(injected, tmp_path, content):
    folder = store(tmp_path / "run", toy())
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    report(injected, "config.yaml with other content", folder, str(content))
