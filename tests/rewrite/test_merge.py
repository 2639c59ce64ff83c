"""Pairs of linear nodes in one, on graphs of a few nodes run by ONNX Runtime before and after."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from onnx_kfe.graph import count_macs, count_parameters, open_network
from onnx_kfe.planning import FORMS, Candidate, Plan, network_cost
from onnx_kfe.rewrite import FactorizePass, Merge, MergePass, is_smaller, solve_plan, write_chains
from tests.tiny import node, run, tiny, weights

Arrays = dict[str, np.ndarray]


def always(merge: Merge) -> bool:
    return True


def merge(
    model: onnx.ModelProto, cheaper: Callable[[Merge], bool] = always
) -> tuple[onnx.ModelProto, dict[str, str], bool]:
    """The model after the pass, checked with its shapes inferred; what was declined; whether anything changed."""
    merging = MergePass(cheaper)
    result = merging(ir.from_proto(model))
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    known = {v.name for v in (*proto.graph.value_info, *proto.graph.output) if v.type.tensor_type.HasField("shape")}
    assert known >= {output for each in proto.graph.node for output in each.output if each.op_type != "If"}
    for before, after in ((model.graph.input, proto.graph.input), (model.graph.output, proto.graph.output)):
        assert [value.name for value in after] == [value.name for value in before]
    used = {name for each in proto.graph.node for name in each.input} | {v.name for v in proto.graph.output}
    assert {each.name for each in proto.graph.initializer} <= used
    return proto, merging.declined, result.modified


def kinds(model: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in model.graph.node]


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, rtol: float = 1e-5, batches: tuple = (1, 3)) -> None:
    """Both give the same for inputs of the declared shape, and not the same for any input."""
    (declared,) = (value.type.tensor_type for value in before.graph.input if value.name == "x")
    shape = [dim.dim_value for dim in declared.shape.dim][1:]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type)
    for batch in batches:
        feeds = {"x": weights(batch, *shape, seed=batch).astype(dtype)}
        wanted, found = run(before, feeds), run(after, feeds)
        assert list(found) == list(wanted)
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype == dtype
            assert np.ptp(array.astype(float)) > 0.1
            scale = np.abs(array).max().astype(float)
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * scale, err_msg=name)


def initializers(model: onnx.ModelProto) -> Arrays:
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def attributes(model: onnx.ModelProto, place: int = 0) -> dict[str, object]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in model.graph.node[place].attribute}


def convolutions(*layers: tuple[tuple[int, ...], dict], biases: str = "", dtype: type = np.float32) -> onnx.ModelProto:
    """Convolutions one behind the other, then Relu; biases where their place is named."""
    nodes, arrays = [], {}
    names = ["x", *(f"h{place}" for place in range(len(layers)))]
    for place, ((shape, options), (source, target)) in enumerate(zip(layers, pairwise(names), strict=True)):
        operands = {f"w{place}": weights(*shape, seed=place, dtype=dtype)}
        if str(place) in biases:
            operands[f"b{place}"] = weights(shape[0], seed=10 + place, dtype=dtype)
        nodes.append(node("Conv", [source, *operands], [target], f"conv{place}", **options))
        arrays |= operands
    nodes.append(node("Relu", [names[-1]], ["y"], "relu"))
    first = layers[0][0]
    sizes, free = [11, 10, 9][: len(first) - 2], ["h", "w", "d"][: len(first) - 2]
    channels = first[1] * layers[0][1].get("group", 1)
    shapes = {"x": ["n", channels, *sizes]}, {"y": ["n", layers[-1][0][0], *free]}
    return tiny(nodes, *shapes, arrays, dtype=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


POINTWISE = ((4, 6, 1, 1), {})
CONVOLUTIONS = {
    "1x1, 1x1": (POINTWISE, ((7, 4, 1, 1), {}), "both"),
    "1x1 that says so": (
        ((4, 6, 1, 1), {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "group": 1, "dilations": [2, 2]}),
        ((7, 4, 1, 1), {"auto_pad": "SAME_UPPER"}),
        "both",
    ),
    "strided 1x1, 1x1": (((4, 6, 1, 1), {"strides": [2, 3]}), ((7, 4, 1, 1), {}), "both"),
    "1x1, strided 1x1": (POINTWISE, ((7, 4, 1, 1), {"strides": [2, 3]}), "both"),
    "padded 1x1, 1x1": (((4, 6, 1, 1), {"pads": [1, 0, 2, 1]}), ((7, 4, 1, 1), {}), "both"),
    "1x1, padded 1x1": (POINTWISE, ((7, 4, 1, 1), {"pads": [1, 0, 2, 1]}), "behind"),
    "3x3, 1x1": (((4, 6, 3, 3), {"pads": [1, 0, 2, 1]}), ((7, 4, 1, 1), {}), "both"),
    "strided 3x2, 1x1": (
        ((4, 6, 3, 2), {"strides": [2, 1], "dilations": [1, 3], "kernel_shape": [3, 2]}),
        ((7, 4, 1, 1), {"kernel_shape": [1, 1]}),
        "both",
    ),
    "same 3x3, 1x1": (((4, 6, 3, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}), ((7, 4, 1, 1), {}), "both"),
    "1x1, 3x3": (POINTWISE, ((7, 4, 3, 3), {}), "both"),
    "1x1, valid 3x3": (POINTWISE, ((7, 4, 3, 3), {"auto_pad": "VALID", "dilations": [2, 1]}), "both"),
    "1x1, padded 3x3": (POINTWISE, ((7, 4, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 2]}), "behind"),
    "1x1, same 2x3": (POINTWISE, ((7, 4, 2, 3), {"auto_pad": "SAME_UPPER"}), "behind"),
    "1-D": (((4, 6, 1), {}), ((7, 4, 5), {"strides": [2]}), "both"),
    "3-D": (((4, 6, 2, 1, 3), {"pads": [1, 0, 0, 0, 0, 1]}), ((7, 4, 1, 1, 1), {}), "both"),
}


@pytest.mark.parametrize("biases", ["", "0", "1", "01"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, biases):
    first, second, allowed = CONVOLUTIONS[case]
    model = convolutions(first, second, biases=biases)
    merged, declined, modified = merge(model)
    if allowed == "behind" and "0" in biases:
        assert (declined, modified) == ({"conv1": "its zero padding lacks the bias of 'conv0'"}, False)
        assert kinds(merged) == ["Conv", "Conv", "Relu"]
        return
    assert (kinds(merged), declined, modified) == (["Conv", "Relu"], {}, True)
    assert_same(model, merged)
    assert set(initializers(merged)) == {"w1/merged"} | ({"w1/bias"} if biases else set())
    kernel = np.maximum(first[0][2:], second[0][2:])
    assert initializers(merged)["w1/merged"].shape == (7, 6, *kernel)


def test_the_geometry_is_that_of_the_spatial_node():
    spatial = {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2], "kernel_shape": [3, 3]}
    for pair in ((POINTWISE, ((7, 4, 3, 3), spatial)), (((4, 6, 3, 3), spatial), ((7, 4, 1, 1), {}))):
        assert attributes(merge(convolutions(*pair))[0]) == spatial


def test_a_bias_of_zeros_does_not_stop_at_padding():
    model = convolutions(POINTWISE, ((7, 4, 3, 3), {"pads": [1] * 4}), biases="01")
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "b0"))
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["Conv", "Relu"], {})
    assert_same(model, merged)


def product(*nodes: onnx.NodeProto, also: str = "", **arrays: np.ndarray) -> onnx.ModelProto:
    """Nodes from ``x [n, 5, 6]`` to ``y`` and perhaps another output, with weights ``w [6, 4]`` and ``v [4, 7]``."""
    arrays = {"w": weights(6, 4), "v": weights(4, 7, seed=1)} | arrays
    return tiny(nodes, {"x": ["n", 5, 6]}, {name: ["n", None, None] for name in ("y", *also)}, arrays)


def add(*inputs: str) -> onnx.NodeProto:
    return node("Add", list(inputs), ["g"], "add")


FIRST, SECOND = node("MatMul", ["x", "w"], ["h"], "first"), node("MatMul", ["h", "v"], ["y"], "second")
LAST = node("MatMul", ["g", "v"], ["y"], "second")
BIASED = [FIRST, add("h", "b"), LAST]
BETWEEN, BEHIND = weights(4, seed=2), weights(7, seed=3)


def test_matrix_products():
    model = product(FIRST, SECOND)
    merged, declined, modified = merge(model)
    assert (kinds(merged), declined, modified) == (["MatMul"], {}, True)
    assert list(initializers(merged)) == ["v/merged"]
    assert_same(model, merged)


@pytest.mark.parametrize("order", [["h", "b"], ["b", "h"]])
def test_an_addition_between_goes_behind(order):
    model = product(FIRST, add(*order), LAST, b=BETWEEN)
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["MatMul", "Add"], {})
    assert [each.name for each in merged.graph.node] == ["second/merged", "second/bias_add"]
    assert set(initializers(merged)) == {"v/merged", "v/bias"}
    assert_same(model, merged)


@pytest.mark.parametrize("order", [["z", "c"], ["c", "z"]])
def test_an_addition_behind_takes_that_between(order):
    second = node("MatMul", ["g", "v"], ["z"], "second")
    model = product(*BIASED[:2], second, node("Add", order, ["y"], "behind"), b=BETWEEN, c=BEHIND)
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["MatMul", "Add"], {})
    assert set(initializers(merged)) == {"v/merged", "c/merged"}
    assert_same(model, merged)


def test_an_addition_behind_stays_as_it_is_without_one_between():
    model = product(
        FIRST, node("MatMul", ["h", "v"], ["z"], "second"), node("Add", ["z", "c"], ["y"], "behind"), c=BEHIND
    )
    merged, _, _ = merge(model)
    assert kinds(merged) == ["MatMul", "Add"]
    np.testing.assert_array_equal(initializers(merged)["c"], BEHIND)
    assert_same(model, merged)


GEMM_BIASES = [
    (None, None), ((4,), None), (None, (7,)), ((4,), (7,)), ((1, 4), (1, 7)), ((), ()), ((1,), (1, 1)), ((4,), ()),
]  # fmt: skip


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("biases", GEMM_BIASES)
def test_gemm(first, second, scale, biases):
    arrays = {"w": weights(4, 6) if first else weights(6, 4), "v": weights(*((7, 4) if second else (4, 7)), seed=1)}
    nodes = []
    wiring = ("x", "h", "w", biases[0], first), ("h", "y", "v", biases[1], second)
    for source, target, name, shape, transposed in wiring:
        options = {"transB": transposed} if transposed else {}
        options |= {"alpha": scale, "beta": 3.0} if scale else {}
        operands = [name] if shape is None else [name, f"b{name}"]
        if shape is not None:
            arrays[f"b{name}"] = np.asarray(weights(*shape, seed=2 + len(arrays)))
        nodes.append(node("Gemm", [source, *operands], [target], f"gemm_{name}", **options))
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 7]}, arrays)
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["Gemm"], {})
    assert attributes(merged) == ({"transB": 1} if second else {})
    assert len(merged.graph.node[0].input) == (2 if biases == (None, None) else 3)
    assert_same(model, merged)


CHAIN = [((4, 6, 1, 1), {}), ((5, 4, 3, 3), {"strides": [2, 2]}), ((7, 5, 1, 1), {})]


@pytest.mark.parametrize("biases", ["", "012"])
def test_three_convolutions(biases):
    model = convolutions(*CHAIN, biases=biases)
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["Conv", "Relu"], {})
    assert_same(model, merged)


def test_a_pair_that_merges_is_tried_with_the_node_in_front_of_it():
    """The last two merge although the first two did not, and then the first merges with what they became."""
    seen = []

    def not_the_first_two(merge: Merge) -> bool:
        seen.append((merge.first.name, merge.second.name))
        return merge.second.name != "conv1"

    model = convolutions(*CHAIN, biases="012")
    merged, declined, _ = merge(model, not_the_first_two)
    assert seen == [("conv0", "conv1"), ("conv1", "conv2"), ("conv0", "conv2/merged")]
    assert (kinds(merged), declined) == (["Conv", "Relu"], {})
    assert_same(model, merged)


def test_a_declined_pair_of_a_chain_is_told_under_the_names_that_are_left():
    model = convolutions(*CHAIN)
    merged, declined, modified = merge(model, lambda merge: merge.second.name == "conv2")
    assert ([each.name for each in merged.graph.node], modified) == (["conv0", "conv2/merged", "relu"], True)
    assert declined == {"conv2/merged": "not cheaper: 4x6x1x1 and 7x4x3x3 would be 7x6x3x3"}
    assert_same(model, merged)


def test_three_products_with_additions_between():
    second = node("MatMul", ["g", "v"], ["i"], "second")
    third = [node("Add", ["i", "c"], ["j"], "again"), node("MatMul", ["j", "u"], ["y"], "third")]
    model = product(*BIASED[:2], second, *third, b=BETWEEN, c=BEHIND, u=weights(7, 3, seed=4))
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["MatMul", "Add"], {})
    assert_same(model, merged)


def test_an_addition_that_merging_wrote_is_merged_in_turn():
    second, third = node("MatMul", ["g", "v"], ["i"], "second"), node("MatMul", ["i", "u"], ["y"], "third")
    model = product(*BIASED[:2], second, third, b=BETWEEN, u=weights(7, 3, seed=4))
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (["MatMul", "Add"], {})
    assert_same(model, merged)


TALL = ((4, 6, 3, 3), {})
NEITHER = "neither it nor 'conv0' is 1x1 with stride 1 and no padding"
DECLINED_CONVOLUTIONS = {
    "two kernels": (TALL, ((7, 4, 3, 3), {}), NEITHER),
    "a kernel across": (((4, 6, 1, 3), {}), ((7, 4, 3, 1), {}), NEITHER),
    "strides behind a kernel": (TALL, ((7, 4, 1, 1), {"strides": [2, 2]}), NEITHER),
    "strides before a kernel": (((4, 6, 1, 1), {"strides": [2, 2]}), ((7, 4, 3, 3), {}), NEITHER),
    "padding behind a kernel": (TALL, ((7, 4, 1, 1), {"pads": [1] * 4}), NEITHER),
    "padding before a kernel": (((4, 6, 1, 1), {"pads": [1] * 4}), ((7, 4, 3, 3), {}), NEITHER),
    "groups in front": (((4, 3, 1, 1), {"group": 2}), ((7, 4, 1, 1), {}), "'conv0' is grouped"),
    "groups behind": (POINTWISE, ((8, 2, 1, 1), {"group": 2}), "'conv1' is grouped"),
    "depthwise": (POINTWISE, ((4, 1, 3, 3), {"group": 4}), "'conv1' is grouped"),
}


@pytest.mark.parametrize("case", DECLINED_CONVOLUTIONS)
def test_convolutions_that_do_not_merge(case):
    first, second, reason = DECLINED_CONVOLUTIONS[case]
    model = convolutions(first, second)
    merged, declined, modified = merge(model)
    assert (declined, modified) == ({"conv1": reason}, False)
    assert kinds(merged) == ["Conv", "Conv", "Relu"]
    assert initializers(merged).keys() == initializers(model).keys()
    assert_same(model, merged)


FROM_ADD = "its input comes from Add 'add'"
NEGATED = {name: node("Neg", [name], ["z"], "neg") for name in "gh"}
SQUARE = [node("Transpose", ["x"], ["t"], "turn", perm=[0, 2, 1]), node("MatMul", ["t", "h"], ["g"], "square")]
LARGEST = node("ReduceMax", ["x"], ["m"], "max", axes=[2])
DECLINED_PRODUCTS = {
    "an activation": ([FIRST, node("Relu", ["h"], ["g"], "relu"), LAST], {}, "its input comes from Relu 'relu'"),
    "read twice": ([FIRST, SECOND, NEGATED["h"]], {"also": "z"}, "'h' is read 2 times"),
    "read before the addition": ([*BIASED, NEGATED["h"]], {"b": BETWEEN, "also": "z"}, "'h' is read 2 times"),
    "read behind the addition": ([*BIASED, NEGATED["g"]], {"b": BETWEEN, "also": "z"}, "'g' is read 2 times"),
    "an output": ([FIRST, SECOND], {"also": "h"}, "'h' is a graph output"),
    "an output before the addition": (BIASED, {"b": BETWEEN, "also": "h"}, "'h' is a graph output"),
    "an output behind the addition": (BIASED, {"b": BETWEEN, "also": "g"}, "'g' is a graph output"),
    "a scalar added": (BIASED, {"b": weights()}, FROM_ADD),
    "a matrix added": (BIASED, {"b": weights(5, 4)}, FROM_ADD),
    "added to itself": ([FIRST, add("h", "h"), LAST], {}, FROM_ADD),
    "no constant added": ([FIRST, LARGEST, add("h", "m"), LAST], {}, FROM_ADD),
    "a vector that widens": (BIASED, {"w": weights(6, 1), "b": BETWEEN}, FROM_ADD),
    "rank 3 in front": ([FIRST, SECOND], {"w": weights(1, 6, 4)}, "'first' has a weight of rank 3"),
    "rank 3 behind": ([FIRST, SECOND], {"v": weights(1, 4, 7)}, "'second' has a weight of rank 3"),
    "rank 1 behind": ([FIRST, SECOND], {"v": weights(4)}, "'second' has a weight of rank 1"),
    "no constant in front": ([FIRST, *SQUARE, LAST], {}, "'square' has no constant weight"),
}


@pytest.mark.parametrize("case", DECLINED_PRODUCTS)
def test_products_that_do_not_merge(case):
    nodes, arrays, reason = DECLINED_PRODUCTS[case]
    model = product(*nodes, **arrays)
    if case == "rank 1 behind":
        del model.graph.output[0].type.tensor_type.shape.dim[-1]
    merged, declined, modified = merge(model)
    assert declined["second"] == reason
    assert (kinds(merged), modified) == ([each.op_type for each in nodes], False)
    assert_same(model, merged)


def gemm(*nodes: onnx.NodeProto, **arrays: np.ndarray) -> onnx.ModelProto:
    return tiny(nodes, {"x": [3, 6]}, {"y": [None, None]}, {"w": weights(6, 4), "v": weights(4, 7, seed=1), **arrays})


GEMM = node("Gemm", ["h", "v"], ["y"], "second")
DECLINED_GEMMS = {
    "a MatMul in front": (FIRST, GEMM, {}, "it is Gemm, 'first' is MatMul"),
    "a MatMul behind": (node("Gemm", ["x", "w"], ["h"], "first"), SECOND, {}, "it is MatMul, 'first' is Gemm"),
    "a transposed input": (
        node("Gemm", ["x", "w"], ["h"], "first", transA=1), GEMM, {"w": weights(3, 4)}, "'first' transposes its input"
    ),
    "a matrix added": (
        node("Gemm", ["x", "w", "b"], ["h"], "first"), GEMM, {"b": weights(3, 4)}, "'first' adds no constant vector"
    ),
    "a column added": (
        node("Gemm", ["x", "w", "b"], ["h"], "first"), GEMM, {"b": weights(3, 1)}, "'first' adds no constant vector"
    ),
    "no constant added": (
        node("Gemm", ["x", "w"], ["h"], "first"), node("Gemm", ["h", "v", "x"], ["y"], "second"), {"v": weights(4, 6)},
        "'second' adds no constant vector"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED_GEMMS)
def test_gemms_that_do_not_merge(case):
    first, second, arrays, reason = DECLINED_GEMMS[case]
    model = gemm(first, second, **arrays)
    merged, declined, modified = merge(model)
    assert (declined, modified, kinds(merged)) == ({"second": reason}, False, [first.op_type, second.op_type])
    assert_same(model, merged, batches=(3,))


@pytest.mark.parametrize("place", [0, 1])
def test_transposed_convolutions_do_not_merge(place):
    ops = ["Conv", "Conv"]
    ops[place] = "ConvTranspose"
    nodes = [node(ops[0], ["x", "w"], ["h"], "conv0"), node(ops[1], ["h", "v"], ["y"], "conv1")]
    arrays = {"w": weights(6, 6, 1, 1), "v": weights(6, 6, 1, 1, seed=1)}
    merged, declined, _ = merge(tiny(nodes, {"x": ["n", 6, 5, 5]}, {"y": ["n", 6, 5, 5]}, arrays))
    assert (declined, kinds(merged)) == ({"conv1": f"'conv{place}' is ConvTranspose"}, ops)


def test_integers_do_not_merge():
    arrays = {"w": weights(6, 4).astype(np.int32), "v": weights(4, 7).astype(np.int32)}
    model = tiny([FIRST, SECOND], {"x": ["n", 6]}, {"y": ["n", 7]}, arrays, dtype=onnx.TensorProto.INT32)
    assert merge(model)[1] == {"second": "'first' has a weight of INT32"}


def test_operators_of_another_domain_do_not_merge():
    other = onnx.helper.make_opsetid("com.microsoft", 1)
    nodes = [node("MatMul", ["x", "w"], ["h"], "first", domain="com.microsoft"), SECOND]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 7]}, {"w": weights(6, 4), "v": weights(4, 7)}, opsets=[other])
    merging = MergePass(always)
    assert not merging(ir.from_proto(model)).modified
    assert merging.declined == {"second": "its input comes from MatMul 'first'"}


def test_weights_that_can_be_fed_do_not_merge():
    model = product(FIRST, SECOND)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [6, 4]))
    merged, declined, _ = merge(model)
    assert (declined, kinds(merged)) == ({"second": "'first' has no constant weight"}, ["MatMul", "MatMul"])


def test_what_bodies_read_counts():
    body = tiny([node("Neg", ["h"], ["r"], "inner")], {}, {"r": ["n", None, 4]}).graph
    other = tiny([node("Abs", ["h"], ["r"], "inner")], {}, {"r": ["n", None, 4]}).graph
    condition = [node("ReduceMin", ["x"], ["m"], "min", keepdims=0), node("Cast", ["m"], ["t"], "cast", to=9)]
    choice = node("If", ["t"], ["z"], "if", then_branch=body, else_branch=other)
    model = product(FIRST, SECOND, *condition, choice, also="z")
    merged, declined, _ = merge(model)
    assert declined == {"second": "'h' is read 3 times"}
    assert_same(model, merged)


def test_a_pair_that_would_be_dearer_stays():
    """What a factorised layer is: merging would undo it."""
    model = convolutions(((2, 6, 1, 1), {}), ((7, 2, 1, 1), {}))
    merged, declined, modified = merge(model, is_smaller)
    assert (declined, modified) == ({"conv1": "not cheaper: 2x6x1x1 and 7x2x1x1 would be 7x6x1x1"}, False)
    assert kinds(merged) == ["Conv", "Conv", "Relu"]


RULES = [
    (((8, 4), (4, 8), (4, 4)), {}, (64, 16), (64, 16), True),
    (((4, 8), (8, 4), (8, 8)), {}, (64, 64), (64, 64), False),
    (((3, 8), (8, 3), (8, 8)), {}, (48, 64), (48, 64), False),
    (((4, 8), (8, 4), (8, 8)), {"stride": 2}, (96, 64), (64, 64), True),
    (((4, 8), (8, 4), (8, 8)), {"stride": 4, "kept": 1}, (160, 64), (64, 65), False),
    (((4, 8), (6, 4), (6, 8)), {"kept": 8}, (56, 48), (56, 56), True),
    (((4, 6, 1, 1), (4, 4, 3, 3), (4, 6, 3, 3)), {"stride": 4}, (240, 216), (168, 216), False),
]


@pytest.mark.parametrize(("shapes", "more", "macs", "parameters", "smaller"), RULES)
def test_the_rule(shapes, more, macs, parameters, smaller):
    front, behind = (ir.Node("", "MatMul", []) for _ in range(2))
    found = Merge(front, behind, *shapes, **more)
    assert (found.macs, found.parameters, is_smaller(found)) == (macs, parameters, smaller)


def test_what_the_rule_is_told():
    seen = []
    merge(convolutions(POINTWISE, ((7, 4, 3, 2), {"strides": [2, 3]})), lambda merge: seen.append(merge) or True)
    (told,) = seen
    assert (told.first_shape, told.second_shape, told.merged_shape) == ((4, 6, 1, 1), (7, 4, 3, 2), (7, 6, 3, 2))
    assert (told.stride, told.kept) == (6, 0)


@pytest.mark.parametrize(("name", "kept"), [("w", 24), ("v", 28)])
def test_a_shared_weight_stays_for_the_other(name, kept):
    seen = []
    model = product(FIRST, SECOND, node("Neg", [name], ["n"], "neg"), node("Unsqueeze", ["n", "a"], ["z"], "wrap"),
                    also="z", a=np.array([0]))  # fmt: skip
    merged, _, _ = merge(model, lambda merge: seen.append(merge) or True)
    assert kinds(merged) == ["MatMul", "Neg", "Unsqueeze"]
    assert set(initializers(merged)) == {"v/merged", name, "a"}
    assert seen[0].kept == kept
    assert_same(model, merged)


def test_shared_biases_stay_for_the_other():
    nodes = [*BIASED[:2], node("MatMul", ["g", "v"], ["i"], "second"), node("Add", ["i", "c"], ["j"], "behind"),
             node("Add", ["j", "c"], ["k"], "again"), node("MatMul", ["k", "u"], ["o"], "third"),
             node("Add", ["o", "b"], ["y"], "last")]  # fmt: skip
    model = product(*nodes, b=BETWEEN, c=BEHIND, u=weights(7, 4, seed=4))
    merged, declined, _ = merge(model)
    assert (kinds(merged), declined) == (
        ["MatMul", "Add", "Add", "MatMul", "Add"],
        {"third": "its input comes from Add 'again'"},
    )
    np.testing.assert_array_equal(initializers(merged)["b"], BETWEEN)
    np.testing.assert_array_equal(initializers(merged)["c"], BEHIND)
    assert_same(model, merged)


def test_one_weight_for_both():
    seen = []
    nodes = [node("MatMul", ["x", "w"], ["h"], "first"), node("MatMul", ["h", "w"], ["y"], "second")]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, {"w": weights(6, 6)})
    merged, _, _ = merge(model, lambda merge: seen.append(merge) or True)
    assert (list(initializers(merged)), seen[0].kept) == (["w/merged"], 0)
    assert_same(model, merged)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 1e-2), (np.float64, 1e-12)])
def test_weights_stay_in_their_type(dtype, rtol):
    arrays = {"w": weights(6, 4), "c": weights(4), "v": weights(4, 7, seed=1), "d": weights(7, seed=3)}
    gemms = [node("Gemm", ["x", "w", "c"], ["h"], "first"), node("Gemm", ["h", "v", "d"], ["y"], "second")]
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    models = [tiny(gemms, {"x": ["n", 6]}, {"y": ["n", 7]}, arrays, dtype=element)]
    if dtype == np.float16:  # ONNX Runtime has no convolution in double
        models.append(convolutions(*CHAIN, biases="012", dtype=dtype))
    for model in models:
        merged, _, modified = merge(model)
        assert modified
        assert {array.dtype for array in initializers(merged).values()} == {np.dtype(dtype)}
        assert_same(model, merged, rtol)


def test_the_product_is_rounded_once():
    """Weights whose product float32 would round on the way."""
    w, v = np.float32([[1 + 2**-12, 2**12]]), np.float32([[1 + 2**-12], [2**-24]])
    nodes = [node("MatMul", ["x", "w"], ["h"], "first"), node("MatMul", ["h", "v"], ["y"], "second")]
    merged, _, _ = merge(tiny(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"w": w, "v": v}))
    (found,) = initializers(merged).values()
    assert found == (w.astype(np.float64) @ v.astype(np.float64)).astype(np.float32)


def test_names_and_metadata():
    model = convolutions(POINTWISE, ((7, 4, 1, 1), {}), biases="1")
    onnx.helper.set_model_props(model, {"key": "value"})
    model.graph.node[2].name = "conv1/merged"
    model.graph.node[2].output[0] = "w1/merged"
    model.graph.node.append(node("Neg", ["w1/merged"], ["y"], "neg"))
    merged, _, _ = merge(model)
    assert [each.name for each in merged.graph.node] == ["conv1/merged_2", "conv1/merged", "neg"]
    assert set(initializers(merged)) == {"w1/merged_2", "w1/bias"}
    assert [output for each in merged.graph.node for output in each.output] == ["h1", "w1/merged", "y"]
    assert {each.key: each.value for each in merged.metadata_props} == {"key": "value"}
    assert_same(model, merged)


@pytest.mark.parametrize("name", ["", "conv0"])
def test_nodes_need_names_of_their_own(name):
    model = convolutions(POINTWISE, ((7, 4, 1, 1), {}))
    model.graph.node[1].name = name
    with pytest.raises(PreconditionError, match=f"not the name of a single node: '{name}'"):
        MergePass()(ir.from_proto(model))


def test_a_linear_bottleneck_of_two_factorised_layers():
    """From 24 -> 5 -> 12 -> 5 -> 24 to 24 -> 5 -> 24: first what meets at 12, then the 5 x 5 that comes of it."""
    network = open_network(convolutions(((12, 24, 1, 1), {}), ((24, 12, 1, 1), {}), biases="01"))
    form, ranks = FORMS["two_factor"], (5,)
    choices = {
        layer.name: Candidate("two_factor", ranks, form.cost(layer.geometry, ranks), 0.0) for layer in network.prunable
    }
    plan = Plan(network.fingerprint, choices, network_cost(network))
    chains, _ = solve_plan(network, plan, None)
    factorised = FactorizePass(chains)(network.model.clone()).model
    before = ir.to_proto(factorised)
    merged, declined, _ = merge(before, is_smaller)
    shapes = [[initializers(model)[each.input[1]].shape[:2] for each in model.graph.node[:-1]]
              for model in (before, merged)]  # fmt: skip
    assert shapes == [[(5, 24), (12, 5), (5, 12), (24, 5)], [(5, 24), (24, 5)]]
    assert declined == {"conv1/two_factor_1": "not cheaper: 5x24x1x1 and 24x5x1x1 would be 24x24x1x1"}
    assert_same(before, merged)
    after = ir.from_proto(merged)
    assert count_macs(factorised) - count_macs(after) == 120 * 110
    assert count_parameters(factorised) - count_parameters(after) == 120 + 12 - 5
    written = ir.to_proto(write_chains(network, plan, None, chains))
    assert [initializers(written)[each.input[1]].shape for each in written.graph.node[:-1]] == [
        initializers(merged)[each.input[1]].shape for each in merged.graph.node[:-1]
    ]
