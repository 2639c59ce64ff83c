"""Pure mathematics on float64 arrays: small forms of a weight, and what its parts matter, under K-FAC curvature."""

from onnx_kfe.kfe._compensation import compensate
from onnx_kfe.kfe._coordinates import (
    BASES,
    Coordinates,
    EigenMoments,
    channel_coordinates,
    eigen_bases,
    eigen_coordinates,
)
from onnx_kfe.kfe._covariance import Array, above_rounding, centre, channel_covariance, predicted_loss, symmetrize
from onnx_kfe.kfe._importance import IMPORTANCES, Importance, Scores
from onnx_kfe.kfe._joint import Balance, balance
from onnx_kfe.kfe._low_rank import TwoFactor, two_factor
from onnx_kfe.kfe._pivoting import BlockDiagonal, block_diagonal
from onnx_kfe.kfe._separable import Separable, separable, separable_losses
from onnx_kfe.kfe._tucker import InputSubspace, input_directions, refine_subspace, solve_core, tucker_losses
from onnx_kfe.kfe._whitening import Whitening, damp, whiten

__all__ = [
    "BASES",
    "IMPORTANCES",
    "Array",
    "Balance",
    "BlockDiagonal",
    "Coordinates",
    "EigenMoments",
    "Importance",
    "InputSubspace",
    "Scores",
    "Separable",
    "TwoFactor",
    "Whitening",
    "above_rounding",
    "balance",
    "block_diagonal",
    "centre",
    "channel_coordinates",
    "channel_covariance",
    "compensate",
    "damp",
    "eigen_bases",
    "eigen_coordinates",
    "input_directions",
    "predicted_loss",
    "refine_subspace",
    "separable",
    "separable_losses",
    "solve_core",
    "symmetrize",
    "tucker_losses",
    "two_factor",
    "whiten",
]
