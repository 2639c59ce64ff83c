"""K-FAC factors by eager torch: the independent computation that the product's factors are compared with, and its peer.

The model is converted to torch by ``onnx2fx``. While it runs, every call of a convolution or matrix product with a
layer's weight is intercepted: its patches are taken by ``torch.nn.functional.unfold``, its cotangents by a hook on its
output. Nothing of the product's backward pass, patches or head detection is used; what must agree is the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx2fx
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from onnx_kfe.graph import Layer

__all__ = ["Factors", "Gate", "Grid", "Noise", "Output", "TorchOracle", "all_positions", "relative_error"]

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, F.linear)
_GATES = (F.relu, torch.relu, torch.clamp)
_FULL_GRID = (1, 1, 1)
_ROUNDING = 1e-5

Noise = Callable[[int], Sequence[np.ndarray]]
"""Sample index -> sampling noise of every output, each with a leading axis of size 1."""


Gate = np.ndarray | None


@dataclass(frozen=True)
class Output:
    """How an output of the model is read.

    Attributes:
        kind: categorical, bernoulli or gaussian.
        axis: Class axis of a categorical output.
        probabilities: Whether it holds probabilities rather than logits (or their logarithms).
        scale: Standard deviation of a Gaussian output.
    """

    kind: str
    axis: int = -1
    probabilities: bool = False
    scale: float = 1.0

    def loss(self, value: Tensor, noise: Tensor) -> Tensor:
        """A scalar whose gradient has the covariance of the Fisher information: the output, its variance stabilised."""
        value = value.reshape(noise.shape)
        if self.kind == "gaussian":
            return (value / self.scale * noise).sum()
        if self.kind == "bernoulli":
            probabilities = value if self.probabilities else value.sigmoid()
            return (2 * probabilities.sqrt().asin() * noise).sum()
        probabilities = value if self.probabilities else value.softmax(self.axis)
        return (2 * probabilities.sqrt() * noise).sum()


@dataclass(frozen=True)
class Grid:
    """Positions that statistics are taken at: every so many along each axis; all of them by default."""

    inputs: tuple[int, ...] = _FULL_GRID
    cotangents: tuple[int, ...] = _FULL_GRID


def all_positions(layer: Layer, extent: tuple[int, ...]) -> Grid:
    """The grid of every position."""
    return Grid()


@dataclass
class Factors:
    """Sums of one layer, and the factors that they give; shapes as in ``onnx_kfe.calibration.LayerStatistics``."""

    input_second_moment: Tensor | float = 0.0
    input_sum: Tensor | float = 0.0
    cotangent_second_moment: Tensor | float = 0.0
    seen_inputs: int = 0
    seen_cotangents: int = 0
    positions: int = 0

    def factors(self, samples: int) -> dict[str, np.ndarray]:
        """A, the mean and G, with the positions left out by a grid made up for."""
        share = self.seen_inputs / self.positions
        return {
            "A": _numpy(self.input_second_moment) / samples / share,
            "mean": _numpy(self.input_sum) / self.seen_inputs,
            "G": _numpy(self.cotangent_second_moment) / self.seen_cotangents,
        }


@dataclass
class TorchOracle:
    """Accumulates the factors of a model over batches.

    Attributes:
        model: The model, as it was given or normalised; its weights are recognised by their values.
        layers: The layers wanted.
        outputs: The outputs with a probability model, by name.
        dtype: float64 to check, float32 to be timed.
        grid: From a layer and the extent of its positions, the grid that they are taken on.
    """

    model: onnx.ModelProto
    layers: Sequence[Layer]
    outputs: Mapping[str, Output]
    dtype: torch.dtype = torch.float64
    grid: Callable[[Layer, tuple[int, ...]], Grid] = all_positions

    def __post_init__(self) -> None:
        self.samples = 0
        self.sums = {layer.name: Factors() for layer in self.layers}
        self._names = [value.name for value in self.model.graph.output]
        initializers = {tensor.name for tensor in self.model.graph.initializer}
        self._inputs = [value.name for value in self.model.graph.input if value.name not in initializers]
        self.module = onnx2fx.convert(self.model).requires_grad_(False)
        by_value = {_key(_weight(layer)): layer for layer in self.layers}
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        found = {name: by_value[_key(tensor.numpy())] for name, tensor in tensors.items() if _key_in(tensor, by_value)}
        self.module = self.module.to(self.dtype)
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._by_pointer = {tensors[name].data_ptr(): layer for name, layer in found.items()}

    def add(
        self, feeds: Mapping[str, np.ndarray], indices: Sequence[int], noise: Noise, gates: Sequence[Gate] = ()
    ) -> None:
        """Add a batch.

        A gradient jumps where a ReLU or Clip meets its threshold, and rounding decides on which side a unit falls that
        is nearly there. `gates` makes it fall on the side where another computation had it.

        Args:
            feeds: Input name -> array.
            indices: Index of each sample in the whole data.
            noise: The sampling noise.
            gates: Outputs of the ReLU and Clip calls elsewhere, in order; None where unknown.
        """
        arrays = [torch.from_numpy(feeds[name]) for name in self._inputs]
        with _Recorder(self, gates):
            values = self.module(*(a.to(self.dtype) if a.is_floating_point() else a for a in arrays))
        by_name = dict(zip(self._names, values if isinstance(values, tuple | list) else (values,), strict=True))
        drawn = [np.concatenate(rows) for rows in zip(*(noise(int(index)) for index in indices), strict=True)]
        loss = sum(
            output.loss(by_name[name], torch.from_numpy(rows).to(self.dtype))
            for (name, output), rows in zip(self.outputs.items(), drawn, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        self.samples += len(indices)

    def factors(self) -> dict[str, dict[str, np.ndarray]]:
        """A, mean and G by layer name."""
        return {name: sums.factors(self.samples) for name, sums in self.sums.items()}

    def layer_of(self, weight: Any) -> Layer | None:
        """The layer that a tensor is the weight of."""
        return self._by_pointer.get(weight.data_ptr()) if isinstance(weight, Tensor) else None


class _Recorder(TorchFunctionMode):
    """Sees every call of a torch function while the model runs."""

    def __init__(self, oracle: TorchOracle, gates: Sequence[Gate]) -> None:
        super().__init__()
        self._oracle = oracle
        self._gates = iter(gates)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _GATES:
            gate = next(self._gates, None)
            return result if gate is None else _gated(result, args[0], torch.from_numpy(gate), *_bounds(args, kwargs))
        if func not in (*_CONVOLUTIONS, *_TRANSPOSED, *_PRODUCTS):
            return result
        layer = self._oracle.layer_of(args[1])
        if layer is None:
            return result
        if func in _TRANSPOSED:
            return self._transposed(layer, result, args, kwargs or {})
        convolution = func in _CONVOLUTIONS
        extent = tuple(result.shape[2:] if convolution else result.shape[1:-1][-1:])
        sums, grid = self._oracle.sums[layer.name], self._oracle.grid(layer, extent)
        # The first layers see nothing that requires a gradient, and no gradient is needed before their outputs.
        result = result if result.requires_grad else result.requires_grad_()
        groups = (kwargs or {}).get("groups", 1)
        rows = _channels_last if convolution else _thinned
        result.register_hook(lambda g: _add_cotangents(sums, rows(g, grid.cotangents), groups))
        _add_inputs(
            sums, _patches(*args, grid=grid.inputs, **kwargs) if convolution else _thinned(args[0], grid.inputs), groups
        )
        sums.positions += result.numel() // result.shape[1 if convolution else -1]
        return result

    def _transposed(self, layer: Layer, result: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """Of a transposed convolution positions are those of the input, and cotangents come in patches."""
        x, *rest = args
        sums, grid = self._oracle.sums[layer.name], self._oracle.grid(layer, tuple(x.shape[2:]))
        result = result if result.requires_grad else result.requires_grad_()
        groups = kwargs.get("groups", 1)
        result.register_hook(
            lambda g: _add_cotangents(sums, _patches(g, *rest, grid=grid.cotangents, **kwargs), groups)
        )
        _add_inputs(sums, _channels_last(x, grid.inputs), groups)
        sums.positions += x.numel() // x.shape[1]
        return result


def _bounds(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[float, float]:
    """Thresholds of a call of ReLU or clamp."""
    if len(args) == 1 and not {"min", "max"} & set(kwargs or {}):
        return 0.0, float("inf")
    low, high = (*args[1:], *(kwargs[key] for key in ("min", "max") if kwargs and key in kwargs))
    return float(low), float(high)


def _gated(result: Tensor, x: Tensor, gate: Tensor, low: float, high: float) -> Tensor:
    """The call's result, with every unit on the side of its thresholds that `gate` is on: by rounding the same."""
    forced = torch.where(gate <= low, low, torch.where(gate >= high, high, x)).to(x.dtype)
    assert (forced - result).abs().max() <= _ROUNDING * x.abs().max(), "the gates are of another computation"
    return forced


@torch.no_grad()
def _patches(
    x: Tensor, weight: Tensor, *_: Any, grid: tuple[int, ...], stride: Any, padding: Any, dilation: Any, **__: Any
) -> Tensor:
    """Patches ``[rows, channels * taps]`` of a convolution with these arguments, on a grid that starts at the first."""
    spatial = weight.dim() - 2
    steps, pads, spread = (
        tuple(v) if isinstance(v, tuple | list) else (v,) * spatial for v in (stride, padding, dilation)
    )
    coarse = tuple(s * g for s, g in zip(steps, grid, strict=False))
    kernel = tuple(weight.shape[2:])
    if set(kernel) == {1} and set(pads) == {0}:
        return _channels_last(x, coarse)
    if spatial == 3:
        return _volume_patches(x, kernel, coarse, pads, spread)
    if spatial == 1:
        x, kernel, coarse, pads, spread = x[:, :, None], (1, *kernel), (1, *coarse), (0, *pads), (1, *spread)
    columns = F.unfold(x, kernel, dilation=spread, padding=pads, stride=coarse)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _volume_patches(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], spread: Sequence[int]
) -> Tensor:
    """Patches ``[rows, channels * taps]`` over three axes, which ``unfold`` of torch.nn.functional does not know."""
    x = F.pad(x, [side for pad in reversed(pads) for side in (pad, pad)])
    for axis, (k, s, d) in enumerate(zip(kernel, strides, spread, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(x.shape[0] * math.prod(x.shape[2:5]), -1)


def _channels_last(g: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``[N, C, *positions]`` to ``[rows, C]`` on a grid."""
    steps = tuple(slice(None, None, step) for step, _ in zip(grid, g.shape[2:], strict=False))
    return g[(slice(None), slice(None), *steps)].flatten(2).transpose(1, 2).reshape(-1, g.shape[1])


def _thinned(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``[..., features]`` to ``[rows, features]``, on a grid along the last position axis."""
    return (x[..., :: grid[0], :] if x.dim() > 2 else x).reshape(-1, x.shape[-1])


@torch.no_grad()
def _add_inputs(sums: Factors, rows: Tensor, groups: int) -> None:
    sums.input_second_moment = sums.input_second_moment + _second_moment(rows, groups)
    sums.input_sum = sums.input_sum + rows.sum(0).reshape(groups, -1)
    sums.seen_inputs += len(rows)


@torch.no_grad()
def _add_cotangents(sums: Factors, rows: Tensor, groups: int) -> None:
    sums.cotangent_second_moment = sums.cotangent_second_moment + _second_moment(rows, groups)
    sums.seen_cotangents += len(rows)


def _second_moment(rows: Tensor, groups: int) -> Tensor:
    """``[groups, n, n]``."""
    return torch.stack([part.T @ part for part in rows.chunk(groups, 1)])


def _weight(layer: Layer) -> np.ndarray:
    value = layer.weight_value
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _key(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array).tobytes()


def _key_in(tensor: Tensor, keys: Mapping[Any, Layer]) -> bool:
    return tensor.is_floating_point() and _key(tensor.numpy()) in keys


def _numpy(value: Tensor | float) -> np.ndarray:
    assert isinstance(value, Tensor), "the layer was never run, or no gradient reached it"
    return value.double().numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference relative to that of the expected."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))
