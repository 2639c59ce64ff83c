"""The instrumented graph: forward, backward and covariances in one model, of which only small matrices come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter, append_gradients
from onnx_kfe.calibration._coherence import emit_position_means
from onnx_kfe.calibration._gradients import emit_gate_gradients
from onnx_kfe.calibration._heads import HEAD_KINDS, Head, detect_heads
from onnx_kfe.calibration._patches import emit_cotangents, emit_inputs, features_last
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network, convert_opset, in_single_precision, infer_shapes, serialize
from onnx_kfe.runtime import Serialized

__all__ = [
    "PHASE_INPUT",
    "Differentiated",
    "Instrumented",
    "Probe",
    "activation_bytes",
    "differentiable_copy",
    "differentiate",
    "find_heads",
    "instrument",
    "noise_input",
]

PHASE_INPUT = "kfe/phase"
_WORKING_OPSET = 21
_OLDEST_OPSET = 18


@dataclass(frozen=True)
class Probe:
    """Names of the outputs of the instrumented graph for one layer.

    Attributes:
        layer: The layer.
        input_second_moment: ``[groups, taps * c, taps * c]``, tap-major, summed over the positions taken.
        input_sum: ``[groups, taps * c]``.
        input_size: Elements of the patches taken.
        cotangent_second_moment: ``[groups, o, o]``, summed over the positions taken.
        cotangent_size: Elements of the cotangents taken.
        output_size: Elements of the layer's output.
        input_means: The input averaged over the positions of each sample, ``[n, c]``.
        cotangent_means: The cotangent averaged likewise, ``[n, o]``.
        gate_gradients: Derivative of the loss of each sample by a gate on each output channel, ``[n, o]``.
    """

    layer: Layer
    input_second_moment: str
    input_sum: str
    input_size: str
    cotangent_second_moment: str
    cotangent_size: str
    output_size: str
    input_means: str
    cotangent_means: str
    gate_gradients: str

    @property
    def outputs(self) -> list[str]:
        """All names, in order."""
        return [
            self.input_second_moment, self.input_sum, self.input_size,
            self.cotangent_second_moment, self.cotangent_size, self.output_size,
            self.input_means, self.cotangent_means, self.gate_gradients,
        ]  # fmt: skip


@dataclass(frozen=True)
class Instrumented:
    """An instrumented model.

    Attributes:
        model: Serialised.
        probes: One for each layer with statistics.
        skipped: Why there are none, by layer name.
    """

    model: Serialized
    probes: list[Probe]
    skipped: dict[str, str]


def noise_input(head: Head) -> str:
    """Name of the graph input that carries the sampling noise of a head."""
    return f"kfe/noise/{head.output}"


def differentiable_copy(model: ir.Model) -> ir.Model:
    """A private copy in single precision at an opset that the gradient rules are written for, with shapes inferred.

    Raises:
        KfeError: The model cannot be brought to that opset.
    """
    opset = model.graph.opset_imports.get("", 1)
    copy = in_single_precision(model)
    if opset < _OLDEST_OPSET:
        try:
            copy = convert_opset(copy, _WORKING_OPSET)
        except Exception as error:
            raise KfeError(f"the model's opset {opset} cannot be converted to {_WORKING_OPSET}: {error}") from error
    outputs = list(copy.graph.outputs)
    copy.graph.outputs.clear()  # or they would keep shapes that say less than what is known
    infer_shapes(copy)
    copy.graph.outputs.extend(outputs)
    return copy


def find_heads(network: Network, kinds: Mapping[str, str] | None = None) -> list[Head]:
    """The heads of a network, see `detect_heads`."""
    return detect_heads(differentiable_copy(network.model).graph, kinds)


@dataclass(frozen=True)
class Differentiated:
    """A model extended with its backward pass.

    Attributes:
        model: The model.
        emit: Where further nodes go.
        layers: The layers with a gradient: each with its input, its output and the cotangent of that, `features_last`.
        skipped: Why the others have none, by layer name.
    """

    model: ir.Model
    emit: Emitter
    layers: list[tuple[Layer, ir.Value, ir.Value, ir.Value]]
    skipped: dict[str, str]

    def serialized(self, outputs: Sequence[ir.Value]) -> Serialized:
        """The model with these values as its only outputs."""
        self.model.graph.outputs.clear()
        self.model.graph.outputs.extend(outputs)
        return serialize(self.model)


def differentiate(model: ir.Model, layers: Sequence[Layer], heads: Sequence[Head]) -> Differentiated:
    """Extend a model with its backward pass, from noise at the heads to the outputs of layers.

    Args:
        model: As of `differentiable_copy`; it is changed.
        layers: Layers whose gradients are wanted; values are found by name.
        heads: Heads, with their scales.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    emit = Emitter(graph, prefix="kfe/")
    seeds = _seeds(emit, heads, values)
    found = [layer for layer in layers if layer.output in values and layer.input in values]
    skipped = {layer.name: "not found after opset conversion" for layer in layers if layer not in found}
    gradients = append_gradients(graph, seeds, [values[layer.output] for layer in found])
    reached = []
    for layer in found:
        output = values[layer.output]
        if output in gradients.blocked:
            skipped[layer.name] = gradients.blocked[output]
            continue
        try:
            ends = values[layer.input], output, gradients.cotangents[output]
            x, y, cotangent = (features_last(emit, layer, value) for value in ends)
        except KfeError as error:
            skipped[layer.name] = str(error)
        else:
            reached.append((layer, x, y, cotangent))
    return Differentiated(model, emit, reached, skipped)


def instrument(model: ir.Model, layers: Sequence[Layer], heads: Sequence[Head]) -> Instrumented:
    """Extend a model with its backward pass and the moments of every layer.

    Args:
        model: As of `differentiable_copy`; it is changed.
        layers: Layers to collect for; values are found by name.
        heads: Heads, with their scales.
    """
    whole = differentiate(model, layers, heads)
    emit, skipped = whole.emit, whole.skipped
    phase = _input(model.graph, PHASE_INPUT, ir.DataType.INT64, [3])
    probes, outputs = [], []
    for layer, x, y, cotangent in whole.layers:
        try:
            moments = [
                *emit_inputs(emit, layer, x, y, phase),
                *emit_cotangents(emit, layer, cotangent, phase),
                emit_position_means(emit, layer, x),
                emit_position_means(emit, layer, cotangent),
                emit_gate_gradients(emit, layer, y, cotangent),
            ]
        except KfeError as error:
            skipped[layer.name] = str(error)
            continue
        probes.append(Probe(layer, *(value.name or "" for value in moments)))
        outputs += moments
    if not probes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise KfeError(f"no layer can be collected ({reasons})" if reasons else "the model has no prunable layer")
    return Instrumented(whole.serialized(outputs), probes, skipped)


def _seeds(emit: Emitter, heads: Sequence[Head], values: Mapping[str | None, ir.Value]) -> dict[ir.Value, ir.Value]:
    seeds: dict[ir.Value, ir.Value] = {}
    for head in heads:
        source = values[head.source]
        noise = _input(emit.graph, noise_input(head), ir.DataType.FLOAT, source.shape)
        cotangent = HEAD_KINDS[head.kind](emit, source, noise, head)
        seeds[source] = emit.op("Add", seeds[source], cotangent, like=source) if source in seeds else cotangent
    return seeds


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape | list[int] | None) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape) if shape is not None else None)
    graph.inputs.append(value)
    return value


def activation_bytes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all float32 intermediate values of one sample."""
    return 4 * sum(math.prod(shapes.get(value.name or "", ())) for node in model.graph for value in node.outputs)
