"""Branches on graphs of a few nodes, and over the zoo against what no longer reaches an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_kfe.graph import Branch, Network, find_branches, find_junction, only_feeding, open_network
from tests.cases import load_case
from tests.tiny import node, tiny, weights

SHAPE = ["n", 4, 6, 6]
KERNELS = {name: weights(4, 4, 3, 3, seed=seed) for seed, name in enumerate("abcd")} | {
    "depthwise": weights(4, 1, 3, 3, seed=9)
}


def conv(value: str, weight: str, output: str, **attributes: object) -> onnx.NodeProto:
    """The layer has the name of its weight."""
    return node("Conv", [value, weight], [output], weight, pads=[1] * 4, **attributes)


def convolutional(
    *nodes: onnx.NodeProto, outputs: Sequence[str] = ("y",), shape: Sequence[int | str] = SHAPE, **arrays: np.ndarray
) -> onnx.ModelProto:
    """A graph from ``x``, with the weights that its nodes read."""
    used = {name for each in nodes for name in each.input}
    constants = {name: array for name, array in (KERNELS | arrays).items() if name in used}
    return tiny(nodes, {"x": shape}, dict.fromkeys(outputs, shape), constants)


def branches_of(model: onnx.ModelProto, **options: object) -> list[Branch]:
    return find_branches(open_network(model, **options))  # type: ignore[arg-type]


def block(*branch: onnx.NodeProto, summands: Sequence[str] = ("x", "h")) -> list[onnx.NodeProto]:
    """A branch that ends in ``h``, and the sum, with something behind it."""
    return [*branch, node("Add", summands, ["s"], "sum"), node("Relu", ["s"], ["y"])]


PLAIN = [conv("x", "a", "g"), node("Relu", ["g"], ["r"]), conv("r", "b", "h")]


@pytest.mark.parametrize("summands", [("x", "h"), ("h", "x")])
def test_a_plain_block(summands):
    assert branches_of(convolutional(*block(*PLAIN, summands=summands))) == [Branch("b", ("a", "b"), "sum")]


def test_depthwise_layers_vanish_with_the_others():
    inner = [conv("x", "a", "g"), conv("g", "depthwise", "k", group=4), conv("k", "b", "h")]
    assert branches_of(convolutional(*block(*inner))) == [Branch("b", ("a", "depthwise", "b"), "sum")]


def test_a_layer_may_be_all_of_the_branch():
    assert branches_of(convolutional(*block(conv("x", "a", "h")))) == [Branch("a", ("a",), "sum")]


def test_both_operands_may_be_layers():
    nodes = block(*PLAIN, conv("x", "c", "k"), summands=("h", "k"))
    assert branches_of(convolutional(*nodes)) == [Branch("b", ("a", "b"), "sum"), Branch("c", ("c",), "sum")]


def test_branches_lie_within_branches():
    inner = [conv("x", "a", "g"), conv("g", "b", "k"), node("Add", ["g", "k"], ["m"], "inner"), conv("m", "c", "h")]
    assert branches_of(convolutional(*block(*inner))) == [
        Branch("b", ("b",), "inner"),
        Branch("c", ("a", "b", "c"), "sum"),
    ]


@pytest.mark.parametrize("bias", [["k", "bias"], ["bias", "k"], None])
def test_products_end_in_a_bias_or_not(bias):
    arrays = {"a": weights(6, 8), "b": weights(8, 6), "bias": weights(6)}
    end = [node("Add", bias, ["h"], "bias")] if bias else []
    nodes = [
        node("MatMul", ["x", "a"], ["g"], "a"),
        node("Relu", ["g"], ["r"]),
        node("MatMul", ["r", "b"], ["k" if bias else "h"], "b"),
        *end,
        node("Add", ["h", "x"], ["s"], "sum"),
        node("Relu", ["s"], ["y"]),
    ]
    model = tiny(nodes, {"x": ["n", 5, 6]}, {"y": ["n", 5, 6]}, arrays if bias else {k: arrays[k] for k in "ab"})
    network = open_network(model)
    assert find_branches(network) == [Branch("b", ("a", "b"), "sum")]
    junction = find_junction(network.layers[1].node)
    assert (junction.addition.name, junction.branch.name, junction.other.name) == ("sum", "h", "x")
    assert (junction.bias and junction.bias.name) == ("bias" if bias else None)
    assert {n.name for n in network.model.graph} - {n.name for n in only_feeding(junction.branch)} == {"sum", "Relu_y"}


def test_a_value_used_elsewhere_keeps_what_computes_it():
    inner = [conv("x", "a", "g"), conv("g", "b", "k"), conv("k", "c", "h")]
    nodes = [*inner, node("Add", ["x", "h"], ["s"], "sum"), node("Mul", ["s", "g"], ["y"])]
    assert branches_of(convolutional(*nodes)) == [Branch("c", ("b", "c"), "sum")]
    assert branches_of(convolutional(*block(*inner), outputs=("y", "k"))) == [Branch("c", ("c",), "sum")]


FREE = ["n", 4, "h", "w"]
NONE = {
    "an activation lies between": convolutional(*block(conv("x", "a", "g"), node("Relu", ["g"], ["h"]))),
    "the output is a graph output": convolutional(*block(*PLAIN), outputs=("y", "h")),
    "the sum is a graph output": convolutional(*PLAIN, node("Add", ["x", "h"], ["y"])),
    "the output is used twice": convolutional(
        conv("x", "a", "h"), node("Add", ["x", "h"], ["s"]), node("Mul", ["s", "h"], ["y"])
    ),
    "the output is added to itself": convolutional(*block(*PLAIN, summands=("h", "h"))),
    "the operand is a constant": convolutional(*block(*PLAIN, summands=("h", "e")), e=weights(1, 4, 6, 6)),
    "the operand has one position": convolutional(
        *block(*PLAIN, node("GlobalAveragePool", ["x"], ["p"]), summands=("h", "p"))
    ),
    "the operand has one channel": convolutional(
        *block(*PLAIN, node("ReduceMean", ["x"], ["p"], axes=[1]), summands=("h", "p"))
    ),
    "the operand has one sample": convolutional(
        *block(*PLAIN, node("ReduceMean", ["x"], ["p"], axes=[0]), summands=("h", "p"))
    ),
    "the output has one position": convolutional(
        conv("x", "a", "g"), node("GlobalAveragePool", ["g"], ["p"]), node("Conv", ["p", "c"], ["h"], "c"),
        node("Add", ["x", "h"], ["s"]), node("Relu", ["s"], ["y"]), c=weights(4, 4, 1, 1),
    ),
    "the addend of a product is no bias": tiny(
        [node("MatMul", ["x", "w"], ["g"]), node("Add", ["g", "e"], ["h"]), node("Add", ["h", "x"], ["s"]),
         node("Relu", ["s"], ["y"])],
        {"x": ["n", 5, 6]}, {"y": ["n", 5, 6]}, {"w": weights(6, 6), "e": weights(5, 6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", NONE)
def test_no_branch_where(why):
    assert len(open_network(NONE[why]).prunable) > 0
    assert branches_of(NONE[why]) == []


def test_free_positions_and_a_fixed_batch_are_no_hindrance():
    for shape in (FREE, [2, 4, 6, 6], [1, 4, 6, 6]):
        assert branches_of(convolutional(*block(*PLAIN), shape=shape)) == [Branch("b", ("a", "b"), "sum")]


def test_layers_that_the_user_left_out_stay():
    model = convolutional(*block(*PLAIN))
    assert branches_of(model, exclude=["a"]) == []
    assert branches_of(model, include=["b"]) == []
    network = open_network(model, exclude=["a"])
    assert network.unselected == {"a": "excluded by --exclude"}


def test_bodies_that_read_a_value_vanish_or_hold_it():
    """An If in the branch goes with what its bodies read; one beside it keeps that."""
    bodies = [tiny([node(kind, ["g"], [kind], kind)], {}, {kind: SHAPE}).graph for kind in ("Neg", "Abs")]
    start = [node("ReduceMin", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["t"], to=9), conv("x", "a", "g")]
    choose = node("If", ["t"], ["r"], "if", then_branch=bodies[0], else_branch=bodies[1])
    within = convolutional(*start, *block(choose, conv("r", "b", "h")))
    beside = convolutional(*start, choose, *block(conv("g", "b", "h")), node("Neg", ["r"], ["z"]), outputs=("y", "z"))
    assert branches_of(within) == [Branch("b", ("a", "b"), "sum")]
    assert branches_of(beside) == [Branch("b", ("b",), "sum")]


def left_without(network: Network, branch: ir.Value) -> set[str]:
    """Nodes that still reach an output when nothing reads a value any more."""
    found: set[str] = set()
    pending = list(network.model.graph.outputs)
    while pending:
        value = pending.pop()
        if value is branch or value.producer() is None or value.producer().name in found:
            continue
        found.add(value.producer().name)
        pending += [used for used in value.producer().inputs if used is not None]
    return found


ZOO: Mapping[str, list[int]] = {  # layers that vanish, branch by branch
    "plain-13": [],
    "residual-11": [2, 2],
    "strided_shortcut-17": [2, 1, 2],
    "inverted_residual-17": [5, 5],
    "pyramid-11": [1],
    "gelu_mlp-17": [2],
    "attention-13": [4, 2],
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_loses_what_reaches_no_output(name):
    network = open_network(load_case(name).model)
    branches = find_branches(network)
    assert [len(branch.layers) for branch in branches] == ZOO[name]
    layers = {layer.name: layer for layer in network.layers}
    for branch in branches:
        junction = find_junction(layers[branch.layer].node)
        kept = left_without(network, junction.branch)
        assert branch.layers == tuple(layer.name for layer in network.layers if layer.name not in kept)
        assert branch.layers[-1] == branch.layer
        assert {n.name for n in only_feeding(junction.branch)} == {n.name for n in network.model.graph} - kept
