"""Forms that keep the most important directions of the Kronecker-factored eigenbasis: EigenDamage and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_kfe.graph import Geometry
from onnx_kfe.kfe import IMPORTANCES, Array, Scores, compensate, separable, whiten
from onnx_kfe.planning._chain import Link, Stage, chain_cost
from onnx_kfe.planning._form import Form, all_axes
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["DIRECTION_FORMS", "DirectionChain", "Directions", "best", "three_factors"]


@dataclass(frozen=True)
class Directions:
    """A weight between the directions that are kept: ``decoder @ core_k @ encoder`` at each tap k.

    Attributes:
        encoder: ``[r, c]``.
        core: ``[s, r, *kernel]``.
        decoder: ``[o, s]``.
    """

    encoder: Array
    core: Array
    decoder: Array

    def around(self, inner: Directions) -> Directions:
        """The same with directions of the core kept in its place: rotations are folded, ``Q <- Q Q_new``."""
        return Directions(inner.encoder @ self.encoder, inner.core, self.decoder @ inner.decoder)


class DirectionChain(Form):
    """``1x1`` into the input directions kept, ``k x k`` to the output directions kept, ``1x1`` out.

    Unlike those of `TuckerChain` its directions are eigenvectors of the factors, the most important first (EigenDamage,
    Wang et al. 2019). Where k is 1 the core becomes one with the rotation on its narrower side, which changes nothing.
    For ungrouped layers.

    Args:
        name: Name of the form.
        importance: Key of `IMPORTANCES`.
        published: Whether everything is as published: inputs not centred, positions taken for independent, no damping,
            and the bias left as it is.
    """

    searched = False

    def __init__(self, name: str, importance: str, *, published: bool = False) -> None:
        self.name = name
        self.importance = importance
        self.moves_bias = not published
        self.published = published

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        return (geometry.in_channels, geometry.out_channels) if geometry.groups == 1 and not geometry.transposed else ()

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        return _links(geometry, ranks)

    def accepted(self, geometry: Geometry, ranks: Sequence[int]) -> bool:
        """Whether the bottleneck has fewer parameters than the layer, which is all that EigenDamage asks of it."""
        return chain_cost(geometry, _links(geometry, ranks)).parameters < geometry.weight_parameters

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """None: one threshold for the whole model decides on the ranks."""
        return iter(())

    def scores(self, problem: LayerProblem) -> Scores:
        """Importances of the output directions ``[o]`` and of the input directions ``[c]``."""
        (coordinates,) = problem.coordinates("kfe", published=self.published)
        return IMPORTANCES[self.importance](coordinates)

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        return self.written(self.directions(problem, ranks), problem.geometry)

    def written(self, kept: Directions, geometry: Geometry) -> list[Stage]:
        """The chain of some directions."""
        return _bottleneck(kept, geometry)

    def directions(self, problem: LayerProblem, ranks: Sequence[int]) -> Directions:
        """The most important directions, and the weight between them."""
        (coordinates,) = problem.coordinates("kfe", published=self.published)
        importance = IMPORTANCES[self.importance]
        inside, outside = ranks
        scores = importance(coordinates)
        rows, columns = (best(s, count) for s, count in zip(scores, (outside, inside), strict=True))
        weight = coordinates.weight
        if importance.compensates:
            core = compensate(weight, coordinates.input_factor, coordinates.output_factor, rows, columns)
        else:
            core = weight[rows][:, columns]
        core = core.reshape(*core.shape[:2], *problem.weight.shape[3:])
        return Directions(coordinates.input_basis[:, columns].T, core, coordinates.output_basis[:, rows])


class SeparableDirections(DirectionChain):
    """The depthwise variant of EigenDamage: the core split into ``1x1 -> depthwise k x k -> 1x1`` (CP).

    The outer factors join the rotations. Its rank is the smaller of the numbers of directions kept, as published.
    """

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        if geometry.taps == 1:
            return super().links(geometry, ranks)
        narrow = min(ranks)
        depthwise = Link(narrow, narrow, narrow, all_axes(geometry))
        return [Link(geometry.in_channels, narrow), depthwise, Link(narrow, geometry.out_channels)]

    def written(self, kept: Directions, geometry: Geometry) -> list[Stage]:
        if geometry.taps == 1:
            return super().written(kept, geometry)
        outputs, inputs = kept.core.shape[:2]
        metric = np.eye(kept.core[0].size), whiten(np.eye(outputs))
        chain = separable(kept.core, *metric, min(outputs, inputs))
        depthwise = Stage(chain.depthwise[:, None, None], all_axes(geometry))
        return [Stage((chain.encoder @ kept.encoder)[None]), depthwise, Stage((kept.decoder @ chain.left)[None])]


def _bottleneck(kept: Directions, geometry: Geometry) -> list[Stage]:
    """The three-factor chain of some directions, two factors where the kernel is 1 wide."""
    axes = all_axes(geometry)
    if geometry.taps > 1:
        return three_factors(kept, geometry)
    core = kept.core.reshape(kept.core.shape[:2])
    narrow = len(kept.encoder) <= len(core)
    first, last = (kept.encoder, kept.decoder @ core) if narrow else (core @ kept.encoder, kept.decoder)
    return [Stage(first.reshape(1, *first.shape, *[1] * len(axes)), axes), Stage(last[None])]


def three_factors(kept: Directions, geometry: Geometry) -> list[Stage]:
    """The chain of some directions with the core by itself, for later rounds to drop more of."""
    return [Stage(kept.encoder[None]), Stage(kept.core[None], all_axes(geometry)), Stage(kept.decoder[None])]


def _links(geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
    inside, outside = ranks
    if geometry.taps == 1:
        narrow = min(ranks)
        return [Link(geometry.in_channels, narrow, axes=all_axes(geometry)), Link(narrow, geometry.out_channels)]
    core = Link(inside, outside, axes=all_axes(geometry))
    return [Link(geometry.in_channels, inside), core, Link(outside, geometry.out_channels)]


def best(scores: Array, count: int) -> npt.NDArray[np.bool_]:
    """Where the highest scores are, of equal ones the first."""
    mask = np.zeros(len(scores), np.bool_)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


DIRECTION_FORMS: dict[str, DirectionChain] = {
    "eigendamage": DirectionChain("eigendamage", "c-obd", published=True),
    "eigendamage-depthwise": SeparableDirections("eigendamage_depthwise", "c-obd", published=True),
    **{
        f"kfe {name}": DirectionChain(f"kfe_{name.replace('-', '_')}", name)
        for name, importance in IMPORTANCES.items()
        if "kfe" in importance.bases
    },
}
"""By method; every importance that is defined in the KFE has one."""
