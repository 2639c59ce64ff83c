"""How much worse than the original a model is, as one number with its confidence: what a quality floor bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from onnx_kfe.calibration import import_function, is_function_name
from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation._custom import CustomScorer
from onnx_kfe.evaluation._fidelity import HeadQuality, HeadSpec
from onnx_kfe.evaluation._readings import CharacterAccuracy
from onnx_kfe.evaluation._samplewise import Cosine, MeanIou, Psnr, Spearman, TopFive
from onnx_kfe.evaluation._scorers import Drop, Scorer, paired_interval

if TYPE_CHECKING:
    from onnx_kfe.evaluation._quality import Quality

__all__ = [
    "METRICS",
    "Metric",
    "check_fit",
    "default_metric",
    "find_metric",
    "measured_drop",
    "new_scorer",
]

_DECISIONS = ("categorical", "bernoulli")
_QUANTITIES = ("gaussian", "embedding")


@dataclass(frozen=True)
class Metric:
    """A way to say how much worse than the original a model is.

    Attributes:
        drop: The drop that a measured quality amounts to, with its interval; None where there is a scorer.
        scorer: Scores both models from the outputs of every sample; None where a measured quality says enough.
        range: Of the score, which for `higher_is_better` False is the drop itself.
        higher_is_better: Whether the drop is the original's score less the model's.
        kinds: Kinds of head that it is of; of any outputs when empty.
        classes: The fewest classes of that head.
        positions: Whether that head decides at several positions.
        labels: Whether it needs labels. Others take them where they can, but for `agreement`, `kl`, errors,
            `cosine` and `spearman`, which compare with the original.
        own_labels: Whether labels are other than one class for each decision.
        unit: What drops are written in: ``%`` for shares, ``dB``, ``nats``, or nothing.
        counted: Whether it is a share of decisions, so that one decision is what samples can show.
        function: The user's own.
    """

    drop: Callable[[Quality], Drop] | None = None
    scorer: type[Scorer] | None = None
    range: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool = True
    kinds: tuple[str, ...] = ()
    classes: int = 1
    positions: bool = False
    labels: bool = False
    own_labels: bool = False
    unit: str = ""
    counted: bool = False
    function: Callable[..., object] | None = None

    @property
    def wanted(self) -> str:
        """The head that it is of, in words."""
        classes = f" of {self.classes} classes or more" if self.classes > 1 else ""
        return f"{' or '.join(self.kinds)} output{' with positions' if self.positions else ''}{classes}"

    def fits(self, head: HeadQuality) -> bool:
        """Whether it can be of this head."""
        many = head.positions > 1 or not self.positions
        return not self.kinds or (head.kind in self.kinds and head.classes >= self.classes and many)


def measured_drop(quality: Quality, metric: str) -> Drop:
    """The drop that a measured quality amounts to.

    Args:
        quality: Measured against the original, by `evaluate` with this metric where it has a scorer.
        metric: Key of `METRICS` or ``package.module:function``.

    Raises:
        UsageError: There is no such metric, or it does not fit the model or the data.
    """
    known = find_metric(metric)
    if quality.score is not None and quality.score.metric == metric:
        return quality.score.drop
    if not (known.labels and quality.lost is not None):
        check_fit(metric, quality.heads, labelled=quality.lost is not None)
    if known.drop is None:
        raise UsageError(f"--metric {metric}: it was not asked for when quality was measured")
    return known.drop(quality)


def default_metric(quality: Quality) -> str:
    """Agreement where the model decides something, else the unexplained variance."""
    return "agreement" if any(head.agreement is not None for head in quality.heads) else "unexplained-variance"


def find_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        UsageError: There is none, or its function cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    if is_function_name(name):
        function = import_function(name)
        return Metric(scorer=CustomScorer, range=(-math.inf, math.inf), own_labels=True, function=function)
    raise UsageError(f"--metric {name}: it can be {', '.join(METRICS)}, or package.module:function")


def check_fit(name: str, heads: Sequence[HeadQuality], *, labelled: bool) -> None:
    """Refuse a metric that is of no head of the model, or needs labels that are not there.

    Raises:
        UsageError: What is lacking, and the metrics that fit.
    """
    metric = find_metric(name)
    others = [k for k, m in METRICS.items() if (labelled or not m.labels) and any(map(m.fits, heads))]
    fitting = f"what fits: {', '.join(others) or 'package.module:function'}"
    if metric.labels and not labelled and any(map(metric.fits, heads)):
        lacking = "the data have no labels that fit a categorical output of the model"
        raise UsageError(f"--metric {name}: {lacking}; {fitting}")
    if not any(map(metric.fits, heads)):
        found = ", ".join(_described(head) for head in heads)
        raise UsageError(
            f"--metric {name}: the model has no {metric.wanted} ({found}); {fitting}; --head NAME=KIND can change that"
        )


def new_scorer(name: str, spec: HeadSpec | None, metadata: Mapping[str, str]) -> Scorer | None:
    """A scorer of a metric for a head; None for a metric without."""
    metric = find_metric(name)
    if metric.function is not None:
        return CustomScorer(name, metric.function)
    return None if metric.scorer is None or spec is None else metric.scorer(spec, metadata)


def _described(head: HeadQuality) -> str:
    classes = f" of {head.classes} classes" if head.kind == "categorical" and head.classes else ""
    return f"{head.name} {head.kind}{classes}"


def _agreement(quality: Quality) -> Drop:
    """Share of decisions that are others than the original's, of the head where it is largest (Wilson's interval)."""
    worst = min((head.agreement for head in quality.heads if head.agreement is not None), key=lambda rate: rate.value)
    return Drop(1 - worst.value, 1 - worst.high, 1 - worst.low, quality.samples)


def _accuracy(quality: Quality) -> Drop:
    """Loss of top-1 accuracy, with the interval of paired proportions."""
    lost, gained = quality.lost or 0.0, quality.gained or 0.0
    return Drop(lost - gained, *paired_interval(lost, gained, quality.samples), quality.samples)


def _kl(quality: Quality) -> Drop:
    """Divergence from the original in nats a sample, all outputs that are distributions together."""
    heads = [head for head in quality.heads if head.kl is not None]
    low, high = (sum(_interval(head)[end] for head in heads) for end in (0, 1))
    return Drop(sum(head.kl or 0.0 for head in heads), low, high, quality.samples)


def _relative_error(quality: Quality) -> Drop:
    """Relative error of the quantity where it is largest."""
    errors = [(head.relative_error, *_interval(head)) for head in quality.heads if head.relative_error is not None]
    return Drop(*max(errors), quality.samples)


def _unexplained_variance(quality: Quality) -> Drop:
    """The square of the relative error: the share of the output's variance that is not met, where it is largest."""
    error = _relative_error(quality)
    return Drop(error.value**2, error.low**2, error.high**2, error.samples)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "agreement": Metric(_agreement, kinds=_DECISIONS, unit="%", counted=True),
        "kl": Metric(_kl, range=(0.0, math.inf), higher_is_better=False, kinds=_DECISIONS, unit="nats"),
        "unexplained-variance": Metric(
            _unexplained_variance, range=(0.0, math.inf), higher_is_better=False, kinds=_QUANTITIES, unit="%"
        ),
        "relative-error": Metric(_relative_error, range=(0.0, math.inf), higher_is_better=False, kinds=_QUANTITIES),
        "accuracy": Metric(_accuracy, kinds=("categorical",), labels=True, unit="%", counted=True),
        "top-5": Metric(
            scorer=TopFive, kinds=("categorical",), classes=6, labels=True, unit="%", counted=True
        ),
        "cosine": Metric(scorer=Cosine, range=(-1.0, 1.0), kinds=_QUANTITIES),
        "psnr": Metric(scorer=Psnr, range=(-math.inf, 100.0), kinds=("gaussian",), own_labels=True, unit="dB"),
        "spearman": Metric(scorer=Spearman, range=(-1.0, 1.0), kinds=_QUANTITIES),
        "character-accuracy": Metric(
            scorer=CharacterAccuracy, range=(-math.inf, 1.0), kinds=("categorical",), positions=True, own_labels=True,
            unit="%",
        ),
        "miou": Metric(scorer=MeanIou, kinds=("categorical",), positions=True, own_labels=True, unit="%"),
    }
)  # fmt: skip
"""By name. A new metric is one entry; ``package.module:function`` is one as well, see `CustomScorer`."""


def _interval(head: HeadQuality) -> tuple[float, float]:
    return head.interval or (0.0, math.inf)
