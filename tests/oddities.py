"""What can be odd about a graph: each adds one oddity to a draft, whose value `x` keeps its kind."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.odd_graphs import Draft, oddity
from tests.tiny import node, weights

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL


# Constants


@oddity()
def shared_weight(d: Draft) -> None:
    weight = d.layer_weight()
    d.layer(weight=weight)
    d.x = d.op("Relu", d.x)
    d.layer(weight=weight)


@oddity()
def scalars(d: Draft) -> None:
    d.x = d.op("Mul", d.number(0.5), d.op("Add", d.x, d.number([0.25])))


@oddity()
def empty_tensors(d: Draft) -> None:
    """Nothing of the channels, beside all of them, and an output without elements."""
    nothing = d.op("Slice", d.x, d.const([0]), d.const([0]), d.const([d.axis]))
    d.x = d.op("Concat", nothing, d.x, axis=d.axis)
    d.output(d.op("Relu", nothing))


@oddity()
def a_layer_without_inputs(d: Draft) -> None:
    """A sum over no channels."""
    nothing = d.op("Slice", d.x, d.const([0]), d.const([0]), d.const([-1]))
    d.x = d.op("Add", d.x, d.op("MatMul", nothing, d.number(np.zeros((0, 1)))))


@oddity()
def a_layer_without_outputs(d: Draft) -> None:
    width = 8 if not d.image else 5
    nothing = d.op(
        "MatMul", d.op("Slice", d.x, d.const([0]), d.const([width]), d.const([-1])), d.number(np.zeros((width, 0)))
    )
    d.output(nothing)


@oddity()
def zero_weights(d: Draft) -> None:
    """A layer that always gives zero, behind a ReLU that always does."""
    dead = d.op("Relu", d.op("Sub", d.x, d.number(1e4)))
    zero = d.layer(weight=d.number(np.zeros(d.constants[d.layer_weight()].shape)), x=dead)
    d.x = d.op("Add", d.x, d.layer(x=zero))


@oddity()
def narrow_weights(d: Draft) -> None:
    """One channel, and back to eight."""
    d.layer(1)
    d.layer(8)


@oddity()
def weights_through_nodes(d: Draft) -> None:
    """Identity, Cast and Transpose in turn."""
    w = d.layer_weight()
    stored = d.constants.pop(w)
    d.constants[w] = np.ascontiguousarray(stored.T.astype(np.float32))
    w = d.op("Identity", w)
    w = d.op("Cast", w, to=d.dtype)
    d.layer(weight=d.op("Transpose", w, perm=list(range(stored.ndim))[::-1]))


@oddity()
def weights_of_constant_nodes(d: Draft) -> None:
    w = d.layer_weight()
    tensor = numpy_helper.from_array(d.constants.pop(w))
    d.layer(weight=d.op("Constant", value=tensor))


@oddity(image=False, types=[FLOAT], refused="Sparse tensors are not supported")
def a_sparse_weight(d: Draft) -> None:
    """Of a Constant, as COO."""
    values = numpy_helper.from_array(weights(4), "sparse")
    sparse = helper.make_sparse_tensor(
        values, numpy_helper.from_array(np.array([0, 9, 18, 63]), "places"), [d.width, 8]
    )
    d.layer(8, weight=d.op("Constant", sparse_value=sparse))


@oddity()
def constants_that_are_inputs(d: Draft) -> None:
    """Whose values a caller may override."""
    w = d.layer_weight()
    d.layer(weight=w)
    d.inputs.append(helper.make_tensor_value_info(w, d.dtype, d.constants[w].shape))


@oddity()
def constants_that_are_outputs(d: Draft) -> None:
    w, b = d.layer_weight(), d.number([0.5])
    d.layer(weight=w)
    d.x = d.op("Add", d.x, b)
    d.output(w)
    d.output(b)


@oddity()
def unused_constants(d: Draft) -> None:
    d.const(np.arange(3))
    d.const(np.zeros((0, 3), np.float32))


@oddity()
def texts(d: Draft) -> None:
    """Constants that are strings, as an output."""
    d.output(d.op("Identity", d.const(["ä", ""], np.object_)), TensorProto.STRING)


# Names


@oddity()
def no_names(d: Draft) -> None:
    def finish(model: onnx.ModelProto) -> None:
        for each in model.graph.node:
            each.ClearField("name")

    d.finishers.append(finish)


@oddity()
def names_of_our_own(d: Draft) -> None:
    """Names that this package gives nodes and values."""
    d.constants["w"] = d.constants.pop(d.layer_weight())
    d.layer(8, weight="w")
    d.nodes[-1].name = "conv"
    d.nodes.append(node("Neg", [d.x], ["conv/two_factor_0_output"], "conv/two_factor_0"))
    d.nodes.append(node("Neg", ["conv/two_factor_0_output"], ["gradient/Mul_0"], "conv/two_factor_0_2"))
    d.constants["w/two_factor_0"] = d.constants.pop(d.number([0.5]))
    d.x = d.op("Mul", "gradient/Mul_0", "w/two_factor_0")


@oddity()
def strange_names(d: Draft) -> None:
    w = d.layer_weight()
    d.constants["w/ä [0]:0 %s {}"] = d.constants.pop(w)
    d.layer(weight="w/ä [0]:0 %s {}")
    d.nodes[-1].name = "*?[/ "


@oddity()
def notes(d: Draft) -> None:
    """Documentation and metadata of nodes, values and constants."""

    def finish(model: onnx.ModelProto) -> None:
        model.graph.node[0].doc_string = model.graph.input[0].doc_string = "some words"
        model.graph.initializer[0].doc_string = "more"
        model.doc_string, model.graph.doc_string, model.domain, model.model_version = "a", "b", "org.test", 7

    d.finishers.append(finish)


# Inputs and outputs


@oddity()
def token_input(d: Draft) -> None:
    """Of integers that choose rows of a table."""
    name = d.input("ids", INT64, ["n", "s"], [1, 3])
    mean = d.reduce("ReduceMean", d.op("Gather", d.weight(2, d.width), name), [1], int(not d.image))
    d.x = d.op("Add", d.x, d.shaped("Unsqueeze", mean, [2, 3]) if d.image else mean)


@oddity()
def scalar_input(d: Draft) -> None:
    d.x = d.op("Mul", d.x, d.input("strength", d.dtype, [], []))


@oddity()
def scalar_integer_input(d: Draft) -> None:
    d.x = d.op("Mul", d.x, d.op("Cast", d.input("number", TensorProto.INT32, [], []), to=d.dtype))


@oddity()
def mask_input(d: Draft) -> None:
    shape = ["m", 1, 1, 1] if d.image else ["m", 1, 1]
    d.x = d.op("Where", d.input("mask", BOOL, shape, [1] * len(shape)), d.x, d.number(0.0))


@oddity()
def input_without_elements(d: Draft) -> None:
    extra = d.input(
        "nothing", d.dtype, ["n", 0, "h", "w"] if d.image else ["n", "t", 0], [1, 0, 6, 5] if d.image else [1, 7, 0]
    )
    d.x = d.op("Concat", d.x, extra, axis=d.axis)


@oddity()
def unused_input(d: Draft) -> None:
    d.input("unused", FLOAT, ["n", 3], [1, 3])


@oddity()
def input_of_unknown_sizes(d: Draft) -> None:
    """Dimensions without a number or a name."""
    d.x = d.op("Add", d.x, d.input("other", d.dtype, [None] * (4 if d.image else 3), [1] * (4 if d.image else 3)))


@oddity(refused="input 'shapeless' has no declared shape: declare one")
def input_without_shape(d: Draft) -> None:
    d.x = d.op("Add", d.x, d.input("shapeless", d.dtype, None, []))


@oddity(refused="input 'sequence' is no tensor")
def sequence_input(d: Draft) -> None:
    d.inputs.append(helper.make_tensor_sequence_value_info("sequence", d.dtype, ["n", 8]))
    d.output(d.op("SequenceLength", "sequence"), INT64)


@oddity()
def an_input_that_is_an_output(d: Draft) -> None:
    d.outputs.append(d.inputs[0])
    d.output(d.op("Identity", "x"))


@oddity()
def a_layer_that_is_an_output_and_used(d: Draft) -> None:
    d.output(d.layer(8))


@oddity()
def an_output_twice(d: Draft) -> None:
    """The same value by two names."""
    value = d.layer(8)
    d.output(d.op("Identity", value))
    d.output(d.op("Identity", value))


@oddity()
def outputs_of_other_types(d: Draft) -> None:
    d.output(d.op("ArgMax", "x", axis=d.axis), INT64)
    d.output(d.op("Shape", d.x), INT64)
    d.output(d.op("Equal", d.x, d.x), BOOL)


@oddity()
def layers_that_feed_nothing(d: Draft) -> None:
    d.layer(x=d.layer(x=d.x))


@oddity()
def a_layer_that_feeds_integers(d: Draft) -> None:
    """What passes no gradient on."""
    d.output(d.op("Cast", d.op("Clip", d.layer(x=d.layer(x=d.x)), d.number(7.0)), to=INT64), INT64)


@oddity()
def named_like_probabilities(d: Draft) -> None:
    axis = d.axis if d.opset >= 13 else (3 if d.image else 2)
    d.output(d.op("Softmax", d.layer(x=d.x), axis=axis))
    d.output(d.op("Sigmoid", d.layer(x=d.x)))
