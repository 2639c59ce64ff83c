"""Sums over samples and positions of one layer, which merge by adding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnx_kfe.errors import KfeError
from onnx_kfe.kfe import Array, EigenMoments, centre, symmetrize

__all__ = ["LayerStatistics", "PositionMeans"]

_TINY = float(np.finfo(np.float64).tiny)


@dataclass
class PositionMeans:
    """Sums over rows, one for each entry of the leading axis, of what is averaged over the positions of a row.

    K-FAC takes the positions of a sample for independent. Where they are not, as before a global average pooling that
    hands all of them one gradient, changes at all positions add up coherently, and the loss is larger than ``A (x) G``
    says, up to T times. Split input and cotangent into their mean over the positions and the deviations from it, which
    are taken for independent; with the shares ``rho`` of their variance that the means carry, the trace of the Fisher
    information is that of ``A (x) G`` times ``(1 - rho_A)(1 - rho_G) + T rho_A rho_G``: the deviations as in the
    `expand` setting, the means as in the `reduce` setting of Eschenhagen et al. (2023).

    Attributes:
        rows: Number of rows.
        input_mean: Sum of the means of the input, ``[c]``.
        input_mean_square: Sum of their squared norms.
        cotangent_mean_square: Sum of the squared norms of the means of the cotangent, at nodes with more positions than
            others with the same weight in proportion to these.
    """

    rows: float = 0.0
    input_mean: Array = field(default_factory=lambda: np.zeros(1))
    input_mean_square: float = 0.0
    cotangent_mean_square: float = 0.0

    def coherence(self, positions: float, input_variance: float, cotangent_square: float) -> float:
        """``(1 - rho_A)(1 - rho_G) + T rho_A rho_G``.

        Args:
            positions: Positions summed over.
            input_variance: Variance of the input over all positions, summed over channels.
            cotangent_square: Mean squared norm of the cotangent, the trace of G.
        """
        centre_square = float(np.square(self.input_mean / self.rows).sum())
        input_share = _share(self.input_mean_square / self.rows - centre_square, input_variance)
        cotangent_share = _share(self.cotangent_mean_square / self.rows, cotangent_square)
        independent = (1 - input_share) * (1 - cotangent_share)
        return independent + positions / self.rows * input_share * cotangent_share

    def cut(self, columns: np.ndarray, cotangent_share: float) -> PositionMeans:
        """The sums over fewer channels, taking the shares of the means for the same in all of them.

        Args:
            columns: Input channels kept, ``[c]``.
            cotangent_share: Share of the squared cotangents that is left.
        """
        kept, whole = (float(np.square(part).sum()) for part in (self.input_mean[columns], self.input_mean))
        share = kept / whole if whole > 0 else float(columns.mean())
        return PositionMeans(
            self.rows, self.input_mean[columns], self.input_mean_square * share,
            self.cotangent_mean_square * cotangent_share,
        )  # fmt: skip

    def in_basis(self, inputs: Array, input_ratio: float, cotangent_ratio: float) -> PositionMeans:
        """The sums in another basis, taking the shares of the means for the same in all directions.

        Args:
            inputs: Q of ``x' = Q x``, ``[c, c]``.
            input_ratio: Variance of the input there over that here.
            cotangent_ratio: Squared norm of the cotangents there over that here.
        """
        mean = inputs @ self.input_mean
        around = self.input_mean_square - float(np.square(self.input_mean).sum()) / self.rows
        return PositionMeans(
            self.rows, mean, around * input_ratio + float(np.square(mean).sum()) / self.rows,
            self.cotangent_mean_square * cotangent_ratio,
        )  # fmt: skip

    def __add__(self, other: PositionMeans) -> PositionMeans:
        return PositionMeans(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


def _share(part: float, whole: float) -> float:
    return float(np.clip(part / whole, 0.0, 1.0)) if whole > 0 else 0.0


@dataclass
class LayerStatistics:
    """Sums over samples and positions of one layer; patches are channel-major, ``i = c * taps``.

    Of a ConvTranspose, where a position of the input writes a patch of the output, positions are those of the input,
    ``i = c``, and ``o`` below are patches of its cotangent.

    Attributes:
        input_second_moment: Sum of ``x x^T``, ``[groups, i, i]``.
        input_sum: Sum of x, ``[groups, i]``.
        cotangent_second_moment: Sum of ``g g^T``, ``[groups, o, o]`` with o the output channels of a group.
        positions: Number of positions summed over.
        samples: Number of samples N.
        common: What the positions of a sample have in common.
        saliency_sum: Sum of the squared derivative of a sample's loss by a gate on an output channel, ``[groups,
            out/groups]``; None in files of before it was collected.
        eigen: Second moments in the eigenbases, summed over samples, where a second pass collected them (EKFAC).
    """

    input_second_moment: Array
    input_sum: Array
    cotangent_second_moment: Array
    positions: float
    samples: int
    common: PositionMeans = field(default_factory=lambda: PositionMeans())
    saliency_sum: Array | None = None
    eigen: EigenMoments | None = None

    @property
    def mean(self) -> Array:
        """mu, ``[groups, i]``, over samples and positions."""
        return self.input_sum / self.positions

    @property
    def input_factor(self) -> Array:
        """A, ``[groups, i, i]``: summed over positions, averaged over samples (`expand` setting)."""
        return symmetrize(self.input_second_moment / self.samples)

    @property
    def centred_input_factor(self) -> Array:
        """A less what the bias absorbs, ``A - T mu mu^T``."""
        return centre(self.input_factor, self.mean, self.positions / self.samples)

    @property
    def output_factor(self) -> Array:
        """G, ``[groups, o, o]``: averaged over samples and positions."""
        return symmetrize(self.cotangent_second_moment / self.positions)

    @property
    def coherence(self) -> float:
        """Trace of the Fisher information over that of ``A (x) G``, see `PositionMeans`."""
        if not self.common.rows:
            return 1.0
        variances = np.einsum("gii->gi", self.centred_input_factor).reshape(len(self.common.input_mean), -1)
        middle = variances[:, variances.shape[1] // 2]  # the tap that sees the least of the padding
        cotangent_square = np.einsum("gii->", self.output_factor)
        return self.common.coherence(
            self.positions, float(middle.sum()) * self.samples / self.positions, float(cotangent_square)
        )

    @property
    def uncentred(self) -> LayerStatistics:
        """The same with the means of inputs taken for zero, as where no bias can make up for them."""
        common = dataclasses.replace(self.common, input_mean=np.zeros_like(self.common.input_mean))
        return dataclasses.replace(self, input_sum=np.zeros_like(self.input_sum), common=common)

    @property
    def saliency(self) -> Array | None:
        """``E_n[(sum_t y_t g_t)^2]`` of each output channel, ``[groups, o]``: the Fisher of a gate on it."""
        return None if self.saliency_sum is None else self.saliency_sum / self.samples

    def eigen_moments(self, group: int) -> EigenMoments | None:
        """Eigenbases of one group and the second moments in them, averaged over samples; None if not collected."""
        if self.eigen is None:
            return None
        moments = self.eigen.second_moment[group] / self.samples
        return EigenMoments(self.eigen.input_basis[group], self.eigen.output_basis[group], moments)

    def cut(self, rows: np.ndarray, columns: np.ndarray) -> LayerStatistics:
        """The statistics of what is left of the layer without some channels; moments in eigenbases are dropped.

        Args:
            rows: Output channels kept, ``[out]`` over all groups, as many in each.
            columns: Input channels kept, ``[in]`` over all groups, as many in each.
        """
        groups, outputs, _ = self.cotangent_second_moment.shape
        taps, written = self.input_sum.size // len(columns), groups * outputs // len(rows)
        row_places = [np.flatnonzero(np.repeat(mask, written)) for mask in rows.reshape(groups, -1)]
        column_places = [np.flatnonzero(np.repeat(mask, taps)) for mask in columns.reshape(groups, -1)]
        cotangents = _cut(self.cotangent_second_moment, row_places)
        share = float(np.einsum("gii->", cotangents) / max(np.einsum("gii->", self.cotangent_second_moment), _TINY))
        return LayerStatistics(
            _cut(self.input_second_moment, column_places),
            np.stack([total[kept] for total, kept in zip(self.input_sum, column_places, strict=True)]),
            cotangents, self.positions, self.samples,
            self.common.cut(columns, share) if self.common.rows else self.common,
            None if self.saliency_sum is None else self.saliency_sum.reshape(-1)[rows].reshape(groups, -1),
        )  # fmt: skip

    def in_basis(self, outputs: Array, inputs: Array) -> LayerStatistics:
        """The statistics of the layer with other bases of its channels; for one group, and inputs for one tap.

        Moments in eigenbases are dropped, and so are saliencies, which are of the channels as they were.

        Args:
            outputs: R of ``y' = R y``, ``[out, out]``, so that cotangents become ``R^-T g``.
            inputs: Q of ``x' = Q x``, ``[in, in]``; the identity of a layer with more than one tap.
        """
        back = np.linalg.inv(outputs)
        taps = self.input_sum.shape[1] // len(inputs)
        patches = np.kron(inputs, np.eye(taps))
        turned = LayerStatistics(
            patches @ self.input_second_moment @ patches.T, self.input_sum @ patches.T,
            back.T @ self.cotangent_second_moment @ back, self.positions, self.samples,
        )  # fmt: skip
        if not self.common.rows:
            return turned
        ratios = [
            float(np.trace(after[0]) / max(np.trace(before[0]), _TINY))
            for after, before in (
                (turned.centred_input_factor, self.centred_input_factor), (turned.output_factor, self.output_factor)
            )
        ]  # fmt: skip
        return dataclasses.replace(turned, common=self.common.in_basis(inputs, *ratios))

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("saliency_sum", "eigen")
        }
        saliency = None
        if self.saliency_sum is not None and other.saliency_sum is not None:
            saliency = self.saliency_sum + other.saliency_sum
        return LayerStatistics(**sums, saliency_sum=saliency, eigen=_merged(self.eigen, other.eigen))


def _cut(moments: Array, places: Sequence[npt.NDArray[np.intp]]) -> Array:
    return np.stack([moment[np.ix_(kept, kept)] for moment, kept in zip(moments, places, strict=True)])


def _merged(one: EigenMoments | None, other: EigenMoments | None) -> EigenMoments | None:
    if one is None and other is None:
        return None
    if (
        one is None
        or other is None
        or not all(
            np.array_equal(getattr(one, basis), getattr(other, basis)) for basis in ("input_basis", "output_basis")
        )
    ):
        raise KfeError("cannot merge second moments of different eigenbases: merge first, then collect these")
    return dataclasses.replace(one, second_moment=one.second_moment + other.second_moment)
