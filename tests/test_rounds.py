"""Pruning in rounds: budgets in the graph that is written, shapes and means of what is folded, and one round alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe._measure import Machine
from onnx_kfe._recipe import Recipe
from onnx_kfe._rounds import Rounds, prune_in_rounds
from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.graph import Network, count_macs, count_parameters, open_network
from onnx_kfe.planning import (
    Budget,
    ChannelPlanner,
    DirectionPlanner,
    Macs,
    Milliseconds,
    Params,
    compose,
)
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import apply_plan, write_chains
from tests.networks import classifier, samples
from tests.tiny import node, run, tiny, weights

DIRECTIONS = [("eigendamage", None), ("eigendamage-depthwise", None), ("c-obd", "kfe"), ("kron-obs", "kfe")]
CHANNELS = [("kron-obs", None), ("taylor", None), ("magnitude-l2", None)]


def pointwise() -> onnx.ModelProto:
    """A 1x1 convolution with strides, products with and without bias, and a Gemm."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c"], "conv", strides=[2, 2]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w1", "b1"], ["h"], "gemm", transB=1),
        node("Relu", ["h"], ["s"]),
        node("MatMul", ["s", "w2"], ["m"], "product"),
        node("Relu", ["m"], ["t"]),
        node("Gemm", ["t", "w3"], ["logits"], "last"),
    ]
    shapes = {"w0": (12, 3, 1, 1), "w1": (14, 12), "w2": (14, 16), "w3": (16, 5), "b0": (12,), "b1": (14,)}
    arrays = {name: weights(*shape, seed=n) / 2 for n, (name, shape) in enumerate(shapes.items())}
    return tiny(nodes, {"x": ["n", 3, 8, 8]}, {"logits": ["n", 5]}, arrays)


MODELS = {"classifier": classifier, "pointwise": pointwise}
X = samples(128)


@pytest.fixture(scope="module", params=MODELS)
def given(request) -> tuple[Network, kfe.Statistics]:
    network = open_network(MODELS[request.param]())
    return network, kfe.collect(network, {"x": X}, threads=1)


def rounds_of(
    given: tuple[Network, kfe.Statistics],
    recipe: Recipe,
    *budgets: Budget,
    round_to: int | None = None,
    x: np.ndarray = X,
) -> tuple[Rounds, list[Network]]:
    """What came of them, and the networks that statistics were collected of on the way."""
    seen: list[Network] = []

    def collect(network: Network) -> kfe.Statistics:
        seen.append(network)
        return kfe.collect(network, {"x": x}, threads=1)

    return prune_in_rounds(*given, budgets, recipe, round_to, Machine(threads=1), collect, Progress()), seen


def model_of(rounds: Rounds):
    return write_chains(rounds.network, rounds.plan, rounds.statistics, rounds.chains)


@pytest.mark.parametrize(("method", "basis"), [*CHANNELS, *DIRECTIONS])
@pytest.mark.parametrize("budget", [Macs(0.5), Params(0.6)])
def test_the_budget_is_met_in_the_end_and_in_steps(given, method, basis, budget) -> None:
    network, _ = given
    found, seen = rounds_of(given, Recipe.of(method, basis, rounds=2), budget, round_to=1)
    model = model_of(found)
    spent = {"macs": count_macs(model), "parameters": count_parameters(model)}[budget.resource]
    added = sum(layer.bias() is None for layer in network.layers) * 16 * (budget.resource == "parameters")
    assert spent <= budget.amount * budget.of(found.plan.original) + added
    (half,) = seen
    between = {"macs": count_macs(half.model), "parameters": count_parameters(half.model)}[budget.resource]
    if not found.chains:  # in the network in between cores stand by themselves
        assert between <= budget.amount**0.5 * budget.of(found.plan.original) + added
    assert spent < between
    assert np.isfinite(run(model, {"x": X})["logits"]).all()
    assert set(found.losses) >= {name for name, choice in found.plan.changed.items()}
    assert found.plan.predicted_loss == pytest.approx(sum(found.losses.values()))
    assert found.plan.budget == str(budget)


def test_folded_rotations_have_the_shapes_that_the_plan_says() -> None:
    network = open_network(classifier())
    given = network, kfe.collect(network, {"x": X}, threads=1)
    found, _ = rounds_of(given, Recipe.of("eigendamage", rounds=3), Macs(0.4))
    assert {"conv1", "conv2"} <= set(found.chains)
    for name, chain in found.chains.items():
        geometry = next(layer.geometry for layer in network.layers if layer.name == name)
        inside, outside = found.plan.choices[name].ranks
        assert [stage.weight.shape for stage in chain.stages] == [
            (1, inside, geometry.in_channels),
            (1, outside, inside, 3, 3),
            (1, geometry.out_channels, outside),
        ]
        encoder, _, decoder = (stage.weight[0] for stage in chain.stages)
        np.testing.assert_allclose(encoder @ encoder.T, np.eye(inside), atol=1e-9)  # products of rotations are such
        np.testing.assert_allclose(decoder.T @ decoder, np.eye(outside), atol=1e-9)


@pytest.mark.parametrize(("method", "basis"), [("eigendamage", None), ("kron-obs", "kfe")])
def test_one_round_is_the_plan_at_once(given, method, basis) -> None:
    network, statistics = given
    recipe = Recipe.of(method, basis)
    found, seen = rounds_of(given, recipe, Macs(0.6))
    assert seen == []
    planner = DirectionPlanner(network, statistics, recipe.method.form)
    plan = planner.plan(Macs(0.6))
    assert {name: (c.form, c.ranks) for name, c in found.plan.choices.items()} == {
        name: (choice.form, choice.ranks) for name, choice in plan.choices.items()
    }
    model, losses = apply_plan(network, plan, statistics)
    assert found.losses == pytest.approx(losses)
    wanted = run(model, {"x": X})["logits"]
    np.testing.assert_allclose(run(model_of(found), {"x": X})["logits"], wanted, rtol=1e-3, atol=1e-4)


def test_one_round_of_channels_is_the_plan_at_once(given) -> None:
    network, statistics = given
    found, _ = rounds_of(given, Recipe.of("kron-obs"), Macs(0.6), round_to=1)
    plan = ChannelPlanner(network, statistics, "kron-obs", round_to=1).plan(Macs(0.6))
    assert (found.plan.channels, found.plan.compensates) == (plan.channels, True)
    wanted = run(apply_plan(network, plan, statistics)[0], {"x": X})["logits"]
    np.testing.assert_allclose(run(model_of(found), {"x": X})["logits"], wanted, rtol=1e-4, atol=1e-4)


def test_channels_of_later_rounds_are_those_of_the_original(given) -> None:
    network, _ = given
    found, (half,) = rounds_of(given, Recipe.of("taylor", rounds=2), Macs(0.3), round_to=1)
    assert found.network.whole is half.whole is network
    for name, kept in found.plan.channels.items():
        rows = found.network.cuts[name].rows
        assert tuple(np.flatnonzero(rows)) == kept
        assert set(kept) <= set(np.flatnonzero(half.cuts[name].rows))
    assert any(len(kept) < half.cuts[name].rows.sum() for name, kept in found.plan.channels.items())


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_mean_output_stays_over_rounds(rounds) -> None:
    """Of the first layer, which in each round gets the inputs that it got at first; later ones get others."""
    network = open_network(pointwise())
    x = np.broadcast_to(weights(128, 3, 1, 1), (128, 3, 8, 8))  # so that it does not matter which positions are drawn
    given = network, kfe.collect(network, {"x": x}, threads=1)
    found, _ = rounds_of(given, Recipe.of("c-obd", "kfe", rounds=rounds), Macs(0.5), x=x)
    assert network.layers[0].name in found.chains
    statistics = given[1]
    moved = 0.0
    for name, chain in found.chains.items():
        (layer,) = (each for each in network.layers if each.name == name)
        mean = statistics.layers[name].mean[0]
        before = layer.weight()[0].reshape(-1, mean.size) @ mean + (0 if layer.bias() is None else layer.bias())
        after = compose(chain.stages)[0].reshape(-1, mean.size) @ mean + chain.bias
        if layer is network.layers[0] or rounds == 1:
            np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
        moved = max(moved, np.abs(chain.bias - (0 if layer.bias() is None else layer.bias())).max())
    assert moved > 1e-3


def test_the_published_method_leaves_the_biases_in_every_round() -> None:
    network = open_network(classifier())
    given = network, kfe.collect(network, {"x": X}, threads=1)
    found, _ = rounds_of(given, Recipe.of("eigendamage", rounds=2), Macs(0.5))
    for name, chain in found.chains.items():
        (layer,) = (each for each in network.layers if each.name == name)
        np.testing.assert_allclose(chain.bias, layer.bias(), rtol=1e-6)


def test_budgets_that_cannot_be(given) -> None:
    with pytest.raises(UsageError, match="--latency-ms cannot be divided over --iterations: give --latency"):
        rounds_of(given, Recipe.of("kron-obs", rounds=2), Milliseconds(1.0))
    for method in ("kron-obs", "eigendamage"):
        with pytest.raises(BudgetError, match=r"best (channels|directions) stay.*can become is --macs 0\.\d+"):
            rounds_of(given, Recipe.of(method, rounds=2), Macs(0.001))
