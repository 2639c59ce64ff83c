"""Operators that differ in training, or that onnx2fx converts wrongly: handlers of our own, in its terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OPERATORS"]

Handler = Callable[[Any, onnx.NodeProto], Any]


class BatchNormalization(nn.Module):
    """Batch normalisation with weights that are given to it: by the batch in training mode, else by its statistics."""

    def __init__(self, epsilon: float, momentum: float) -> None:
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Normalise; `mean` and `variance` are updated in training mode."""
        return F.batch_norm(x, mean, variance, scale, bias, self.training, self.momentum, self.epsilon)


def _batch_normalization(builder: Any, node: onnx.NodeProto) -> Any:
    # ONNX weighs the statistics that were, torch those that are new.
    module = BatchNormalization(_attribute(node, "epsilon", 1e-5), 1 - _attribute(node, "momentum", 0.9))
    return _call_module(builder, node, module, [builder.get_value(name) for name in node.input])


def _shape(builder: Any, node: onnx.NodeProto) -> Any:
    start, end = _attribute(node, "start", 0), _attribute(node, "end", None)
    return builder.call_function(_sizes, (builder.get_value(node.input[0]), start, end))


def _sizes(x: Tensor, start: int, end: int | None) -> Tensor:
    # Beside the constants that it is going to be computed with.
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def _call_module(builder: Any, node: onnx.NodeProto, module: nn.Module, inputs: list[Any]) -> Any:
    return builder.call_module(builder.register_submodule(node.name or node.op_type, module), inputs)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


OPERATORS: dict[str, Handler] = {"BatchNormalization": _batch_normalization, "Shape": _shape}
"""Handlers by operator: from the builder of onnx2fx and a node to the fx node of its first output."""
