"""Covariances: centring, symmetry and the parts of a patch covariance.

Shape convention of this package, all arrays float64: a weight is ``[o, c, *kernel]`` and its matrix ``[o, i]`` with
``i = c * taps``, channel-major as ``weight.reshape(o, -1)``; the input factor A is ``[i, i]`` in the same order and the
output factor G is ``[o, o]``. One group of a convolution at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "above_rounding", "centre", "channel_covariance", "predicted_loss", "symmetrize"]

Array = npt.NDArray[np.float64]

_ROUNDING = 3e-7  # of float32 sums, as a share of their trace


def symmetrize(matrix: Array) -> Array:
    """The symmetric part, which rounding in float32 sums takes away."""
    return 0.5 * (matrix + np.swapaxes(matrix, -1, -2))


def centre(second_moment: Array, mean: Array, positions: float) -> Array:
    """Covariance that is left to explain once the bias absorbs the mean: ``A - T mu mu^T``.

    Args:
        second_moment: A, ``[..., i, i]``, summed over positions and averaged over samples.
        mean: mu, ``[..., i]``, averaged over samples and positions.
        positions: T, positions of a sample.
    """
    return symmetrize(second_moment - positions * mean[..., :, None] * mean[..., None, :])


def above_rounding(covariance: Array, second_moment: Array) -> Array:
    """A covariance made definite where the data hardly vary, so that what is left of float32 sums is rounding.

    Args:
        covariance: ``[..., n, n]``, centred.
        second_moment: What it was centred from.
    """
    floor = _ROUNDING * np.trace(second_moment, axis1=-2, axis2=-1)
    return covariance + np.asarray(floor)[..., None, None] * np.eye(covariance.shape[-1])


def channel_covariance(patch_covariance: Array, taps: int) -> Array:
    """The ``[c, c]`` covariance of channels: a patch covariance averaged over the taps of the kernel."""
    channels = patch_covariance.shape[0] // taps
    return np.einsum("ckdk->cd", patch_covariance.reshape(channels, taps, channels, taps)) / taps


def predicted_loss(change: Array, input_factor: Array, output_factor: Array) -> float:
    """Loss in nats per sample that a change of the weight is predicted to cost.

    ``1/2 tr(G D A D^T)``, the second-order term under the K-FAC Fisher ``A (x) G`` (Martens & Grosse 2015).

    Args:
        change: D, ``[o, ...]``, new weight less old.
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
    """
    matrix = change.reshape(change.shape[0], -1)
    return 0.5 * float(np.vdot(output_factor @ matrix, matrix @ input_factor))
