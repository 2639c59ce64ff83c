"""Compensation: the weights that stay make up for rows and columns that go."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array
from onnx_kfe.kfe._whitening import damp

__all__ = ["compensate"]

_SOLVE_DAMPING = 1e-10  # keeps the normal equations solvable where channels are dead; no effect otherwise


def compensate(
    weight: Array,
    input_factor: Array,
    output_factor: Array,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    output_side: bool = True,
    input_side: bool = True,
) -> Array:
    """The weights left, changed together so that the whole change costs least under ``A (x) G``.

    The minimiser of ``1/2 tr(G (V - W) A (V - W)^T)`` over all V that are zero outside the kept rows K and columns L is
    ``G_KK^-1 G_K: W A_:L A_LL^-1``. For rows P that go alone that is Kron-OBS's update
    ``-[G^-1]_KP ([G^-1]_PP)^-1 W_P`` (Hassibi & Stork 1993; Wang et al. 2019), for columns its twin with ``A^-1``.

    Args:
        weight: W, ``[o, c, *kernel]``, in any basis.
        input_factor: A, ``[i, i]``, in that basis.
        output_factor: G, ``[o, o]``.
        rows: ``[o]``, True for the rows that stay.
        columns: ``[c]``, True for the columns that stay.
        output_side: Whether rows make up for rows that go; if not they are dropped.
        input_side: Likewise columns for columns.

    Returns:
        ``[kept o, kept c, *kernel]``.
    """
    taps = input_factor.shape[0] // weight.shape[1]
    patches = np.repeat(columns, taps)
    matrix = weight.reshape(len(weight), -1)
    left = _projected(output_factor, matrix, rows) if output_side else matrix[rows]
    both = _projected(input_factor, left.T, patches) if input_side else left.T[patches]
    return np.ascontiguousarray(both.T).reshape(int(rows.sum()), int(columns.sum()), *weight.shape[2:])


def _projected(factor: Array, matrix: Array, kept: np.ndarray) -> Array:
    """``F_KK^-1 F_K: M``: the rows K of a matrix, taking over what they can of the rows that go."""
    if kept.all() or not kept.any():
        return matrix[kept]
    lower = scipy.linalg.cho_factor(damp(factor[np.ix_(kept, kept)], _SOLVE_DAMPING), lower=True, check_finite=False)
    # The kept rows pass unchanged: solving for the rest alone keeps them exact where the factor is singular.
    taken = scipy.linalg.cho_solve(lower, factor[np.ix_(kept, ~kept)] @ matrix[~kept], check_finite=False)
    return matrix[kept] + taken
