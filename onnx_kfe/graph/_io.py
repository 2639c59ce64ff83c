"""Loading, saving and fingerprinting models: a path, a ``ModelProto`` or an ``ir.Model`` in, whole files out."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph._serialize import external_tensors, fits_one_message, in_one_message
from onnx_kfe.graph.fusions import is_fusion

__all__ = [
    "ModelSource",
    "check_output",
    "fingerprint",
    "load",
    "replace_whole",
    "save",
    "source_name",
]

ModelSource: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def source_name(source: ModelSource) -> str:
    """What to call `source` in a message."""
    return str(source) if isinstance(source, str | os.PathLike) else "the model"


def load(source: ModelSource) -> ir.Model:
    """Load a model; an ``ir.Model`` or ``ModelProto`` is copied, so that the caller's own is never modified.

    Raises:
        KfeError: The file is missing, is not ONNX, is truncated, lacks its external data, or its graph is invalid.
    """
    name = source_name(source)
    if isinstance(source, ir.Model):
        return _checked(_with_own_names(source.clone()), name)
    if isinstance(source, onnx.ModelProto):
        return _checked(_from_proto(source, name), name)
    path = Path(source)
    if not path.is_file():
        raise KfeError(f"{path}: no such file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise KfeError(f"{path}: not an ONNX file, or a truncated one") from error
    model = _from_proto(proto, name)
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    return _checked(model, name)


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    if not proto.opset_import or not proto.graph.node:
        raise KfeError(f"{name}: not an ONNX model (no operator set or no nodes in it)")
    if proto.graph.sparse_initializer:
        raise KfeError(f"{name}: sparse initializers are not supported; make them dense")
    try:
        return _with_own_names(ir.from_proto(proto))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones say where, in terms of another library
            cause = cause.__cause__
        raise KfeError(f"{name}: cannot be read as an ONNX model ({str(cause).splitlines()[0]})") from error


def _with_own_names(model: ir.Model) -> ir.Model:
    """Constants that can be renamed without renaming them in the message that they were read from."""
    for value in model.graph.initializers.values():
        value.const_value = _with_own_name(value.const_value)
    for node in (node for graph in (model.graph, *model.functions.values()) for node in graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = _with_own_name(attribute.as_tensor())
                node.attributes[attribute.name] = ir.Attr(attribute.name, ir.AttributeType.TENSOR, tensor)
    return model


def _with_own_name(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    if not isinstance(tensor, ir.serde.TensorProtoTensor):
        return tensor
    return ir.LazyTensor(lambda: tensor, tensor.dtype, tensor.shape, name=tensor.name, doc_string=tensor.doc_string)


def _checked(model: ir.Model, name: str) -> ir.Model:
    """Reject what no runtime would load, before any work is spent on it."""
    if not model.graph.outputs:
        raise KfeError(f"{name}: the graph has no outputs")
    try:
        TopologicalSortPass()(model)
    except Exception as error:
        raise KfeError(f"{name}: the graph has a cycle") from error
    opset = model.opset_imports.get("", 1)
    for node in model.graph.all_nodes():
        called = node.name or node.op_type
        for value in node.inputs:
            if value is not None and not _is_defined(value):
                raise KfeError(f"{name}: node '{called}' reads '{value.name}', which nothing computes")
        known = node.domain != "" or node.op_identifier() in model.functions or onnx.defs.has(node.op_type, opset)
        if not (known or is_fusion(node, opset)):
            raise KfeError(f"{name}: operator {node.op_type} (node '{called}') does not exist in opset {opset}")
    for tensor in external_tensors(model):
        try:
            tensor.numpy()  # maps the file, reads nothing
        except Exception as error:
            raise KfeError(
                f"{name}: external data of '{tensor.name}' is missing, too short or outside the model's folder, "
                f"expected in {tensor.path}"
            ) from error
    return model


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def fingerprint(model: ir.Model) -> str:
    """SHA-256 over structure and weights, the same however the model was stored or handed over."""
    digest = hashlib.sha256(repr(sorted(model.opset_imports.items())).encode())
    _digest_graph(digest, model.graph)
    for _, function in sorted(model.functions.items()):
        _digest_graph(digest, function)
    return digest.hexdigest()


def _digest_graph(digest: hashlib._Hash, graph: ir.Graph | ir.Function) -> None:
    digest.update(repr([_names(graph.inputs), _names(graph.outputs)]).encode())
    for node in graph:
        digest.update(repr((node.domain, node.op_type, _names(node.inputs), _names(node.outputs))).encode())
        for _, attribute in sorted(node.attributes.items()):
            _digest_attribute(digest, attribute)
    if isinstance(graph, ir.Graph):
        for name, value in sorted(graph.initializers.items()):
            if value.const_value is not None:
                _digest_tensor(digest, name, value.const_value)


def _digest_attribute(digest: hashlib._Hash, attribute: ir.Attr) -> None:
    value = attribute.value
    if isinstance(value, ir.Graph):
        _digest_graph(digest, value)
    elif isinstance(value, ir.TensorProtocol):
        _digest_tensor(digest, attribute.name, value)
    else:
        plain = list(value) if isinstance(value, list | tuple) else value
        digest.update(repr((attribute.name, attribute.type.name, attribute.ref_attr_name, plain)).encode())


def _digest_tensor(digest: hashlib._Hash, name: str, tensor: ir.TensorProtocol) -> None:
    digest.update(repr((name, tensor.dtype.name, tuple(tensor.shape))).encode())
    if tensor.dtype == ir.DataType.STRING:
        digest.update(repr(tensor.numpy().tolist()).encode())
    elif tensor.dtype.bitwidth < 8:
        digest.update(tensor.tobytes())
    else:  # without a copy, which of a mapped file would be all that there is in memory
        digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)


def _names(values: Iterable[ir.Value | None]) -> list[str | None]:
    return [value.name if value is not None else None for value in values]


def check_output(output: str | os.PathLike[str], *inputs: ModelSource) -> Path:
    """Check, before any work, that `output` can be written and is none of the inputs.

    Raises:
        UsageError: The output is an input, or its folder does not exist or is not writable.
    """
    path = Path(output)
    for source in inputs:
        if isinstance(source, str | os.PathLike) and path.resolve() == Path(source).resolve():
            raise UsageError(f"{path}: the output would overwrite its input; choose another path for -o")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give a file name for -o")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"{path}: cannot be written")
    return path


def replace_whole(path: str | os.PathLike[str], data: bytes | Iterable[memoryview]) -> None:
    """Write `data`, or one part of it after another, to `path` so that the file appears whole or not at all."""
    target = check_output(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise KfeError(f"{target}: cannot be written ({error.strerror})") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write the model whole or not at all; weights go to ``<path>.data`` when they exceed protobuf's limit.

    Raises:
        UsageError: The folder does not exist or cannot be written.
        KfeError: Writing failed, for example for want of space.
    """
    target = check_output(path)
    if fits_one_message(model):
        replace_whole(target, in_one_message(model))
        return
    data = target.with_name(f"{target.name}.data")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            ir.save(model, Path(folder) / target.name, external_data=data.name)
            _replace_both(Path(folder), target, data)
    except OSError as error:
        raise KfeError(f"{target}: cannot be written ({error.strerror})") from error


def _replace_both(folder: Path, target: Path, data: Path) -> None:
    """Move model and weights into place; the weights that were there come back when the model cannot follow."""
    earlier = folder / "earlier"
    if data.exists():
        os.replace(data, earlier)
    try:
        os.replace(folder / data.name, data)
        os.replace(folder / target.name, target)
    except OSError:
        data.unlink(missing_ok=True)
        if earlier.exists():
            earlier.rename(data)
        raise
