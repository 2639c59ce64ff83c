"""The depthwise-separable chain ``1x1 -> depthwise k x k -> 1x1``: a CP decomposition in the K-FAC metric.

``W[o, c, t] ~ sum_r left[o, r] depthwise[r, t] encoder[r, c]`` is the depthwise variant of EigenDamage (Wang et al.
2019), there a split of the bottleneck's core after pruning. Here the three stages are fitted to the weight itself, in
two metrics, one after the other:

* Alternating least squares finds the codes, that is encoder and depthwise weights, under ``A ~ A_c (x) A_t``, the
  covariances of channels and of taps: whitened by their roots and by that of G the problem is a CP decomposition in the
  Euclidean norm. There the true A would couple all unknowns of a stage.
* `left` is solved under the full patch covariance, exactly: what the codes are worth does not depend on G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, channel_covariance, predicted_loss, symmetrize
from onnx_kfe.kfe._whitening import Whitening, damp, whiten

__all__ = ["Separable", "separable", "separable_losses"]

_INPUT_DAMPING = 1e-3  # of both input covariances, which are inverted
_SOLVE_DAMPING = 1e-10  # keeps the normal equations solvable where channels are dead; no effect otherwise
_SWEEPS = 60
_PLANNING_SWEEPS = 12  # a rank starts from the fit of the rank before it
_RIDGE = 1e-2  # of the share of the energy that is not explained yet; vanishes as the fit becomes exact
_SMALLEST_RIDGE = 1e-12
_FIRST_STRIDE, _STRIDE_GROWTH = 0.5, 1.1
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Separable:
    """A weight as a depthwise-separable chain, the norms of a channel equal in all three stages.

    Attributes:
        encoder: ``[r, c]``.
        depthwise: ``[r, *kernel]``.
        left: ``[o, r]``.
        loss: Predicted loss in nats per sample.
    """

    encoder: Array
    depthwise: Array
    left: Array
    loss: float


def separable(weight: Array, input_factor: Array, output: Whitening, rank: int) -> Separable:
    """A depthwise-separable chain over `rank` channels: a local optimum, `left` the best for its codes.

    Args:
        weight: W, ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``, definite.
        output: Whitening of G.
        rank: r, at most ``c * taps``, where the chain is exact. It may exceed o and c.
    """
    tensor, channels, kernel = _whitened(weight, input_factor, output)
    encoder, depthwise = next(_fits(tensor, [rank], _SWEEPS))
    total = predicted_loss(weight, input_factor, output.root @ output.root)
    chain = _solve_left(weight, input_factor, output, encoder @ channels, depthwise @ kernel, total)
    return _balanced(chain)


def separable_losses(weight: Array, input_factor: Array, output: Whitening, ranks: Sequence[int]) -> list[float]:
    """Predicted losses in nats per sample of chains over r channels, for each of `ranks`.

    Attained, but after fewer sweeps than `separable` makes: an upper bound that lies some ten percent above it.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``, definite.
        output: Whitening of G.
        ranks: Ranks wanted, ascending.

    Returns:
        As many losses, never rising: a chain over more channels can leave some unused.
    """
    tensor, channels, kernel = _whitened(weight, input_factor, output)
    total = predicted_loss(weight, input_factor, output.root @ output.root)
    losses = [
        _solve_left(weight, input_factor, output, encoder @ channels, depthwise @ kernel, total).loss
        for encoder, depthwise in _fits(tensor, ranks, _PLANNING_SWEEPS)
    ]
    return [float(loss) for loss in np.minimum.accumulate(losses)]


def _whitened(weight: Array, input_factor: Array, output: Whitening) -> tuple[Array, Array, Array]:
    """The whitened tensor ``[o, c, taps]`` in its principal directions, the ways back for encoders and for taps.

    Both channel axes are rotated so that the directions with most energy come first (HOSVD).
    """
    taps = input_factor.shape[0] // weight.shape[1]
    channels = whiten(channel_covariance(input_factor, taps), _INPUT_DAMPING)
    kernel = whiten(_tap_covariance(input_factor, taps), _INPUT_DAMPING)
    tensor = weight.reshape(*weight.shape[:2], taps) @ kernel.root
    tensor = np.einsum("oct,op,cd->pdt", tensor, output.root, channels.root, optimize=True)
    outputs, inputs = _principal(tensor, 0), _principal(tensor, 1)
    tensor = np.einsum("oct,op,cd->pdt", tensor, outputs, inputs, optimize=True)
    return tensor, inputs.T @ channels.inverse_root, kernel.inverse_root


def _tap_covariance(patch_covariance: Array, taps: int) -> Array:
    """The ``[taps, taps]`` covariance of taps, summed over channels; its mean variance is 1: A_c carries the scale."""
    channels = patch_covariance.shape[0] // taps
    summed = np.einsum("ckcl->kl", patch_covariance.reshape(channels, taps, channels, taps))
    return summed * (taps / max(float(np.trace(summed)), _TINY))


def _principal(tensor: Array, axis: int) -> Array:
    """Orthonormal directions of an axis as columns, most energy first."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    _, vectors = scipy.linalg.eigh(unfolded @ unfolded.T)
    return vectors[:, ::-1]


def _fits(tensor: Array, ranks: Sequence[int], sweeps: int) -> Iterator[tuple[Array, Array]]:
    """Encoders ``[r, c]`` and depthwise weights ``[r, taps]`` for each of `ranks`, ascending: each grows into the next.

    The fit at rank r sees somewhat more than the r leading directions of either channel axis: hardly any energy that r
    components could reach lies beyond, and sweeps become cheap.
    """
    rng = np.random.default_rng(0)
    _, inputs, taps = tensor.shape
    encoder, depthwise = np.zeros((0, inputs)), np.zeros((0, taps))
    for rank in ranks:
        seen = rank + max(rank // 2, 8)
        part = np.ascontiguousarray(tensor[:seen, :seen])
        size, new = part.shape[1], rank - len(encoder)
        grown = np.vstack([encoder[:, :size], rng.normal(size=(new, size))])
        encoder, depthwise = _alternate(part, grown, np.vstack([depthwise, rng.normal(size=(new, taps))]), sweeps)
        encoder = np.pad(encoder, ((0, 0), (0, inputs - size)))
        yield encoder, depthwise


def _alternate(tensor: Array, encoder: Array, depthwise: Array, sweeps: int) -> tuple[Array, Array]:
    """Alternating least squares for ``tensor ~ sum_r left[r, o] encoder[r, c] depthwise[r, t]``.

    Sweeps start from a point extrapolated beyond the last one, and fall back to it when that raised the objective (Ang
    et al. 2020), which takes a fraction of the sweeps. A ridge on the components keeps them from growing against each
    other, as they do where no best approximation exists (de Silva & Lim 2008).
    """
    energy = max(float(np.vdot(tensor, tensor)), _TINY)
    ridge, stride, least = _RIDGE, _FIRST_STRIDE, np.inf
    best = start = encoder, depthwise
    for _ in range(sweeps):
        *found, explained = _sweep(tensor, *start, ridge)
        if energy - explained > least:
            start, stride = best, stride / 2
            continue
        step = stride if np.isfinite(least) else 0.0  # nothing to extrapolate from before the first
        start = found[0] + step * (found[0] - best[0]), found[1] + step * (found[1] - best[1])
        best, least, stride = (found[0], found[1]), energy - explained, min(stride * _STRIDE_GROWTH, 1.0)
        ridge = max(_RIDGE * least / energy, _SMALLEST_RIDGE)
    return _unit(best[0]), best[1]


def _sweep(tensor: Array, encoder: Array, depthwise: Array, ridge: float) -> tuple[Array, Array, float]:
    """One round of least squares: the next encoder and depthwise weights, the energy explained less the penalty.

    Two factors have unit norm while the third is solved for, so that the ridge is on the norms of whole components.
    """
    encoder, depthwise = _unit(encoder), _unit(depthwise)
    gram, seen = encoder @ encoder.T, np.tensordot(encoder, tensor, axes=(1, 1))  # [r, o, taps]
    left = _unit(_ridge_solve(gram * (depthwise @ depthwise.T), (seen @ depthwise[:, :, None])[:, :, 0], ridge))
    depthwise = _unit(_ridge_solve(gram * (left @ left.T), (left[:, None, :] @ seen)[:, 0], ridge))
    cross = (np.tensordot(left, tensor, axes=(1, 0)) @ depthwise[:, :, None])[:, :, 0]  # [r, c]
    encoder = _ridge_solve((left @ left.T) * (depthwise @ depthwise.T), cross, ridge)
    return encoder, depthwise, float(np.vdot(encoder, cross))


def _ridge_solve(gram: Array, cross: Array, ridge: float) -> Array:
    factor = scipy.linalg.cho_factor(gram + ridge * np.eye(len(gram)), lower=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, cross, check_finite=False)


def _solve_left(
    weight: Array, input_factor: Array, output: Whitening, encoder: Array, depthwise: Array, total: float
) -> Separable:
    """The least-squares `left` ``W A M^T (M A M^T)^(-1)`` for codes ``M x``, ``M[r, (c, t)] = encoder depthwise``."""
    codes = (encoder[:, :, None] * depthwise[:, None, :]).reshape(len(encoder), -1)
    seen = codes @ input_factor
    covariance = symmetrize(seen @ codes.T)
    cross = weight.reshape(len(weight), -1) @ seen.T
    factor = scipy.linalg.cho_factor(damp(covariance, _SOLVE_DAMPING), lower=True, check_finite=False)
    left = scipy.linalg.cho_solve(factor, cross.T, check_finite=False).T
    explained = 0.5 * float(np.vdot(output.root @ left, output.root @ (2 * cross - left @ covariance)))
    kernel = weight.shape[2:]
    return Separable(encoder, depthwise.reshape(-1, *kernel), left, max(total - explained, 0.0))


def _balanced(chain: Separable) -> Separable:
    """The same chain with the norms of each channel equal in all three stages."""
    rank = len(chain.encoder)
    stages = chain.encoder, chain.depthwise.reshape(rank, -1), chain.left.T
    norms = np.stack([np.linalg.norm(stage, axis=1) for stage in stages])
    scales = np.cbrt(norms.prod(axis=0)) / np.maximum(norms, _TINY)
    encoder, depthwise, left = (stage * scale[:, None] for stage, scale in zip(stages, scales, strict=True))
    return Separable(encoder, depthwise.reshape(chain.depthwise.shape), left.T, chain.loss)


def _unit(matrix: Array) -> Array:
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), _TINY)
