"""Operators that differ in training, and those that onnx2fx converts wrongly or to tensors on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnx_kfe.errors import KfeError
from onnx_kfe.recovery.training._resize import make_resize

__all__ = ["OPERATORS"]

Handler = Callable[[Any, onnx.NodeProto], Any]

OPERATORS: dict[str, Handler] = {}
"""Handlers by operator: from the builder of onnx2fx and a node to the fx node of what it gives."""


def _handles(operator: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        OPERATORS[operator] = handler
        return handler

    return register


class BatchNormalization(nn.Module):
    """Batch normalisation with weights that are given to it: by the batch in training mode, else by its statistics."""

    def __init__(self, epsilon: float, momentum: float) -> None:
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Normalise; in training mode `mean` and `variance` are updated in place."""
        return F.batch_norm(x, mean, variance, scale, bias, self.training, self.momentum, self.epsilon)


@_handles("BatchNormalization")
def _batch_normalization(builder: Any, node: onnx.NodeProto) -> Any:
    if _attribute(node, "training_mode", 0) or len(node.output) > 1:
        raise _refused(node, "in training mode")
    # ONNX weighs the statistics that were, torch those that are new.
    module = BatchNormalization(_attribute(node, "epsilon", 1e-5), 1 - _attribute(node, "momentum", 0.9))
    return _call_module(builder, node, module, _inputs(builder, node))


@_handles("Dropout")
def _dropout(builder: Any, node: onnx.NodeProto) -> Any:
    if len(node.output) > 1:
        raise _refused(node, "with a mask")
    ratio = _attribute(node, "ratio", 0.5)
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in builder.initializer_map:
            raise _refused(node, "by a ratio that is computed")
        ratio = builder.initializer_map[node.input[1]].item()
    return _call_module(builder, node, nn.Dropout(ratio), _inputs(builder, node)[:1])


@_handles("Resize")
@_handles("Upsample")
def _resize(builder: Any, node: onnx.NodeProto) -> Any:
    return builder.call_function(make_resize(node, builder.opset_version), _inputs(builder, node))


@_handles("ConvTranspose")
def _conv_transpose(builder: Any, node: onnx.NodeProto) -> Any:
    return builder.call_function(
        transposed_convolution, _inputs(builder, node), {a.name: _value(a) for a in node.attribute}
    )


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """ConvTranspose, whose pads may differ by side."""
    rank = x.dim() - 2
    strides, dilations, extra = strides or [1] * rank, dilations or [1] * rank, output_padding or [0] * rank
    begins, ends = (pads or [0] * 2 * rank)[:rank], (pads or [0] * 2 * rank)[rank:]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        taps = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
        whole = [(n - 1) * s + t + e for n, s, t, e in zip(x.shape[2:], strides, taps, extra, strict=True)]
        cut = [size - wanted for size, wanted in zip(whole, output_shape[-rank:], strict=True)]
        small, large = [max(size, 0) // 2 for size in cut], [(max(size, 0) + 1) // 2 for size in cut]
        begins, ends = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        ends = [end + min(size, 0) for end, size in zip(ends, cut, strict=True)]  # zeros, where more is wanted
    both = [max(min(sides), 0) for sides in zip(begins, ends, strict=True)]
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = convolve(x, weight, bias, strides, both, extra, group, dilations)
    rest = [(p - begin, p - end) for p, begin, end in zip(both, begins, ends, strict=True)]
    return F.pad(y, [side for sides in reversed(rest) for side in sides]) if any(map(any, rest)) else y


@_handles("Pad")
def _pad(builder: Any, node: onnx.NodeProto) -> Any:
    mode = _attribute(node, "mode", "constant")
    if mode == "wrap":
        raise _refused(node, "that wraps around")
    if builder.opset_version < 11:
        value = _attribute(node, "value", 0.0)
        return builder.call_function(
            padded, (_inputs(builder, node)[0], _attribute(node, "pads", []), value, None, mode)
        )
    x, pads, fill, axes = (*_inputs(builder, node), None, None)[:4]
    return builder.call_function(padded, (x, pads, fill, axes, mode))


def padded(x: Tensor, pads: Tensor | list[int], fill: Tensor | float | None, axes: Tensor | None, mode: str) -> Tensor:
    """Pad; negative pads cut off, as in ONNX."""
    amounts = pads.tolist() if isinstance(pads, Tensor) else pads
    where = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    sides = {axis: (amounts[i], amounts[i + len(where)]) for i, axis in enumerate(where)}
    first = min((axis for axis, both in sides.items() if any(both)), default=x.dim() - 1)
    if mode != "constant":
        first = 2 if first > 1 and x.dim() > 2 else 1  # torch wants all spatial axes, or the channels too
    flat = [amount for axis in range(x.dim() - 1, first - 1, -1) for amount in sides.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if fill is None else float(fill))
    return F.pad(x, flat, mode={"edge": "replicate"}.get(mode, mode))


@_handles("Clip")
def _clip(builder: Any, node: onnx.NodeProto) -> Any:
    x, low, high = (*_inputs(builder, node), None, None)[:3]
    return builder.call_function(clipped, (x, _attribute(node, "min", low), _attribute(node, "max", high)))


def clipped(x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    """Clip, which without bounds does nothing."""
    return x if low is None and high is None else torch.clamp(x, low, high)


@_handles("Swish")
def _swish(builder: Any, node: onnx.NodeProto) -> Any:
    arguments = _inputs(builder, node)[0], _attribute(node, "alpha", 1.0)
    return builder.call_function(lambda x, alpha: x * torch.sigmoid(alpha * x), arguments)


# What is computed of sizes lies beside the constants that it is computed with.


@_handles("Shape")
def _shape(builder: Any, node: onnx.NodeProto) -> Any:
    part = slice(_attribute(node, "start", 0), _attribute(node, "end", None))
    return builder.call_function(
        lambda x, part: torch.tensor(x.shape[part], device=x.device), (_inputs(builder, node)[0], part)
    )


@_handles("Size")
def _size(builder: Any, node: onnx.NodeProto) -> Any:
    return builder.call_function(lambda x: torch.tensor(x.numel(), device=x.device), (_inputs(builder, node)[0],))


@_handles("ConstantOfShape")
def _constant_of_shape(builder: Any, node: onnx.NodeProto) -> Any:
    tensor = _attribute(node, "value", None)
    value = torch.zeros(1) if tensor is None else builder.load_tensor(tensor)
    arguments = _inputs(builder, node)[0], value.item(), value.dtype
    return builder.call_function(
        lambda sizes, value, dtype: torch.full(sizes.tolist(), value, dtype=dtype, device=sizes.device), arguments
    )


@_handles("Range")
def _range(builder: Any, node: onnx.NodeProto) -> Any:
    return builder.call_function(
        lambda start, end, step: torch.arange(
            start.item(), end.item(), step.item(), dtype=start.dtype, device=start.device
        ),
        _inputs(builder, node),
    )


def _inputs(builder: Any, node: onnx.NodeProto) -> list[Any]:
    """The fx nodes of a node's inputs, None for those left out."""
    return [builder.get_value(name) if name else None for name in node.input]


def _call_module(builder: Any, node: onnx.NodeProto, module: nn.Module, inputs: list[Any]) -> Any:
    return builder.call_module(builder.register_submodule(node.name or node.op_type, module), inputs)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((_value(attribute) for attribute in node.attribute if attribute.name == name), default)


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _refused(node: onnx.NodeProto, how: str) -> KfeError:
    name = node.name or node.output[0]
    return KfeError(f"operator {node.op_type} (node '{name}') {how} cannot be converted to torch")
