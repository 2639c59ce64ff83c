"""Whitening: the root of a covariance and its pseudo-inverse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, symmetrize

__all__ = ["Whitening", "damp", "whiten"]


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
