"""From an ONNX model to a torch module that can be trained, and from the trained module back to the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnx_kfe.errors import KfeError
from onnx_kfe.exporting import import_torch
from onnx_kfe.graph import ModelSource, load, source_name
from onnx_kfe.recovery.training._learnt import constant_tensor, find_learnt

if TYPE_CHECKING:
    from torch import Tensor

    from onnx_kfe.recovery.training._onnx_module import OnnxModule

__all__ = ["to_torch", "write_back"]


def to_torch(model: ModelSource) -> OnnxModule:
    """Make a torch module of a model, to be trained and given to `write_back`.

    What was learnt (weights, biases, scales, embeddings, whether initializers or Constant nodes) are parameters under
    the names that it has in the graph; other constants are buffers that are not saved. Batch normalisation that was
    not folded uses the batch in training mode and keeps running statistics, Dropout drops in training mode. The module
    is in training mode, as new modules are.

    ``forward`` takes the inputs of the graph by position or name and returns its output, or a tuple of its outputs.
    ``input_names`` and ``output_names`` hold their names, ``initializer_names`` the name in the graph by the key in
    ``state_dict()``; the two differ only where torch does not allow a name.

    Args:
        model: A path, ``ModelProto`` or ``ir.Model``; it is not modified.

    Raises:
        KfeError: The model cannot be read, an operator of it cannot be converted, or torch or onnx2fx is missing.
    """
    convert = _import_converter()
    copy = ir.external_data.load_to_model(load(model))
    # By way of protobuf, as names are going to change and a clone shares its tensors, which have names too.
    return convert(ir.from_proto(ir.to_proto(copy)))


def _import_converter() -> Callable[[ir.Model], OnnxModule]:
    import_torch()
    try:
        from onnx_kfe.recovery.training._convert import convert
    except ImportError as error:
        raise KfeError("this needs onnx2fx, which is not installed: pip install 'onnx-kfe[train]'") from error
    return convert


def write_back(module: OnnxModule, model: ModelSource) -> ir.Model | onnx.ModelProto:
    """Put the weights of a module into the model that it was made from.

    Args:
        module: A module from `to_torch`, or a copy of it.
        model: The model that it was made from; it is not modified.

    Returns:
        The same graph with the module's parameters and running statistics, in the types that they have there: an
        ``ir.Model`` for an ``ir.Model``, else a ``ModelProto``.

    Raises:
        KfeError: The module is of another model: names or shapes differ. The message names the first that does.
    """
    written = load(model)
    state = module.state_dict()
    tensors = {name: state[key] for key, name in module.initializer_names.items()}
    learnt = find_learnt(written.graph).values
    _check(tensors, learnt, source_name(model))
    for name, value in learnt.items():
        _replace(value, tensors[name])
    return written if isinstance(model, ir.Model) else ir.to_proto(written)


def _check(tensors: dict[str, Tensor], learnt: dict[str, ir.Value], model: str) -> None:
    for name in [*learnt, *tensors]:
        if name not in learnt or name not in tensors:
            owner, other = (model, "the module") if name in learnt else ("the module", model)
            raise KfeError(f"the module is of another model: {owner} has weights '{name}', {other} has not")
        tensor = constant_tensor(learnt[name])
        assert tensor is not None
        found, wanted = list(tensors[name].shape), list(tensor.shape.numpy())
        if found != wanted:
            raise KfeError(f"the module is of another model: '{name}' has shape {found}, in {model} it is {wanted}")


def _replace(value: ir.Value, tensor: Tensor) -> None:
    """Give an initializer or a Constant node other values."""
    earlier = constant_tensor(value)
    assert earlier is not None
    array = tensor.detach().cpu().double().numpy().astype(earlier.dtype.numpy())
    replaced = ir.tensor(array, dtype=earlier.dtype, name=earlier.name, doc_string=earlier.doc_string)
    node = value.producer()
    if node is None:
        value.const_value = replaced
    else:
        node.attributes["value"] = ir.AttrTensor("value", replaced, node.attributes["value"].doc_string)
