"""What a measured quantity is: checked, collected once by name, and kept as text beside the numbers."""

import json

import numpy as np
import pytest
import xarray as xr

from svf_lightning.callbacks import CausalAblation
from svf_lightning.errors import InputError
from svf_lightning.quantities import (
    ATTRIBUTE,
    COSINES,
    MODULE_QUANTITIES,
    Panel,
    Place,
    Quantity,
    as_json,
    attach,
    collect,
    from_json,
    stored_quantities,
)
from svf_lightning.registry import BUILT_IN, METRICS, how_to_have, known

FULL = Quantity(
    "group/name", "a label", "What it says.", symbol="σ_1", unit="nats", low=0, high=2.5, source="Fig. 1",
    dims=("pair", "rank"), better="lower", needs="a head", places=Place.TABLE | Place.SWEEP, logged="mean",
    column="col", panel=Panel("Title", "axis (nats)", "Section", log=True, low=0.0, high=1.0), colour="blue",
    change=Quantity("dynamics/t_name", "it has changed", symbol="t", unit="steps", low=0),
    provider="my_module.Mine",
)  # fmt: skip


def by_name(*quantities):
    return {quantity.name: quantity for quantity in quantities}


# ---- as text


def test_everything_that_is_known_of_a_quantity_survives_as_text():
    text = as_json(by_name(FULL, Quantity("plain"), Quantity("nowhere", places=Place.NOWHERE)))
    json.loads(text, parse_constant=pytest.fail)
    found = from_json(text)
    assert list(found) == ["group/name", "dynamics/t_name", "plain", "nowhere"]
    assert found["group/name"] == FULL
    assert found["dynamics/t_name"] == FULL.change
    assert found["plain"] == Quantity("plain")
    assert found["nowhere"].places == Place.NOWHERE


def test_every_quantity_of_this_package_survives_as_text():
    assert from_json(as_json(BUILT_IN)) == BUILT_IN


def test_what_a_later_version_writes_beside_is_left_out():
    (entry,) = json.loads(as_json(by_name(FULL)))
    entry["mood"] = "sunny"
    entry["panel"]["grid"] = True
    entry["change"]["mood"] = "dark"
    entry["places"].append("HOLOGRAM")
    found = from_json(json.dumps([entry]))
    assert found["group/name"] == FULL
    assert found["dynamics/t_name"] == FULL.change


def test_a_dataset_carries_what_is_known_of_its_own_quantities_alone():
    dataset = xr.Dataset({"group/name": (("step",), np.zeros(3)), "other": (("step",), np.zeros(3))})
    found = attach(dataset, by_name(FULL, Quantity("absent")))
    assert stored_quantities(found)["group/name"] == FULL
    assert "absent" not in found.attrs[ATTRIBUTE]
    assert found["group/name"].attrs == {
        "long_name": "a label", "units": "nats", "description": "What it says.", "symbol": "σ_1", "source": "Fig. 1",
        "valid_min": 0, "valid_max": 2.5,
    }  # fmt: skip
    assert found["other"].attrs == {}
    assert dataset.attrs == {}  # the one that was given is left as it was
    assert stored_quantities(dataset) == {}


def test_a_trajectory_knows_better_than_this_package_what_it_holds():
    own = Quantity("alignment/matched", "another alignment", unit="degrees")
    dataset = attach(xr.Dataset({own.name: (("step",), np.zeros(3))}), by_name(own))
    assert known(dataset)["alignment/matched"] == own
    assert known(dataset)["spectrum/sigma_1"] == BUILT_IN["spectrum/sigma_1"]
    assert known(xr.Dataset())["alignment/matched"] == BUILT_IN["alignment/matched"]  # of an earlier version


# ---- collected from those that measure


def test_quantities_are_collected_in_order_with_who_provides_them_and_what_follows_from_them():
    found = collect([("a.A", (FULL, Quantity("x"))), ("b.B", (Quantity("y"),))])
    assert list(found) == ["group/name", "dynamics/t_name", "x", "y"]
    assert [quantity.provider for quantity in found.values()] == ["a.A", "a.A", "a.A", "b.B"]


def test_one_name_of_two_providers_is_refused_with_the_flag_to_leave_out():
    with pytest.raises(InputError) as error:
        collect([("a.First", (FULL,)), ("b.Second", (Quantity("group/name"),))])
    text = str(error.value)
    assert text.startswith("a.First and b.Second both measure 'group/name'. Allowed: ")
    fix = text[text.index("Fix: ") :]
    assert "--trainer.callbacks+=b.Second" in fix
    assert "Second.quantities" in fix  # or to rename it there


def test_one_provider_twice_is_refused_with_the_flag_to_leave_out_once():
    with pytest.raises(InputError, match=r"a\.First is in the run twice.*Fix: .*--trainer\.callbacks\+=a\.First"):
        collect([("a.First", (FULL,)), ("a.First", (FULL,))])


def test_a_name_that_follows_from_another_quantity_is_taken_too():
    with pytest.raises(InputError, match="both measure 'dynamics/t_name'"):
        collect([("a.First", (FULL,)), ("b.Second", (Quantity("dynamics/t_name"),))])


# ---- one by one


@pytest.mark.parametrize("name", ["", " ", "/norm", "norm/", "norm ", "two\nlines"])
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(InputError, match="name="):
        Quantity(name)


@pytest.mark.parametrize(
    ("quantity", "title", "axis", "bounds"),
    [
        (Quantity("a/b"), "a/b", "a/b", ""),
        (Quantity("a", "length", unit="nats", low=0), "length", "length (nats)", "[0, ∞)"),
        (Quantity("a", "share of nats", unit="nats", high=1), "share of nats", "share of nats", "(-∞, 1]"),
        (Quantity("a", "cosine", low=-1, high=1), "cosine", "cosine", "[-1, 1]"),
        (Quantity("a", low=0.25, high=1e6), "a", "a", "[0.25, 1e+06]"),
    ],
)
def test_titles_axes_and_ranges_are_made_of_label_unit_and_bounds(quantity, title, axis, bounds):
    assert (quantity.title, quantity.axis, quantity.range) == (title, axis, bounds)


def test_a_quantity_is_at_its_places_alone():
    assert FULL.is_at(Place.TABLE)
    assert FULL.is_at(Place.SWEEP)
    assert not FULL.is_at(Place.SLIDER)
    assert not Quantity("x", places=Place.NOWHERE).is_at(Place.TABLE)


# ---- those of this package


def test_every_quantity_of_this_package_says_who_measures_it_and_can_be_told_from_the_others():
    assert {"AttentionSparsity", "CausalAblation", "NearestFeature", "SVDAlignment", "TheoryGap"} <= set(METRICS)
    for name, quantity in BUILT_IN.items():
        assert quantity.name == name
        assert quantity.label, name
        assert quantity.provider, name
    shown = [quantity for quantity in BUILT_IN.values() if quantity.is_at(Place.TABLE)]
    assert len({quantity.label for quantity in shown}) == len(shown)
    assert MODULE_QUANTITIES.keys() <= BUILT_IN.keys()


def test_curves_of_one_panel_have_its_bounds():
    for quantity in BUILT_IN.values():
        if quantity.panel is COSINES:
            assert (quantity.low, quantity.high) == (0, 1), quantity.name


def test_columns_of_the_table_of_checkpoints_are_told_apart():
    columns = [quantity.column for quantity in BUILT_IN.values() if quantity.column]
    assert columns
    assert len(set(columns)) == len(columns)


def test_a_run_without_a_quantity_is_told_what_to_add():
    assert how_to_have("spectrum/sigma_1") == (
        "run with the SVDAlignment callback (--trainer.callbacks+=svf_lightning.callbacks.SVDAlignment), "
        "with a head (not template=zero)"
    )
    assert "SVDAlignment" in how_to_have("cosine_left")  # what it is derived from
    assert "--model.init_features=cone" in how_to_have("cone_strength")
    assert how_to_have("never/heard/of") == "add the callback that measures it"


def test_a_metric_may_declare_what_its_options_make_of_it():
    assert "causal/top/attention/3" not in BUILT_IN
    assert "causal/top/attention/3" in by_name(*CausalAblation(report=(3,)).quantities)
