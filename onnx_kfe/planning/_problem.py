"""One layer as an approximation problem: its weight and the curvature that says which changes of it are cheap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from onnx_kfe.calibration import LayerStatistics
from onnx_kfe.graph import Geometry, Layer
from onnx_kfe.kfe import (
    BASES,
    Array,
    Coordinates,
    TwoFactor,
    Whitening,
    above_rounding,
    input_directions,
    predicted_loss,
    tucker_losses,
    two_factor,
    whiten,
)

__all__ = ["GroupProblem", "LayerProblem"]

_OUTPUT_DAMPING = 0.05  # of the mean eigenvalue of G: sampled gradients say little about directions they hardly visit
_INPUT_DAMPING = 1e-4  # of A's mean eigenvalue, so that unseen input directions keep the weight they have


class GroupProblem:
    """One group of a layer (the whole layer where it has one group).

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: Centred A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
        dampings: Of the two, in units of their mean eigenvalues.
    """

    def __init__(
        self,
        weight: Array,
        input_factor: Array,
        output_factor: Array,
        dampings: tuple[float, float] = (_INPUT_DAMPING, _OUTPUT_DAMPING),
    ) -> None:
        size = len(input_factor)
        floor = dampings[0] * max(float(np.trace(input_factor)) / size, np.finfo(np.float64).tiny)
        self.weight = weight
        self.input_factor = input_factor + floor * np.eye(size)
        self.output: Whitening = whiten(output_factor, dampings[1])
        self.output_factor = self.output.root @ self.output.root
        self._tucker_losses: dict[tuple[int, ...], list[Array]] = {}

    @cached_property
    def by_columns(self) -> GroupProblem:
        """The same problem with the rows of the kernel among the input channels: ``[o, c * kh, kw]``."""
        other = copy.copy(self)
        other.weight = self.weight.reshape(len(self.weight), -1, self.weight.shape[-1])
        other._tucker_losses = {}
        return other

    @cached_property
    def factors(self) -> TwoFactor:
        """The two-factor forms of every rank."""
        return two_factor(self.weight, self.input_factor, self.output)

    def tucker_losses(self, ranks: Sequence[int]) -> list[Array]:
        """Predicted losses at each input rank for every output rank (`kfe.tucker_losses`), kept for the next form."""
        if (key := tuple(ranks)) not in self._tucker_losses:
            directions = input_directions(self.weight, self.input_factor, self.output.root)
            losses = tucker_losses(self.weight, self.input_factor, self.output, directions, key)
            self._tucker_losses[key] = list(losses)
        return self._tucker_losses[key]

    def loss(self, approximation: Array) -> float:
        """Predicted loss in nats per sample of replacing the weight, the bias absorbing the mean."""
        return predicted_loss(approximation - self.weight, self.input_factor, self.output_factor)


class LayerProblem:
    """A layer with its statistics, group by group.

    A ConvTranspose is the adjoint of a convolution, and a change D of its weight as dear as the change ``D^T`` of that
    one with A and G in exchanged places, as which its groups are stated. Its input is not centred: how many taps meet
    at an output position depends on the position, so what the mean input gives is no constant that a bias could give.
    A bias on a 1x1 in front would be exact, but brings nothing: the best truncation has none.

    Args:
        layer: A prunable layer.
        statistics: Its sums; None for curvature that knows nothing (identity factors), which leaves the weights alone
            to say what is redundant.
        weight: ``[groups, o, c, *kernel]`` to approximate in place of the layer's own.
        bias: ``[out]`` that goes with it.
    """

    def __init__(
        self,
        layer: Layer,
        statistics: LayerStatistics | None,
        weight: Array | None = None,
        bias: Array | None = None,
    ) -> None:
        assert layer.geometry is not None
        self.layer = layer
        self.statistics = statistics
        self.geometry: Geometry = layer.geometry
        self.weight = layer.weight() if weight is None else weight
        self._bias = layer.bias() if bias is None else bias
        transposed, patch, out = self.geometry.transposed, self.geometry.patch_size, self.geometry.cotangent_size
        if transposed and statistics is not None:
            statistics = statistics.uncentred
        if statistics is None or transposed:
            self.mean: Array = np.zeros((len(self.weight), self.weight[0, 0].size))
        else:
            self.mean = statistics.mean
        if statistics is None:
            factors = [(np.eye(patch), np.eye(out))] * self.geometry.groups
        else:
            coherent = statistics.coherence * above_rounding(statistics.centred_input_factor, statistics.input_factor)
            factors = list(zip(coherent, statistics.output_factor, strict=True))
        pairs = zip(self.weight, factors, strict=True)
        self.groups = [_adjoint(w, a, g) if transposed else GroupProblem(w, a, g) for w, (a, g) in pairs]

    @property
    def adjoint(self) -> LayerProblem:
        """Of a ConvTranspose the problem of the convolution that it is the adjoint of."""
        other = copy.copy(self)
        other.geometry, other.weight = self.geometry.adjoint, self.weight.swapaxes(1, 2)
        return other

    def coordinates(self, basis: str, *, published: bool = False) -> list[Coordinates]:
        """Weight and curvature of each group in a basis, a key of `BASES`.

        Args:
            basis: Its name.
            published: Take the factors as they were collected: inputs not centred, no damping.
        """
        seen = self.statistics
        factors = [(group.input_factor, group.output_factor) for group in self.groups]
        if published and seen is not None:
            factors = list(zip(seen.input_factor, seen.output_factor, strict=True))
        saliency = None if seen is None else seen.saliency
        return [
            BASES[basis](
                weight, *factors[place], saliency=None if saliency is None else saliency[place],
                eigen=None if seen is None else seen.eigen_moments(place),
            )
            for place, weight in enumerate(self.weight)
        ]  # fmt: skip

    def loss(self, approximation: Array) -> float:
        """Predicted loss in nats per sample of replacing the weight ``[groups, o, c, *kernel]``."""
        stated = approximation.swapaxes(1, 2) if self.geometry.transposed else approximation
        return sum(group.loss(w) for group, w in zip(self.groups, stated, strict=True))

    def bias(self, approximation: Array) -> Array:
        """The bias ``[out]`` that keeps the mean output: ``b + (W - W_hat) mu``."""
        change = (self.weight - approximation).reshape(*self.weight.shape[:2], -1)
        moved = np.einsum("goi,gi->go", change, self.mean).reshape(-1)
        return moved if self._bias is None else self._bias + moved


def _adjoint(weight: Array, input_factor: Array, output_factor: Array) -> GroupProblem:
    """A group of a ConvTranspose, weight ``[o, c, *kernel]``, as one of the convolution that it is the adjoint of."""
    return GroupProblem(weight.swapaxes(0, 1), output_factor, input_factor, (_OUTPUT_DAMPING, _INPUT_DAMPING))
