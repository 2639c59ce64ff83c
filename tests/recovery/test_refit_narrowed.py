"""Refit of networks that lost channels: towards the whole original, layer by layer on the channels that are left."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe.graph import Network, count_macs, find_groups, open_network, serialize
from onnx_kfe.planning import ChannelPlanner, Macs, Plan
from onnx_kfe.recovery import refit
from onnx_kfe.rewrite import apply_plan, narrow, solve_plan, write_chains
from tests.cases import load_case
from tests.networks import classifier, samples
from tests.recovery.test_refit import dataset, dense_plan, outputs
from tests.rewrite.test_narrow import products

SAMPLES = 256


def products_with_mean(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, 3, 5)) + random.standard_normal((count, 1, 5))).astype(np.float32)


def made(name: str) -> tuple[Network, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A network, samples, and others."""
    if name == "classifier":
        return open_network(classifier()), {"x": samples(SAMPLES)}, {"x": samples(SAMPLES, seed=1)}
    if name == "products":
        network = open_network(products()[0])
        return network, {"x": products_with_mean(SAMPLES, 0)}, {"x": products_with_mean(SAMPLES, 1)}
    case = load_case(name)
    return open_network(case.model), case.inputs(SAMPLES, 0), case.inputs(SAMPLES, 1)


def refitted(network: Network, plan: Plan, statistics: kfe.Statistics, feeds: dict[str, np.ndarray]) -> bytes:
    narrowed = narrow(network, plan, statistics)
    chains = refit(narrowed.network, plan, narrowed.statistics, dataset(network, feeds))
    return serialize(write_chains(narrowed.network, plan, narrowed.statistics, chains))


@pytest.mark.parametrize("importance", ["magnitude-l2", "kron-obs"])
@pytest.mark.parametrize("name", ["classifier", "products", "residual-dynamo", "grouped-11", "gelu_mlp-17"])
def test_what_is_left_comes_nearer_to_the_original(name, importance) -> None:
    network, feeds, unseen = made(name)
    statistics = kfe.collect(network, feeds, threads=1)
    plan = ChannelPlanner(network, statistics, importance, round_to=1).plan(Macs(0.7))
    assert plan.channels
    (wanted,) = outputs(serialize(network.original), unseen)

    def error(model: bytes) -> float:
        return float(np.square(outputs(model, unseen)[0] - wanted).mean())

    before = error(serialize(apply_plan(network, plan, statistics)[0]))
    assert before > 1e-4 * wanted.var()
    enough = 1.0 if plan.compensates else 0.9  # what makes up for what went already leaves less to be found
    assert error(refitted(network, plan, statistics, feeds)) < enough * before


@pytest.mark.parametrize("name", ["classifier", "products", "residual-dynamo"])
def test_where_all_channels_stay_it_is_the_plain_refit(name) -> None:
    network, feeds, _ = made(name)
    statistics = kfe.collect(network, feeds, threads=1)
    plan = dense_plan(network)
    plan.choices.update(kfe.plan(network, statistics, kfe.Macs(0.6), round_to=1, threads=1).choices)
    assert plan.changed
    plain = refitted(network, plan, statistics, feeds)
    for group in find_groups(network).groups:
        plan.channels[group.name] = tuple(range(group.size))
    assert narrow(network, plan, statistics).network.whole is network
    for wanted, found in zip(
        outputs(plain, feeds), outputs(refitted(network, plan, statistics, feeds), feeds), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.std())


def test_channels_then_forms() -> None:
    network, feeds, unseen = made("classifier")
    statistics = kfe.collect(network, feeds, threads=1)
    plan = kfe.plan(network, statistics, kfe.Macs(0.4), channels=0.7, round_to=2, threads=1)
    assert plan.channels
    assert plan.changed
    once = apply_plan(network, plan, statistics)[0]
    planned = sum(choice.cost.macs for choice in plan.choices.values())
    assert count_macs(once) == planned <= 0.4 * plan.original.macs
    narrowed = narrow(network, plan, statistics)
    _, losses = solve_plan(narrowed.network, plan, narrowed.statistics)
    assert sum(losses.values()) + sum(narrowed.losses.values()) == pytest.approx(plan.predicted_loss, rel=0.2)
    model = refitted(network, plan, statistics, feeds)
    (wanted,) = outputs(serialize(network.original), unseen)
    errors = [np.square(outputs(each, unseen)[0] - wanted).mean() for each in (model, serialize(once))]
    assert errors[0] < 0.9 * errors[1]
    assert count_macs(kfe.inspect(onnx.load_from_string(model)).model) == planned


def test_the_mean_is_not_made_up_for_twice() -> None:
    """What narrowing adds behind a product, where it has no bias of its own, is a part of what refit solves for."""
    network, feeds, _ = made("products")
    statistics = kfe.collect(network, feeds, threads=1)
    plan = dense_plan(network)
    plan.channels.update({"first": (0, 1, 2, 3), "added": (0, 1, 2, 3), "bare": (0, 1, 2)})
    narrowed = narrow(network, plan, statistics)
    (wanted,) = outputs(serialize(network.original), feeds)
    assert np.abs(narrowed.network.shifts["output"]).max() > 0.3 * wanted.std()
    (found,) = outputs(refitted(network, plan, statistics, feeds), feeds)
    assert np.abs((found - wanted).mean((0, 1))).max() < 0.05 * wanted.std()
