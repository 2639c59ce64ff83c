"""Reading a loss, and all that can be said against it before anything runs."""

from __future__ import annotations

import os
from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnx_kfe.autodiff import Emitter, append_gradients, sizes_of
from onnx_kfe.calibration._inputs import LABEL_KEYS, InputSpec, fixed_batch
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.calibration._opset import at_opset, working_opset
from onnx_kfe.calibration._passes import input_specs
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import ModelSource, Network, fingerprint, load, source_name

__all__ = ["open_loss"]

_CONTROL_FLOW = ("If", "Loop", "Scan")


def open_loss(source: ModelSource, network: Network) -> Loss:
    """Read a loss and see that it fits a model.

    Args:
        source: Its graph, as a path, ``ModelProto`` or ``ir.Model``: from outputs of the model, by name and in their
            shapes, and where wanted from its inputs and from arrays of the data, to one negative log-likelihood in
            nats a sample ``[N]``, or a scalar, their sum. An input called ``labels``, ``label`` or ``y`` gets the
            labels of the data.
        network: The model.

    Raises:
        UsageError: It reads no output of the model, or one in another type or rank; it cannot be brought to the
            model's opset; its output is no loss; an operator in it has no gradient rule.
        KfeError: It cannot be read.
    """
    given = load(source)
    name = source_name(source) if isinstance(source, str | os.PathLike) else "graph"
    model = network.model.graph
    try:
        loss = at_opset(_plain(given), working_opset(network.model))
        _check_domains(loss, network.model)
        _check_inputs(loss.graph, model)
        loss = _with_shapes(loss, model)
        _check_output(loss.graph)
        _check_gradients(loss.graph, model)
        targets = _targets(loss.graph, network.model)
    except KfeError as error:
        raise UsageError(f"--loss {name}: {error}") from error
    labels = next((spec for spec in targets if spec.name in LABEL_KEYS), None)
    return Loss(name, loss.graph, fingerprint(given), tuple(spec for spec in targets if spec is not labels), labels)


def _plain(given: ir.Model) -> ir.Model:
    """The loss without functions, constants and initializers among its inputs."""
    passes = ir.passes.Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveInitializersFromInputsPass(),
    )
    loss = passes(given.clone()).model
    if node := next((node for node in loss.graph if node.op_type in _CONTROL_FLOW), None):
        raise KfeError(f"no gradient rule for {node.op_type} (node '{node.name}')")
    return loss


def _check_domains(loss: ir.Model, model: ir.Model) -> None:
    """Custom operators must mean the same in both graphs."""
    known = model.graph.opset_imports
    for domain, version in loss.graph.opset_imports.items():
        if domain and known.get(domain, version) != version:
            raise KfeError(f"it has version {version} of the domain '{domain}', the model has version {known[domain]}")


def _check_inputs(loss: ir.Graph, model: ir.Graph) -> None:
    own = {value.name: value for value in (*model.inputs, *model.outputs)}
    outputs = [value.name or "" for value in model.outputs]
    reads = [value.name or "" for value in loss.inputs]
    if not set(reads) & set(outputs):
        raise KfeError(f"it reads {', '.join(reads) or 'nothing'}, but no output of the model ({', '.join(outputs)})")
    for value in loss.inputs:
        there = own.get(value.name)
        if there is not None and not _fits(value, there):
            raise KfeError(f"its input '{value.name}' is {_described(value)}, the model's is {_described(there)}")


def _fits(value: ir.Value, there: ir.Value) -> bool:
    alike = value.dtype is None or there.dtype is None or value.dtype == there.dtype
    return alike and (value.shape is None or there.shape is None or len(value.shape) == len(there.shape))


def _described(value: ir.Value) -> str:
    sizes = sizes_of(value)
    shape = "" if sizes is None else f" [{', '.join('?' if size is None else str(size) for size in sizes)}]"
    return f"{'?' if value.dtype is None else value.dtype.name.lower()}{shape}"


def _with_shapes(loss: ir.Model, model: ir.Graph) -> ir.Model:
    """The loss with the shapes of the model; sizes that are its own get names that the model cannot have."""
    own = {value.name: value for value in (*model.inputs, *model.outputs)}
    known = {size for value in own.values() for size in sizes_of(value) or ()}
    for value in loss.graph.inputs:
        if (there := own.get(value.name)) is not None:
            value.type, value.shape = there.type, there.shape.copy() if there.shape is not None else None
        else:
            _rename_sizes(value)
    for value in (output for node in loss.graph for output in node.outputs):
        value.shape = None
    inferred = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(loss).model
    for value in (output for node in inferred.graph for output in node.outputs):
        _rename_sizes(value, known)
    return inferred


def _rename_sizes(value: ir.Value, known: Collection[int | str | None] = ()) -> None:
    if (sizes := sizes_of(value)) is not None:
        value.shape = ir.Shape([f"loss/{s}" if isinstance(s, str) and s not in known else s for s in sizes])


def _check_output(loss: ir.Graph) -> None:
    if len(loss.outputs) != 1:
        names = ", ".join(value.name or "" for value in loss.outputs)
        raise KfeError(f"it has {len(loss.outputs)} outputs ({names}); a loss has one")
    (value,) = loss.outputs
    floating = value.dtype is None or value.dtype.is_floating_point()
    if not floating or (value.shape is not None and len(value.shape) > 1):
        raise KfeError(
            f"its output '{value.name}' is {_described(value)}; it must be one value a sample, [N], or their sum"
        )


def _check_gradients(loss: ir.Graph, model: ir.Graph) -> None:
    """Differentiate the loss by itself, for the reasons why that may be impossible."""
    graph = loss.clone()
    (value,) = graph.outputs
    outputs = {output.name for output in model.outputs}
    wanted = [v for v in graph.inputs if v.name in outputs and (v.dtype is None or v.dtype.is_floating_point())]
    emit = Emitter(graph, prefix="kfe/")
    gradients = append_gradients(graph, {value: emit.expand_like(emit.number(1.0, value), value)}, wanted)
    reasons = [reason for reason in gradients.blocked.values() if reason != "no path to a head"]
    if reasons:
        raise KfeError(reasons[0])
    if not gradients.cotangents:
        raise KfeError(f"no small change of {', '.join(sorted(filter(None, outputs)))} changes it")


def _targets(loss: ir.Graph, model: ir.Model) -> list[InputSpec]:
    """What the loss reads of the data: arrays whose first axis is the samples."""
    known = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    batch = fixed_batch(input_specs(model))
    targets = []
    for value in loss.inputs:
        if value.name in known:
            continue
        if value.dtype is None or not value.shape:
            raise KfeError(f"its input '{value.name}' is {_described(value)}; what is read of the data is [N, ...]")
        rest = (size if isinstance(size, int) else size.value for size in list(value.shape)[1:])
        targets.append(InputSpec(value.name or "", value.dtype.numpy(), (batch, *rest)))
    return targets
