"""Forms with an input subspace: the core is re-solved under the full patch covariance.

A weight ``W_k`` (one matrix for each tap k) becomes ``core_k @ encoder``: the encoder ``[r, c]`` is a 1x1 convolution
that every tap shares, the core ``[o, r, *kernel]`` a convolution over r channels. Splitting the core once more gives
the three-factor chain ``1x1 -> k x k -> 1x1`` (Tucker-2; Kim et al. 2016, and the chain that EigenDamage writes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, channel_covariance, predicted_loss, symmetrize
from onnx_kfe.kfe._low_rank import TwoFactor, two_factor
from onnx_kfe.kfe._whitening import Whitening, damp, whiten

__all__ = ["InputSubspace", "input_directions", "refine_subspace", "solve_core", "tucker_losses"]

_SOLVE_DAMPING = 1e-10  # keeps the normal equations solvable where channels are dead; no effect otherwise


@dataclass(frozen=True)
class InputSubspace:
    """A weight restricted to an input subspace, with the best core for it.

    Attributes:
        encoder: ``[r, c]``.
        core: ``[o, r, *kernel]``.
        covariance: Patch covariance of the encoded input, ``[r * taps, r * taps]``.
        loss: Predicted loss in nats per sample of the restriction.
    """

    encoder: Array
    core: Array
    covariance: Array
    loss: float

    def output_factors(self, output: Whitening) -> TwoFactor:
        """The best factorisations of the core; their losses add to this one's: the residuals are orthogonal."""
        return two_factor(self.core, self.covariance, output)


def input_directions(weight: Array, input_factor: Array, output_root: Array, damping: float = 1e-3) -> Array:
    """Encoders of every rank: the first r rows are the subspace of rank r.

    Left singular vectors of the whitened weight unfolded over input channels, ``A_c^(1/2) W_k^T G^(1/2)`` side by side
    for all taps, with A_c the channel covariance.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output_root: ``[o, p]`` with ``G = output_root @ output_root^T``; fewer columns restrict G to a subspace.
        damping: Relative damping of the channel covariance.
    """
    taps = input_factor.shape[0] // weight.shape[1]
    channels = whiten(channel_covariance(input_factor, taps), damping)
    by_tap = weight.reshape(weight.shape[0], weight.shape[1], taps)
    seen = np.tensordot(output_root, by_tap, axes=(0, 0))  # [p, c, taps]
    gram = np.tensordot(seen, seen, axes=((0, 2), (0, 2)))
    _, vectors = scipy.linalg.eigh(symmetrize(channels.root @ gram @ channels.root))
    return vectors[:, ::-1].T @ channels.inverse_root


def tucker_losses(
    weight: Array, input_factor: Array, output: Whitening, directions: Array, ranks: Sequence[int]
) -> Iterator[Array]:
    """Predicted losses of the restriction to the first r directions, for each of `ranks` at every output rank.

    With ``C = L L^T`` the encoded covariance and ``X`` the encoded cross moment, the best core explains
    ``G^(1/2) X C^(-1) X^T G^(1/2) = Y^T Y`` with ``Y = L^(-1) X^T G^(1/2)``. The leading rows of Y belong to the
    leading directions, so one Cholesky factor serves all ranks; eigenvalues of ``Y^T Y`` are what output ranks keep.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output: Whitening of G.
        directions: ``[>= max(ranks), c]``, as of `input_directions`.
        ranks: Ranks wanted.

    Yields:
        For each rank r, losses in nats per sample at output ranks 0 to min(o, r * taps); at the last one nothing but
        the input is restricted.
    """
    if not ranks:
        return
    covariance, cross = _encoded(weight, input_factor, directions[: max(ranks)])
    taps = input_factor.shape[0] // weight.shape[1]
    total = predicted_loss(weight, input_factor, output.root @ output.root)
    lower = scipy.linalg.cholesky(damp(covariance, _SOLVE_DAMPING), lower=True, check_finite=False)
    explained = scipy.linalg.solve_triangular(lower, cross.T @ output.root, lower=True, check_finite=False)
    for rank in ranks:
        kept = explained[: rank * taps]
        values = scipy.linalg.eigvalsh(kept.T @ kept)[::-1][: rank * taps]
        yield np.maximum(total - 0.5 * np.append(0.0, np.cumsum(values)), 0.0)


def solve_core(weight: Array, input_factor: Array, output_factor: Array, encoder: Array) -> InputSubspace:
    """The least-squares core for one encoder: ``W A P^T (P A P^T)^(-1)`` with ``P = encoder (x) I``.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
        encoder: ``[r, c]``.
    """
    covariance, cross = _encoded(weight, input_factor, encoder)
    factor = scipy.linalg.cho_factor(damp(covariance, _SOLVE_DAMPING), lower=True, check_finite=False)
    core = scipy.linalg.cho_solve(factor, cross.T, check_finite=False).T
    explained = 0.5 * float(np.vdot(output_factor @ core, 2 * cross - core @ covariance))
    loss = max(predicted_loss(weight, input_factor, output_factor) - explained, 0.0)
    return InputSubspace(encoder, core.reshape(-1, len(encoder), *weight.shape[2:]), covariance, loss)


def refine_subspace(
    weight: Array, input_factor: Array, output: Whitening, rank: int, output_rank: int, sweeps: int = 4
) -> tuple[InputSubspace, TwoFactor]:
    """Alternate between both subspaces (HOOI, De Lathauwer et al. 2000) while the predicted loss falls.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output: Whitening of G.
        rank: Input rank.
        output_rank: Output rank; o for no factor on the output side.
        sweeps: At most this many alternations.
    """
    output_factor = output.root @ output.root
    directions = input_directions(weight, input_factor, output.root)
    best: tuple[InputSubspace, TwoFactor] | None = None
    least = np.inf
    for _ in range(sweeps):
        subspace = solve_core(weight, input_factor, output_factor, directions[:rank])
        factors = subspace.output_factors(output)
        loss = subspace.loss + float(factors.losses[min(output_rank, len(factors.losses) - 1)])
        if best is not None and loss > least * (1 - 1e-3):
            break
        best, least = (subspace, factors), loss
        kept = output.root @ factors.left[:, :output_rank]  # orthonormal: U_r
        directions = input_directions(weight, input_factor, output.root @ kept)
    assert best is not None
    return best


def _encoded(weight: Array, input_factor: Array, encoder: Array) -> tuple[Array, Array]:
    """Patch covariance of the encoded input, ``[r * taps, r * taps]``, and its cross moment with the output."""
    channels = weight.shape[1]
    taps = input_factor.shape[0] // channels
    size = len(encoder) * taps
    blocks = input_factor.reshape(channels, taps, channels, taps)
    half = np.tensordot(encoder, blocks, axes=(1, 0))  # [r, taps, c, taps]
    inner = np.tensordot(half, encoder, axes=(2, 1)).transpose(0, 1, 3, 2)  # [r, taps, r, taps]
    cross = weight.reshape(len(weight), -1) @ half.reshape(size, -1).T
    return symmetrize(inner.reshape(size, size)), cross
