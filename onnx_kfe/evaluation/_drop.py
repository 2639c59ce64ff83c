"""How much worse than the original a model is, as one number with its confidence: what a quality floor bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation._fidelity import Z95, HeadQuality
from onnx_kfe.evaluation._quality import Quality

__all__ = ["METRICS", "RATES", "Drop", "default_metric", "measured_drop"]

RATES = ("agreement", "accuracy")
"""The metrics that are shares of decisions: what they can resolve is one decision."""


@dataclass(frozen=True)
class Drop:
    """How much worse than the original a model was on some samples.

    Attributes:
        value: The drop, 0 for the original itself; below 0 where a model has more labels right than the original.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        samples: Number of samples.
    """

    value: float
    low: float
    high: float
    samples: int


def measured_drop(quality: Quality, metric: str) -> Drop:
    """The drop that a measured quality amounts to.

    Args:
        quality: Measured against the original.
        metric: Key of `METRICS`.

    Raises:
        UsageError: There is no such metric, or it does not fit the model or the data.
    """
    if metric not in METRICS:
        raise UsageError(f"--metric {metric}: it can be {', '.join(METRICS)}")
    return METRICS[metric](quality)


def default_metric(quality: Quality) -> str:
    """Agreement where the model decides something, else the relative error."""
    return "agreement" if any(head.agreement is not None for head in quality.heads) else "relative-error"


def _agreement(quality: Quality) -> Drop:
    """Share of decisions that are others than the original's, of the head where it is largest."""
    rates = [head.agreement for head in quality.heads if head.agreement is not None]
    if not rates:
        raise _unfit("agreement", "categorical or bernoulli output", quality)
    worst = min(rates, key=lambda rate: rate.value)
    return Drop(1 - worst.value, 1 - worst.high, 1 - worst.low, quality.samples)


def _accuracy(quality: Quality) -> Drop:
    """Loss of top-1 accuracy, with the interval of paired proportions (Agresti and Min, Statistics in Medicine 2005).

    Only samples on which the two models differ tell them apart. Half a sample is added to each of the four cells, so
    that the interval is sound for few of them too.
    """
    if quality.lost is None or quality.gained is None:
        raise UsageError("--metric accuracy: the data have no labels that fit a categorical output of the model")
    samples = quality.samples + 2
    lost, gained = ((share * quality.samples + 0.5) / samples for share in (quality.lost, quality.gained))
    half = Z95 * math.sqrt((lost + gained - (lost - gained) ** 2) / samples)
    centre = lost - gained
    return Drop(quality.lost - quality.gained, max(centre - half, -1.0), min(centre + half, 1.0), quality.samples)


def _kl(quality: Quality) -> Drop:
    """Divergence from the original in nats a sample, all outputs that are distributions together."""
    heads = [head for head in quality.heads if head.kl is not None]
    if not heads:
        raise _unfit("kl", "categorical or bernoulli output", quality)
    low, high = (sum(_interval(head)[end] for head in heads) for end in (0, 1))
    return Drop(sum(head.kl or 0.0 for head in heads), low, high, quality.samples)


def _relative_error(quality: Quality) -> Drop:
    """Relative error of the Gaussian output where it is largest."""
    errors = [(head.relative_error, *_interval(head)) for head in quality.heads if head.relative_error is not None]
    if not errors:
        raise _unfit("relative-error", "gaussian output", quality)
    return Drop(*max(errors), quality.samples)


METRICS: Mapping[str, Callable[[Quality], Drop]] = MappingProxyType(
    {"agreement": _agreement, "kl": _kl, "relative-error": _relative_error, "accuracy": _accuracy}
)
"""By name: the drop that a quality amounts to. A new metric is one entry."""


def _interval(head: HeadQuality) -> tuple[float, float]:
    return head.interval or (0.0, math.inf)


def _unfit(metric: str, lacking: str, quality: Quality) -> UsageError:
    heads = ", ".join(f"{head.name} {head.kind}" for head in quality.heads)
    return UsageError(f"--metric {metric}: the model has no {lacking} ({heads}); --head NAME=KIND can change that")
