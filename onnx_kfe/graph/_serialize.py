"""Models as byte strings, and what becomes of those that are too large for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from onnx_kfe.errors import KfeError
from onnx_kfe.runtime import Mapped, Serialized

__all__ = ["external_tensors", "fits_one_message", "in_one_message", "serialize"]

_PROTOBUF_LIMIT = 2**31 - 2**24  # a protobuf message stays below 2 GiB; leave room for the graph itself
_LARGE = 128  # bytes of a constant that stays out of the message of a model over the limit


def serialize(model: ir.Model) -> Serialized:
    """The model for ONNX Runtime: one byte string with external data taken in, as far as protobuf can hold that."""
    return in_one_message(model) if fits_one_message(model) else _mapped(model)


def in_one_message(model: ir.Model) -> bytes:
    """The model as one byte string, external data taken in.

    Raises:
        KfeError: The model is over protobuf's 2 GiB.
    """
    if not fits_one_message(model):
        size = _weight_bytes(model) / 2**30
        raise KfeError(f"the model has {size:.1f} GiB of weights, over the 2 GiB that one message can hold")
    if external_tensors(model):
        model = ir.external_data.load_to_model(model.clone())
    return ir.to_proto(model).SerializeToString()


def _mapped(model: ir.Model) -> Mapped:
    copy = model.clone()
    folder = next((Path(tensor.base_dir) for tensor in external_tensors(copy)), None)
    constants: dict[str, np.ndarray] = {}
    in_memory = []
    for graph in copy.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            in_folder = isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == folder
            if tensor.nbytes >= _LARGE and graph is copy.graph:
                constants[name] = tensor.numpy()
                if not in_folder:
                    in_memory.append(name)
                    shape = ir.Shape(tensor.shape.numpy())
                    value.const_value = ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, name=name)
    RemoveInitializersFromInputsPass()(copy)  # what may be overridden cannot be shared
    return Mapped(ir.to_proto(copy).SerializeToString(), folder, constants, frozenset(in_memory))


def fits_one_message(model: ir.Model) -> bool:
    """Whether a model is below protobuf's 2 GiB."""
    return _weight_bytes(model) <= _PROTOBUF_LIMIT


def _weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """The constants that are in other files."""
    constants = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return [tensor for tensor in constants if isinstance(tensor, ir.ExternalTensor)]
