"""Other weights in the nodes that there are, in each of the ways that these store them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from onnx_kfe.graph import open_network
from onnx_kfe.rewrite import ReweighPass, Weights
from tests.tiny import node, run, tiny, weights

X = weights(3, 6, seed=7)
IMAGES = weights(2, 6, 5, 4, seed=8)
TOKENS = weights(2, 3, 6, seed=9)


def gemm(bias: bool = True, **attributes: object) -> onnx.ModelProto:
    shape = (5, 6) if attributes.get("transB") else (6, 5)
    arrays = {"w": weights(*shape)} | ({"b": weights(5, seed=1)} if bias else {})
    return tiny([node("Gemm", ["x", *arrays], ["y"], "layer", **attributes)], {"x": ["n", 6]}, {"y": ["n", 5]}, arrays)


def conv(bias: bool = True, group: int = 1) -> onnx.ModelProto:
    arrays = {"w": weights(4, 6 // group, 3, 3)} | ({"b": weights(4, seed=1)} if bias else {})
    nodes = [node("Conv", ["x", *arrays], ["y"], "layer", pads=[1] * 4, group=group)]
    return tiny(nodes, {"x": ["n", 6, 5, 4]}, {"y": ["n", 4, 5, 4]}, arrays)


def matmul(*after: onnx.NodeProto, **arrays: np.ndarray) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["h" if after else "y"], "layer"), *after]
    return tiny(nodes, {"x": ["n", 3, 6]}, {"y": ["n", 3, 5]}, {"w": weights(6, 5), **arrays})


MODELS = {
    "gemm": (gemm(), X),
    "gemm transB": (gemm(transB=1), X),
    "gemm alpha beta": (gemm(transB=1, alpha=0.5, beta=3.0), X),
    "gemm without bias": (gemm(bias=False, alpha=2.0), X),
    "conv": (conv(), IMAGES),
    "conv without bias": (conv(bias=False), IMAGES),
    "grouped conv": (conv(group=2), IMAGES),
    "matmul of an output": (matmul(), TOKENS),
    "matmul and add": (matmul(node("Add", ["h", "b"], ["y"], "add"), b=weights(5)), TOKENS),
    "matmul and another add": (matmul(node("Add", ["h", "b"], ["y"], "add"), b=weights(3, 5)), TOKENS),
    "matmul and relu": (matmul(node("Relu", ["h"], ["y"], "relu")), TOKENS),
}


def reference(network, feeds: dict[str, np.ndarray], change: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The output of the original with the difference, computed by a node beside it."""
    proto = ir.to_proto(network.model.clone())
    layer = next(each for each in proto.graph.node if each.name == "layer")
    groups, outputs = change.shape[:2]
    matrix = change.reshape(groups * outputs, *change.shape[2:])
    arrays = {"change": matrix if layer.op_type == "Conv" else matrix.T, "shift": shift}
    extra = node(layer.op_type, [layer.input[0], "change"], ["changed"], "beside")
    if layer.op_type == "Conv":
        extra.attribute.extend(layer.attribute)
        arrays["shift"] = shift.reshape(-1, 1, 1)
    place = list(proto.graph.node).index(layer)
    before = layer.output[0]
    layer.output[0] = "unchanged"
    more = [extra, node("Add", ["unchanged", "changed"], ["sum"]), node("Add", ["sum", "shift"], [before])]
    for offset, each in enumerate(more, 1):
        proto.graph.node.insert(place + offset, each)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return run(proto, feeds)["y"]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_node_computes_with_other_weights(name, shifted) -> None:
    proto, x = MODELS[name]
    network = open_network(proto)
    (layer,) = network.layers
    change = weights(*layer.weight().shape, seed=3).astype(np.float64)
    shift = weights(layer.geometry.out_channels, seed=4).astype(np.float64) * shifted
    bias = (np.zeros_like(shift) if layer.bias() is None else layer.bias()) + shift
    model = network.model.clone()
    assert ReweighPass({"layer": Weights(layer.weight() + change, bias)})(model).modified
    np.testing.assert_allclose(
        run(model, {"x": x})["y"], reference(network, {"x": x}, change, shift), rtol=1e-4, atol=1e-4
    )
    kept = {made.name for made in network.model.graph}
    names = {made.name for made in model.graph}
    added = {"layer/bias_add"} if shifted and layer.op_type == "MatMul" and name != "matmul and add" else set()
    assert names - kept == added
    assert kept <= names
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_constant_that_others_read_is_copied() -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], "one"), node("Gemm", ["h", "w", "b"], ["y"], "two")]
    arrays = {"w": weights(6, 6), "b": weights(6, seed=1)}
    network = open_network(tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, arrays))
    model = network.model.clone()
    other = weights(1, 6, 6, seed=2).astype(np.float64)
    ReweighPass({"two": Weights(other, np.ones(6))})(model)
    first = X @ arrays["w"] + arrays["b"]
    np.testing.assert_allclose(run(model, {"x": X})["y"], first @ other[0].T + 1, rtol=1e-4, atol=1e-4)


def test_half_precision_stays() -> None:
    arrays = {"w": weights(6, 5, dtype=np.float16)}
    proto = tiny(
        [node("MatMul", ["x", "w"], ["y"], "layer")], {"x": ["n", 6]}, {"y": ["n", 5]}, arrays,
        dtype=onnx.TensorProto.FLOAT16,
    )  # fmt: skip
    network = open_network(proto)
    model = network.model.clone()
    ReweighPass({"layer": Weights(2 * network.layers[0].weight(), np.ones(5))})(model)
    x = X.astype(np.float16)
    found = run(model, {"x": x})["y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, 2 * x @ arrays["w"] + 1, rtol=2e-2, atol=2e-2)


def test_nodes_that_there_are_not_are_refused() -> None:
    network = open_network(gemm())
    with pytest.raises(PreconditionError, match="no node named ghost"):
        ReweighPass({"ghost": Weights(np.zeros((1, 5, 6)), np.zeros(5))})(network.model.clone())
    assert not ReweighPass({})(network.model.clone()).modified
