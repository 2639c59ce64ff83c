"""Tiny models whose outputs numpy can compute."""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Data:
    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None = None


def serialise(nodes, inputs, outputs, weights=None) -> bytes:
    """A model from nodes, name -> (type, shape) for inputs and outputs, and name -> array."""
    infos = [
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in d.items()] for d in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", *infos, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def linear(
    weight: np.ndarray, activation: str = "Identity", *, rank: int = 2, output: str = "y", **attributes
) -> bytes:
    """y = activation(x @ weight); x is [N, D] or [N, T, D]."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node(activation, ["z"], [output], **attributes),
    ]
    dims = ["N", "T"][: rank - 1]
    weight = weight.astype(np.float32)
    return serialise(
        nodes,
        {"x": (TensorProto.FLOAT, [*dims, weight.shape[0]])},
        {output: (TensorProto.FLOAT, [*dims, weight.shape[1]])},
        {"w": weight},
    )


def save_external(model: bytes, path) -> None:
    """Save with the weights in a file beside the model."""
    onnx.save(onnx.load_from_string(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
