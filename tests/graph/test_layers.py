"""Geometry, cost and reasons of layers: by hand, and counted independently over the zoo."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import nn
from torch.nn import functional as F

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Geometry, Layer, concrete_shapes, count_macs, count_parameters, find_layers, load, normalize
from tests.cases import CASES, load_case
from tests.tiny import node, run, tiny, weights

Shape = list[int | str]


def only_layer(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> Layer:
    (layer,) = find_layers(load(model), shapes or None)
    return layer


def convolution(weight: tuple[int, ...], shape: Shape, kind: str = "Conv", **attributes: object) -> onnx.ModelProto:
    nodes = [node(kind, ["x", "w", "b"], ["y"], "layer", **attributes)]
    outputs = ["n", *("abc"[: len(weight) - 1])]
    channels = weight[0] if kind == "Conv" else weight[1] * int(attributes.get("group", 1))  # type: ignore[call-overload]
    return tiny(nodes, {"x": shape}, {"y": outputs}, {"w": weights(*weight), "b": weights(channels, seed=1)})


BY_HAND = [
    # 8 x 6 x 3 x 3 at 10 x 12 positions
    (
        convolution((8, 6, 3, 3), ["n", 6, 10, 12], pads=[1] * 4),
        Geometry(6, 8, (3, 3), (1, 1), 1, (10, 12), (10, 12)),
        51840,
    ),
    # floor((11 - 3) / 2) + 1 = 5, floor((12 - 3) / 2) + 1 = 5
    (
        convolution((8, 6, 3, 3), ["n", 6, 11, 12], strides=[2, 2]),
        Geometry(6, 8, (3, 3), (2, 2), 1, (5, 5), (11, 12)),
        10800,
    ),
    # reach 2 * (3 - 1) + 1 = 5: 10 + 1 + 2 - 5 + 1 = 9, 10 - 3 + 1 = 8
    (
        convolution((4, 2, 3, 3), ["n", 2, 10, 10], pads=[1, 0, 2, 0], dilations=[2, 1]),
        Geometry(2, 4, (3, 3), (1, 1), 1, (9, 8), (10, 10)),
        5184,
    ),
    (convolution((8, 3, 1, 3), ["n", 6, 5, 5], group=2), Geometry(6, 8, (1, 3), (1, 1), 2, (5, 3), (5, 5)), 1080),
    (convolution((6, 1, 3, 3), ["n", 6, 5, 5], group=6), Geometry(6, 6, (3, 3), (1, 1), 6, (3, 3), (5, 5)), 486),
    # floor((9 - 3) / 2) + 1 = 4, 8, reach 2 * (2 - 1) + 1 = 3: 7 + 1 - 3 + 1 = 6
    (
        convolution(
            (8, 3, 3, 1, 2), ["n", 6, 9, 8, 7], group=2, strides=[2, 1, 1], pads=[0, 0, 1, 0, 0, 0], dilations=[1, 1, 2]
        ),
        Geometry(6, 8, (3, 1, 2), (2, 1, 1), 2, (4, 8, 6), (9, 8, 7)),
        27648,
    ),
    (convolution((8, 4, 5), ["n", 4, 20], strides=[3], pads=[2, 2]), Geometry(4, 8, (5,), (3,), 1, (7,), (20,)), 1120),
    (
        convolution((6, 4, 2, 2), ["n", 6, 5, 5], "ConvTranspose", strides=[2, 2]),
        Geometry(6, 4, (2, 2), (2, 2), 1, (10, 10), (5, 5), transposed=True),
        2400,
    ),
    (
        convolution((6, 2, 4, 4), ["n", 6, 5, 5], "ConvTranspose", group=3, strides=[2, 2]),
        Geometry(6, 6, (4, 4), (2, 2), 3, (12, 12), (5, 5), transposed=True),
        4800,
    ),
]


@pytest.mark.parametrize(("model", "geometry", "macs"), BY_HAND)
def test_convolutions_by_hand(model, geometry, macs):
    layer = only_layer(model)
    assert layer.geometry == geometry
    assert layer.macs == count_macs(load(model)) == macs
    weight, bias = (math.prod(tensor.dims) for tensor in model.graph.initializer)
    assert layer.geometry.weight_parameters == weight
    assert layer.parameters == count_parameters(load(model)) == weight + bias


def product(x: Shape, w: tuple[int, ...], y: Shape, kind: str = "MatMul", **attributes: object) -> onnx.ModelProto:
    return tiny([node(kind, ["x", "w"], ["y"], "layer", **attributes)], {"x": x}, {"y": y}, {"w": weights(*w)})


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (product(["n", 6], (6, 8), ["n", 8]), 1),
        (product(["n", 5, 6], (6, 8), ["n", 5, 8]), 5),
        (product(["n", 3, 5, 6], (6, 8), ["n", 3, 5, 8]), 15),
        (product([4, 5, 6], (6, 8), [4, 5, 8]), 5),  # a fixed batch of 4 samples
        (product(["n", 6], (6, 8), ["n", 8], "Gemm"), 1),
        (product([4, 6], (8, 6), [4, 8], "Gemm", transB=1), 1),
    ],
)
def test_products_by_hand(model, positions):
    layer = only_layer(model)
    assert layer.geometry == Geometry(6, 8, repeats=positions)
    assert layer.macs == positions * 48
    assert layer.parameters == 48
    assert layer.prunable


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_weights_of_recurrent_operators_by_hand(kind, gates, directions):
    """7 steps of 5 inputs and 6 states."""
    arrays = {"w": weights(directions, gates * 6, 5), "r": weights(directions, gates * 6, 6)}
    direction = "bidirectional" if directions == 2 else "forward"
    nodes = [node(kind, ["x", "w", "r"], ["y"], "cell", hidden_size=6, direction=direction)]
    inputs, states = find_layers(load(tiny(nodes, {"x": [7, 1, 5]}, {"y": [7, directions, 1, 6]}, arrays)))
    assert (inputs.name, states.name) == ("cell/W", "cell/R")
    assert [layer.reason for layer in (inputs, states)] == ["recurrent"] * 2
    assert [layer.op_type for layer in (inputs, states)] == [kind] * 2
    assert [layer.parameters for layer in (inputs, states)] == [arrays["w"].size, arrays["r"].size]


def test_multiplications_of_recurrent_operators_are_counted():
    """One sample of 7 steps; the batch is the second axis."""
    arrays = {"w": weights(2, 24, 5), "r": weights(2, 24, 6), "u": weights(5, 5)}
    nodes = [
        node("MatMul", ["x", "u"], ["h"], "before"),
        node("Transpose", ["h"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "w", "r"], ["y"], "cell", hidden_size=6, direction="bidirectional"),
    ]
    before, inputs, states = find_layers(load(tiny(nodes, {"x": ["n", 7, 5]}, {"y": [7, 2, "n", 6]}, arrays)))
    assert [layer.macs for layer in (before, inputs, states)] == [7 * 25, 7 * 2 * 24 * 5, 7 * 2 * 24 * 6]


@pytest.mark.parametrize(("leading", "positions"), [(["n"], 7), (["n", 2, 3], 42), ([4, 2], 14)])
def test_products_with_the_constant_on_the_left_by_hand(leading, positions):
    x, y = [*leading, 6, 7], [*leading, 8, 7]
    layer = only_layer(tiny([node("MatMul", ["w", "x"], ["y"], "layer")], {"x": x}, {"y": y}, {"w": weights(8, 6)}))
    assert layer.geometry == Geometry(6, 8, repeats=positions)
    assert (layer.left, layer.input, layer.weight_value.name, layer.prunable) == (True, "x", "w", True)
    assert layer.parameters == 48


def test_a_constant_that_multiplies_a_vector_is_left_alone():
    nodes = [node("ReduceSum", ["x"], ["v"], axes=[0], keepdims=0), node("MatMul", ["w", "v"], ["y"], "layer")]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": [8]}, {"w": weights(8, 6)}, opset=11)
    (layer,) = find_layers(normalize(load(model)))
    assert layer.reason == "multiplies a vector"


def test_products_without_constants_count_too():
    model = tiny([node("MatMul", ["x", "y"], ["z"])], {"x": ["n", 2, 5, 6], "y": ["n", 2, 6, 7]}, {"z": ["n", 2, 5, 7]})
    layer = only_layer(model)
    assert layer.macs == 2 * 5 * 6 * 7
    assert layer.parameters == 0
    assert layer.reason == "no constant weight"


def test_a_fixed_batch_counts_one_sample():
    one, four = (convolution((8, 6, 3, 3), [batch, 6, 10, 12], pads=[1] * 4) for batch in (1, 4))
    assert only_layer(one).geometry == only_layer(four).geometry


def test_input_shapes_set_free_axes():
    model = convolution((8, 6, 3, 3), ["n", 6, "h", "w"], pads=[1] * 4)
    assert only_layer(model, x=(1, 6, 5, 7)).geometry.positions == 35
    assert only_layer(model, x=(3, 6, 5, 7)).geometry.positions == 35
    assert only_layer(model).geometry.positions == 224 * 224
    for shape, message in (
        ((1, 6, 5), "the model expects rank 4, not 3"),
        ((1, 7, 5, 5), "axis 1 is fixed at 6, not 7"),
    ):
        with pytest.raises(UsageError, match=f"--input-shape x: {message}"):
            find_layers(load(model), {"x": shape})
    with pytest.raises(UsageError, match="--input-shape z: no such input; the model has x"):
        find_layers(load(model), {"z": (1, 2)})


def test_shapes_stay_unknown_where_nothing_tells_them():
    """The output has as many rows as the input has positive numbers, and a product of that with itself."""
    nodes = [
        node("NonZero", ["x"], ["where"]),
        node("Transpose", ["where"], ["rows"]),
        node("Cast", ["rows"], ["floats"], to=1),
        node("MatMul", ["floats", "w"], ["y"], "layer"),
    ]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["m", 8]}, {"w": weights(2, 8)})
    layer = only_layer(model)
    assert layer.geometry is None
    assert layer.macs == 0
    assert layer.reason == "shapes unknown: give --input-shape"


def test_shapes_that_arithmetic_in_the_graph_decides_are_found():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "last"], ["c"]),
        node("Div", ["c", "two"], ["half"]),
        node("Concat", ["minus", "half"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["r"]),
        node("MatMul", ["r", "w"], ["y"], "layer"),
    ]
    integers = {"last": [-1], "two": [2], "minus": [-1]}
    model = tiny(
        nodes, {"x": [6, 8]}, {"y": ["m", 5]},
        {"w": weights(4, 5)} | {name: np.array(value) for name, value in integers.items()},
    )  # fmt: skip
    assert concrete_shapes(load(model), {"x": (6, 8)})["r"] == (12, 4)
    assert only_layer(model).geometry == Geometry(4, 5, repeats=2)


def test_shapes_that_only_a_run_tells_are_found():
    """A size taken as other integers and out of a slice, next to what is copied from the input."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["narrow"], to=onnx.TensorProto.INT32),
        node("Slice", ["narrow", "one", "two", "zero"], ["part"]),
        node("Cast", ["part"], ["size"], to=onnx.TensorProto.INT64),
        node("Concat", ["zero", "size", "two", "four"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["r"]),
        node("MatMul", ["r", "w"], ["y"], "layer"),
    ]
    integers = {"zero": [0], "one": [1], "two": [2], "four": [4]}
    model = tiny(
        nodes, {"x": ["n", "t", 8]}, {"y": ["n", "t", 2, 5]},
        {"w": weights(4, 5)} | {name: np.array(value) for name, value in integers.items()},
    )  # fmt: skip
    assert concrete_shapes(load(model), {"x": (3, 7, 8)})["r"] == (3, 7, 2, 4)


def _reason_of(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], **options: object) -> list[str | None]:
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", "m"]}, arrays, **options)  # type: ignore[arg-type]
    return [layer.reason for layer in find_layers(load(model))]


W = {"w": weights(4, 4)}


@pytest.mark.parametrize(
    ("nodes", "arrays", "reason"),
    [
        ([node("Gemm", ["x", "w"], ["y"])], W, None),
        ([node("MatMul", ["x", "x"], ["y"])], {}, "no constant weight"),
        ([node("MatMul", ["w", "x"], ["y"])], {"w": weights(2, 4, 4)}, "weight of rank 3"),
        ([node("Gemm", ["w", "x"], ["y"])], W, "the constant is the left operand"),
        ([node("Gemm", ["x", "w"], ["y"], transA=1)], W, "Gemm with a transposed input"),
        ([node("Gemm", ["x", "w", "x"], ["y"])], W, "bias is computed in the graph"),
        ([node("Gemm", ["x", "w", "w2"], ["y"])], W | {"w2": weights(4, 4)}, "Gemm whose addend is not a bias vector"),
        ([node("Gemm", ["x", "w", "w2"], ["y"])], W | {"w2": weights(4, 1)}, "Gemm whose addend is not a bias vector"),
        ([node("Gemm", ["x", "w", "w2"], ["y"])], W | {"w2": weights(1, 4)}, None),
        ([node("Gemm", ["x", "w", "w2"], ["y"])], W | {"w2": weights(1)}, None),
        ([node("Gemm", ["x", "w"], ["y"])], {"w": weights(4, 1)}, "too small to factorise"),
        ([node("MatMul", ["x", "w"], ["y"])], {"w": weights(4)}, "weight of rank 1"),
        ([node("MatMul", ["x", "w"], ["y"])], {"w": weights(2, 4, 4)}, "weight of rank 3"),
    ],
)
def test_reasons_of_products(nodes, arrays, reason):
    assert _reason_of(nodes, arrays) == [reason]


@pytest.mark.parametrize(
    ("weight", "shape", "options", "reason"),
    [
        ((8, 4, 3, 3), ["n", 4, 8, 8], {}, None),
        ((8, 2, 3, 3), ["n", 4, 8, 8], {"group": 2}, None),
        ((4, 1, 3, 3), ["n", 4, 8, 8], {"group": 4}, "depthwise"),
        ((8, 1, 3, 3), ["n", 4, 8, 8], {"group": 4}, "depthwise"),
        ((4, 2, 3, 3), ["n", 8, 8, 8], {"group": 4}, "depthwise"),
        ((1, 4, 3, 3), ["n", 4, 8, 8], {}, "too small to factorise"),
        ((8, 1, 1, 1), ["n", 1, 8, 8], {}, "too small to factorise"),
        ((8, 4, 3, 3, 3), ["n", 4, 8, 8, 8], {}, None),
        ((8, 4, 1, 1, 1, 1), ["n", 4, 8, 8, 8, 8], {}, "a convolution over more than three axes"),
        ((4, 8, 3, 3), ["n", 4, 8, 8], {"kind": "ConvTranspose"}, None),
        ((4, 1, 3, 3), ["n", 4, 8, 8], {"kind": "ConvTranspose"}, None),
        ((4, 2, 3), ["n", 4, 8], {"kind": "ConvTranspose", "group": 2}, None),
        ((4, 1, 1, 1), ["n", 4, 8, 8], {"kind": "ConvTranspose"}, "too small to factorise"),
        ((1, 4, 3, 3), ["n", 1, 8, 8], {"kind": "ConvTranspose"}, "too small to factorise"),
        ((4, 1, 3, 3), ["n", 4, 8, 8], {"kind": "ConvTranspose", "group": 4}, "depthwise"),
        (
            (4, 1366, 3, 3),
            ["n", 4, 8, 8],
            {"kind": "ConvTranspose"},
            "gradient covariance of 12,294 x 12,294 is too large",
        ),
        (
            (4, 8, 3, 3),
            ["n", 4, 8, 8],
            {"kind": "ConvTranspose", "output_shape": [10, 10]},
            "its output_shape is given, and pads cannot say it",
        ),
        (
            (4, 8, 1, 1, 1, 1),
            ["n", 4, 8, 8, 8, 8],
            {"kind": "ConvTranspose"},
            "a convolution over more than three axes",
        ),
    ],
)
def test_reasons_of_convolutions(weight, shape, options, reason):
    assert only_layer(convolution(weight, shape, **options)).reason == reason


def test_a_weight_that_is_an_output_is_left_alone():
    model = tiny([node("Gemm", ["x", "w"], ["y"])], {"x": ["n", 4]}, {"y": ["n", 4], "w": [4, 4]}, W)
    assert only_layer(model).reason == "weight is a graph output"


def test_integer_weights_are_left_alone():
    nodes = [node("Cast", ["x"], ["i"], to=6), node("MatMul", ["i", "w"], ["j"]), node("Cast", ["j"], ["y"], to=1)]
    assert _reason_of(nodes, {"w": np.ones((4, 4), np.int32)}) == ["weight is INT32"]


def test_bodies_of_control_flow_are_left_alone():
    body = tiny([node("Gemm", ["x", "w"], ["b"], "g")], {}, {"b": ["n", 4]}).graph
    steps = helper.make_graph(
        [node("Gemm", ["a", "w2"], ["b"], "g"), node("Identity", ["go"], ["on"])], "steps",
        [helper.make_tensor_value_info(*v) for v in (("i", 7, []), ("go", 9, []), ("a", 1, ["n", 4]))],
        [helper.make_tensor_value_info(*v) for v in (("on", 9, []), ("b", 1, ["n", 4]))],
    )  # fmt: skip
    nodes = [
        node("If", ["t"], ["h"], then_branch=body, else_branch=body),
        node("Loop", ["three", "t", "h"], ["k"], body=steps),
        node("Gemm", ["x", "w3"], ["l"], "g"),
        node("Add", ["k", "l"], ["y"]),
    ]
    arrays = W | {"w2": weights(4, 4), "w3": weights(4, 4), "t": np.array(True), "three": np.array(3)}
    inside = "inside the body of a control-flow operator"
    assert _reason_of(nodes, arrays) == [inside, inside, inside, None]


def test_domains_other_than_the_default_are_no_layers():
    nodes = [node("MatMul", ["x", "w"], ["y"], domain="com.other")]
    assert _reason_of(nodes, W, opsets=[helper.make_opsetid("com.other", 1)]) == []


def recompute(layer: Layer, x: np.ndarray) -> torch.Tensor:
    """The layer in torch from `weight()` and `bias()` alone, which are to be oriented alike for every kind."""
    weight, bias = torch.from_numpy(layer.weight()), layer.bias()
    groups, out, *rest = weight.shape
    b = torch.from_numpy(bias) if bias is not None else torch.zeros(groups * out, dtype=torch.float64)
    if layer.left:
        return weight[0] @ torch.from_numpy(x).double()
    if layer.op_type != "Conv":
        return torch.from_numpy(x).double() @ weight[0].T + b
    pads = layer.node.attributes.get_ints("pads", [0] * 2 * (len(rest) - 1))
    padding = [p for axis in reversed(range(len(rest) - 1)) for p in (pads[axis], pads[axis + len(rest) - 1])]
    padded = F.pad(torch.from_numpy(x).double(), padding)
    function = {2: F.conv1d, 3: F.conv2d, 4: F.conv3d}[len(rest)]
    dilations = tuple(layer.node.attributes.get_ints("dilations", [1] * (len(rest) - 1)))
    return function(padded, weight.flatten(0, 1), b, layer.geometry.strides, 0, dilations, groups)


@pytest.mark.parametrize(
    "model",
    [
        convolution((8, 4, 3, 2), ["n", 4, 8, 9], pads=[1, 0, 2, 1], strides=[2, 1]),
        convolution((9, 2, 3, 3), ["n", 6, 8, 8], group=3, dilations=[2, 1]),
        convolution((6, 4, 3), ["n", 4, 9], pads=[1, 0]),
        product(["n", 5, 6], (6, 8), ["n", 5, 8]),
        tiny([node("MatMul", ["w", "x"], ["y"])], {"x": ["n", 6, 5]}, {"y": ["n", 8, 5]}, {"w": weights(8, 6)}),
        product(["n", 6], (6, 8), ["n", 8], "Gemm", alpha=0.5),
        product(["n", 6], (8, 6), ["n", 8], "Gemm", transB=1),
        *(
            tiny(
                [node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0)], {"x": ["n", 6]}, {"y": ["n", 8]},
                {"w": weights(6, 8), "b": weights(*shape, seed=1)},
            )
            for shape in ((8,), (1, 8), (1,), ())
        ),
    ],
)  # fmt: skip
def test_weight_and_bias_recompute_the_layer(model):
    layer = only_layer(model)
    shape = [dim.dim_value or 3 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = weights(*shape, seed=2)
    np.testing.assert_allclose(recompute(layer, x), run(model, {"x": x})["y"], rtol=1e-4, atol=1e-5)


def torch_cost(module: nn.Module, example: torch.Tensor) -> list[tuple[int, int]]:
    """MACs and weight elements of each convolution and linear layer that runs, counted by hooks in torch."""
    found = []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = layer.weight
        if isinstance(layer, nn.Linear):
            positions = output.numel() // output.shape[-1]
        elif isinstance(layer, nn.ConvTranspose2d):
            positions = inputs[0][0, 0].numel()
            found.append((positions * weight.numel(), weight.numel()))
            return
        else:
            positions = output[0, 0].numel()
        found.append((positions * weight.numel(), weight.numel()))

    hooks = [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear)
    ]
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", CASES)
def test_zoo_costs_what_torch_counts(name):
    case = load_case(name)
    model = normalize(load(case.model))
    layers = find_layers(model)
    constant = [layer for layer in layers if layer.reason != "no constant weight"]
    counted = torch_cost(case.module, torch.from_numpy(case.inputs(1)["x"]))
    assert sorted((layer.macs, layer.geometry.weight_parameters) for layer in constant) == sorted(counted)
    assert count_macs(model) == sum(layer.macs for layer in layers)
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.geometry is not None for layer in layers)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("13")])
def test_zoo_positions_are_those_of_the_values(name):
    """Every layer's output, made a graph output, has the elements that its geometry says."""
    case = load_case(name)
    model = normalize(load(case.model))
    layers = find_layers(model)
    for layer in layers:
        if not layer.node.outputs[0].is_graph_output():
            model.graph.outputs.append(layer.node.outputs[0])
    found = run(ir.to_proto(model), case.inputs(1))
    for layer in layers:
        geometry = layer.geometry
        written = geometry.output_size if geometry.transposed else (geometry.positions,)
        assert found[layer.output].size == math.prod(written) * geometry.out_channels
