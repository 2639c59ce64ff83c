"""The metric that was asked for, over the outputs of both models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation._drop import check_fit, find_metric, measured_drop, new_scorer
from onnx_kfe.evaluation._fidelity import HeadQuality, HeadSpec
from onnx_kfe.evaluation._scorers import Outputs, Score

if TYPE_CHECKING:
    from onnx_kfe.evaluation._quality import Quality

__all__ = ["Scoring"]


class Scoring:
    """Scores both models batch by batch.

    Attributes:
        own_labels: Whether labels are other than one class for each decision.

    Args:
        name: Key of `METRICS` or ``package.module:function``.
        specs: The heads, of which the first that fits is scored.
        reference: Session of the original; None where there is none.
        first: Outputs of the original on the first batch, one for each head.
        labelled: Whether there are labels.

    Raises:
        UsageError: There is no original, or the metric does not fit the heads or the labels.
    """

    def __init__(
        self, name: str, specs: Sequence[HeadSpec], reference: Any, first: Sequence[np.ndarray], labelled: bool
    ) -> None:
        metric = find_metric(name)
        if reference is None:
            raise UsageError(f"--metric {name} compares with the original: give --reference")
        heads = [_shaped(spec, value) for spec, value in zip(specs, first, strict=True)]
        check_fit(name, heads, labelled=labelled)
        scored = next(spec for spec, head in zip(specs, heads, strict=True) if metric.fits(head))
        self.own_labels = metric.own_labels
        self._name = name
        self._scorer = new_scorer(name, scored, reference.get_modelmeta().custom_metadata_map)
        self._all = [value.name for value in reference.get_outputs()] if metric.function is not None else []

    def outputs(self, heads: Sequence[str]) -> list[str]:
        """Names of the outputs that are needed, those of the heads included."""
        return list(dict.fromkeys([*heads, *self._all]))

    def update(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        """Add a batch."""
        if self._scorer is not None:
            self._scorer.update(reference, outputs, labels)

    def result(self, quality: Quality) -> Score:
        """The score over all batches, from what was measured besides where that says it."""
        if self._scorer is None:
            return Score(self._name, None, None, measured_drop(quality, self._name))
        return self._scorer.result(self._name)


def _shaped(spec: HeadSpec, output: np.ndarray) -> HeadQuality:
    """A head with the classes and positions that an output of it has."""
    _, positions, width = spec.rows(output).shape
    if spec.kind == "categorical":
        return HeadQuality(spec.name, spec.kind, classes=width, positions=positions)
    return HeadQuality(spec.name, spec.kind, positions=positions * width if spec.kind == "bernoulli" else 1)
