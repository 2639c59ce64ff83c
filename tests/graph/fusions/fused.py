"""Models of one fused node, as ONNX Runtime runs it and as it is decomposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnx_kfe.graph import load, normalize
from tests.tiny import run

__all__ = ["assert_equal_outputs", "assert_expands", "fused", "kept"]

Arrays = Mapping[str, np.ndarray]


def fused(
    op_type: str,
    inputs: str,
    arrays: Arrays,
    *,
    constants: Arrays | None = None,
    outputs: Sequence[str] = ("y",),
    integers: Sequence[str] = (),
    opset: int = 17,
    domain: str = "com.microsoft",
    shapes: bool = True,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node.

    Args:
        op_type: Its operator.
        inputs: Names of its inputs, ``-`` for one that is left out.
        arrays: What goes in, of sizes that only have names, but for the last of floats.
        constants: Inputs that are initializers.
        outputs: Names of its outputs, empty for one that is left out.
        integers: Those that are int32.
        opset: Of the domain of ONNX.
        domain: Of the operator.
        shapes: Whether the model tells the shapes of its inputs.
        attributes: Of the node.
    """
    names = ["" if name == "-" else name for name in inputs.split()]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    sizes = {name: [f"n{n}" for n in array.shape] for name, array in arrays.items()}
    for name, array in arrays.items():
        sizes[name][-1:] = array.shape[-1:] if array.dtype.kind == "f" else sizes[name][-1:]
    floats = next(
        helper.np_dtype_to_tensor_dtype(array.dtype)
        for array in (*arrays.values(), *(constants or {}).values())
        if array.dtype.kind == "f"
    )
    graph = helper.make_graph(
        [helper.make_node(op_type, names, list(outputs), name="fused", domain=domain, **attributes)],
        "fused",
        [helper.make_tensor_value_info(name, kinds[name], sizes[name] if shapes else None) for name in arrays],
        [
            helper.make_tensor_value_info(name, TensorProto.INT32 if name in integers else floats, None)
            for name in outputs
            if name
        ],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def assert_expands(op_type: str, inputs: str, arrays: Arrays, *, tolerance: float = 1e-5, **options: Any) -> ir.Model:
    """Check that a node becomes nodes of ONNX that give what ONNX Runtime gives for it; return the normalised model."""
    model = fused(op_type, inputs, arrays, **options)
    normal = normalize(load(model))
    assert {node.domain for node in normal.graph} == {""}
    assert set(normal.opset_imports) == {""}
    onnx.checker.check_model(ir.to_proto(normal), full_check=True)
    assert_equal_outputs(normal, model, arrays, tolerance)
    return normal


def assert_equal_outputs(
    found: onnx.ModelProto | ir.Model, wanted: onnx.ModelProto, arrays: Arrays, tolerance: float = 1e-5
) -> None:
    """Check that two models give the same."""
    got = run(found, arrays)
    for name, array in run(wanted, arrays).items():
        assert array.std() > 0.01
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


def kept(model: onnx.ModelProto) -> ir.Model:
    """The normalised model, in which the fused node has to be as it was."""
    normal = normalize(load(model))
    (before,), (after,) = model.graph.node, [node for node in normal.graph if node.domain]
    assert (after.op_type, after.domain, after.name) == (before.op_type, before.domain, before.name)
    assert "com.microsoft" in normal.opset_imports or before.domain == ""
    return normal
