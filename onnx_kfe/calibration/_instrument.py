"""The instrumented graph: forward, backward and covariances in one model, of which only small matrices come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_kfe.autodiff import Emitter, append_gradients
from onnx_kfe.calibration._coherence import emit_cotangent_means, emit_position_means
from onnx_kfe.calibration._gradients import emit_gate_gradients
from onnx_kfe.calibration._heads import HEAD_KINDS, Head, detect_heads, emit_source
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.calibration._moments import emit_cotangents, emit_inputs
from onnx_kfe.calibration._opset import at_opset, working_opset
from onnx_kfe.calibration._padding import Padding, find_padding
from onnx_kfe.calibration._patches import features_last
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network, infer_shapes

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


@dataclass(frozen=True)
class Probe:
    """Names of the outputs of the instrumented graph for one node of a layer.

    Attributes:
        layer: The layer, or the twin of one.
        input_second_moment: ``[groups, taps * c, taps * c]``, tap-major, summed over the positions taken.
        input_sum: ``[groups, taps * c]``.
        input_size: Elements of the patches taken.
        cotangent_second_moment: ``[groups, o, o]``, summed over the positions taken.
        cotangent_size: Elements of the cotangents taken.
        output_size: Elements of the layer's output, of a ConvTranspose of its input.
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
    def second_moments(self) -> tuple[str, str]:
        """The outputs that are large."""
        return self.input_second_moment, self.cotangent_second_moment

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
        model: The model, whose outputs are those of the probes.
        probes: One for each node of the layers with statistics.
        skipped: Why there are none, by layer name.
    """

    model: ir.Model
    probes: list[Probe]
    skipped: dict[str, str]

    def part(self, probes: Sequence[Probe]) -> ir.Model:
        """The model with the second moments of these probes alone.

        All else that is computed stays, for ONNX Runtime fuses nodes by what else reads their outputs, and what it
        fuses is rounded differently.
        """
        part = self.model.clone()
        every, wanted = ({name for probe in some for name in probe.second_moments} for some in (self.probes, probes))
        left_out = every - wanted
        outputs = [value for value in part.graph.outputs if value.name not in left_out]
        part.graph.outputs.clear()
        part.graph.outputs.extend(outputs)
        return RemoveUnusedNodesPass()(part).model


def noise_input(head: Head) -> str:
    """Name of the graph input that carries the sampling noise of a head."""
    return f"kfe/noise/{head.output}"


def differentiable_copy(model: ir.Model) -> ir.Model:
    """A private copy in single precision at an opset that the gradient rules are written for, with shapes inferred.

    Raises:
        KfeError: The model cannot be brought to that opset.
    """
    copy = at_opset(model, working_opset(model))
    outputs = list(copy.graph.outputs)
    copy.graph.outputs.clear()  # or they would keep shapes that say less than what is known
    infer_shapes(copy)
    copy.graph.outputs.extend(outputs)
    return copy


def find_heads(network: Network, kinds: Mapping[str, str] | None = None) -> list[Head]:
    """The heads of a network, see `detect_heads`."""
    return detect_heads(differentiable_copy(network.model), kinds)


@dataclass(frozen=True)
class Differentiated:
    """A model extended with its backward pass.

    Attributes:
        model: The model.
        emit: Where further nodes go.
        layers: The layers and twins with a gradient: each with its input, its output and the cotangent of that,
            `features_last`.
        skipped: Why the others have none, by name.
        padding: Which positions are real; None where all are.
    """

    model: ir.Model
    emit: Emitter
    layers: list[tuple[Layer, ir.Value, ir.Value, ir.Value]]
    skipped: dict[str, str]
    padding: Padding | None

    def with_outputs(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """The model, now with these values as its only outputs."""
        self.model.graph.outputs.clear()
        self.model.graph.outputs.extend(outputs)
        return self.model


def differentiate(
    model: ir.Model, layers: Sequence[Layer], heads: Sequence[Head], loss: Loss | None = None
) -> Differentiated:
    """Extend a model with its backward pass, from noise at the heads to the outputs of layers.

    Args:
        model: As of `differentiable_copy`; it is changed.
        layers: Layers whose gradients are wanted, at all of their nodes; values are found by name.
        heads: Heads, with their scales.
        loss: What is differentiated in the place of the heads.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    emit = Emitter(graph, prefix="kfe/")
    padding = find_padding(model)
    seeds = _seeds(emit, heads, values, padding) if loss is None else loss.seeds(emit)
    nodes = [use for layer in layers for use in layer.uses]
    found = [layer for layer in nodes if layer.output in values and layer.input in values]
    skipped = {layer.name: "not found after opset conversion" for layer in nodes if layer not in found}
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
    return Differentiated(model, emit, reached, skipped, padding)


def instrument(
    model: ir.Model, layers: Sequence[Layer], heads: Sequence[Head], loss: Loss | None = None
) -> Instrumented:
    """Extend a model with its backward pass and the moments of every layer.

    Args:
        model: As of `differentiable_copy`; it is changed.
        layers: Layers to collect for; values are found by name.
        heads: Heads, with their scales.
        loss: What is differentiated in the place of the heads.
    """
    whole = differentiate(model, layers, heads, loss)
    emit, lacking = whole.emit, dict(whole.skipped)
    phase = _input(model.graph, PHASE_INPUT, ir.DataType.INT64, [3])
    found: dict[str, list[ir.Value]] = {}
    for layer, x, y, cotangent in whole.layers:
        try:
            ends, weight = (x, cotangent), None
            if whole.padding is not None and whole.padding.covers(layer):
                ends = whole.padding.real_rows(emit, x), whole.padding.real_rows(emit, cotangent)
                weight = whole.padding.weight(emit, x)
            found[layer.name] = [
                *emit_inputs(emit, layer, ends[0], y, phase),
                *emit_cotangents(emit, layer, ends[0], ends[1], phase),
                emit_position_means(emit, layer, x, weight),
                emit_cotangent_means(emit, layer, x, cotangent, weight),
                emit_gate_gradients(emit, layer, y, cotangent),
            ]
        except KfeError as error:
            lacking[layer.name] = str(error)
    skipped = _skipped(layers, lacking)
    nodes = [use for layer in layers if layer.name not in skipped for use in layer.uses]
    if not nodes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise KfeError(f"no layer can be collected ({reasons})" if reasons else "the model has no prunable layer")
    probes = [Probe(node, *(value.name or "" for value in found[node.name])) for node in nodes]
    model = whole.with_outputs([value for node in nodes for value in found[node.name]])
    return Instrumented(model, probes, skipped)


def _skipped(layers: Sequence[Layer], lacking: Mapping[str, str]) -> dict[str, str]:
    """Why layers have no statistics, by name: one is skipped where any of its nodes is lacking."""
    first = {layer.name: next((use.name for use in layer.uses if use.name in lacking), None) for layer in layers}
    return {
        name: lacking[node] if node == name else f"'{node}', which has the same weight: {lacking[node]}"
        for name, node in first.items()
        if node is not None
    }


def _seeds(
    emit: Emitter, heads: Sequence[Head], values: Mapping[str | None, ir.Value], padding: Padding | None
) -> dict[ir.Value, ir.Value]:
    seeds: dict[ir.Value, ir.Value] = {}
    for head in heads:
        source = emit_source(emit, head, values)
        noise = _input(emit.graph, noise_input(head), ir.DataType.FLOAT, source.shape)
        if padding is not None and source.name in padding.ranks:
            noise = emit.op("Mul", noise, padding.weight(emit, source), like=noise)
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
