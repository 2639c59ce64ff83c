"""Copies in single precision compute what the model does, but for its rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_kfe.graph import in_single_precision, load
from tests.tiny import node, run, serialized, tiny, weights

CLOSE = {TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 5e-2, TensorProto.DOUBLE: 1e-5}
OTHERS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def odd(dtype: int) -> onnx.ModelProto:
    """Types in constants, attributes, bodies and sequences."""
    numpy = helper.tensor_dtype_to_np_dtype(dtype)
    array = (weights(4, 4) / 2).astype(numpy)
    inner = helper.make_graph(
        [node("MatMul", ["r", "v"], ["b"])], "inner", [], [helper.make_tensor_value_info("b", dtype, None)],
        [numpy_helper.from_array(array, "v")],
    )  # fmt: skip
    nodes = [
        node("Constant", [], ["k"], value=numpy_helper.from_array(np.array([2], numpy))),
        node("MatMul", ["x", "w"], ["h"]),
        node("Mul", ["h", "k"], ["m"]),
        node("Cast", ["m"], ["i"], to=TensorProto.INT32),
        node("Cast", ["i"], ["f"], to=dtype),
        node("Add", ["m", "f"], ["s"]),
        node("SequenceConstruct", ["s", "m"], ["seq"]),
        node("SequenceAt", ["seq", "zero"], ["r"]),
        node("If", ["true"], ["y"], then_branch=inner, else_branch=inner),
    ]
    constants = {"w": array, "zero": np.array(0), "true": np.array(True)}
    return tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, constants, dtype=dtype, opset=19)


def types_of(model: ir.Model) -> set[ir.DataType | None]:
    values = (value for graph in model.graphs() for each in graph for value in (*each.inputs, *each.outputs))
    return {value.dtype for value in (*values, *model.graph.inputs, *model.graph.outputs) if value is not None}


@pytest.mark.parametrize("dtype", CLOSE, ids=TensorProto.DataType.Name)
def test_it_gives_what_the_model_does(dtype):
    model = load(odd(dtype))
    before = serialized(model)
    x = weights(3, 4, seed=1).astype(helper.tensor_dtype_to_np_dtype(dtype))
    (wanted,) = ReferenceEvaluator(odd(dtype)).run(None, {"x": x})
    copy = in_single_precision(model)
    found = run(copy, {"x": x.astype(np.float32)})["y"]
    assert not types_of(copy) & OTHERS
    assert types_of(model) & OTHERS
    np.testing.assert_allclose(found, wanted.astype(np.float64), atol=CLOSE[dtype] * np.abs(wanted).max().astype(float))
    assert serialized(model) == before


def test_a_model_in_single_precision_stays_as_it_is():
    proto = odd(TensorProto.FLOAT)
    assert serialized(in_single_precision(load(proto))) == serialized(load(proto).clone())


def test_numbers_beyond_single_precision_stay_finite():
    """As masks are added in double precision, times nothing where they do not apply."""
    nodes = [node("Mul", ["x", "mask"], ["y"])]
    model = tiny(nodes, {"x": [3]}, {"y": [3]}, {"mask": np.array([-1e300, np.inf, 1.5])}, dtype=TensorProto.DOUBLE)
    copy = in_single_precision(load(model))
    largest = np.finfo(np.float32).max
    assert copy.graph.initializers["mask"].const_value.numpy().tolist() == [-largest, np.inf, 1.5]


def test_bfloat16_has_no_type_of_numpy():
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    model = tiny([node("Add", ["x", "c"], ["y"])], {"x": [2]}, {"y": [2]}, {"c": array}, dtype=TensorProto.BFLOAT16)
    copy = in_single_precision(load(model))
    assert copy.graph.initializers["c"].const_value.numpy().dtype == np.float32
