"""Convolutions: their input gradients are convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._emitter import constant_of, integers, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp

__all__ = ["Geometry", "halves", "transposed"]


@dataclass(frozen=True)
class Geometry:
    """How a window walks over the spatial axes; its extent is that of the dilated kernel, `d (k - 1) + 1`."""

    strides: Sequence[int]
    dilations: Sequence[int]
    extents: Sequence[int]
    begins: Sequence[int]
    ends: Sequence[int]
    group: int

    @property
    def pads(self) -> list[int]:
        """As the attribute of that name."""
        return [*self.begins, *self.ends]


@vjp("Conv")
def conv(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """By the input: at stride 1 the convolution with the flipped kernel, else a transposed convolution."""
    x, weight = operand(node, 0), operand(node, 1)

    def rule(index: int, value: ir.Value) -> ir.Value | None:
        if index == 1:
            return None
        if index == 2:
            return _sum_positions(backward, cotangent)
        geometry = _conv_geometry(node, x, weight)
        kernel = constant_of(weight)
        if kernel is not None and all(stride == 1 for stride in geometry.strides):
            return _flipped(backward, geometry, kernel, x, cotangent)
        return transposed(backward, geometry, weight, x, cotangent)

    return backward.for_needed(node, rule)


@vjp("ConvTranspose")
def conv_transpose(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """By the input: the convolution that this one transposes."""
    x, weight = operand(node, 0), operand(node, 1)

    def rule(index: int, value: ir.Value) -> ir.Value | None:
        if index == 1:
            return None
        if index == 2:
            return _sum_positions(backward, cotangent)
        geometry = _transpose_geometry(node, x, weight)
        return backward.op(
            "Conv",
            cotangent,
            weight,
            like=x,
            strides=geometry.strides,
            dilations=geometry.dilations,
            pads=geometry.pads,
            group=geometry.group,
        )

    return backward.for_needed(node, rule)


def _sum_positions(backward: Backward, cotangent: ir.Value) -> ir.Value:
    """The bias gradient: the sum over everything but the channels."""
    sizes = sizes_of(cotangent)
    if sizes is None:
        raise Declined("no gradient rule for the bias of a convolution of unknown rank")
    return backward.op("ReduceSum", cotangent, backward.ints(0, *range(2, len(sizes))), keepdims=0)


def _flipped(backward: Backward, geometry: Geometry, kernel: np.ndarray, x: ir.Value, cotangent: ir.Value) -> ir.Value:
    """The convolution with the kernel flipped in space and transposed in channels, group by group."""
    out, inner, *taps = kernel.shape
    grouped = kernel.reshape(geometry.group, out // geometry.group, inner, *taps).swapaxes(1, 2)
    turned = grouped.reshape(geometry.group * inner, out // geometry.group, *taps)
    turned = np.flip(turned, tuple(range(2, kernel.ndim)))
    begins = [extent - 1 - pad for extent, pad in zip(geometry.extents, geometry.begins, strict=True)]
    ends = [extent - 1 - pad for extent, pad in zip(geometry.extents, geometry.ends, strict=True)]
    if min(*begins, *ends) < 0:
        # Windows that saw padding alone: they pass nothing on, so their cotangents are cropped.
        crop = [0, 0, *(min(pad, 0) for pad in begins), 0, 0, *(min(pad, 0) for pad in ends)]
        cotangent = backward.op("Pad", cotangent, backward.ints(*crop))
    return backward.op(
        "Conv",
        cotangent,
        backward.constant(turned),
        like=x,
        dilations=geometry.dilations,
        pads=[max(pad, 0) for pad in (*begins, *ends)],
        group=geometry.group,
    )


def transposed(backward: Backward, geometry: Geometry, weight: ir.Value, x: ir.Value, cotangent: ir.Value) -> ir.Value:
    """The transposed convolution; its size is ambiguous at strides above 1, and the forward input says which it is."""
    sizes, out_sizes = _spatial(x), _spatial(cotangent)
    exact = sizes is not None and out_sizes is not None
    if sizes is not None and out_sizes is not None:
        extra = _output_padding(geometry, sizes, out_sizes)
    else:
        extra = [stride - 1 for stride in geometry.strides]
    full = backward.op(
        "ConvTranspose",
        cotangent,
        weight,
        like=x if exact else None,
        strides=geometry.strides,
        dilations=geometry.dilations,
        pads=geometry.pads,
        output_padding=extra,
        group=geometry.group,
    )
    if exact or not any(extra):
        return full
    # The longest candidate, cropped to the size of the input.
    axes = range(2, 2 + len(geometry.strides))
    shape = backward.op("Slice", backward.shape_of(x), backward.ints(2), backward.ints(2**31 - 1))
    return backward.op("Slice", full, backward.ints(*[0] * len(axes)), shape, backward.ints(*axes), like=x)


def _spatial(value: ir.Value) -> list[int] | None:
    return integers((sizes_of(value) or (None, None, None))[2:])


def _output_padding(geometry: Geometry, sizes: Sequence[int], out_sizes: Sequence[int]) -> list[int]:
    terms = zip(sizes, out_sizes, geometry.strides, geometry.extents, geometry.begins, geometry.ends, strict=True)
    return [size + begin + end - extent - (out - 1) * s for size, out, s, extent, begin, end in terms]


def _conv_geometry(node: ir.Node, x: ir.Value, weight: ir.Value) -> Geometry:
    strides, dilations, extents = _walk(node, weight)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        begins, ends = _stated_pads(node, len(extents), ignore=auto == "VALID")
    else:
        spatial = (sizes_of(x) or (None,) * (2 + len(extents)))[2:]
        totals = []
        for size, stride, extent in zip(spatial, strides, extents, strict=True):
            if stride == 1:
                totals.append(extent - 1)
            elif isinstance(size, int):
                totals.append(max((-(-size // stride) - 1) * stride + extent - size, 0))
            else:
                raise Declined(f"no gradient rule for Conv with auto_pad {auto} of an input of unknown size")
        begins, ends = halves(totals, larger_first=auto == "SAME_LOWER")
    return Geometry(strides, dilations, extents, begins, ends, node.attributes.get_int("group", 1))


def _transpose_geometry(node: ir.Node, x: ir.Value, weight: ir.Value) -> Geometry:
    strides, dilations, extents = _walk(node, weight)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID" or (auto == "NOTSET" and "output_shape" not in node.attributes):
        begins, ends = _stated_pads(node, len(extents), ignore=auto == "VALID")
    else:
        sizes, out_sizes = _spatial(x), _spatial(node.outputs[0])
        if sizes is None or out_sizes is None:
            raise Declined("no gradient rule for ConvTranspose with automatic padding of an input of unknown size")
        extra = node.attributes.get_ints("output_padding", [0] * len(extents))
        terms = zip(sizes, out_sizes, strides, extents, extra, strict=True)
        totals = [max((size - 1) * stride + added + extent - out, 0) for size, out, stride, extent, added in terms]
        begins, ends = halves(totals, larger_first=auto != "SAME_UPPER")
    return Geometry(strides, dilations, extents, begins, ends, node.attributes.get_int("group", 1))


def _walk(node: ir.Node, weight: ir.Value) -> tuple[Sequence[int], Sequence[int], list[int]]:
    taps = node.attributes.get_ints("kernel_shape", _spatial(weight) or ())
    if not taps:
        raise Declined(f"no gradient rule for {node.op_type} with a kernel of unknown size")
    strides = node.attributes.get_ints("strides", [1] * len(taps))
    dilations = node.attributes.get_ints("dilations", [1] * len(taps))
    return strides, dilations, [d * (k - 1) + 1 for d, k in zip(dilations, taps, strict=True)]


def _stated_pads(node: ir.Node, rank: int, *, ignore: bool) -> tuple[Sequence[int], Sequence[int]]:
    pads = [0] * (2 * rank) if ignore else node.attributes.get_ints("pads", [0] * (2 * rank))
    return pads[:rank], pads[rank:]


def halves(totals: Sequence[int], *, larger_first: bool) -> tuple[list[int], list[int]]:
    """Split the padding of each axis before and after it; where it is odd, one side gets more."""
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (large, small) if larger_first else (small, large)
