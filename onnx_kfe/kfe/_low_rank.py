"""The best two-factor form of a weight under Kronecker-factored curvature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, symmetrize
from onnx_kfe.kfe._whitening import Whitening

__all__ = ["TwoFactor", "two_factor"]


@dataclass(frozen=True)
class TwoFactor:
    """All truncations of ``W = left @ right``, ordered by what they cost.

    Attributes:
        left: ``[o, r]`` at full rank r; its first columns are the best truncation.
        right: ``[r, i]`` at full rank; its first rows are the best truncation.
        losses: ``[r + 1]`` predicted loss in nats per sample at each rank from 0 to r.
    """

    left: Array
    right: Array
    losses: Array

    def truncated(self, rank: int) -> tuple[Array, Array]:
        """Left ``[o, rank]`` and right ``[rank, i]`` factor, balanced to equal norms so that neither is ill-scaled."""
        left, right = self.left[:, :rank], self.right[:rank]
        scales = np.sqrt(_norms(right, axis=1) / _norms(left, axis=0))
        return left * scales, right / scales[:, None]


def two_factor(weight: Array, input_factor: Array, output: Whitening) -> TwoFactor:
    """Truncated SVD of the whitened weight, for every rank at once.

    With ``S = G^(1/2) W A^(1/2) = U S V^T`` the optimum is ``G^(-1/2) U_r U_r^T G^(1/2) W``, and its loss half the sum
    of the squared singular values dropped (Eckart & Young 1936). A enters through ``S S^T`` alone and is not inverted.

    Args:
        weight: W, ``[o, ...]``.
        input_factor: A, ``[i, i]``, centred where the bias is corrected.
        output: Whitening of G, ``[o, o]``.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    whitened = output.root @ matrix
    values, vectors = scipy.linalg.eigh(symmetrize(whitened @ input_factor @ whitened.T))
    rank = min(matrix.shape)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    losses = 0.5 * np.append(np.cumsum(values[::-1])[::-1], 0.0)[: rank + 1]
    return TwoFactor(output.inverse_root @ vectors[:, :rank], vectors[:, :rank].T @ whitened, losses)


def _norms(matrix: Array, axis: int) -> Array:
    return np.maximum(np.linalg.norm(matrix, axis=axis), np.finfo(np.float64).tiny)
