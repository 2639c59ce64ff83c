"""Hand-made graphs of a few nodes, and running them in plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

__all__ = ["add_external_data", "node", "run", "serialized", "tiny", "weights"]

Shape = Sequence[int | str]
node = helper.make_node


def tiny(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    initializers: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    **options: object,
) -> onnx.ModelProto:
    """A model of the default domain."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *options.pop("opsets", ())]  # type: ignore[misc]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **options)


def weights(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Seeded normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def serialized(model: onnx.ModelProto | ir.Model) -> bytes:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return proto.SerializeToString()


def run(model: onnx.ModelProto | ir.Model | str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name, in ONNX Runtime as it comes, but for its warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    source = model if isinstance(model, str) else serialized(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def add_external_data(model: onnx.ModelProto, path: str, location: str = "weights.bin") -> str:
    """Save with the weights in a file beside it."""
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=location, size_threshold=0
    )
    return path
