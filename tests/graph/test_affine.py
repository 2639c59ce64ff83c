"""Scales and shifts go into convolutions, and the model computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_kfe.graph import load, normalize
from tests.tiny import node, run, tiny, weights

PER_CHANNEL = weights(6, 1, 1, seed=3)
POINTWISE = ("w1", {})
PADDED = ("w3", {"pads": [1, 1, 1, 1]})
GROUPED = ("wg", {"group": 2, "pads": [1, 1, 1, 1]})
DEPTHWISE = ("wd", {"group": 6, "pads": [1, 0, 1, 2]})
CONSTANTS = {
    "w1": weights(6, 6, 1, 1), "w3": weights(6, 6, 3, 3), "wg": weights(6, 3, 3, 3), "wd": weights(6, 1, 3, 3),
    "b": weights(6, seed=1), "half": np.array([0.5], np.float32), "two": np.array(2, np.float32),
    "three": np.array([3], np.float32), "six": np.array([6], np.float32), "sixth": np.array([1 / 6], np.float32),
    "zero": np.array(0, np.float32), "top": np.array(6, np.float32), "channels": PER_CHANNEL,
    "positions": weights(1, 1, 5, seed=4), "nothing": np.zeros(1, np.float32),
    "raised": np.ones((1, 1, 1, 1, 1), np.float32),
}  # fmt: skip


def model(nodes: list[onnx.NodeProto], *, opset: int = 17, dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A model with the constants that are read, in an element type."""
    read = {name for each in nodes for name in each.input}
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    constants = {name: array.astype(kind) for name, array in CONSTANTS.items() if name in read}
    return tiny(nodes, {"x": ["n", 6, 7, 5]}, {"y": ["n", 6, "h", "v"]}, constants, opset=opset, dtype=dtype)


def convolution(kind: tuple[str, dict], given: str, output: str, *more: str) -> onnx.NodeProto:
    weight, attributes = kind
    return node("Conv", [given, weight, *more], [output], f"conv_{output}", **attributes)


def check(proto: onnx.ModelProto, operators: list[str], rtol: float = 1e-5) -> None:
    """Equal outputs, and these operators in order."""
    before = proto.SerializeToString(deterministic=True)
    found = normalize(load(proto))
    assert [each.op_type for each in found.graph] == operators
    x = weights(3, 6, 7, 5, seed=7).astype(
        onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    )
    wanted, given = run(proto, {"x": 3 * x}), run(found, {"x": 3 * x})
    assert list(given) == list(wanted)
    for name, array in wanted.items():
        assert given[name].dtype == array.dtype
        np.testing.assert_allclose(given[name], array, rtol=0, atol=rtol * np.abs(array).max())
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("kind", [POINTWISE, PADDED, GROUPED, DEPTHWISE], ids=["1x1", "3x3", "grouped", "depthwise"])
@pytest.mark.parametrize("constant", ["half", "two", "channels"])
@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_behind_a_convolution(operator: str, constant: str, kind: tuple[str, dict]):
    for bias in ((), ("b",)):
        check(model([convolution(kind, "x", "c", *bias), node(operator, ["c", constant], ["y"])]), ["Conv"])


@pytest.mark.parametrize("kind", [POINTWISE, PADDED, GROUPED, DEPTHWISE], ids=["1x1", "3x3", "grouped", "depthwise"])
@pytest.mark.parametrize("constant", ["half", "channels"])
@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_in_front_of_a_convolution(operator: str, constant: str, kind: tuple[str, dict]):
    """What is padded with zeros takes no shift."""
    stays = operator in ("Add", "Sub") and kind is not POINTWISE
    nodes = [node("Relu", ["x"], ["r"]), node(operator, ["r", constant], ["c"]), convolution(kind, "c", "y", "b")]
    check(model(nodes), ["Relu", *([operator] if stays else []), "Conv"])


@pytest.mark.parametrize("kind", [PADDED, GROUPED, DEPTHWISE], ids=["3x3", "grouped", "depthwise"])
@pytest.mark.parametrize("shift", [("Add", "half"), ("Sub", "channels")])
@pytest.mark.parametrize("scale", [("Mul", "two"), ("Div", "six"), ("Mul", "channels")])
def test_a_scale_passes_a_shift_that_stays(scale: tuple[str, str], shift: tuple[str, str], kind: tuple[str, dict]):
    nodes = [
        node("Relu", ["x"], ["r"]), node(scale[0], ["r", scale[1]], ["s"]), node("Mul", ["half", "s"], ["t"]),
        node(shift[0], ["t", shift[1]], ["c"]), convolution(kind, "c", "y"),
    ]  # fmt: skip
    check(model(nodes), ["Relu", shift[0], "Conv"])


def test_between_two_convolutions_and_commuted():
    nodes = [
        convolution(PADDED, "x", "c"), node("Mul", ["half", "c"], ["d"]), node("Add", ["channels", "d"], ["e"]),
        node("Div", ["e", "six"], ["f"]), convolution(POINTWISE, "f", "g"), node("Add", ["two", "g"], ["y"]),
    ]  # fmt: skip
    check(model(nodes), ["Conv", "Conv"])


STAYS = {
    "differs between positions": [convolution(PADDED, "x", "c"), node("Mul", ["c", "positions"], ["y"])],
    "a constant over what is computed": [convolution(PADDED, "x", "c"), node("Div", ["two", "c"], ["y"])],
    "a division by zero": [convolution(PADDED, "x", "c"), node("Div", ["c", "nothing"], ["y"])],
    "read twice": [
        convolution(PADDED, "x", "c"), node("Mul", ["c", "half"], ["d"]), node("Add", ["c", "d"], ["y"]),
    ],
    "a weight that is shared": [
        convolution(PADDED, "x", "c"), node("Div", ["c", "three"], ["d"]), convolution(PADDED, "d", "y"),
    ],
    "two values": [
        convolution(PADDED, "x", "c"), node("Sigmoid", ["x"], ["s"]), node("Mul", ["c", "s"], ["y"]),
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str):
    proto = model(STAYS[name])
    found = [each.op_type for each in normalize(load(proto)).graph]
    assert found == [each.op_type for each in STAYS[name]]


def test_half_precision_stays():
    nodes = [node("Relu", ["x"], ["r"]), node("Div", ["r", "six"], ["c"]), convolution(PADDED, "c", "y")]
    check(model(nodes, dtype=onnx.TensorProto.FLOAT16), ["Relu", "Div", "Conv"], 2e-3)


def test_a_constant_that_makes_more_channels_or_axes_stays():
    for constant, axes in (("channels", [1]), ("raised", [0])):
        grown = tiny(
            [
                node("ReduceMax", ["x"], ["m"], axes=axes, keepdims=1),
                node("Add", ["m", constant], ["c"]),
                *([node("Squeeze", ["c", "first"], ["d"])] if constant == "raised" else []),
                convolution(POINTWISE, "d" if constant == "raised" else "c", "y"),
            ],
            {"x": ["n", 6, 7, 5]},
            {"y": ["m", 6, 7, 5]},
            {"w1": CONSTANTS["w1"], constant: CONSTANTS[constant], "first": np.zeros(1, np.int64)},
        )
        found = normalize(load(grown))
        assert "Add" in [each.op_type for each in found.graph]
        x = {"x": weights(3, 6, 7, 5, seed=7)}
        np.testing.assert_allclose(run(found, x)["y"], run(grown, x)["y"], atol=1e-5)


def test_what_bodies_read_stays():
    inside = [node("Mul", ["c", "half"], ["d"]), node("Add", ["d", "two"], ["t"])]
    result = onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["n", 6, "h", "v"])
    branches = {
        key: onnx.helper.make_graph(nodes, key, [], [result])
        for key, nodes in (("then_branch", inside), ("else_branch", [convolution(POINTWISE, "x", "t")]))
    }
    nodes = [
        convolution(PADDED, "x", "c"), node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["k"], to=9),
        node("If", ["k"], ["y"], **branches),
    ]  # fmt: skip
    constants = {name: CONSTANTS[name] for name in ("w3", "w1", "half", "two")}
    proto = tiny(nodes, {"x": ["n", 6, 7, 5]}, {"y": ["n", 6, "h", "v"]}, constants)
    check(proto, ["Conv", "ReduceMax", "Cast", "If"])


def gate(product: tuple[str, str] | None, scale: onnx.NodeProto, clip: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [node("Add", ["x", "three"], ["a"]), clip, *([node("Mul", product, ["m"])] if product else []), scale]


CLIP = node("Clip", ["a", "zero", "top"], ["c"])
OLD_CLIP = node("Clip", ["a"], ["c"], min=0.0, max=6.0)
OVER_SIX = node("Div", ["m", "six"], ["y"])


@pytest.mark.parametrize(
    ("nodes", "opset", "left"),
    [
        (gate(("x", "c"), OVER_SIX, CLIP), 17, ["HardSigmoid", "Mul"]),
        (gate(("c", "x"), OVER_SIX, CLIP), 17, ["HardSigmoid", "Mul"]),
        (gate(("x", "c"), node("Mul", ["sixth", "m"], ["y"]), CLIP), 17, ["HardSigmoid", "Mul"]),
        (gate(("x", "c"), OVER_SIX, OLD_CLIP), 9, ["HardSigmoid", "Mul"]),
        (gate(None, node("Div", ["c", "six"], ["y"]), CLIP), 17, ["HardSigmoid"]),
        (gate(None, node("Div", ["c", "three"], ["y"]), CLIP), 17, ["Add", "Clip", "Div"]),
        (gate(("c", "c"), OVER_SIX, CLIP), 17, ["Add", "Clip", "Mul", "Div"]),
        (gate(("a", "c"), OVER_SIX, CLIP), 17, ["Add", "Clip", "Mul", "Div"]),
    ],
)
def test_gates(nodes: list[onnx.NodeProto], opset: int, left: list[str]):
    check(model(nodes, opset=opset), left, 1e-6)
    if "sixth" not in nodes[-1].input:  # which in half precision is another number
        check(model(nodes, opset=opset, dtype=onnx.TensorProto.FLOAT16), left, 2e-3)


def test_a_gate_between_convolutions_with_scale_and_shift():
    """As PP-OCR has them: seven elementwise operators, of which three stay in front of a padded convolution."""
    middle = [
        node("Add", ["c", "half"], ["e"]), node("Add", ["e", "three"], ["f"]),
        node("Clip", ["f", "zero", "top"], ["g"]), node("Mul", ["e", "g"], ["h"]), node("Div", ["h", "six"], ["i"]),
        node("Mul", ["half", "i"], ["j"]), node("Add", ["j", "two"], ["k"]),
    ]  # fmt: skip
    for kind, left in ((POINTWISE, []), (DEPTHWISE, ["Add"])):
        nodes = [convolution(PADDED, "x", "c"), *middle, convolution(kind, "k", "y")]
        check(model(nodes), ["Conv", "HardSigmoid", "Mul", *left, "Conv"])
