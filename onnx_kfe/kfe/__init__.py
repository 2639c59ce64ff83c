"""Pure mathematics on float64 arrays: whitening, and small forms of a weight under Kronecker-factored curvature."""

from onnx_kfe.kfe._covariance import Array, above_rounding, centre, channel_covariance, predicted_loss, symmetrize
from onnx_kfe.kfe._low_rank import TwoFactor, two_factor
from onnx_kfe.kfe._pivoting import BlockDiagonal, block_diagonal
from onnx_kfe.kfe._separable import Separable, separable, separable_losses
from onnx_kfe.kfe._tucker import InputSubspace, input_directions, refine_subspace, solve_core, tucker_losses
from onnx_kfe.kfe._whitening import Whitening, damp, whiten

__all__ = [
    "Array",
    "BlockDiagonal",
    "InputSubspace",
    "Separable",
    "TwoFactor",
    "Whitening",
    "above_rounding",
    "block_diagonal",
    "centre",
    "channel_covariance",
    "damp",
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
