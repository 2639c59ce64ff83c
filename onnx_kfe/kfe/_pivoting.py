"""Block-diagonal after pivoting: a grouped convolution between two permutations of channels.

Sredojevic et al. (2017) permute rows and columns of a weight so that what matters falls into blocks, and train with the
rest at zero. Here nothing is trained: blocks are chosen by the loss that K-FAC predicts for each pair of channels, and
the weights inside them are solved anew under the full curvature, so that they make up for those outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

from onnx_kfe.kfe._covariance import Array, symmetrize
from onnx_kfe.kfe._whitening import Whitening, damp

__all__ = ["BlockDiagonal", "block_diagonal"]

_Labels = npt.NDArray[np.intp]  # the group of each channel

_ROUNDS = 12  # of moving some columns and alternating anew
_MOVED = 0.2  # of the columns
_MEANS_STEPS = 10
_SOLVE_DAMPING = 1e-10  # keeps the blocks invertible where channels are dead; no effect otherwise
_TOLERANCE = 3e-3  # of the loss: what a further step may still gain
_ROUNDING = 1e-12  # of the loss without the layer
_MOST_STEPS = 30
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class BlockDiagonal:
    """A weight that is block-diagonal in permuted channels: a grouped convolution from ``columns`` to ``rows``.

    Attributes:
        weight: ``[groups, o / groups, c / groups, *kernel]``.
        rows: The original output channel at each place, ``[o]``.
        columns: The original input channel at each place, ``[c]``.
        loss: Predicted loss in nats per sample.
    """

    weight: Array
    rows: _Labels
    columns: _Labels
    loss: float


def block_diagonal(weight: Array, input_factor: Array, output: Whitening, groups: int) -> BlockDiagonal:
    """Choose `groups` equal blocks and solve for the weights in them.

    Args:
        weight: W, ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output: Whitening of G.
        groups: Number of blocks, which divides o and c.
    """
    channels = weight.shape[1]
    output_factor = symmetrize(output.root @ output.root)
    row_groups, column_groups = _pivot(_energies(weight, input_factor, output_factor), groups)
    rows, columns = (np.argsort(labels, kind="stable") for labels in (row_groups, column_groups))
    places = np.arange(len(input_factor)).reshape(channels, -1)[columns].reshape(-1)
    matrix = weight.reshape(len(weight), -1)[np.ix_(rows, places)]
    blocks, loss = _solve_blocks(
        matrix, input_factor[np.ix_(places, places)], output_factor[np.ix_(rows, rows)], groups
    )
    shape = (groups, len(rows) // groups, channels // groups, *weight.shape[2:])
    return BlockDiagonal(blocks.reshape(shape), rows, columns, loss)


def _energies(weight: Array, input_factor: Array, output_factor: Array) -> Array:
    """Twice the loss of dropping the weights between an output and an input channel alone, ``[o, c]``."""
    outputs, channels = weight.shape[:2]
    by_tap = weight.reshape(outputs, channels, -1)
    taps = by_tap.shape[2]
    within = np.einsum("ckcl->ckl", input_factor.reshape(channels, taps, channels, taps))
    squares = np.einsum("ock,ckl,ocl->oc", by_tap, within, by_tap, optimize=True)
    return np.diag(output_factor)[:, None] * np.maximum(squares, 0.0)


def _pivot(energy: Array, groups: int) -> tuple[_Labels, _Labels]:
    """Balanced groups of rows and of columns that keep much of the energy in common blocks.

    Best assignments of rows given columns and of columns given rows alternate, from a spectral start and from channels
    as they are; then from some columns of the best moved at random, as long as that finds more.
    """
    rng = np.random.default_rng(0)
    channels = energy.shape[1]
    starts = (_spectral_groups(energy, groups), np.arange(channels) * groups // channels)
    best = max((_alternate(energy, start, groups) for start in starts), key=lambda found: found[0])
    for _ in range(_ROUNDS):
        start = best[2].copy()
        moved = rng.choice(channels, max(2, round(_MOVED * channels)), replace=False)
        start[moved] = rng.permutation(start[moved])
        best = max(best, _alternate(energy, start, groups), key=lambda found: found[0])
    return best[1], best[2]


def _alternate(energy: Array, columns: _Labels, groups: int) -> tuple[float, _Labels, _Labels]:
    """The energy kept, groups of rows and groups of columns once neither has a better balanced assignment."""
    units = np.eye(groups)
    best: tuple[float, _Labels, _Labels] = (-1.0, columns, columns)
    while True:
        rows = _balanced(energy @ units[columns])
        columns = _balanced(energy.T @ units[rows])
        kept = float(energy[rows[:, None] == columns].sum())
        if kept <= best[0] * (1 + 1e-9):
            return best
        best = kept, rows, columns


def _balanced(scores: Array) -> _Labels:
    """The group of each member, equally many in each, with the largest sum of scores ``[members, groups]``."""
    members, groups = scores.shape
    size = members // groups
    _, seats = scipy.optimize.linear_sum_assignment(np.repeat(scores, size, axis=1), maximize=True)
    return seats // size


def _spectral_groups(energy: Array, groups: int) -> _Labels:
    """Groups of columns by spectral co-clustering (Dhillon 2001), its k-means with balanced assignments."""
    energy = energy + 1e-6 * energy.mean() + _TINY
    rows, columns = (np.sqrt(energy.sum(axis=axis)) for axis in (1, 0))
    _, _, right = scipy.linalg.svd(energy / rows[:, None] / columns, full_matrices=False)
    points = right[:groups].T / columns[:, None]
    seeds = [int(np.argmax(np.square(points).sum(axis=1)))]
    while len(seeds) < groups:  # the point farthest from all seeds
        seeds.append(int(np.argmax(_squared_distances(points, points[seeds]).min(axis=1))))
    centres = points[seeds]
    for _ in range(_MEANS_STEPS):
        labels = _balanced(-_squared_distances(points, centres))
        centres = np.stack([points[labels == group].mean(axis=0) for group in range(groups)])
    return labels


def _squared_distances(points: Array, centres: Array) -> Array:
    return np.square(points[:, None] - centres).sum(axis=2)


def _solve_blocks(matrix: Array, input_factor: Array, output_factor: Array, groups: int) -> tuple[Array, float]:
    """The blocks ``[groups, o / groups, i / groups]`` of least predicted loss, by conjugate gradients, and that loss.

    The loss is least where ``G (B - W) A`` vanishes on the blocks B. Were G zero between groups, that would be
    ``B_p = W[p, :] A[:, p] A[p, p]^(-1)`` group by group, whatever G is within them. As it is not, outputs of one group
    make up for those of another, and the system is coupled; the blocks ``G[p, p] (x) A[p, p]`` precondition it.
    """
    outputs, inputs = matrix.shape
    seen = matrix @ input_factor
    total = loss = 0.5 * float(np.vdot(output_factor @ matrix, seen))
    if total <= _TINY:  # a dead layer, whose factors have no inverses
        return np.zeros((groups, outputs // groups, inputs // groups)), 0.0
    inner, outer = (_inverse_blocks(factor, groups) for factor in (input_factor, output_factor))

    def weighted(seen: Array) -> Array:
        """``G seen`` on the blocks, for ``[o, i]``."""
        by_group = seen.reshape(outputs, groups, inputs // groups).transpose(1, 0, 2)
        return output_factor.reshape(groups, outputs // groups, outputs) @ by_group

    def curvature(blocks: Array) -> Array:
        seen = blocks @ input_factor.reshape(groups, inputs // groups, inputs)
        return weighted(seen.reshape(outputs, inputs))

    residual = weighted(seen)
    blocks = np.zeros_like(residual)
    direction = outer @ residual @ inner
    strength = float(np.vdot(residual, direction))  # about twice what there is to gain
    for _ in range(_MOST_STEPS):
        if strength <= max(_TOLERANCE * loss, _ROUNDING * total):
            break
        curved = curvature(direction)
        step = strength / float(np.vdot(direction, curved))
        blocks, residual, loss = blocks + step * direction, residual - step * curved, loss - 0.5 * step * strength
        steepest, previous = outer @ residual @ inner, strength
        strength = float(np.vdot(residual, steepest))
        direction = steepest + strength / previous * direction
    return blocks, max(loss, 0.0)


def _inverse_blocks(matrix: Array, groups: int) -> Array:
    """Inverses of the diagonal blocks, ``[groups, n / groups, n / groups]``."""
    size = len(matrix) // groups
    blocks = np.einsum("gigj->gij", matrix.reshape(groups, size, groups, size))
    return np.linalg.inv(np.stack([damp(block, _SOLVE_DAMPING) for block in blocks]))
