"""Joint low rank: a basis of the channels between two linear maps in which the product of both is cut best.

Any invertible R between two linear maps leaves their product as it is: ``W_2 W_1 = (W_2 R^-1) (R W_1)``. With R from
the singular value decomposition of the whitened product, the first r channels are the best product of rank r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array
from onnx_kfe.kfe._whitening import whiten

__all__ = ["Balance", "balance"]

_DAMPING = 1e-6  # of the mean variance: bounds how far directions are stretched that hardly vary, or hardly matter


@dataclass(frozen=True)
class Balance:
    """A basis in which what is computed and what it matters have the same diagonal form, up to a factor.

    Attributes:
        forward: R, ``[d, d]``, for the channels as they are computed.
        backward: ``R^-1``, for what reads them.
        strengths: Singular values of the whitened product ``[d]``, in descending order.
    """

    forward: Array
    backward: Array
    strengths: Array


def balance(computed: Array, read: Array) -> Balance:
    """Find R with ``R C R^T = c S`` and ``R^-T N R^-1 = S / c``, S diagonal and in descending order (Moore 1981).

    For ``C = W_1 A W_1^T`` and ``N = W_2^T G W_2`` the diagonal of S is that of the singular values of
    ``G^(1/2) W_2 W_1 A^(1/2)``. Hence the first r channels give the product of rank r that is best in this metric, and
    what it loses is the sum of the other squares (Eckart & Young 1936). C and N are of the channels alone, so that
    nothing as large as the layers is decomposed. The factor c keeps the total variance of the channels.

    Args:
        computed: C, ``[d, d]``, covariance of the channels.
        read: N, ``[d, d]``, curvature by them, or covariance of what they are multiplied by.

    Returns:
        R and its inverse; the identity where the channels are constant, or nothing depends on them.
    """
    first, second = whiten(computed, _DAMPING), whiten(read, _DAMPING)
    left, strengths, right = scipy.linalg.svd(second.root @ first.root)
    if not min(np.trace(computed), np.trace(read), strengths[-1]) > 0:
        return Balance(np.eye(len(computed)), np.eye(len(computed)), np.zeros(len(computed)))
    factor = np.trace(computed) / strengths.sum()
    forward = left.T @ second.root * np.sqrt(factor / strengths)[:, None]
    return Balance(forward, first.root @ right.T / np.sqrt(factor * strengths), strengths)
