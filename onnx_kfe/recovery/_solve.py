"""A layer solved anew: the weight that maps the inputs it now gets to the outputs it is to give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe import Array, above_rounding, symmetrize

__all__ = ["JointMoments", "solve"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the pull towards the old weight that are tried, in units of the mean variance of the inputs."""


@dataclass
class JointMoments:
    """Sums over positions of one group, inputs first, then wanted outputs.

    Attributes:
        second: Sum of ``z z^T`` with ``z = [x; y]``, ``[i + o, i + o]``.
        total: Sum of z, ``[i + o]``.
        positions: How many.
    """

    second: Array
    total: Array
    positions: float

    def __add__(self, other: JointMoments) -> JointMoments:
        return JointMoments(self.second + other.second, self.total + other.total, self.positions + other.positions)

    @property
    def mean(self) -> Array:
        """Mean of z."""
        return self.total / self.positions

    @property
    def covariance(self) -> Array:
        """Covariance of z."""
        second = self.second / self.positions
        return above_rounding(symmetrize(second - np.outer(self.mean, self.mean)), second)


def solve(weight: Array, folds: tuple[JointMoments, JointMoments], output_factor: Array) -> Array:
    """Least squares of the outputs on the inputs, pulled towards the old weight as strongly as cross-validation says.

    ``W = (C_yx + l W_old)(C_xx + l I)^-1``, with the l that on each half of the data predicts the other half best, in
    the metric of the output factor. Centred, so the bias is ``mean(y) - W mean(x)``.

    Args:
        weight: W_old, ``[o, i]``.
        folds: Moments of two halves of the data.
        output_factor: G, ``[o, o]``.

    Returns:
        ``[o, i]``.
    """
    size = weight.shape[1]
    errors = np.zeros(len(RIDGES) + 1)
    for fit, test in (folds, folds[::-1]):
        candidates = [*_ridge_path(weight, fit.covariance, size), weight]
        errors += [_error(w, test.covariance, size, output_factor) for w in candidates]
    best = int(np.argmin(errors))
    return weight if best == len(RIDGES) else _ridge(weight, (folds[0] + folds[1]).covariance, size, RIDGES[best])


def _ridge_path(weight: Array, covariance: Array, size: int) -> list[Array]:
    return [_ridge(weight, covariance, size, strength) for strength in RIDGES]


def _ridge(weight: Array, covariance: Array, size: int, strength: float) -> Array:
    inputs, cross = covariance[:size, :size], covariance[size:, :size]
    pull = strength * max(float(np.trace(inputs)) / size, np.finfo(np.float64).tiny)
    factor = scipy.linalg.cho_factor(inputs + pull * np.eye(size), lower=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, (cross + pull * weight).T, check_finite=False).T


def _error(weight: Array, covariance: Array, size: int, output_factor: Array) -> float:
    """``E ||y - W x||_G^2`` less what W cannot change."""
    inputs, cross = covariance[:size, :size], covariance[size:, :size]
    residual = weight @ inputs - 2 * cross
    return float(np.vdot(output_factor @ weight, residual))
