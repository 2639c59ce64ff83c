"""Weights that several nodes share: which are one layer, and why others are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_kfe.graph import count_macs, find_branches, find_layers, load, open_network
from tests.cases import load_case
from tests.tied import pyramid, siamese, stacked
from tests.tiny import node, tiny, weights

W = {"w": weights(4, 4), "v": weights(4, 4, seed=1)}


def reasons(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",), **arrays: np.ndarray) -> list[str | None]:
    shapes = {name: ["n", 4] if name == "y" else [4, 4] for name in outputs}
    return [layer.reason for layer in find_layers(load(tiny(nodes, {"x": ["n", 4]}, shapes, W | arrays)))]


def gemm(x: str, y: str, weight: str = "w", **attributes: object) -> onnx.NodeProto:
    return node("Gemm", [x, weight], [y], y, **attributes)


@pytest.mark.parametrize(
    ("model", "tied"),
    [
        (pyramid(), {"Conv6": ["Conv12", "Conv18"], "Conv8": ["Conv14", "Conv20"], "Conv10": ["Conv16", "Conv22"]}),
        (stacked(), {"MatMul0": ["MatMul6", "MatMul12"], "MatMul3": ["MatMul9", "MatMul15"]}),
        (siamese(), {"p/first": ["q/first"], "p/second": ["q/second"]}),
        (load_case("shared-11").model, {"/1/Conv": ["/1_1/Conv"]}),
    ],
)
def test_the_first_node_owns_the_others(model: onnx.ModelProto, tied: dict[str, list[str]]):
    network = open_network(model)
    assert {layer.name: [twin.name for twin in layer.twins] for layer in network.prunable if layer.twins} == tied
    assert network.twins == {twin: owner for owner, twins in tied.items() for twin in twins}
    for layer in network.layers:
        assert layer.reason == (f"pruned with '{network.twins[layer.name]}'" if layer.name in network.twins else None)
    assert network.owners == network.prunable
    assert sum(use.macs for layer in network.prunable for use in layer.uses) == count_macs(network.model)
    for layer in network.prunable:
        for use in layer.uses:
            np.testing.assert_array_equal(use.weight(), layer.weight())


def test_nodes_that_read_a_weight_otherwise_are_left_alone():
    shared = "weight 'w' is shared by 2 nodes"
    assert reasons([gemm("x", "h"), gemm("h", "y")]) == [None, "pruned with 'h'"]
    assert reasons([gemm("x", "h", transB=1), gemm("h", "y")]) == [f"{shared} that read it in different ways"] * 2
    assert reasons([gemm("x", "h", alpha=2.0), gemm("h", "y")]) == [f"{shared} that read it in different ways"] * 2
    product = [gemm("x", "h"), node("MatMul", ["h", "w"], ["y"], "y")]
    assert reasons(product) == [f"{shared} that read it in different ways"] * 2
    turned = [gemm("x", "h"), node("Transpose", ["w"], ["t"], "turn"), node("MatMul", ["h", "t"], ["y"], "y")]
    assert reasons(turned) == [f"{shared}, Transpose 'turn' among them", "no constant weight"]


def test_a_node_with_a_reason_of_its_own_keeps_all_from_being_pruned():
    own = "Gemm whose addend is not a bias vector"
    addend = node("Gemm", ["h", "w", "v"], ["y"], "y")
    assert reasons([gemm("x", "h"), addend]) == [
        f"weight 'w' is shared by 2 nodes, of which 'y' cannot be pruned: {own}", own,
    ]  # fmt: skip
    assert reasons([gemm("x", "h"), gemm("h", "y")], ("y", "w")) == ["weight is a graph output"] * 2
    deep = [node("Conv", [x, "d"], [y], y, group=4, pads=[1] * 4) for x, y in (("x", "h"), ("h", "y"))]
    shape = {"x": ["n", 4, 5, 5]}
    model = tiny(deep, shape, {"y": ["n", 4, 5, 5]}, {"d": weights(4, 1, 3, 3)})
    assert [layer.reason for layer in find_layers(load(model))] == ["depthwise"] * 2


def test_bodies_that_read_a_weight():
    body = tiny([gemm("x", "b")], {}, {"b": ["n", 4]}).graph
    nodes = [node("If", ["t"], ["h"], "if", then_branch=body, else_branch=body), gemm("h", "y")]
    inside = "inside the body of a control-flow operator"
    found = reasons(nodes, t=np.array(True))
    assert found[:2] == [inside] * 2
    assert found[2] is not None
    assert found[2].startswith("weight 'w' is shared by 3 nodes")


@pytest.mark.parametrize(
    "options", [{"exclude": ["q/fir*"]}, {"exclude": ["p/first"]}, {"include": ["last", "*/sec*"]}]
)
def test_what_is_left_out_is_left_out_at_all_nodes(options: dict[str, list[str]]):
    network = open_network(siamese(), **options)
    for seen in (network, network.with_input_shapes({"p": (2, 12), "q": (2, 12)})):
        assert [layer.name for layer in seen.prunable] == ["p/second", "last"]
        assert set(seen.unselected) == {"p/first", "q/first"}
        assert not any(layer.twins for layer in seen.layers if "first" in layer.name)


def test_one_of_the_nodes_is_enough_to_include():
    network = open_network(siamese(), include=["q/first"])
    (layer,) = network.prunable
    assert [use.name for use in layer.uses] == ["p/first", "q/first"]


def test_branches_with_a_shared_weight_stay():
    assert find_branches(open_network(stacked())) == []
    untied = stacked()
    for place, name in enumerate(["MatMul0", "MatMul3", "MatMul9"]):
        (each,) = (each for each in untied.graph.node if each.name == name)
        (tensor,) = (tensor for tensor in untied.graph.initializer if tensor.name == each.input[1])
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = each.input[1] = f"own{place}"
        untied.graph.initializer.append(copy)
    assert [branch.layer for branch in find_branches(open_network(untied))] == ["MatMul3"]
