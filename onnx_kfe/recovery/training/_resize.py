"""Resize in torch: repetition where it is that, else a matrix along each axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_kfe.autodiff import Declined, interpolation
from onnx_kfe.errors import KfeError

__all__ = ["make_resize"]


def make_resize(proto: onnx.NodeProto, opset: int) -> Callable[..., Tensor]:
    """Make a function of a Resize or Upsample node: from its inputs, None for those left out, to its output.

    Args:
        proto: The node.
        opset: The operator set that it is of.

    Raises:
        KfeError: The node asks for something that is no matrix along each axis.
    """
    node = ir.serde.deserialize_node(proto)
    if opset < 11:  # there was no choice
        coordinates, rounding = "coordinate_transformation_mode", "nearest_mode"
        node.attributes[coordinates] = ir.AttrString(coordinates, "asymmetric")
        node.attributes[rounding] = ir.AttrString(rounding, "floor")
    try:
        interpolation(node, 2, 4, 2.0)
    except Declined as error:
        raise _refused(proto) from error
    attributes = node.attributes
    if attributes.get_int("antialias", 0) or attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise _refused(proto)

    def resize(x: Tensor, *inputs: Tensor | None) -> Tensor:
        scales, sizes = ([inputs[0] if inputs else None, None]) if opset < 11 else (*inputs, None, None, None)[1:3]
        new = _new_sizes(node, x, scales, sizes)
        for axis, (size, scale) in new.items():
            matrix = interpolation(node, x.shape[axis], size, scale)
            if _repeats(matrix):
                x = x.repeat_interleave(size // x.shape[axis], axis)
            else:
                x = (x.movedim(axis, -1) @ torch.from_numpy(matrix).to(x).T).movedim(-1, axis)
        return x

    return resize


def _refused(proto: onnx.NodeProto) -> KfeError:
    name = proto.name or proto.output[0]
    options = ", ".join(f"{a.name} {onnx.helper.get_attribute_value(a)!r}" for a in proto.attribute)
    return KfeError(f"operator {proto.op_type} (node '{name}') with {options} cannot be converted to torch")


def _new_sizes(node: ir.Node, x: Tensor, scales: Tensor | None, sizes: Tensor | None) -> dict[int, tuple[int, float]]:
    """New size and scale of the axes that are resized."""
    axes = [axis % x.dim() for axis in node.attributes.get_ints("axes", range(x.dim()))]
    if sizes is not None and sizes.numel():
        new = {axis: (int(size), size / x.shape[axis]) for axis, size in zip(axes, sizes.tolist(), strict=True)}
    else:
        factors = node.attributes.get_floats("scales", ()) if scales is None else scales.tolist()
        new = {axis: (int(x.shape[axis] * scale), scale) for axis, scale in zip(axes, factors, strict=True)}
    return {axis: (size, scale) for axis, (size, scale) in new.items() if scale != 1}


def _repeats(matrix: np.ndarray) -> bool:
    """Whether a matrix repeats every element equally often, so that it need not be multiplied with."""
    new, old = matrix.shape
    return new % old == 0 and np.array_equal(matrix, np.repeat(np.eye(old), new // old, axis=0))
