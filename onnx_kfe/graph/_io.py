"""Loading, saving and fingerprinting models: a path, a ``ModelProto`` or an ``ir.Model`` in, whole files out."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from onnx_kfe.errors import KfeError, UsageError

__all__ = ["ModelSource", "check_output", "fingerprint", "load", "replace_whole", "save", "serialize", "source_name"]

ModelSource: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model

_PROTOBUF_LIMIT = 2**31 - 2**24  # a protobuf message stays below 2 GiB; leave room for the graph itself


def source_name(source: ModelSource) -> str:
    """What to call `source` in a message."""
    return str(source) if isinstance(source, str | os.PathLike) else "the model"


def load(source: ModelSource) -> ir.Model:
    """Load a model; an ``ir.Model`` or ``ModelProto`` is copied, so that the caller's own is never modified.

    Raises:
        KfeError: The file is missing, is not ONNX, is truncated, lacks its external data, or its graph is invalid.
    """
    if isinstance(source, ir.Model):
        return source.clone()
    name = source_name(source)
    if isinstance(source, onnx.ModelProto):
        return _checked(ir.from_proto(source), source, name)
    path = Path(source)
    if not path.is_file():
        raise KfeError(f"{path}: no such file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise KfeError(f"{path}: not an ONNX file, or a truncated one") from error
    if not proto.opset_import or not proto.graph.node:
        raise KfeError(f"{path}: not an ONNX model (no operator set or no nodes in it)")
    _check_external_data(path, proto)
    return _checked(ir.load(path), proto, name)


def _check_external_data(path: Path, proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        data = path.parent / entries.get("location", "")
        needed = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not data.is_file() or data.stat().st_size < needed:
            raise KfeError(f"{path}: external data of '{tensor.name}' is missing or too short, expected in {data}")


def _checked(model: ir.Model, proto: onnx.ModelProto, name: str) -> ir.Model:
    """Reject what no runtime would load, before any work is spent on it."""
    if not model.graph.outputs:
        raise KfeError(f"{name}: the graph has no outputs")
    try:
        TopologicalSortPass()(model)
    except Exception as error:
        raise KfeError(f"{name}: the graph has a cycle") from error
    defined = {value for node in model.graph for value in node.outputs}
    defined |= {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in defined:
                raise KfeError(
                    f"{name}: node '{node.name or node.op_type}' reads '{value.name}', which nothing computes"
                )
        if node.domain == "" and not _is_known(node.op_type) and not model.functions:
            raise KfeError(f"{name}: unknown operator {node.op_type} (node '{node.name}')")
    return model


def _is_known(op_type: str) -> bool:
    return onnx.defs.has(op_type)


def fingerprint(model: ir.Model) -> str:
    """SHA-256 over structure and weights, the same however the model was stored or handed over."""
    digest = hashlib.sha256()
    for node in model.graph.all_nodes():
        values = [v.name if v is not None else "" for v in (*node.inputs, *node.outputs)]
        digest.update(repr((node.domain, node.op_type, values, sorted(map(str, node.attributes.values())))).encode())
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            digest.update(repr((name, str(value.const_value.dtype), tuple(value.const_value.shape))).encode())
            digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def serialize(model: ir.Model) -> bytes:
    """The model as one byte string for ONNX Runtime.

    Raises:
        KfeError: The model is over protobuf's 2 GiB.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > _PROTOBUF_LIMIT:
        raise KfeError(
            f"the model has {size / 2**30:.1f} GiB of weights; models over 2 GiB cannot be handled in memory yet"
        )
    return ir.to_proto(model).SerializeToString()


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


def replace_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that the file appears whole or not at all."""
    target = check_output(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size <= _PROTOBUF_LIMIT:
        replace_whole(target, serialize(model))
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        data_name = f"{target.name}.data"
        try:
            ir.save(model, Path(folder) / target.name, external_data=data_name)
        except OSError as error:
            raise KfeError(f"{target}: cannot be written ({error.strerror})") from error
        shutil.move(Path(folder) / data_name, target.parent / data_name)
        os.replace(Path(folder) / target.name, target)
