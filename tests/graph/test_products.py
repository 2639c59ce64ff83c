"""Products in all shapes become layers, and the model computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe.graph import count_macs, find_layers, load, normalize, open_network
from onnx_kfe.planning import FORMS, Candidate, Plan, network_cost
from onnx_kfe.rewrite import apply_plan
from tests.tiny import node, run, tiny, weights

W = weights(6, 8)
B = weights(8, seed=1)


def gemm(*operands: str, **attributes: object) -> onnx.NodeProto:
    return node("Gemm", operands, ["y"], "layer", **attributes)


def convolution(operator: str, *weight: int) -> tuple[list[onnx.NodeProto], dict, list, list]:
    """With a bias that the graph computes, of each channel's mean over all samples."""
    nodes = [
        node("ReduceMean", ["x"], ["b"], axes=[0, 2, 3], keepdims=0),
        node(operator, ["x", "w", "b"], ["y"], "layer", strides=[2, 1]),
    ]
    return nodes, {"w": weights(*weight)}, ["n", 6, 5, 4], ["n", 6, "h", "w"]


CASES = {  # nodes, constants, shapes of x and y
    "gemm transA": ([gemm("x", "w", transA=1)], {"w": W}, [6, "n"], ["n", 8]),
    "gemm transA transB, scaled": (
        [gemm("x", "w", "b", transA=1, transB=1, alpha=0.5, beta=2.0)], {"w": W.T.copy(), "b": B}, [6, "n"], ["n", 8],
    ),
    "gemm, constant on the left": ([gemm("w", "x")], {"w": W.T.copy()}, [6, "n"], [8, "n"]),
    "gemm, constant on the left, transA": (
        [gemm("w", "x", "b", transA=1, alpha=0.5, beta=3.0)], {"w": W, "b": weights(8, 1)}, [6, "n"], [8, "n"],
    ),
    "gemm, constant on the left, transB": ([gemm("w", "x", transB=1)], {"w": W.T.copy()}, ["n", 6], [8, "n"]),
    "gemm, constant on the left, both": (
        [gemm("w", "x", "b", transA=1, transB=1)], {"w": W, "b": weights(1)}, ["n", 6], [8, "n"],
    ),
    "gemm, column addend": ([gemm("x", "w", "b", beta=0.5)], {"w": W, "b": weights(4, 1)}, [4, 6], [4, 8]),
    "gemm, matrix addend": ([gemm("x", "w", "b", alpha=2.0)], {"w": W, "b": weights(4, 8)}, [4, 6], [4, 8]),
    "gemm, computed addend": (
        [node("Sigmoid", ["x"], ["s"]), gemm("x", "w", "s", beta=0.25, alpha=0.5)],
        {"w": weights(6, 6)}, ["n", 6], ["n", 6],
    ),
    "gemm, computed vector": (
        [node("ReduceMean", ["x"], ["s"], axes=[0], keepdims=0), gemm("x", "w", "s", transB=1)],
        {"w": weights(6, 6)}, ["n", 6], ["n", 6],
    ),
    "convolution, computed bias": convolution("Conv", 6, 6, 3, 2),
    "transposed convolution, computed bias": convolution("ConvTranspose", 6, 6, 3, 2),
    "matmul, leading axis of 1": (
        [node("MatMul", ["x", "w"], ["y"], "layer")], {"w": W[None]}, ["n", 5, 6], ["n", 5, 8],
    ),
    "matmul, leading axes of 1 on the left": (
        [node("MatMul", ["w", "x"], ["y"], "layer")], {"w": W.T[None, None]}, ["n", 2, 6, 5], ["n", 2, 8, 5],
    ),
}  # fmt: skip


def model_of(name: str) -> onnx.ModelProto:
    nodes, arrays, x, y = CASES[name]
    relu = node("Relu", ["x_in"], ["x"], "relu")  # a computed input, as within a network
    return tiny([relu, *nodes], {"x_in": x}, {"y": y}, {key: np.ascontiguousarray(a) for key, a in arrays.items()})


def inputs(name: str, seed: int = 0, count: int = 4) -> dict[str, np.ndarray]:
    shape = [count if size == "n" else size for size in CASES[name][2]]
    return {"x_in": weights(*shape, seed=seed)}


@pytest.mark.parametrize("name", CASES)
def test_products_become_layers(name: str):
    model = model_of(name)
    assert [layer.prunable for layer in find_layers(load(model))] == [False], "what is to be made a layer is one"
    normal = normalize(load(model))
    (layer,) = find_layers(normal)
    assert (layer.name, layer.reason) == ("layer", None)
    assert layer.macs == find_layers(load(model))[0].macs
    for seed in (0, 1):
        feeds = inputs(name, seed)
        np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-4, atol=1e-5)
    assert normal.opset_imports == load(model).opset_imports
    assert all(value.uses() or value.is_graph_output() for value in normal.graph.initializers.values())


@pytest.mark.parametrize("name", CASES)
def test_and_are_pruned_like_others(name: str):
    model, feeds = model_of(name), inputs(name)
    network = open_network(model, input_shapes={"x_in": feeds["x_in"].shape})
    (layer,) = network.layers
    batch_first = isinstance(CASES[name][2][0], str)
    statistics = kfe.collect(network, feeds, heads={"y": "gaussian"}) if batch_first else None
    assert statistics is None or not statistics.skipped
    form = "output_low_rank" if layer.geometry.kernel else "two_factor"
    limits = FORMS[form].limits(layer.geometry)
    for ranks in (limits, (2,)):
        choice = Candidate(form, ranks, FORMS[form].cost(layer.geometry, ranks), 0.0)
        plan = Plan(network.fingerprint, {"layer": choice}, network_cost(network))
        smaller, _ = apply_plan(network, plan, statistics)
        found, wanted = run(smaller, feeds)["y"], run(model, feeds)["y"]
        assert found.shape == wanted.shape
        if ranks == limits:
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        else:
            assert np.abs(found - wanted).max() > 1e-3
            assert count_macs(smaller, {"x_in": feeds["x_in"].shape}) < layer.macs


@pytest.mark.parametrize("bias", [None, "constant", "computed"])
@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_an_output_shape_becomes_pads(mode: str, bias: str | None):
    """Of 4 x 5 by strides of 2 and 3 and reaches of 3 and 5 there would be 9 x 17."""
    arrays = {"w": weights(6, 4, 3, 3)} | ({"b": weights(4)} if bias == "constant" else {})
    mean = [node("ReduceMean", ["c"], ["b"], axes=[0, 2, 3], keepdims=0), node("Conv", ["x", "v"], ["c"], "other")]
    up = node(
        "ConvTranspose", ["x", "w", *(["b"] if bias else [])], ["y"], "layer", strides=[2, 3], dilations=[1, 2],
        output_shape=[8, 14], auto_pad=mode,
    )  # fmt: skip
    nodes = [*(mean[::-1] if bias == "computed" else []), up]
    arrays |= {"v": weights(4, 6, 1, 1)} if bias == "computed" else {}
    model = tiny(nodes, {"x": ["n", 6, 4, 5]}, {"y": ["n", 4, 8, 14]}, arrays)
    normal = normalize(load(model))
    layer = next(layer for layer in find_layers(normal) if layer.name == "layer")
    assert layer.reason is None
    wanted = {"SAME_UPPER": [0, 1, 1, 2], "SAME_LOWER": [1, 2, 0, 1], "NOTSET": [1, 2, 0, 1]}[mode]
    assert list(layer.node.attributes["pads"].as_ints()) == wanted
    for batch in (1, 3):
        feeds = {"x": weights(batch, 6, 4, 5, seed=batch)}
        np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_an_output_shape_of_free_inputs_stays():
    for sizes, shape in ((["h", 5], [8, 10]), ([4, 5], [10, 10])):  # free, or larger than there is
        up = node("ConvTranspose", ["x", "w"], ["y"], "layer", strides=[2, 2], output_shape=shape)
        model = tiny([up], {"x": ["n", 6, *sizes]}, {"y": ["n", 4, *shape]}, {"w": weights(6, 4, 3, 3)})
        (layer,) = find_layers(normalize(load(model)))
        assert layer.reason == "its output_shape is given, and pads cannot say it"


def leave_alone(*nodes: onnx.NodeProto, **arrays: np.ndarray) -> list[str | None]:
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", "m"]}, arrays)
    return [layer.reason for layer in find_layers(normalize(load(model)))]


def test_what_is_no_single_matrix_is_left_alone():
    stack = {"w": weights(2, 6, 8)}
    assert leave_alone(node("MatMul", ["x", "w"], ["y"]), **stack) == ["weight of rank 3"]
    assert leave_alone(node("MatMul", ["x", "w"], ["y"]), w=weights(1, 6, 8)) == ["weight of rank 3"]  # a new axis
    assert leave_alone(node("MatMul", ["x", "w"], ["y"]), w=weights(6)) == ["weight of rank 1"]
    squares = node("Gemm", ["x", "x"], ["y"], transB=1)
    assert leave_alone(squares) == ["no constant weight"]
    twice = [node("Gemm", ["w", "x"], ["h"], transB=1), node("Gemm", ["w", "h"], ["y"])]
    assert leave_alone(*twice, w=weights(6, 6)) == ["the constant is the left operand"] * 2


def test_names_that_are_taken_are_numbered():
    """A second pass over a model that has nodes and values of the names that the first would give."""
    nodes = [
        node("Transpose", ["x"], ["layer/transpose_output"], "layer/transpose", perm=[0, 1]),
        node("Sigmoid", ["layer/transpose_output"], ["s"], "layer/add"),
        node("Gemm", ["s", "w", "s"], ["y"], "layer"),
    ]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, {"w": weights(6, 6)})
    normal = normalize(load(model))
    names = [each.name for each in normal.graph]
    assert len(set(names)) == len(names)
    assert "layer" in names
    feeds = {"x": weights(4, 6)}
    np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-5)
