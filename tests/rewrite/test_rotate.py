"""Rotated heads: the same outputs, statistics as they would be collected, and channels in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import Network, find_groups, open_network
from onnx_kfe.planning import Plan, network_cost
from onnx_kfe.rewrite import narrow, rotate
from tests.cases import load_case
from tests.graph.groups.test_products import DECLINED, TOKENS, attend, attention, split_up
from tests.planning.problems import statistics_of
from tests.rewrite.test_channels import feeds_of
from tests.tiny import run, weights
from tests.topologies import IMAGE, TOPOLOGIES, Builder


def bottleneck() -> onnx.ModelProto:
    """Convolutions with a bias and nothing between them."""
    b = Builder()
    return b.model(IMAGE, b.conv(b.conv("x", 3, 6), 6, 4, 1))


def unbiased() -> onnx.ModelProto:
    """Products without biases, and a Gemm that reads."""
    b = Builder()
    heads = [split_up(b, b.op("MatMul", "x", b.weight(12, 15))) for _ in range(3)]
    return b.model(TOKENS, b.gemm(b.op("Reshape", attend(b, *heads), b.const([-1, 15])), 15, 12))


def shared_bias() -> onnx.ModelProto:
    """One constant is the bias of queries, keys and values."""
    b = Builder()
    bias = b.weight(15)
    heads = [split_up(b, b.op("Add", b.op("MatMul", "x", b.weight(12, 15)), bias)) for _ in range(3)]
    return b.model(TOKENS, b.matmul(attend(b, *heads), 15, 12))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "attention": attention,
    "scaled": lambda: attention(DECLINED["scaled"][0]),
    "half declined": lambda: attention(DECLINED["rotary"][0]),
    "computed": TOPOLOGIES["computed_target"],
    "one layer": lambda: load_case("attention-13").model,
    "one layer, dynamo": lambda: load_case("attention-dynamo").model,
    "bottleneck": bottleneck,
    "unbiased": unbiased,
    "shared bias": shared_bias,
}


def changed(network: Network, other: Network) -> set[str]:
    """The layers whose weights are others."""
    pairs = zip(network.layers, other.layers, strict=True)
    return {one.name for one, two in pairs if one.prunable and not np.allclose(one.weight(), two.weight(), atol=1e-4)}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same(name) -> None:
    network = open_network(MODELS[name]())
    rotated = rotate(network, statistics_of(network))
    assert len(changed(network, rotated.network)) >= 2
    assert [node.name for node in rotated.network.model.graph] == [node.name for node in network.model.graph]
    feeds = feeds_of(ir.to_proto(network.model), 3)
    wanted = run(network.model, feeds)
    for output, array in run(rotated.network.model, feeds).items():
        np.testing.assert_allclose(array, wanted[output], atol=1e-5 * np.abs(wanted[output]).max())


@pytest.mark.parametrize("name", ["attention", "one layer"])
def test_statistics_are_those_that_are_collected_anew(name) -> None:
    network = open_network(MODELS[name]())
    feeds = feeds_of(ir.to_proto(network.model), 64)
    rotated = rotate(network, kfe.collect(network, feeds, threads=1))
    wanted = kfe.collect(rotated.network, feeds, threads=1)
    assert set(rotated.statistics.layers) == set(wanted.layers)
    for layer, found in rotated.statistics.layers.items():
        for field in ("mean", "input_factor", "output_factor", "positions", "samples"):
            expected = getattr(wanted.layers[layer], field)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(getattr(found, field), expected, atol=2e-3 * scale, err_msg=f"{layer} {field}")
        assert found.coherence == pytest.approx(wanted.layers[layer].coherence, rel=0.3)


def kept(network: Network, group: str, units: tuple[int, ...], rotates: bool) -> Plan:
    return Plan(network.fingerprint, {}, network_cost(network), channels={group: units}, rotates=rotates)


def test_the_first_values_cost_less_to_keep_than_any_channels_as_they_were() -> None:
    network = open_network(attention())
    statistics = statistics_of(network)
    (group,) = (group for group in find_groups(network).groups if group.name == "MatMul8")

    def loss(units: tuple[int, ...], rotates: bool) -> float:
        return sum(narrow(network, kept(network, group.name, units, rotates), statistics).losses.values())

    for count in range(1, group.size):
        before = [loss(units, False) for units in itertools.combinations(range(group.size), count)]
        after = [loss(units, True) for units in itertools.combinations(range(group.size), count)]
        assert min(after) == pytest.approx(loss(tuple(range(count)), True))
        assert min(after) < 0.95 * min(before)


def test_keys_lose_least_with_the_last_of_a_head() -> None:
    """Against projections of each head found by a search: none of the same rank costs less under K-FAC."""
    network = open_network(attention())
    statistics = statistics_of(network)
    rotated = rotate(network, statistics)
    place = next(n for n, layer in enumerate(network.layers) if layer.name == "MatMul4")
    weight, seen = network.layers[place].weight()[0], statistics.layers["MatMul4"]
    turned, there = rotated.network.layers[place].weight()[0], rotated.statistics.layers["MatMul4"]
    for head in range(3):
        rows = np.arange(5) + 5 * head
        covariance = weight[rows] @ seen.centred_input_factor[0] @ weight[rows].T
        curvature = seen.output_factor[0][np.ix_(rows, rows)]
        last = rows[3:]
        ours = np.trace(
            turned[last] @ there.centred_input_factor[0] @ turned[last].T @ there.output_factor[0][np.ix_(last, last)]
        )
        random = np.random.default_rng(head)
        best = np.inf
        for _ in range(2000):  # the best projection along a random range
            span = random.normal(size=(5, 3))
            gone = np.eye(5) - span @ np.linalg.solve(span.T @ curvature @ span, span.T @ curvature)
            best = min(best, np.trace(gone.T @ curvature @ gone @ covariance))
        assert 0 < ours < best * (1 + 1e-3)
        assert best < 3 * ours  # the search came near


def test_what_is_not_known_or_was_narrowed_stays() -> None:
    network = open_network(attention())
    statistics = statistics_of(network)
    lacking = replace(statistics, layers={"MatMul0": statistics.layers["MatMul0"]})
    assert rotate(network, lacking) == (network, lacking)
    narrowed = narrow(network, kept(network, "MatMul8", (0, 1), True), statistics)
    assert narrowed.statistics is not None
    assert rotate(narrowed.network, narrowed.statistics) == narrowed[:2]
    others = statistics_of(open_network(attention(DECLINED["scaled"][0])))
    with pytest.raises(KfeError, match="another model"):
        rotate(network, others)


def test_plans_of_rotated_heads_need_statistics() -> None:
    network = open_network(attention())
    with pytest.raises(UsageError, match="those of rotated heads: give --data or --stats"):
        narrow(network, kept(network, "MatMul8", (0, 1), True), None)


def test_a_bias_that_layers_share_becomes_one_of_each() -> None:
    network = open_network(shared_bias())
    rotated = rotate(network, statistics_of(network)).network
    constants = [value.const_value.numpy() for value in rotated.model.graph.initializers.values()]
    biases = [array for array in constants if array.shape == (15,)]
    assert len({array.tobytes() for array in biases}) == len(biases) == 3
    assert not any(np.allclose(array, weights(15)) for array in biases)
