"""Importances of the rows and columns of a weight: what it costs to leave one out.

An importance is one function of `Coordinates`, registered under its name; in the KFE the same functions score
directions in place of channels. The curvature-based ones take the Fisher as ``A (x) G`` (Wang, Grosse, Fidler, Zhang
2019, sections 2 to 4). Optimal brain damage (OBD) deletes and leaves the rest as it is, optimal brain surgeon (OBS)
lets the rest make up for it. C- variants do so for every weight by itself and add the losses up, Kron- variants for a
row or column as a whole, with the quadratic form ``w_i^T A w_i`` where the published code has ``w_i^2 A``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg

from onnx_kfe.errors import KfeError
from onnx_kfe.kfe._coordinates import Coordinates
from onnx_kfe.kfe._covariance import Array
from onnx_kfe.kfe._whitening import damp

__all__ = ["IMPORTANCES", "Importance", "Scores"]

_DAMPING = 1e-6  # of the mean eigenvalue, so that factors of dead channels can be inverted; callers damp against noise


class Scores(NamedTuple):
    """What leaving out each row ``[o]`` and each column ``[c]`` costs; nats per sample where it rests on curvature."""

    rows: Array
    columns: Array


@dataclass(frozen=True)
class Importance:
    """An entry of `IMPORTANCES`; calling it gives the scores, float64 and not below zero.

    Attributes:
        score: The function.
        needs: What it looks at: the weights alone, with them the Kronecker factors, the variances of `Coordinates`, or
            the saliency.
        bases: Keys of `BASES` in which it is defined.
        compensates: Whether what stays makes up for what goes, see `compensate`.
    """

    score: Callable[[Coordinates], Scores]
    needs: Literal["weights", "curvature", "variances", "saliency"]
    bases: tuple[str, ...]
    compensates: bool = False

    def __call__(self, coordinates: Coordinates) -> Scores:
        """The scores of all rows and columns."""
        rows, columns = self.score(coordinates)
        return Scores(np.maximum(rows, 0.0), np.maximum(columns, 0.0))  # rounding goes below


IMPORTANCES: dict[str, Importance] = {}
"""By name, as the user gives it."""

_Score = Callable[[Coordinates], Scores]


def _importance(
    name: str,
    needs: Literal["weights", "curvature", "variances", "saliency"] = "curvature",
    bases: tuple[str, ...] = ("channel", "kfe"),
    compensates: bool = False,
) -> Callable[[_Score], _Score]:
    """Register a function of coordinates under a name."""

    def register(score: _Score) -> _Score:
        IMPORTANCES[name] = Importance(score, needs, bases, compensates)
        return score

    return register


@_importance("magnitude-l1", needs="weights")
def _magnitude_l1(coordinates: Coordinates) -> Scores:
    """Sum of absolute values (Li et al. 2017)."""
    return _summed(np.abs(coordinates.weight))


@_importance("magnitude-l2", needs="weights")
def _magnitude_l2(coordinates: Coordinates) -> Scores:
    """Euclidean norm."""
    rows, columns = _summed(np.square(coordinates.weight))
    return Scores(np.sqrt(rows), np.sqrt(columns))


@_importance("taylor", needs="saliency", bases=("channel",))
def _taylor(coordinates: Coordinates) -> Scores:
    """``1/2 E_n[(sum_t y_ti g_ti)^2]``, the loss of closing a gate on an output channel; columns cost nothing.

    The square of the first-order change (Molchanov et al. 2019). With cotangents that carry the Fisher information its
    mean is the Fisher of the gate, so half of it is the second-order loss in nats; bias and mean go with the channel.
    """
    if coordinates.saliency is None:
        raise KfeError("importance taylor: the statistics have no saliencies; collect the statistics again")
    return Scores(0.5 * coordinates.saliency, np.zeros(coordinates.weight.shape[1]))


@_importance("c-obd", needs="variances")
def _c_obd(coordinates: Coordinates) -> Scores:
    """``1/2 w_q^2 F_qq`` summed; in the KFE that is half of EigenDamage's ``l^g_i l^a_j sum_k w_ijk^2``."""
    return _summed(0.5 * coordinates.variances * np.square(coordinates.weight))


@_importance("c-obs", compensates=True)
def _c_obs(coordinates: Coordinates) -> Scores:
    """``1/2 w_q^2 / [F^-1]_qq`` summed, with ``F^-1 = A^-1 (x) G^-1``."""
    inputs = np.diag(_inverse(coordinates.input_factor)).reshape(coordinates.weight.shape[1:])
    outputs = np.diag(_inverse(coordinates.output_factor))
    return _summed(0.5 * np.square(coordinates.weight) / (outputs[:, None, None] * inputs))


@_importance("kron-obd")
def _kron_obd(coordinates: Coordinates) -> Scores:
    """``1/2 G_ii w_i^T A w_i`` of row i, ``1/2 tr(G W_j A_jj W_j^T)`` of column j, with its block A_jj."""
    blocks = _blocks(coordinates.input_factor, coordinates)
    return Scores(np.diag(coordinates.output_factor) * _row_forms(coordinates), _column_forms(coordinates, blocks))


@_importance("kron-obs", compensates=True)
def _kron_obs(coordinates: Coordinates) -> Scores:
    """``1/2 w_i^T A w_i / [G^-1]_ii`` of row i, ``1/2 tr(G W_j ([A^-1]_jj)^-1 W_j^T)`` of column j."""
    blocks = np.linalg.inv(_blocks(_inverse(coordinates.input_factor), coordinates)).astype(np.float64)
    outputs = np.diag(_inverse(coordinates.output_factor))
    return Scores(_row_forms(coordinates) / outputs, _column_forms(coordinates, blocks))


def _summed(scores: Array) -> Scores:
    """Scores of single weights ``[o, c, taps]``, added up over rows and columns."""
    return Scores(scores.sum((1, 2)), scores.sum((0, 2)))


def _row_forms(coordinates: Coordinates) -> Array:
    """``1/2 w_i^T A w_i``, ``[o]``."""
    matrix = coordinates.weight.reshape(len(coordinates.weight), -1)
    return 0.5 * np.einsum("oi,oi->o", matrix @ coordinates.input_factor, matrix)


def _column_forms(coordinates: Coordinates, blocks: Array) -> Array:
    """``1/2 tr(G W_j B_j W_j^T)``, ``[c]``, for blocks ``[c, taps, taps]``."""
    weight = coordinates.weight
    seen = np.einsum("ojk,jkl->ojl", weight, blocks)
    return 0.5 * np.einsum("ojl,ojl->j", np.tensordot(coordinates.output_factor, weight, axes=1), seen)


def _blocks(matrix: Array, coordinates: Coordinates) -> Array:
    """The ``[taps, taps]`` diagonal blocks of a patch matrix, ``[c, taps, taps]``."""
    _, channels, taps = coordinates.weight.shape
    return np.einsum("jkjl->jkl", matrix.reshape(channels, taps, channels, taps))


def _inverse(factor: Array) -> Array:
    lower = scipy.linalg.cho_factor(damp(factor, _DAMPING), lower=True, check_finite=False)
    return scipy.linalg.cho_solve(lower, np.eye(len(factor)), check_finite=False)
