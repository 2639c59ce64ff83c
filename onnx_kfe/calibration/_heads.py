"""Heads: model outputs with a probability model attached, whose curvature the backward pass carries to the layers.

The Fisher information of an output distribution with natural parameters v is the covariance of ``v``'s sufficient
statistics, ``diag(p) - p p^T`` for classes. A kind is one entry of `HEAD_KINDS`: it turns standard normal noise into a
cotangent at v with just that covariance. That is the Fisher of sampled targets ``y_hat ~ p(y | x)``, without labels as
there, at a fraction of the variance: of a class with probability 0.001 a thousand sampled targets show one, whereas
every one of these cotangents has its part (Schraudolph 2002; Martens 2020, section 9, on factors of the Gauss-Newton
matrix).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter, sizes_of
from onnx_kfe.calibration._padding import Padding, find_padding
from onnx_kfe.calibration._postprocessing import chosen_by, is_suppressed
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["HEAD_KINDS", "Head", "detect_heads", "emit_source", "sample_noise"]

Noise = npt.NDArray[np.float32]
_CLASS_NAMES = re.compile(r"logit|softmax|prob|class|score|cls|label|pred", re.IGNORECASE)
_PASS_THROUGH = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Head:
    """An output of the model, or what post-processing reads in its place, and its probability model.

    Attributes:
        output: Name of the value: a graph output, or one inside the graph.
        kind: Key of `HEAD_KINDS`.
        source: Name of the value that is differentiated: the input of a final Softmax or Sigmoid, else the output; of
            an embedding ``[n, positions, channels]``, whose mean is differentiated, see `emit_source`.
        axis: Class axis of a categorical head.
        scale: Standard deviation over the calibration data of what is differentiated, by which a quantity is measured.
        weight: Factor on its Fisher information, by which several heads weigh alike, see `Forward.scaled_heads`.
        read_by: Operator of the post-processing that reads a value inside the graph; empty for a graph output.
        mask: Input of the model that is 0 at the positions of an embedding that are padding; empty where all are real.
    """

    output: str
    kind: str
    source: str
    axis: int = -1
    scale: float = 1.0
    weight: float = 1.0
    read_by: str = ""
    mask: str = ""

    @property
    def quantity(self) -> bool:
        """Whether it is a quantity, measured in units of its spread, rather than decisions."""
        return self.kind in ("gaussian", "embedding")

    @property
    def probabilities(self) -> bool:
        """Whether the output itself holds probabilities rather than logits."""
        return not self.quantity and self.source != self.output

    def with_scale(self, scale: float) -> Head:
        """The same head measured in units of `scale`."""
        return replace(self, scale=scale)

    def with_weight(self, weight: float) -> Head:
        """The same head with another weight among the heads."""
        return replace(self, weight=weight)


def _categorical_cotangent(emit: Emitter, logits: ir.Value, noise: ir.Value, head: Head) -> ir.Value:
    """``sqrt(p) * e - p sum(sqrt(p) * e)``, the derivative of ``sum 2 sqrt(p) * e``: covariance ``diag(p) - p p^T``."""
    probabilities = emit.op("Softmax", logits, like=logits, axis=head.axis)
    spread = emit.op("Mul", emit.op("Sqrt", probabilities, like=logits), noise, like=logits)
    total = emit.op("ReduceSum", spread, emit.ints(head.axis), dtype=emit.dtype(logits), keepdims=1)
    return emit.op("Sub", spread, emit.op("Mul", probabilities, total, like=logits), like=logits)


def _bernoulli_cotangent(emit: Emitter, logits: ir.Value, noise: ir.Value, head: Head) -> ir.Value:
    """``sqrt(p (1 - p)) e``, the derivative of ``2 asin(sqrt(p)) e``."""
    both = [emit.op("Sigmoid", value, like=logits) for value in (logits, emit.op("Neg", logits, like=logits))]
    deviation = emit.op("Sqrt", emit.op("Mul", *both, like=logits), like=logits)
    return emit.op("Mul", deviation, noise, like=logits)


def _gaussian_cotangent(emit: Emitter, value: ir.Value, noise: ir.Value, head: Head) -> ir.Value:
    """``e / sigma``."""
    return emit.op("Mul", noise, emit.number(1.0 / head.scale, value), like=value)


HEAD_KINDS: dict[str, Callable[[Emitter, ir.Value, ir.Value, Head], ir.Value]] = {
    "categorical": _categorical_cotangent,
    "bernoulli": _bernoulli_cotangent,
    "gaussian": _gaussian_cotangent,
    "embedding": _gaussian_cotangent,
}
"""By kind: emits the cotangent from the value of `emit_source`, the noise and the head."""


def emit_source(emit: Emitter, head: Head, values: Mapping[str | None, ir.Value]) -> ir.Value:
    """The value that a head is differentiated from: its source, of an embedding the mean of that, ``[n, channels]``.

    Args:
        emit: Where the nodes of the mean go.
        head: The head.
        values: The values of the graph, by name.
    """
    value = values[head.source]
    if head.kind != "embedding":
        return value
    if head.mask:
        return Padding(head.mask, {head.source: 3}).mean(emit, value)
    batch, _, channels = sizes_of(value) or (None,) * 3
    return emit.op("ReduceMean", value, emit.ints(1), shape=(batch, channels), keepdims=0)


def sample_noise(heads: list[Head], shapes: Mapping[str, tuple[int, ...]], seed: int, index: int) -> list[Noise]:
    """Normal noise of one sample for every head, a function of (seed, sample index) alone.

    Its variance is the weight of the head: cotangents are linear in it.

    Args:
        heads: The heads, in order.
        shapes: Shape of what each head is differentiated from for one sample, by output name.
        seed: Seed of the collection.
        index: Index of the sample in the whole data.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    drawn = [generator.standard_normal(size=shapes[head.output], dtype=np.float32) for head in heads]
    return [noise * np.float32(math.sqrt(head.weight)) for head, noise in zip(heads, drawn, strict=True)]


def detect_heads(model: ir.Model, kinds: Mapping[str, str] | None = None) -> list[Head]:
    """The heads of a model of opset 13 or later, detected or as the user says.

    An output behind Softmax or LogSoftmax is categorical, behind Sigmoid Bernoulli, a matrix named like logits
    categorical, anything else Gaussian. What NonMaxSuppression picks is no head: the boxes and scores that it reads
    are. Outputs that are integers or no tensors carry no gradient; where there is nothing else, heads are the values
    that they say the largest of (ArgMax is a decision between classes). An embedding, which is never detected, is an
    output ``[n, positions, channels]`` that is read as its mean over the positions that a mask does not take out.

    Args:
        model: The model.
        kinds: Kind by output name, as of ``--head``; ``none`` leaves the output out.

    Raises:
        UsageError: An unknown output or kind, or an embedding of another shape.
        KfeError: No output can be a head.
    """
    graph, kinds = model.graph, dict(kinds or {})
    names = [value.name or "" for value in graph.outputs]
    read = chosen_by(graph)
    known = [*names, *(value.name or "" for value, _ in read)]
    for name, wanted in kinds.items():
        if name not in known:
            raise UsageError(f"--head {name}={wanted}: no such output; the model has {', '.join(known)}")
        if wanted not in (*HEAD_KINDS, "none"):
            raise UsageError(f"--head {name}={wanted}: the kind must be one of {', '.join(HEAD_KINDS)}, none")
    heads = []
    for value in graph.outputs:
        kind = kinds.get(value.name or "")
        if _is_computed_float(value) and kind != "none" and (kind is not None or not is_suppressed(value)):
            heads.append(_head(value, kind))
    outside = bool(heads)
    for value, node in read:
        kind = kinds.get(value.name or "")
        stands_in = node.op_type == "NonMaxSuppression" or not outside or kind is not None
        if stands_in and _is_computed_float(value) and kind != "none":
            head = _inner_head(value, node, kind)
            if head.source not in [other.source for other in heads]:
                heads.append(head)
    if not heads:
        raise KfeError(
            f"no output can carry a loss (outputs: {', '.join(names)}): no floating-point output computed in the graph"
        )
    return _masked(model, heads)


def _masked(model: ir.Model, heads: list[Head]) -> list[Head]:
    """The heads, of which embeddings know the mask of their positions."""
    padding = find_padding(model) if any(head.kind == "embedding" for head in heads) else None
    if padding is None:
        return heads
    covered = [head.kind == "embedding" and padding.ranks.get(head.source) == 3 for head in heads]
    return [replace(head, mask=padding.mask) if own else head for head, own in zip(heads, covered, strict=True)]


def _head(value: ir.Value, kind: str | None) -> Head:
    name = value.name or ""
    activation = _final_activation(value)
    rank = len(value.shape) if value.shape is not None else 2
    if activation is not None and activation.op_type in ("Softmax", "LogSoftmax") and kind in (None, "categorical"):
        axis = activation.attributes.get_int("axis", -1)
        # Log-probabilities are logits themselves: the softmax of them is that of what they were made from.
        source = name if activation.op_type == "LogSoftmax" else activation.inputs[0].name or ""  # type: ignore[union-attr]
        return Head(name, "categorical", source, axis)
    if activation is not None and activation.op_type == "Sigmoid" and kind in (None, "bernoulli"):
        return Head(name, "bernoulli", activation.inputs[0].name or "")  # type: ignore[union-attr]
    if kind == "embedding" and (value.shape is None or rank != 3):
        shape = "unknown" if value.shape is None else f"[{', '.join(map(str, sizes_of(value) or ()))}]"
        raise UsageError(f"--head {name}=embedding: its shape is {shape}, not [samples, positions, channels]")
    if kind is None:
        kind = "categorical" if rank == 2 and _CLASS_NAMES.search(name) else "gaussian"
    return Head(name, kind, name, axis=1 if rank >= 4 else -1)


def _inner_head(value: ir.Value, node: ir.Node, kind: str | None) -> Head:
    """The head of a value that a node of the post-processing reads."""
    head = _head(value, kind)
    if node.op_type == "ArgMax" and kind is None and head.kind == "gaussian":
        head = replace(head, kind="categorical", axis=node.attributes.get_int("axis", 0))
    return replace(head, read_by=node.op_type)


def _is_computed_float(value: ir.Value) -> bool:
    """Whether a node computes a tensor of floating-point numbers, as far as anything is known of the value."""
    known = value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype in _FLOATS)
    return value.producer() is not None and known


def _final_activation(value: ir.Value) -> ir.Node | None:
    """The node that computes the output, past nodes that only pass values through."""
    producer = value.producer()
    while producer is not None and producer.op_type in _PASS_THROUGH and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer
