"""What can be odd about operators, control flow and types: each adds one oddity to a draft; see `tests.oddities`."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.odd_graphs import DTYPES, NEWEST, Draft, oddity
from tests.tiny import node

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL


# Operators


@oddity()
def left_out_inputs(d: Draft) -> None:
    """Of Clip, and a Resize that takes no scales."""
    d.x = d.op("Clip", d.x, "", d.number(2.0))
    if d.image:
        d.x = d.op(
            "Resize",
            d.x,
            "" if d.opset >= 13 else d.const([], np.float32),
            "" if d.opset >= 13 else d.const([], np.float32),
            d.const(np.array([1, d.width, 6, 5])) if d.opset < 0 else d.op("Shape", d.x),
        )


@oddity(image=True)
def left_out_outputs(d: Draft) -> None:
    d.x = d.op("MaxPool", d.x, outputs=2, kernel_shape=[1, 1])
    d.nodes[-1].output[1] = ""


@oddity()
def dropout_with_mask(d: Draft) -> None:
    """The mask of one is nothing, that of the other is unused."""
    d.x = d.op("Dropout", d.x, outputs=2)
    d.nodes[-1].output[1] = ""
    d.x = d.op("Dropout", d.x, outputs=2)


@oddity()
def unusual_axes(d: Draft) -> None:
    rank = 4 if d.image else 3
    turned = d.op("Transpose", d.x, perm=list(range(rank))[::-1])
    turned = d.op("Mul", turned, d.op("Softmax", turned, axis=-rank + 1))
    joined = d.op("Concat", turned, d.op("Neg", turned), axis=-rank if d.image else 0)
    half = d.op("Slice", joined, d.const([-1]), d.const([-(2**62)]), d.const([0]), d.const([-2]))
    back = d.op("Transpose", half, perm=list(range(rank))[::-1])
    d.x = d.op("Add", d.x, d.reduce("ReduceMax", back, [-1]))


@oddity(types=[FLOAT])
def odd_gemms(d: Draft) -> None:
    """Scaled, with a transposed input, and with a matrix for a bias."""
    mean = d.reduce("ReduceMean", d.x, [2, 3] if d.image else [1], 0)
    a = d.op("Gemm", mean, d.weight(8, d.width), d.number(0.5), transB=1, alpha=0.5, beta=0.25)
    b = d.op("Gemm", d.op("Transpose", a), d.weight(8, d.width), transA=1)
    c = d.op("Gemm", b, d.weight(d.width, d.width), d.weight(1, d.width))
    d.x = d.op("Add", d.x, d.shaped("Unsqueeze", c, [2, 3] if d.image else [1]))


@oddity(image=True, types=[FLOAT, TensorProto.FLOAT16])
def odd_convolutions(d: Draft) -> None:
    """Padded by name, unevenly, dilated, grouped and with strides."""
    d.x = d.op("Conv", d.x, d.weight(8, d.width, 2, 3), auto_pad="SAME_LOWER")
    d.x, d.width = d.op("Conv", d.x, d.weight(8, 2, 3, 3), d.weight(8), group=4, pads=[0, 2, 4, 2], dilations=[2, 2]), 8
    d.x = d.op("Conv", d.x, d.weight(8, d.width, 3, 1), strides=[2, 1], pads=[2, 0, 1, 0], kernel_shape=[3, 1])


@oddity()
def computed_weights(d: Draft) -> None:
    gram = d.op("MatMul", d.op("Transpose", d.x, perm=[0, 1, 3, 2] if d.image else [0, 2, 1]), d.x)
    d.x = d.op("MatMul", d.x, d.op("Softmax", gram, axis=3 if d.image else 2))


@oddity(types=[FLOAT])
def products_of_many_axes(d: Draft) -> None:
    """A weight of rank 3, a vector, and a constant on the left."""
    size = 5 if d.image else d.width
    x = d.op("MatMul", d.x, d.weight(1, size, size))
    vector = d.op("MatMul", x, d.weight(size))
    d.x = d.op("Add", d.x, d.shaped("Unsqueeze", vector, [-1] if d.opset >= 13 else [3 if d.image else 2]))
    rows = 6 if d.image else 7
    d.x = d.op("MatMul", d.weight(rows, rows), d.x)


@oddity()
def shapes_by_arithmetic(d: Draft) -> None:
    sizes = d.op("Shape", d.x)
    batch = d.op("Gather", sizes, d.const(0))
    target = d.op("Concat", d.shaped("Unsqueeze", batch, [0]), d.const([-1]), axis=0)
    d.x = d.op("Reshape", d.op("Reshape", d.x, target), sizes)
    zeros = d.op("ConstantOfShape", sizes, value=numpy_helper.from_array(np.zeros(1, DTYPES[d.dtype])))
    d.x = d.op("Add", d.x, zeros)


# Control flow and other types


@oddity()
def an_if(d: Draft) -> None:
    """Both branches have nodes and values of the same names, and read layers outside."""
    outside = d.x
    w = d.constants[d.layer_weight()]
    kind = "Conv" if d.image else "MatMul"
    branches = [
        d.body(
            [node(kind, [outside, "inner_w"], ["inner"], "layer"), node(last, ["inner"], ["result"], "last")],
            [],
            ["result"],
            inner_w=w,
        )
        for last in ("Relu", "Neg")
    ]
    test = d.op("Cast", d.op("Gather", d.op("Shape", d.x), d.const(0)), to=BOOL)
    d.x = d.op("If", test, then_branch=branches[0], else_branch=branches[1])


@oddity()
def an_if_that_only_reads(d: Draft) -> None:
    """Its branches have no nodes but an Identity of a layer outside, whose weight one of them uses."""
    w = d.layer_weight()
    value = d.layer(weight=w)
    branches = [
        d.body([node("Identity", [value], ["r"], "same")], [], ["r"]),
        d.body([node("Conv" if d.image else "MatMul", [value, w], ["r"], "same")], [], ["r"]),
    ]
    d.x = d.op("If", d.const(True), then_branch=branches[0], else_branch=branches[1])
    test = d.op("Cast", d.op("Size", d.x), to=BOOL)
    d.x = d.op("If", test, then_branch=branches[0], else_branch=branches[1])


@oddity()
def a_loop(d: Draft) -> None:
    """A layer that is carried from turn to turn, and one outside that each reads."""
    outside, w = d.layer(8), d.constants[d.layer_weight()]
    kind = "Conv" if d.image else "MatMul"
    nodes = [
        node(kind, ["carried", "loop_w"], ["h"], "layer"),
        node("Add", ["h", outside], ["next"], "sum"),
        node("Identity", ["go"], ["going"], "on"),
    ]
    infos = [
        helper.make_tensor_value_info(*each)
        for each in (("turn", INT64, []), ("go", BOOL, []), ("carried", d.dtype, None))
    ]
    body = d.body(nodes, infos, ["next"], loop_w=w)
    body.output.insert(0, helper.make_tensor_value_info("going", BOOL, []))
    d.x = d.op("Loop", d.const(2), "", outside, body=body)


@oddity(image=False, types=[FLOAT, TensorProto.FLOAT16])
def a_scan(d: Draft) -> None:
    """Over the tokens."""
    w = d.constants[d.layer_weight()]
    nodes = [node("MatMul", ["row", "scan_w"], ["out"], "layer")]
    body = d.body(nodes, [helper.make_tensor_value_info("row", d.dtype, None)], ["out"], scan_w=w)
    d.x = d.op("Scan", d.x, body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1])


@oddity()
def sequences(d: Draft) -> None:
    parts = d.op("SplitToSequence", d.x, axis=d.axis)
    d.x = d.op("ConcatFromSequence", parts, axis=d.axis)
    pair = d.op("SequenceConstruct", d.layer(x=d.x), d.x)
    d.x = d.op("SequenceAt", pair, d.const(0))
    d.outputs.append(helper.make_tensor_sequence_value_info(pair, d.dtype, None))


@oddity(since=18, types=[FLOAT])
def optionals(d: Draft) -> None:
    boxed = d.op("Optional", d.layer(x=d.x))
    d.x = d.op("OptionalGetElement", boxed)
    d.output(d.op("OptionalHasElement", boxed), BOOL)


@oddity()
def functions(d: Draft) -> None:
    """One calls another, both twice, with an attribute handed on."""
    opsets = [helper.make_opsetid("", d.opset)]
    layer = node("Conv" if d.image else "MatMul", ["a", "w"], ["h"], "layer")
    scaled = node("LeakyRelu", ["h"], ["b"], "last")
    scaled.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    inner = helper.make_function("org.test", "Inner", ["a", "w"], ["b"], [layer, scaled], opsets, ["slope"])
    call = node("Inner", ["a", "w"], ["b"], "inner", domain="org.test")
    call.attribute.add(name="slope", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    outer = helper.make_function(
        "org.test", "Outer", ["a", "w"], ["b"], [call], [*opsets, helper.make_opsetid("org.test", 1)], ["slope"]
    )
    d.functions += [inner, outer]
    for _ in range(2):
        d.x = d.op("Outer", d.x, d.layer_weight(), domain="org.test", slope=0.5)


@oddity(until=NEWEST - 1, refused="functions of the model cannot be inlined: Opset mismatch")
def a_function_of_another_opset(d: Draft) -> None:
    relu = node("Relu", ["a"], ["b"])
    other = [helper.make_opsetid("", d.opset + 1)]
    d.functions.append(helper.make_function("org.test", "Later", ["a"], ["b"], [relu], other))
    d.x = d.op("Later", d.x, domain="org.test")


@oddity(image=False, types=[FLOAT])
def recurrence(d: Draft) -> None:
    """An LSTM, of which only the last state is read, and a GRU in both directions."""
    x = d.op("Transpose", d.x, perm=[1, 0, 2])
    d.op("LSTM", x, d.weight(1, 16, d.width), d.weight(1, 16, 4), outputs=3, hidden_size=4)
    d.nodes[-1].output[2] = ""
    state = f"{d.nodes[-1].name}.1"
    y = d.op(
        "GRU",
        x,
        d.weight(2, 12, d.width),
        d.weight(2, 12, 4),
        d.weight(2, 24),
        hidden_size=4,
        direction="bidirectional",
    )
    y = d.op("Reshape", d.op("Transpose", y, perm=[2, 0, 1, 3]), d.const([0, 0, -1]))
    d.x = d.op("Add", y, d.op("Concat", *[d.op("Transpose", state, perm=[1, 0, 2])] * 2, axis=2))
