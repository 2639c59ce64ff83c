"""Narrowing: what is left against the original with zeroed weights, regressions on the data, and two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_kfe.calibration import LayerStatistics, Statistics
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Layer, LayerCut, Network, find_groups, open_network
from onnx_kfe.planning import Plan, network_cost
from onnx_kfe.rewrite import ReweighPass, Weights, narrow
from tests.planning.problems import random_statistics, statistics_of
from tests.rewrite.test_channels import UNITS, assert_as_cut, feeds_of, model_of
from tests.tied import pyramid, siamese
from tests.tiny import node, run, tiny, weights

_DAMPING = 1e-4  # of the mean variance of a patch, as of `LayerProblem`


def convolutions() -> tuple[onnx.ModelProto, np.ndarray]:
    """Two readers of the first, one in groups."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["h"], "first", pads=[1] * 4),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "w1", "b1"], ["c"], "biased", pads=[1] * 4),
        node("Conv", ["r", "w2"], ["d"], "grouped", group=2, pads=[1] * 4),
        node("Add", ["c", "d"], ["y"]),
    ]
    arrays = {"w0": weights(8, 3, 3, 3), "b0": weights(8, seed=1) + 1, "w1": weights(4, 8, 3, 3, seed=2)}
    arrays |= {"b1": weights(4, seed=3), "w2": weights(4, 4, 3, 3, seed=4)}
    x = weights(40, 3, 6, 5, seed=5) + weights(40, 3, 1, 1, seed=6)
    return tiny(nodes, {"x": ["n", 3, 6, 5]}, {"y": ["n", 4, 6, 5]}, arrays), x


def gemms() -> tuple[onnx.ModelProto, np.ndarray]:
    nodes = [
        node("Gemm", ["x", "w0", "b0"], ["h"], "first", transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "w1", "b1"], ["m"], "scaled", alpha=0.5, beta=2.0),
        node("Relu", ["m"], ["s"]),
        node("Gemm", ["s", "w2"], ["y"], "unbiased", transB=1),
    ]
    arrays = {"w0": weights(8, 5), "b0": weights(8, seed=1) + 1, "w1": weights(8, 6, seed=2)}
    arrays |= {"b1": weights(6, seed=3), "w2": weights(4, 6, seed=4)}
    return tiny(nodes, {"x": ["n", 5]}, {"y": ["n", 4]}, arrays), weights(200, 5, seed=5)


def products() -> tuple[onnx.ModelProto, np.ndarray]:
    """MatMuls with an Add behind, without, and as the output of the graph."""
    nodes = [
        node("MatMul", ["x", "w0"], ["p"], "first"),
        node("Add", ["p", "b0"], ["h"], "add"),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w1"], ["q"], "added"),
        node("Add", ["q", "b1"], ["m"], "add1"),
        node("Relu", ["m"], ["s"]),
        node("MatMul", ["s", "w2"], ["t"], "bare"),
        node("Relu", ["t"], ["u"]),
        node("MatMul", ["u", "w3"], ["y"], "output"),
    ]
    arrays = {"w0": weights(5, 8), "b0": weights(8, seed=1) + 1, "w1": weights(8, 8, seed=2), "b1": weights(8, seed=3)}
    arrays |= {"w2": weights(8, 6, seed=4), "w3": weights(6, 4, seed=6)}
    return tiny(nodes, {"x": ["n", 3, 5]}, {"y": ["n", 3, 4]}, arrays), weights(60, 3, 5, seed=5)


MODELS: dict[str, Callable[[], tuple[onnx.ModelProto, np.ndarray]]] = {
    made.__name__: made for made in (convolutions, gemms, products)
}
Case = tuple[Network, np.ndarray, Statistics, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> Case:
    """A network with data, statistics, and masks of which a third of each group goes."""
    proto, x = MODELS[request.param]()
    network = open_network(proto)
    masks = {
        group.name: np.arange(group.size) % 3 != 1 for group in find_groups(network).groups if group.prunable
    }  # fmt: skip
    assert masks
    return network, x, exact_statistics(network, x), masks


def exact_statistics(network: Network, x: np.ndarray) -> Statistics:
    """Of all positions of the data, with random cotangents."""
    layers = {}
    for layer in network.prunable:
        patches = columns_of(network, layer, x)
        second = patches @ patches.swapaxes(1, 2)
        seen = random_statistics(layer)
        cotangents = seen.output_factor * patches.shape[2]
        layers[layer.name] = LayerStatistics(second, patches.sum(2), cotangents, patches.shape[2], len(x))
    return replace(statistics_of(network), layers=layers)


def plan_of(network: Network, masks: dict[str, np.ndarray], compensates: bool = False) -> Plan:
    kept = {name: tuple(map(int, np.flatnonzero(mask))) for name, mask in masks.items()}
    return Plan(network.fingerprint, {}, network_cost(network), channels=kept, compensates=compensates)


def columns_of(network: Network, layer: Layer, x: np.ndarray) -> np.ndarray:
    """The patches that a layer of the model reads, ``[groups, c * taps, n]``."""
    proto = ir.to_proto(network.model.clone())
    proto.graph.output.append(onnx.helper.make_tensor_value_info(layer.input, onnx.TensorProto.FLOAT, None))
    found = (x if layer.input == "x" else run(proto, {"x": x})[layer.input]).astype(np.float64)
    geometry = layer.geometry
    if not geometry.kernel:
        return found.reshape(1, -1, geometry.in_channels).swapaxes(1, 2)
    padded = np.pad(found, ((0, 0), (0, 0), (1, 1), (1, 1)))  # kernels of 3 that keep the size
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))  # [n, c, h, w, 3, 3]
    patches = patches.transpose(1, 4, 5, 0, 2, 3)
    return patches.reshape(geometry.groups, geometry.patch_size, -1)


def taps_kept(layer: Layer, cut: LayerCut) -> np.ndarray:
    return np.repeat(cut.columns.reshape(layer.geometry.groups, -1), layer.geometry.taps, 1)


def test_the_mean_of_what_goes_stays(case: Case) -> None:
    """As the original with zeros for the weights that read what went, and its mean in the biases."""
    network, x, statistics, masks = case
    cuts = find_groups(network).cut(masks)
    narrowed = narrow(network, plan_of(network, masks), statistics)
    changed = {}
    for layer in network.prunable:
        weight, gone = layer.weight(), ~taps_kept(layer, cuts[layer.name])
        means = columns_of(network, layer, x).mean(2)
        flat = weight.reshape(*weight.shape[:2], -1)
        lost = np.einsum("gop,gp->go", flat * gone[:, None], means).reshape(-1)
        bias = (0 if layer.bias() is None else layer.bias()) + lost
        changed[layer.name] = Weights((flat * ~gone[:, None]).reshape(weight.shape), bias)
    reference = ReweighPass(changed)(network.model.clone()).model
    wanted, before = run(reference, {"x": x})["y"], run(network.model, {"x": x})["y"]
    np.testing.assert_allclose(run(narrowed.network.model, {"x": x})["y"], wanted, rtol=1e-3, atol=1e-3 * wanted.std())
    assert np.abs(wanted - before).max() > 0.1 * wanted.std()


def test_what_stays_makes_up_for_what_goes(case: Case) -> None:
    """The weights are the ridge regression of the old outputs on the inputs that stay."""
    network, x, statistics, masks = case
    cuts = find_groups(network).cut(masks)
    narrowed = narrow(network, plan_of(network, masks, compensates=True), statistics)
    left = {layer.name: layer for layer in narrowed.network.layers}
    checked = 0
    for layer in network.prunable:
        kept = taps_kept(layer, cuts[layer.name])
        patches, weight = columns_of(network, layer, x), layer.weight()
        rows = cuts[layer.name].rows.reshape(len(weight), -1)
        for g, (data, matrix) in enumerate(zip(patches, weight.reshape(*weight.shape[:2], -1), strict=True)):
            centred = data - data.mean(1, keepdims=True)
            variance = np.square(centred).sum() / data.size
            ridge = np.sqrt(_DAMPING * variance * data.shape[1]) * np.eye(len(data))
            inputs = np.concatenate([centred, ridge], 1).T
            wanted = np.linalg.lstsq(inputs[:, kept[g]], inputs @ matrix[rows[g]].T, rcond=None)[0].T
            found = left[layer.name].weight()[g].reshape(wanted.shape)
            np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max(), err_msg=layer.name)
            if not kept[g].all():
                checked += np.abs(wanted - matrix[rows[g]][:, kept[g]]).max() > 0.05 * np.abs(wanted).max()
    assert checked
    assert sum(narrowed.losses.values()) > 0


def test_names_and_what_was_whole_are_known(case: Case) -> None:
    network, _, statistics, masks = case
    before = ir.to_proto(network.model).SerializeToString(deterministic=True)
    narrowed = narrow(network, plan_of(network, masks), statistics).network
    assert ir.to_proto(network.model).SerializeToString(deterministic=True) == before
    names = [layer.name for layer in network.layers]
    assert [layer.name for layer in narrowed.layers] == names
    assert [layer.input for layer in narrowed.layers if layer.op_type != "MatMul"] == [
        layer.input for layer in network.layers if layer.op_type != "MatMul"
    ]
    assert {node.name for node in narrowed.model.graph} >= {node.name for node in network.model.graph}
    assert [value.name for value in narrowed.model.graph.outputs] == [v.name for v in network.model.graph.outputs]
    assert narrowed.whole is network
    assert set(narrowed.cuts) == set(names)
    assert_as_cut(narrowed.model, narrowed.cuts)
    for layer in narrowed.layers:
        whole = next(each for each in network.layers if each.name == layer.name)
        assert narrowed.cuts[layer.name].geometry(whole.geometry) == layer.geometry


def test_the_statistics_are_of_what_is_left(case: Case) -> None:
    network, _, statistics, masks = case
    narrowed = narrow(network, plan_of(network, masks), statistics)
    shapes = {layer.name: layer.geometry for layer in narrowed.network.prunable}
    for name, seen in narrowed.statistics.layers.items():
        groups, patch = shapes[name].groups, shapes[name].patch_size
        assert seen.input_second_moment.shape == (groups, patch, patch)
        assert seen.cotangent_second_moment.shape == (groups, *[shapes[name].out_channels // groups] * 2)
    assert narrowed.statistics.model_hash == statistics.model_hash


@pytest.mark.parametrize("name", sorted({*UNITS} - {"decoder"}))  # with fewer channels than rows its Reshape is unclear
def test_narrowing_twice_is_narrowing_once(name) -> None:
    """Also of groups that are numbered, in whatever way channels come together."""
    network = open_network(model_of(name))
    random = np.random.default_rng(0)
    sizes = {group.name: group.size for group in find_groups(network).groups if group.prunable}
    first = {group: random.permutation(size) < max(size * 2 // 3, 1) for group, size in sizes.items()}
    once = narrow(network, plan_of(network, first), None).network
    assert {g.name: g.size for g in find_groups(once).groups if g.prunable} == {
        group: int(mask.sum()) for group, mask in first.items() if mask.sum() > 1
    }  # fmt: skip
    second = {group: np.arange(mask.sum()) != mask.sum() // 2 for group, mask in first.items() if mask.sum() > 1}
    twice = narrow(once, plan_of(once, second), None).network
    both = {group: mask.copy() for group, mask in first.items()}
    for group, mask in second.items():
        both[group][first[group]] = mask
    at_once = narrow(network, plan_of(network, both), None).network
    assert twice.whole is network
    for layer, cut in at_once.cuts.items():
        np.testing.assert_array_equal(twice.cuts[layer].rows, cut.rows)
        np.testing.assert_array_equal(twice.cuts[layer].columns, cut.columns)
        assert twice.cuts[layer].groups == cut.groups
    feeds = feeds_of(ir.to_proto(network.model), 2)
    found, wanted = run(twice.model, feeds), run(at_once.model, feeds)
    for output, array in wanted.items():
        np.testing.assert_allclose(found[output], array, rtol=1e-3, atol=1e-5, err_msg=output)


def test_without_channels_to_remove_nothing_is_made() -> None:
    network = open_network(gemms()[0])
    statistics = statistics_of(network)
    assert narrow(network, Plan(network.fingerprint, {}, network_cost(network)), statistics) == (
        network,
        statistics,
        {},
    )


def test_channels_of_another_model_are_refused() -> None:
    network = open_network(gemms()[0])
    with pytest.raises(UsageError, match="no such group"):
        narrow(network, plan_of(network, {"ghost": np.ones(2, bool)}), None)


@pytest.mark.parametrize("make", [pyramid, siamese])
def test_nodes_that_share_a_weight_narrow_alike(make: Callable[[], onnx.ModelProto]):
    """One weight is left of each, and all nodes make up for the mean of what went."""
    network = open_network(make())
    statistics = statistics_of(network)
    groups = find_groups(network)
    kept = {group.name: tuple(range(group.size // 2)) for group in groups.groups if group.prunable}
    plan = Plan(network.fingerprint, {}, network_cost(network), channels=kept, compensates=True)
    smaller, _, losses = narrow(network, plan, statistics)
    cuts = groups.cut(plan.masks(groups))
    before = {layer.name: layer for layer in network.prunable}
    layers = [layer for layer in smaller.prunable if layer.twins]
    assert [layer.name for layer in layers] == [layer.name for layer in network.prunable if layer.twins]
    for layer in layers:
        cut, whole = cuts[layer.name], before[layer.name]
        assert len({use.weight_value for use in layer.uses}) == 1
        assert layer.weight().shape[1:3] == (cut.rows.sum(), cut.columns.sum())
        assert layer.name in losses
        moved = []
        for use, given in zip(layer.uses, whole.uses, strict=True):
            bias = np.zeros(len(cut.rows)) if given.bias() is None else given.bias()
            moved.append((0.0 if use.bias() is None else use.bias()) - bias[cut.rows])
        assert cut.columns.all() or np.abs(moved[0]).max() > 0
        np.testing.assert_allclose(moved, [moved[0]] * len(moved), atol=1e-5)
    biases = {use.node.inputs[2] for layer in layers for use in layer.uses if len(use.node.inputs) > 2}
    own = sum(len(layer.uses) if layer.name == "Conv8" else 1 for layer in layers)
    assert len(biases) == own
