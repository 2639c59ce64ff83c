"""Which options go together, and the plans that come of those that do."""

from __future__ import annotations

import pytest

import onnx_kfe as kfe
from onnx_kfe._recipe import Recipe
from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.graph import count_macs, open_network
from onnx_kfe.kfe import IMPORTANCES
from onnx_kfe.planning import METHODS, Macs, Method, find_method, network_cost
from onnx_kfe.rewrite import apply_plan
from tests.networks import classifier, samples

REFUSED = [
    ({"method": "magic"}, "--method magic: it can be forms, channels, eigendamage"),
    ({"method": "kron-obs", "basis": "fourier"}, "--basis fourier: it can be channel, kfe"),
    ({"basis": "kfe"}, "--basis kfe: it goes with --method magnitude-l1.*not with forms"),
    ({"method": "eigendamage", "basis": "kfe"}, "--basis kfe: it goes with .*not with eigendamage"),
    ({"method": "taylor", "basis": "kfe"}, "--basis kfe: taylor is defined in channel only"),
    ({"method": "eigendamage", "channels": 0.5}, "--channels: they go by .*not by eigendamage"),
    ({"method": "c-obd", "basis": "kfe", "channels": 0.5}, "--channels: they go by .*not by c-obd"),
    ({"channels": 0.0}, "--channels 0.0: give a fraction"),
    ({"channels": -0.5}, "--channels -0.5: give a fraction"),
    ({"rounds": 2}, "--iterations: forms are chosen at once"),
    ({"rounds": 2, "channels": 0.5}, "--iterations: .*without --channels"),
    ({"method": "kron-obs", "rounds": 0}, "--iterations 0: give 1 or more"),
    ({"curvature": "exact"}, "--curvature exact: it can be kfac, ekfac"),
    ({"curvature": "ekfac"}, "--curvature ekfac: of the methods only eigendamage"),
    ({"method": "c-obd", "curvature": "ekfac"}, "--curvature ekfac: .*c-obd with --basis kfe"),
    ({"method": "kron-obs", "basis": "kfe", "curvature": "ekfac"}, "--curvature ekfac"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_go_together_is_said(options, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.of(**options)
    assert caught.value.exit_code == 2


def test_what_goes_together() -> None:
    assert Recipe.of() == Recipe()
    assert Recipe.of("forms") == Recipe()
    assert Recipe.of(channels=0.5).method == Method("channels", "channel") == Recipe.of("forms", None, 0.5).method
    assert Recipe.of("taylor", channels=0.5).method == Method("taylor", "channel")
    assert Recipe.of("c-obd", "kfe", curvature="ekfac").curvature == "ekfac"
    assert Recipe.of("eigendamage-depthwise", rounds=3).rounds == 3
    assert [name for name in METHODS if not Recipe.of(name).refits] == ["eigendamage", "eigendamage-depthwise"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_basis_and_there_a_form(name) -> None:
    method = find_method(name)
    assert method.basis == {"forms": None, "channels": "channel"}.get(name, "channel" if name in IMPORTANCES else "kfe")
    assert (method.form is not None) == (method.basis == "kfe")
    for basis in IMPORTANCES[name].bases if name in IMPORTANCES else ():
        form = find_method(name, basis).form
        assert (form is None) == (basis == "channel")
        assert form is None or form.importance == name


@pytest.fixture(scope="module")
def statistics() -> kfe.Statistics:
    return kfe.collect(classifier(), samples(96), threads=1)


@pytest.mark.parametrize("method", [None, "magnitude-l2"])
def test_channels_go_first_and_forms_do_the_rest(statistics, method) -> None:
    network = open_network(classifier())
    plan = kfe.plan(network, statistics, Macs(0.4), channels=0.7, method=method, round_to=2, threads=1)
    alone = kfe.plan(network, statistics, Macs(0.7), method=method or "channels", round_to=2, threads=1)
    assert (plan.channels, plan.compensates) == (alone.channels, method is None)
    assert plan.channels
    assert plan.changed
    assert plan.original == network_cost(network)
    assert plan.budget == "--macs 0.4"
    model, losses = apply_plan(network, plan, statistics)
    assert count_macs(model) == sum(choice.cost.macs for choice in plan.choices.values()) <= 0.4 * plan.original.macs
    assert plan.predicted_loss == pytest.approx(sum(losses.values()), rel=0.2)  # some forms are found anew


def test_goals_that_cannot_be_met_are_named_as_they_were_given(statistics) -> None:
    with pytest.raises(BudgetError, match=r"^--channels 0\.01 cannot be met \(of each group the best .*--channels 0"):
        kfe.plan(classifier(), statistics, Macs(0.005), channels=0.01)
    with pytest.raises(BudgetError, match=r"^--macs 0\.01 cannot be met: .* --macs 0\.\d+$"):
        kfe.plan(classifier(), statistics, Macs(0.01), channels=0.6)
