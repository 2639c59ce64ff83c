"""Rotated heads: the same outputs, statistics as they would be collected, and channels in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import Network, count_parameters, find_groups, find_products, open_network
from onnx_kfe.planning import Plan, network_cost
from onnx_kfe.rewrite import narrow, rotate
from tests.cases import load_case
from tests.graph.groups.test_products import DECLINED, TOKENS, attend, attention, split_up
from tests.planning.problems import statistics_of
from tests.rewrite.test_channels import feeds_of
from tests.tied import siamese
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


def test_plans_say_whether_heads_were_rotated(tmp_path: Path) -> None:
    network = open_network(attention())
    feeds = feeds_of(ir.to_proto(network.model), 64)
    statistics = kfe.collect(network, feeds, threads=1)
    plan = kfe.plan(network, statistics, kfe.Macs(0.6), method="channels", round_to=1)
    assert plan.rotates
    assert {"MatMul0", "MatMul8"} <= set(plan.channels)
    assert not kfe.plan(network, statistics, kfe.Macs(0.6), method="kron-obs", round_to=1).rotates
    both = kfe.plan(network, statistics, kfe.Macs(0.5), channels=0.8, round_to=1)
    assert both.rotates
    plan.save(tmp_path / "plan.json")
    wanted = kfe.prune(network, statistics, plan, measure=False).ir_model
    found = kfe.prune(network, statistics, Plan.load(tmp_path / "plan.json", network), measure=False).ir_model
    outputs = [run(model, feeds)["Add20"] for model in (wanted, found, network.model)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_it_is_refitted_towards_the_rotated_model() -> None:
    network = open_network(attention())
    feeds, unseen = (feeds_of(ir.to_proto(network.model), batch) for batch in (256, 64))
    statistics = kfe.collect(network, feeds, threads=1)
    plan = kfe.plan(network, statistics, kfe.Macs(0.6), method="channels", round_to=1)
    data = {"data": feeds, "plan": plan, "statistics": statistics, "evaluation_data": unseen, "measure": False}
    wanted = run(network.model, unseen)["Add20"]
    once, refitted = (
        np.square(run(kfe.prune(network, **data, refit=refit).ir_model, unseen)["Add20"] - wanted).mean()
        for refit in (False, True)
    )
    assert 1e-6 * wanted.var() < refitted < once < 0.1 * wanted.var()


def test_heads_of_a_block_that_runs_twice_stay_as_they_are() -> None:
    """A basis of one node would part its weight from the other's; those of the last block are its own."""
    b = Builder()
    shared = [b.weight(12, 15) for _ in range(3)], b.weight(15, 12)
    own = [b.weight(12, 15) for _ in range(3)], b.weight(15, 12)
    x = "x"
    for inner, outer in (shared, shared, own):
        x = b.op("MatMul", attend(b, *(split_up(b, b.op("MatMul", x, weight)) for weight in inner)), outer)
    network = open_network(b.model(TOKENS, x))
    rotated = rotate(network, statistics_of(network)).network
    tied = {use.name for layer in network.prunable if layer.twins for use in layer.uses}
    assert len(tied) == 8
    assert len(changed(network, rotated)) == 4
    assert not changed(network, rotated) & tied
    assert rotated.twins == network.twins
    assert count_parameters(rotated.model) == count_parameters(network.model)
    declined = find_products(network, find_groups(network)).declined
    assert declined == dict.fromkeys(["MatMul0", "MatMul6"], "2 nodes share the weight that computes it")


def test_layers_left_out_with_all_their_nodes_are_left_out_once_rotated() -> None:
    network = open_network(siamese(), exclude=["q/first"])
    again = network.reweighed(network.model.clone())
    assert again.unselected == network.unselected
    assert [layer.uses for layer in again.layers] == [layer.uses for layer in network.layers]
