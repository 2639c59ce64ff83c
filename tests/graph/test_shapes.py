"""Types and shapes that are inferred: what they are, and what they leave alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnx_kfe.graph import Geometry, concrete_shapes, find_layers, infer_shapes, load, nominal_input_shapes
from tests.tiny import add_external_data, node, tiny, weights


def values_of(model: ir.Model) -> dict[str | None, ir.Value]:
    return {value.name: value for each in model.graph for value in each.outputs}


def test_what_outputs_are_declared_with_stays():
    """One has names of its own for axes, one no shape."""
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Relu", ["y"], ["z"])]
    proto = tiny(nodes, {"x": ["n", 4]}, {"y": ["batch", "features"], "z": []}, {"w": weights(4, 3)})
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    model = load(proto)
    infer_shapes(model)
    assert [str(size) for size in values_of(model)["y"].shape] == ["batch", "features"]
    assert list(values_of(model)["z"].shape)[1] == 3


def test_small_constants_in_other_files_are_read(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Reshape", ["h", "target"], ["y"]), node("Relu", ["y"], ["z"])]
    constants = {"w": weights(4, 6), "target": np.array([-1, 2, 3])}
    proto = tiny(nodes, {"x": ["n", 4]}, {"z": []}, constants)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = load(add_external_data(proto, str(tmp_path / "m.onnx")))
    infer_shapes(model)
    assert list(values_of(model)["y"].shape)[1:] == [2, 3]


def test_sequences_stay_sequences():
    nodes = [node("SequenceConstruct", ["x", "x"], ["s"]), node("SequenceAt", ["s", "i"], ["y"])]
    model = load(tiny(nodes, {"x": ["n", 4], "i": []}, {"y": ["n", 4]}))
    infer_shapes(model)
    assert values_of(model)["s"].type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))


def test_a_convolution_behind_something_unknown_has_a_rank():
    """What a Loop gives is of unknown shape."""
    nodes = [node("Identity", ["go"], ["going"]), node("Relu", ["c"], ["n"])]
    declared = (("turn", 7, []), ("go", 9, []), ("c", 1, None))
    body = helper.make_graph(
        nodes, "body", [helper.make_tensor_value_info(*each) for each in declared],
        [helper.make_tensor_value_info("going", 9, []), helper.make_tensor_value_info("n", 1, None)],
    )  # fmt: skip
    graph = [
        node("Loop", ["m", "", "x"], ["h"], body=body),
        node("Conv", ["h", "w"], ["y"]),
        node("Relu", ["y"], ["z"]),
    ]
    inputs = {"x": ["n", 2, 5, 5], "m": []}
    model = load(tiny(graph, inputs, {"z": ["n", 3, 5, 5]}, {"w": weights(3, 2, 1, 1)}))
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.INT64)
    infer_shapes(model)
    assert list(values_of(model)["y"].shape)[1] == 3
    assert len(values_of(model)["h"].shape) == 4


def test_axes_without_elements_are_no_free_ones():
    nodes = [node("Concat", ["x", "nothing"], ["h"], axis=1), node("Conv", ["h", "w"], ["y"], "layer")]
    inputs = {"x": ["n", 2, "h", "w"], "nothing": [0, 0, "h", "w"]}
    model = load(tiny(nodes, inputs, {"y": ["n", 3, "h", "w"]}, {"w": weights(3, 2, 1, 1)}))
    assert nominal_input_shapes(model)["nothing"] == (1, 0, 224, 224)
    (layer,) = find_layers(model)
    assert layer.geometry.in_channels == 2


def test_inputs_that_are_no_tensors_have_no_shape_to_choose():
    sequence = helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, ["n", 4])
    proto = tiny([node("SequenceAt", ["s", "i"], ["h"]), node("MatMul", ["x", "w"], ["y"], "layer")],
                 {"x": ["n", 4], "i": []}, {"y": ["n", 3]}, {"w": weights(4, 3)})  # fmt: skip
    proto.graph.input.append(sequence)
    model = load(proto)
    assert nominal_input_shapes(model) == {"x": (1, 4), "i": ()}
    assert concrete_shapes(model, nominal_input_shapes(model))["y"] == (1, 3)


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"])
def test_shapes_that_only_running_tells_whatever_the_element_type(dtype):
    """Inference does not count the rows that are kept; on CPUs ONNX Runtime has no product in bfloat16."""
    kind = onnx.TensorProto.DataType.Value(dtype)
    array = weights(4, 3).astype(helper.tensor_dtype_to_np_dtype(kind))
    nodes = [
        node("Compress", ["x", "some"], ["c"], axis=1),
        node("MatMul", ["c", "w"], ["y"], "layer"),
    ]
    constants = {"w": array, "some": np.array([True, False, True])}
    (layer,) = find_layers(load(tiny(nodes, {"x": [1, 3, 4]}, {"y": [1, "m", 3]}, constants, opset=19, dtype=kind)))
    assert layer.geometry == Geometry(4, 3, repeats=2)
