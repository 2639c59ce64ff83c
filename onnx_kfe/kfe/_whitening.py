"""Whitening: the root of a covariance and its pseudo-inverse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, symmetrize

__all__ = ["Whitening", "damp", "shrink", "shrinkage", "whiten"]


@dataclass(frozen=True)
class Whitening:
    """Symmetric root of a covariance.

    Attributes:
        root: ``C^(1/2)``, ``[n, n]``.
        inverse_root: Pseudo-inverse of the root: directions below the cut are dropped, not divided by.
        rank: Directions kept.
    """

    root: Array
    inverse_root: Array
    rank: int


def damp(covariance: Array, damping: float) -> Array:
    """Add `damping` times the mean eigenvalue to the diagonal: relative, whatever the units of the loss."""
    size = covariance.shape[-1]
    mean = max(float(np.trace(covariance)) / size, np.finfo(np.float64).tiny)
    return symmetrize(covariance) + damping * mean * np.eye(size)


def shrinkage(covariance: Array, samples: int) -> float:
    """Weight of the identity in the estimate of a covariance from few samples.

    The oracle approximating shrinkage for Gaussian data (Chen, Wiesel, Eldar & Hero 2010, equation 23): near 0 where
    the samples are many for the covariance's effective rank, 1 where they say nothing of its shape.

    Args:
        covariance: ``[n, n]``, estimated from the samples.
        samples: Independent samples that it was estimated from.
    """
    size = len(covariance)
    trace, square = float(np.trace(covariance)), float(np.vdot(covariance, covariance))
    spread = (samples + 1 - 2 / size) * (square - trace**2 / size)
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / size) * square + trace**2) / spread)


def shrink(covariance: Array, weight: float) -> Array:
    """Move a covariance towards the identity of the same trace: ``(1 - w) C + w tr(C)/n I``."""
    size = len(covariance)
    return (1 - weight) * symmetrize(covariance) + weight * float(np.trace(covariance)) / size * np.eye(size)


def whiten(covariance: Array, damping: float = 0.0, cut: float = 1e-12) -> Whitening:
    """Root and pseudo-inverse root of a covariance.

    Args:
        covariance: ``[n, n]``, positive semi-definite up to rounding.
        damping: Share of the mean eigenvalue that is added to every eigenvalue.
        cut: Directions whose eigenvalue is below this share of the largest are dropped.
    """
    values, vectors = scipy.linalg.eigh(damp(covariance, damping))
    kept = values > cut * max(values[-1], np.finfo(np.float64).tiny)
    roots = np.sqrt(np.where(kept, values, 0.0))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=kept)
    return Whitening((vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T, int(kept.sum()))
