"""Heads: model outputs with a probability model attached, whose curvature the backward pass carries to the layers.

The Fisher information of an output distribution with natural parameters v is the covariance of ``v``'s sufficient
statistics, ``diag(p) - p p^T`` for classes. A kind is one entry of `HEAD_KINDS`: it turns standard normal noise into a
cotangent at v with just that covariance. That is the Fisher of sampled targets ``y_hat ~ p(y | x)``, without labels as
there, at a fraction of the variance: of a class with probability 0.001 a thousand sampled targets show one, whereas
every one of these cotangents has its part (Schraudolph 2002; Martens 2020, section 9, on factors of the Gauss-Newton
matrix).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["HEAD_KINDS", "Head", "detect_heads", "sample_noise"]

Noise = npt.NDArray[np.float32]
_CLASS_NAMES = re.compile(r"logit|softmax|prob|class|score|cls|label|pred", re.IGNORECASE)
_PASS_THROUGH = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Head:
    """An output of the model and its probability model.

    Attributes:
        output: Name of the graph output.
        kind: Key of `HEAD_KINDS`.
        source: Name of the value that is differentiated: the input of a final Softmax or Sigmoid, else the output.
        axis: Class axis of a categorical head.
        scale: Standard deviation of the output over the calibration data, by which a Gaussian head is measured.
    """

    output: str
    kind: str
    source: str
    axis: int = -1
    scale: float = 1.0

    @property
    def probabilities(self) -> bool:
        """Whether the output itself holds probabilities rather than logits."""
        return self.kind != "gaussian" and self.source != self.output

    def with_scale(self, scale: float) -> Head:
        """The same head measured in units of `scale`."""
        return replace(self, scale=scale)


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
}
"""By kind: emits the cotangent from the value, the noise and the head."""


def sample_noise(heads: list[Head], shapes: Mapping[str, tuple[int, ...]], seed: int, index: int) -> list[Noise]:
    """Standard normal noise of one sample for every head, a function of (seed, sample index) alone.

    Args:
        heads: The heads, in order.
        shapes: Shape of each head's source for one sample, by output name.
        seed: Seed of the collection.
        index: Index of the sample in the whole data.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    return [generator.standard_normal(size=shapes[head.output], dtype=np.float32) for head in heads]


def detect_heads(graph: ir.Graph, kinds: Mapping[str, str] | None = None) -> list[Head]:
    """The heads of a graph of opset 13 or later, detected or as the user says.

    An output behind Softmax or LogSoftmax is categorical, behind Sigmoid Bernoulli, a matrix named like logits
    categorical, anything else Gaussian. Outputs that are integers or no tensors carry no gradient and are left out.

    Args:
        graph: The graph.
        kinds: Kind by output name, as of ``--head``; ``none`` leaves the output out.

    Raises:
        UsageError: An unknown output or kind.
        KfeError: No output can be a head.
    """
    kinds = dict(kinds or {})
    names = [value.name or "" for value in graph.outputs]
    for name, kind in kinds.items():
        if name not in names:
            raise UsageError(f"--head {name}={kind}: no such output; the model has {', '.join(names)}")
        if kind not in (*HEAD_KINDS, "none"):
            raise UsageError(f"--head {name}={kind}: the kind must be one of {', '.join(HEAD_KINDS)}, none")
    heads = []
    for value in graph.outputs:
        name = value.name or ""
        producer = value.producer()
        if producer is None or kinds.get(name) == "none" or not _carries_gradient(value):
            continue
        heads.append(_head(value, kinds.get(name)))
    if not heads:
        raise KfeError(
            f"no output can carry a loss (outputs: {', '.join(names)}): no floating-point output computed in the graph"
        )
    return heads


def _carries_gradient(value: ir.Value) -> bool:
    """Whether a value is a tensor of floating-point numbers, or nothing is known of it."""
    return value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype in _FLOATS)


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
    if kind is None:
        kind = "categorical" if rank == 2 and _CLASS_NAMES.search(name) else "gaussian"
    return Head(name, kind, name, axis=1 if rank == 4 else -1)


def _final_activation(value: ir.Value) -> ir.Node | None:
    """The node that computes the output, past nodes that only pass values through."""
    producer = value.producer()
    while producer is not None and producer.op_type in _PASS_THROUGH and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer
