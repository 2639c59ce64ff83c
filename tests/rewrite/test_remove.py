"""Removed branches against models whose branch is still there, but computes the constant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes import PreconditionError

from onnx_kfe.graph import Layer, Network, find_branches, find_layers, open_network
from onnx_kfe.rewrite import RemovePass
from tests.cases import load_case
from tests.networks import mixer
from tests.tiny import node, run, tiny, weights


def removed(network: Network, removals: Mapping[str, np.ndarray]) -> ir.Model:
    model = RemovePass(removals)(network.model.clone()).model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def emptied(network: Network, removals: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with the weights and biases of layers set to zero, and their outputs to constants by another node."""
    proto = ir.to_proto(network.model.clone())
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers = {each.name: each for each in proto.graph.node}
    for name, mean in removals.items():
        layer = layers[name]
        left = layer.input[0] in constants
        weight = numpy_helper.to_array(constants[layer.input[1 - left]])
        for place, given in enumerate(layer.input):
            if given not in constants:
                continue
            zero = np.zeros_like(numpy_helper.to_array(constants[given]))
            layer.input[place] = f"{name} zero {place}"  # the one that there was may have other readers
            proto.graph.initializer.append(numpy_helper.from_array(zero, layer.input[place]))
        shape = (1, -1, *[1] * (weight.ndim - 2)) if layer.op_type == "Conv" else (-1, 1)[: 1 + left]
        mean = mean.reshape(shape).astype(weight.dtype)
        proto.graph.initializer.append(numpy_helper.from_array(mean, f"{name} mean"))
        place, output = list(proto.graph.node).index(layer), layer.output[0]
        layer.output[0] = f"{name} zero"
        proto.graph.node.insert(place + 1, node("Add", [f"{name} zero", f"{name} mean"], [output]))
    return proto


def assert_same(network: Network, smaller: ir.Model, removals: Mapping[str, np.ndarray], rtol: float = 1e-4) -> None:
    """Same interface, and same outputs as the model whose layers are emptied."""
    original = ir.to_proto(network.model)
    found = ir.to_proto(smaller)
    assert found.graph.input == original.graph.input
    assert found.graph.output == original.graph.output
    assert found.opset_import == original.opset_import
    reference = emptied(network, removals)
    for batch in (1, 3):
        value = original.graph.input[0]
        shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds = {value.name: weights(*shape, seed=batch, dtype=dtype)}
        wanted, before = run(reference, feeds), run(original, feeds)
        scale = {name: np.abs(array).max() for name, array in wanted.items()}
        for name, array in run(smaller, feeds).items():
            assert array.dtype == wanted[name].dtype
            np.testing.assert_allclose(array, wanted[name], rtol=rtol, atol=rtol * scale[name], err_msg=name)
        changes = [np.abs(before[name] - wanted[name]).max() / scale[name] for name in wanted]
        assert max(changes) > 1e-2  # the branch did something


def assert_nothing_dead(model: ir.Model) -> None:
    for each in model.graph:
        assert any(output.uses() or output.is_graph_output() for output in each.outputs), each.name
    assert all(value.uses() for value in model.graph.initializers.values())


def means(layer: Layer, seed: int = 5) -> np.ndarray:
    return weights(layer.geometry.out_channels, seed=seed).astype(np.float64)


ZOO = [
    "residual-11",
    "strided_shortcut-17",
    "inverted_residual-17",
    "pyramid-11",
    "gelu_mlp-17",
    "attention-13",
    "mixer",
]


@pytest.mark.parametrize("name", ZOO)
def test_zoo_without_its_branches(name):
    """Each branch by itself, then one for each sum together."""
    network = open_network(mixer() if name == "mixer" else load_case(name).model)
    layers = {layer.name: layer for layer in network.layers}
    branches = find_branches(network)
    assert branches
    one_each = {branch.sum: branch for branch in reversed(branches)}
    for group in (*([branch] for branch in branches), one_each.values()):
        removals = {branch.layer: means(layers[branch.layer]) for branch in group}
        smaller = removed(network, removals)
        gone = {layer for branch in group for layer in branch.layers}
        assert [layer.name for layer in find_layers(smaller)] == [key for key in layers if key not in gone]
        assert_nothing_dead(smaller)
        assert_same(network, smaller, removals)


def block(kind: str, dtype: type = np.float32, order: tuple[str, str] = ("h", "x")) -> Network:
    """A branch of two layers named first and last, that ends in ``h``, beside the input."""
    arrays = {"w": weights(6, 6, dtype=dtype), "v": weights(6, 6, seed=1, dtype=dtype)}
    arrays |= {"b": weights(6, seed=2, dtype=dtype)}
    shape, options = ["n", 5, 6], {}
    if kind == "Conv":
        arrays |= {name: np.stack([arrays[name]] * 3, -1) for name in "wv"}
        shape, options = ["n", 6, 7], {"pads": [1, 1]}
    elif kind == "Gemm":
        shape = ["n", 6]
    biased = [] if kind == "MatMul" else ["b"]
    nodes = [
        node(kind, ["x", "w", *biased], ["g"], "first", **options),
        node("Clip", ["g", "low"], ["r"], "clip"),
        node(kind, ["r", "v", *biased], ["k" if kind == "MatMul" else "h"], "last", **options),
        *([node("Add", ["k", "b"], ["h"], "bias")] if kind == "MatMul" else []),
        node("Add", order, ["s"], "sum"),
        node("Clip", ["s", "low"], ["y"], "end"),
    ]
    arrays["low"] = np.array(-0.5, dtype)
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    network = open_network(tiny(nodes, {"x": shape}, {"y": shape}, arrays, dtype=element))
    assert [branch.layer for branch in find_branches(network)] == ["last"]
    return network


KINDS = ["Conv", "Gemm", "MatMul"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [("h", "x"), ("x", "h")])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float16, 4e-3)])
def test_the_sum_adds_the_constant(kind, order, dtype, rtol):
    network = block(kind, dtype, order)
    removals = {"last": weights(6, seed=5).astype(np.float64)}
    smaller = removed(network, removals)
    assert [each.name for each in smaller.graph] == ["sum", "end"]
    assert_same(network, smaller, removals, rtol)
    assert set(smaller.graph.initializers) == {"v/mean", "low"}
    constant = smaller.graph.initializers["v/mean"].const_value.numpy()
    assert constant.dtype == dtype
    assert constant.shape == ((1, 6, 1) if kind == "Conv" else (6,))
    bias = weights(6, seed=2, dtype=dtype).astype(np.float64) if kind == "MatMul" else 0
    np.testing.assert_allclose(constant.reshape(-1), removals["last"] + bias, rtol=rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_of_zero_leaves_no_sum(kind):
    network = block(kind)
    removals = {"last": -weights(6, seed=2).astype(np.float64) if kind == "MatMul" else np.zeros(6)}
    smaller = removed(network, removals)
    assert [each.name for each in smaller.graph] == ["end"]
    assert set(smaller.graph.initializers) == {"low"}
    assert_same(network, smaller, removals, 1e-5)


def test_all_that_read_a_sum_read_the_other_operand():
    """Another branch, a body and a second sum among them."""
    body = tiny([node("Abs", ["s"], ["r"], "inner")], {}, {"r": ["n", 6]}).graph
    nodes = [
        node("ReduceMin", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["t"], to=9),
        node("Gemm", ["x", "w"], ["h"], "first"),
        node("Add", ["x", "h"], ["s"], "sum"),
        node("If", ["t"], ["i"], "if", then_branch=body, else_branch=body),
        node("Gemm", ["s", "v"], ["k"], "last"),
        node("Add", ["k", "s"], ["u"], "second sum"),
        node("Add", ["u", "i"], ["y"], "end"),
    ]
    arrays = {"w": weights(6, 6), "v": weights(6, 6, seed=1)}
    network = open_network(tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, arrays))
    for mean in (np.zeros(6), np.ones(6)):
        for names in (["first"], ["last"], ["first", "last"]):
            removals = dict.fromkeys(names, mean)
            smaller = removed(network, removals)
            assert not {each.name for each in smaller.graph} & set(names)
            assert_same(network, smaller, removals, 1e-5)


def nested() -> Network:
    """A sum within a branch; its inner branch is ``inner``, the whole ends in ``outer``."""
    nodes = [
        node("Gemm", ["x", "a"], ["g"], "first"),
        node("Gemm", ["g", "b"], ["k"], "inner"),
        node("Add", ["g", "k"], ["m"], "inner sum"),
        node("Gemm", ["m", "c"], ["h"], "outer"),
        node("Add", ["h", "x"], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "end"),
    ]
    arrays = {name: weights(6, 6, seed=seed) for seed, name in enumerate("abc")}
    return open_network(tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, arrays))


@pytest.mark.parametrize("names", [["inner"], ["outer"], ["inner", "outer"], ["outer", "inner"]])
@pytest.mark.parametrize("zero", [False, True])
def test_branches_within_branches(names, zero):
    network = nested()
    removals = {name: np.zeros(6) if zero else weights(6, seed=7).astype(np.float64) for name in names}
    smaller = removed(network, removals)
    assert_same(network, smaller, removals, 1e-5)
    assert_nothing_dead(smaller)
    assert len(smaller.graph) == (1 if zero else 2) + (0 if "outer" in names else 3)


def test_bodies_vanish_with_their_operator():
    bodies = [tiny([node("Mul", ["g", kind], [f"{kind}!"], kind)], {}, {f"{kind}!": ["n", 6]}).graph for kind in "ab"]
    nodes = [
        node("ReduceMin", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["t"], to=9),
        node("Gemm", ["x", "w"], ["g"], "first"),
        node("If", ["t"], ["r"], "if", then_branch=bodies[0], else_branch=bodies[1]),
        node("Gemm", ["r", "v"], ["h"], "last"),
        node("Add", ["h", "x"], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "end"),
    ]
    arrays = {"w": weights(6, 6), "v": weights(6, 6, seed=1), "a": weights(6, seed=2), "b": weights(6, seed=3)}
    network = open_network(tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, arrays))
    smaller = removed(network, {"last": np.ones(6)})
    assert [each.name for each in smaller.graph.all_nodes()] == ["sum", "end"]
    assert set(smaller.graph.initializers) == {"v/mean"}
    assert_same(network, smaller, {"last": np.ones(6)}, 1e-5)


def test_what_others_read_and_taken_names_stay():
    """The bias is that of another layer too, and another initializer has the name that the constant would get."""
    nodes = [
        node("Gemm", ["x", "v/mean", "b"], ["g"], "first"),
        node("Gemm", ["g", "v", "b"], ["h"], "last"),
        node("Add", ["h", "x"], ["s"], "sum"),
        node("Mul", ["s", "g"], ["y"], "end"),
    ]
    arrays = {"v/mean": weights(6, 6), "v": weights(6, 6, seed=1), "b": weights(6, seed=2)}
    network = open_network(tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, arrays))
    smaller = removed(network, {"last": np.ones(6)})
    assert set(smaller.graph.initializers) == {"v/mean", "b", "v/mean_2"}
    before = run(network.model, {"x": weights(3, 6)})["y"]
    gate = weights(3, 6) @ arrays["v/mean"] + arrays["b"]
    wanted = (weights(3, 6) + 1) * gate
    np.testing.assert_allclose(run(smaller, {"x": weights(3, 6)})["y"], wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(before - wanted).max() > 0.1


def test_what_is_no_branch_is_refused():
    network = open_network(load_case("strided_shortcut-17").model)
    body, shortcut, second = find_branches(network)
    assert body.sum == shortcut.sum != second.sum
    mean = np.ones(16)
    for names, message in (
        (["ghost"], "no node named ghost"),
        ([network.layers[0].name], f"node {network.layers[0].name} is not the end of a residual branch"),
        ([body.layer, shortcut.layer], f"nodes {body.layer} and {shortcut.layer} are all that is added"),
    ):
        with pytest.raises(PreconditionError, match=message):
            RemovePass(dict.fromkeys(names, mean))(network.model.clone())


def test_a_branch_that_ends_in_a_transposed_convolution() -> None:
    nodes = [
        node("Conv", ["x", "v"], ["h"], "first", strides=[2, 2]),
        node("ConvTranspose", ["h", "w"], ["b"], "last", strides=[2, 2]),
        node("Add", ["b", "x"], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "relu"),
    ]
    arrays = {"v": weights(6, 4, 2, 2), "w": weights(6, 4, 2, 2)}
    network = open_network(tiny(nodes, {"x": ["n", 4, 6, 8]}, {"y": ["n", 4, 6, 8]}, arrays))
    mean, feeds = weights(4, seed=5), {"x": weights(2, 4, 6, 8)}
    smaller = removed(network, {"last": mean})
    assert [each.op_type for each in smaller.graph] == ["Add", "Relu"]
    found = run(smaller, feeds)["y"]
    np.testing.assert_allclose(found, np.maximum(feeds["x"] + mean[None, :, None, None], 0), rtol=1e-6)
