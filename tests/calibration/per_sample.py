"""Gradients of single samples by torch autograd: by the weight of a layer, a shift and a gate on its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from onnx_kfe.calibration import Head
from onnx_kfe.graph import Layer, Network, serialize
from tools.torch_oracle import Noise, Output, TorchOracle

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass(frozen=True)
class Gradients:
    """Gradients of one sample's loss.

    Attributes:
        weight: ``[groups, o, c, taps]``.
        shift: ``[groups, o]`` by a constant added to the output, as a bias would be.
        gate: ``[groups, o]`` by a factor on the output.
    """

    weight: np.ndarray
    shift: np.ndarray
    gate: np.ndarray


def per_sample_gradients(
    network: Network, heads: list[Head], feeds: Mapping[str, np.ndarray], noise: Noise
) -> list[dict[str, Gradients]]:
    """For each sample, gradients by layer name, of the loss whose gradient is the cotangent at the heads."""
    outputs = {head.output: Output(head.kind, head.axis, head.probabilities, head.scale) for head in heads}
    oracle = TorchOracle(onnx.ModelProto.FromString(serialize(network.model)), network.prunable, outputs)
    found = []
    for index in range(len(next(iter(feeds.values())))):
        leaves = _Leaves(oracle)
        with leaves:
            oracle.add({name: array[index : index + 1] for name, array in feeds.items()}, [index], noise)
        found.append({layer.name: leaves.gradients(layer) for layer in network.prunable})
    return found


class _Leaves(TorchFunctionMode):
    """Makes the weight of every layer a leaf, and adds a shift of zero and a gate of one behind the layer."""

    def __init__(self, oracle: TorchOracle) -> None:
        super().__init__()
        self._oracle = oracle
        self._leaves: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._transposed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = func in (*_CONVOLUTIONS, torch.matmul, F.linear)
        layer = self._oracle.layer_of(args[1]) if known else None
        if layer is None:
            return func(*args, **(kwargs or {}))
        known = self._leaves.get(layer.name)  # of another node with the same weight
        weight = args[1].detach().requires_grad_() if known is None else known[0]
        y = func(args[0], weight, *args[2:], **(kwargs or {}))
        axis = 1 if func in _CONVOLUTIONS else -1
        shape = [-1 if place == axis % y.dim() else 1 for place in range(y.dim())]
        if known is None:
            made = (make(y.shape[axis], dtype=y.dtype, requires_grad=True) for make in (torch.zeros, torch.ones))
            known = weight, *made
        _, shift, gate = known
        added_later = layer.op_type == "Gemm" and layer.bias() is not None and len(args) < 3 and not kwargs
        bias = torch.from_numpy(layer.bias()).to(y.dtype) if added_later else torch.zeros_like(shift)
        self._leaves[layer.name] = known
        if func is torch.matmul:
            self._transposed.add(layer.name)
        closed = (bias * (gate - 1)).reshape(shape)  # the gate is behind the bias of the layer
        return (y + shift.reshape(shape)) * gate.reshape(shape) + closed

    def gradients(self, layer: Layer) -> Gradients:
        weight, shift, gate = (leaf.grad.numpy() for leaf in self._leaves[layer.name])
        groups, geometry = layer.geometry.groups, layer.geometry
        out, inside = geometry.out_channels // groups, geometry.in_channels // groups
        weight = weight.T if layer.name in self._transposed else weight
        return Gradients(
            weight.reshape(groups, out, inside, geometry.taps), shift.reshape(groups, out), gate.reshape(groups, out)
        )
