"""Forms for convolutions and for their adjoints, with the chain of an adjoint found as that of a convolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx_kfe.graph import Geometry
from onnx_kfe.planning._chain import Link, Stage
from onnx_kfe.planning._form import Form
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["TwoWay"]


class TwoWay(Form):
    """A form of convolutions and products, and of ConvTranspose the adjoint of another form of the convolution.

    The adjoint of a chain is the chain of the adjoints in reverse order: that of ``k x k -> 1x1`` is
    ``1x1 -> k x k``, transposed. So are its ranks.

    Args:
        form: The form, which gives its name.
        mirror: The form whose adjoint is that form of a ConvTranspose; the same one where None.
    """

    def __init__(self, form: Form, mirror: Form | None = None) -> None:
        self.name = form.name
        self._form, self._mirror = form, mirror or form

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        if geometry.transposed:
            return self._mirror.limits(geometry.adjoint, ranks[::-1])[::-1]
        return self._form.limits(geometry, ranks)

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        if geometry.transposed:
            return [link.adjoint for link in reversed(self._mirror.links(geometry.adjoint, ranks[::-1]))]
        return self._form.links(geometry, ranks)

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Those of the form, or of its mirror."""
        if geometry.transposed:
            return self._mirror.grids(geometry.adjoint, round_to)[::-1]
        return self._form.grids(geometry, round_to)

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        if not problem.geometry.transposed:
            yield from self._form.losses(problem, round_to)
            return
        for ranks, loss in self._mirror.losses(problem.adjoint, round_to):
            yield ranks[::-1], loss

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        if problem.geometry.transposed:
            return [stage.adjoint for stage in reversed(self._mirror.stages(problem.adjoint, ranks[::-1]))]
        return self._form.stages(problem, ranks)
