"""Chains: what a form writes in place of a layer, first as links without weights, then as stages with them.

The links share the kernel of a convolution out: each spatial axis is *carried* by exactly one of them, with kernel
extent, stride, pads and dilation of that axis; along the axes that it does not carry a link is 1 wide.
The bias goes on the last stage, where zero padding cannot meet it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_kfe.graph import Geometry, Layer
from onnx_kfe.kfe import Array

__all__ = ["Cost", "Link", "Stage", "chain_cost", "compose", "dense_cost", "dense_link", "layer_cost", "sized"]


@dataclass(frozen=True)
class Cost:
    """What a layer or model costs for one sample.

    Attributes:
        macs: Multiply-accumulates.
        parameters: Elements of its weights, biases not counted.
        nanoseconds: Latency of a run on the machine that it was measured on; 0 where it was not.
    """

    macs: int
    parameters: int
    nanoseconds: int = 0

    def saves(self, other: Cost) -> bool:
        """Whether it takes less operations or parameters and not more of either."""
        no_dearer = self.macs <= other.macs and self.parameters <= other.parameters
        return no_dearer and (self.macs < other.macs or self.parameters < other.parameters)


@dataclass(frozen=True)
class Link:
    """The shape of a stage: a convolution or product, or the reordering of channels.

    Attributes:
        inputs: Input channels, over all groups.
        outputs: Output channels, over all groups.
        groups: Groups.
        axes: The spatial axes that it carries.
        reorders: Whether it is a Gather of channels, which costs nothing but time.
    """

    inputs: int
    outputs: int
    groups: int = 1
    axes: tuple[int, ...] = ()
    reorders: bool = False

    @property
    def adjoint(self) -> Link:
        """The link that passes gradients back; of a convolution a ConvTranspose, and the other way round."""
        return replace(self, inputs=self.outputs, outputs=self.inputs)

    def parameters(self, geometry: Geometry) -> int:
        """Elements of the weight."""
        taps = math.prod(geometry.kernel[axis] for axis in self.axes)
        return 0 if self.reorders else self.outputs * (self.inputs // self.groups) * taps


@dataclass(frozen=True)
class Stage:
    """A link with its weight.

    Attributes:
        weight: ``[groups, out/groups, in/groups, *kernel]``, with the kernel dimensions of the axes carried; of a
            reordering ``[n]``, the channel that comes to each place.
        axes: The spatial axes that it carries.
    """

    weight: Array
    axes: tuple[int, ...] = ()

    @property
    def adjoint(self) -> Stage:
        """The stage that passes gradients back."""
        return replace(self, weight=self.weight.swapaxes(1, 2))

    @property
    def reorders(self) -> bool:
        """Whether it is a reordering of channels."""
        return self.weight.ndim == 1


def dense_link(geometry: Geometry) -> Link:
    """The layer as it is."""
    return Link(geometry.in_channels, geometry.out_channels, geometry.groups, tuple(range(len(geometry.kernel))))


def dense_cost(geometry: Geometry) -> Cost:
    """Cost of the layer as it is."""
    return Cost(geometry.macs, geometry.weight_parameters)


def sized(geometry: Geometry, links: Sequence[Link]) -> Iterator[tuple[Link, tuple[int, ...], tuple[int, ...]]]:
    """Each link with the spatial extents of its input and output: strides and pads act where an axis is carried."""
    size = geometry.input_size
    for link in links:
        after = tuple(geometry.output_size[a] if a in link.axes else extent for a, extent in enumerate(size))
        yield link, size, after
        size = after


def chain_cost(geometry: Geometry, links: Sequence[Link]) -> Cost:
    """Cost of a chain in place of a layer."""
    parameters = [link.parameters(geometry) for link in links]
    sizes = [before if geometry.transposed else after for _, before, after in sized(geometry, links)]
    positions = [geometry.repeats * math.prod(size) for size in sizes]
    return Cost(sum(p * t for p, t in zip(parameters, positions, strict=True)), sum(parameters))


def layer_cost(layer: Layer, cost: Callable[[Geometry], Cost] = dense_cost) -> Cost:
    """Cost of all nodes with the weight of a layer, as they are or by what each costs: parameters count once."""
    costs = [cost(use.geometry) for use in layer.uses if use.geometry is not None]
    return Cost(sum(each.macs for each in costs), costs[0].parameters)


def compose(stages: Sequence[Stage]) -> Array:
    """The weight ``[groups, o, c, *kernel]`` that a chain, or its beginning, amounts to, borders aside exactly."""
    groups = 1 if any(stage.reorders for stage in stages) else min(len(stage.weight) for stage in stages)
    dimensions = 1 + max((axis for stage in stages for axis in stage.axes), default=-1)
    product, *rest = (_expanded(stage, groups, dimensions) for stage in stages)
    for weight in rest:
        taps = [np.maximum(a, b) for a, b in zip(product.shape[3:], weight.shape[3:], strict=True)]
        new, old = (array.reshape(*array.shape[:3], -1) for array in (weight, product))
        # axis by axis one of the two is 1 wide, so the product of their kernels is an outer one
        both = np.einsum("gomx,gmcy->gocxy", new, old, optimize=True)
        both = both.reshape(*both.shape[:3], *weight.shape[3:], *product.shape[3:])
        interleaved = [3 + axis + side * dimensions for axis in range(dimensions) for side in (0, 1)]
        product = both.transpose(0, 1, 2, *interleaved).reshape(*both.shape[:3], *taps)
    return product


def _expanded(stage: Stage, groups: int, dimensions: int) -> Array:
    """The weight with a kernel dimension for each axis and the groups of the whole chain."""
    if stage.reorders:
        size = len(stage.weight)
        return np.eye(size)[stage.weight.astype(int)].reshape(1, size, size, *[1] * dimensions)
    carried = iter(stage.weight.shape[3:])
    kernel = [next(carried) if axis in stage.axes else 1 for axis in range(dimensions)]
    weight = stage.weight.reshape(*stage.weight.shape[:3], *kernel)
    if len(weight) == groups:
        return weight
    inner = len(weight) // groups
    _, out, inside = weight.shape[:3]
    blocks = np.zeros((groups, inner * out, inner * inside, *kernel))
    for place, block in enumerate(weight):
        group, row = divmod(place, inner)
        blocks[group, row * out : (row + 1) * out, row * inside : (row + 1) * inside] = block
    return blocks
