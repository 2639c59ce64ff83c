"""How far one model's outputs are from another's: running sums over batches, one comparison for each kind of head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from onnx_kfe.errors import KfeError, UsageError

Z95 = 1.959963984540054  # standard normal quantile at 0.975


@dataclass(frozen=True)
class Rate:
    """A proportion with its 95 % interval.

    Attributes:
        value: The proportion, in [0, 1].
        low: Lower end of the Wilson score interval.
        high: Upper end of it.
    """

    value: float
    low: float
    high: float

    @classmethod
    def wilson(cls, value: float, trials: int) -> Rate:
        """Wilson's score interval (Wilson, JASA 1927) of a proportion seen in `trials` independent trials."""
        shrink = 1 + Z95**2 / trials
        centre = (value + Z95**2 / (2 * trials)) / shrink
        half = Z95 / shrink * math.sqrt(value * (1 - value) / trials + (Z95 / (2 * trials)) ** 2)
        return cls(value, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Mean:
    """A mean over samples that is not negative, with its 95 % interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval, by the central limit theorem, at least 0.
        high: Upper end of it; infinite where a single sample tells nothing about the others.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, total: float, squares: float, samples: int) -> Mean:
        """The mean of so many samples from their sum and the sum of their squares."""
        mean = total / samples
        if samples < 2:
            return cls(mean, 0.0, math.inf)
        variance = max(squares / samples - mean**2, 0.0) / (samples - 1)
        half = Z95 * math.sqrt(variance)
        return cls(mean, max(0.0, mean - half), mean + half)


@dataclass(frozen=True)
class HeadSpec:
    """How to read one output of the model.

    Attributes:
        name: Name of the output.
        kind: "categorical", "bernoulli", "gaussian" or "embedding".
        probabilities: Whether the output is already a probability; logits when False. No meaning for quantities.
        axis: Axis of the classes (of the channels, for quantities); None for 1 from rank 4 up, else the last.
        scale: Standard deviation by which a quantity is measured in nats; None where it is unknown.
        weight: Factor on its nats, by which several heads weigh alike.
        mask: Input that is 0 at the positions of an embedding that are padding; empty where all are real.

    Raises:
        UsageError: The kind is none of these.
    """

    name: str
    kind: str
    probabilities: bool = False
    axis: int | None = None
    scale: float | None = None
    weight: float = 1.0
    mask: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _COMPARISONS:
            raise UsageError(f"head '{self.name}' cannot be '{self.kind}'; --head can be: {', '.join(_COMPARISONS)}")

    @property
    def quantity(self) -> bool:
        """Whether it is a quantity, measured in units of its spread, rather than decisions."""
        return self.kind in ("gaussian", "embedding")

    def read(self, output: np.ndarray, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is compared of an output: of an embedding ``[n, positions, channels]`` the mean over its real positions.

        Args:
            output: The output of a batch.
            feeds: What the model was given, the mask included.

        Returns:
            ``[n, channels]`` in double precision for an embedding, else the output itself.

        Raises:
            UsageError: The output has no such positions.
        """
        if self.kind != "embedding":
            return output
        real = feeds[self.mask].astype(bool) if self.mask else np.ones(output.shape[:2], bool)
        if output.ndim != 3 or real.shape != output.shape[:2]:
            raise UsageError(f"head '{self.name}' of shape {list(output.shape)} cannot be averaged over positions")
        total = np.where(real[..., None], output, 0).sum(1, dtype=np.float64)
        return np.asarray(total / np.maximum(real.sum(1, keepdims=True), 1))

    def rows(self, output: np.ndarray) -> np.ndarray:
        """The output as [samples, positions, classes].

        Raises:
            UsageError: The output has no such axis.
        """
        if output.ndim < 2:
            return output.reshape((1, 1, -1) if self.kind == "categorical" else (-1, 1, 1))
        axis = self.axis if self.axis is not None else (1 if output.ndim >= 4 else -1)
        if not -output.ndim < axis < output.ndim or axis == 0:
            raise UsageError(f"head '{self.name}' of shape {list(output.shape)} cannot have its classes on axis {axis}")
        moved = np.moveaxis(output, axis, -1)
        return moved.reshape(len(moved), math.prod(moved.shape[1:-1]), moved.shape[-1])


@dataclass(frozen=True)
class HeadQuality:
    """How well one head of a model follows the reference. What has no meaning for the kind of head is None.

    Attributes:
        name: Name of the output.
        kind: Kind of head.
        agreement: Share of the decisions that are the same: the top class at every position (categorical), which side
            of 0.5 (bernoulli). Its interval takes samples, not positions, as independent.
        kl: Mean KL(reference || model) of a sample in nats, summed over its positions.
        nats: What the loss that K-FAC predicts amounts to: `kl`, or for a quantity of known scale half the squared
            error of a sample in units of that scale; times the weight of the head among several.
        relative_error: sqrt(sum ||y - y_ref||^2 / sum ||y_ref - mean||^2), the mean over the data for each channel.
        interval: 95 % interval of `kl` or of `relative_error`, whichever the head has; None where it has no meaning.
        decisions: Number of decisions that were compared; 0 for a quantity.
        classes: Number of classes of a categorical head; 1 for others.
        positions: Number of decisions of a sample; 1 for a quantity.
    """

    name: str
    kind: str
    agreement: Rate | None = None
    kl: float | None = None
    nats: float | None = None
    relative_error: float | None = None
    interval: tuple[float, float] | None = None
    decisions: int = 0
    classes: int = 1
    positions: int = 1


class Comparison(Protocol):
    """Running sums that compare one head of two models."""

    def __init__(self, spec: HeadSpec) -> None: ...

    def update(self, reference: np.ndarray, output: np.ndarray) -> None:
        """Add a batch: the outputs of both models as read, of one shape."""

    def result(self) -> HeadQuality:
        """The comparison over all batches so far."""


def compare(spec: HeadSpec) -> Comparison:
    """An empty comparison for a head."""
    return _COMPARISONS[spec.kind](spec)


class _Decisions(ABC):
    """What categorical and Bernoulli heads share: counts of equal decisions and a sum of divergences."""

    def __init__(self, spec: HeadSpec) -> None:
        self.spec = spec
        self.samples = self.decisions = self.same = 0
        self.classes = 1
        self.kl = self.kl_squares = 0.0

    def update(self, reference: np.ndarray, output: np.ndarray) -> None:
        old, new = self.spec.rows(reference), self.spec.rows(output)
        same = self.decide(old) == self.decide(new)
        self.samples += len(old)
        self.classes = old.shape[-1] if self.spec.kind == "categorical" else 1
        self.decisions += same.size
        self.same += int(same.sum())
        divergences = _divergences(self.log_probabilities(old), self.log_probabilities(new))
        self.kl += float(divergences.sum())
        self.kl_squares += float(np.square(divergences).sum())

    def result(self) -> HeadQuality:
        agreement = Rate.wilson(self.same / self.decisions, self.samples)
        kl = Mean.of(self.kl, self.kl_squares, self.samples)
        quality = HeadQuality(self.spec.name, self.spec.kind, agreement, kl.value, decisions=self.decisions)
        return replace(
            quality, nats=self.spec.weight * kl.value, interval=(kl.low, kl.high),
            classes=self.classes, positions=self.decisions // self.samples,
        )  # fmt: skip

    @abstractmethod
    def decide(self, rows: np.ndarray) -> np.ndarray:
        """The decision at each position, ``[samples, positions]``; for Bernoulli heads each element decides."""

    @abstractmethod
    def log_probabilities(self, rows: np.ndarray) -> np.ndarray:
        """The logarithms of the probabilities of what can be decided, on the last axis."""


class _Categorical(_Decisions):
    def decide(self, rows: np.ndarray) -> np.ndarray:
        return rows.argmax(-1)

    def log_probabilities(self, rows: np.ndarray) -> np.ndarray:
        scores = _log(rows, np.finfo(rows.dtype).smallest_subnormal) if self.spec.probabilities else _double(rows)
        scores = scores - scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


class _Bernoulli(_Decisions):
    def decide(self, rows: np.ndarray) -> np.ndarray:
        return rows > (0.5 if self.spec.probabilities else 0.0)

    def log_probabilities(self, rows: np.ndarray) -> np.ndarray:
        if self.spec.probabilities:
            precision = np.finfo(rows.dtype)
            # A probability rounded to 1 leaves its complement unknown below half a step.
            yes, no = _log(rows, precision.smallest_subnormal), _log(1 - _double(rows), precision.epsneg / 2)
        else:
            yes, no = -np.logaddexp(0, -_double(rows)), -np.logaddexp(0, _double(rows))
        return np.stack([yes, no], axis=-1)


class _Gaussian:
    def __init__(self, spec: HeadSpec) -> None:
        self.spec = spec
        self.samples = self.count = 0
        self.error = self.error_squares = self.scatter = 0.0
        self.mean: np.ndarray | float = 0.0

    def update(self, reference: np.ndarray, output: np.ndarray) -> None:
        old, new = _double(self.spec.rows(reference)), _double(self.spec.rows(output))
        errors = np.square(new - old).sum((1, 2))
        self.samples += len(errors)
        self.error += float(errors.sum())
        self.error_squares += float(np.square(errors).sum())
        if not old.size:
            return
        old = old.reshape(-1, old.shape[-1])
        # Means and scatter of two parts merged (Chan, Golub & LeVeque 1979): exact, and no cancellation.
        mean, total = old.mean(0), self.count + len(old)
        shift = mean - self.mean
        between = self.count * len(old) / total * float(np.square(shift).sum())
        self.scatter += float(np.square(old - mean).sum()) + between
        self.mean = self.mean + shift * (len(old) / total)
        self.count = total

    def result(self) -> HeadQuality:
        scale = self.spec.scale
        nats = self.spec.weight * self.error / self.samples / (2 * scale**2) if scale else None
        if not self.scatter:
            constant = math.inf if self.error else 0.0  # any error of a constant output is beyond measure
            return HeadQuality(self.spec.name, self.spec.kind, nats=nats, relative_error=constant)
        error = Mean.of(self.error, self.error_squares, self.samples)  # its scatter outweighs that of the reference
        relative, low, high = (math.sqrt(e * self.samples / self.scatter) for e in (error.value, error.low, error.high))
        return HeadQuality(self.spec.name, self.spec.kind, nats=nats, relative_error=relative, interval=(low, high))


_COMPARISONS: dict[str, type[Comparison]] = {
    "categorical": _Categorical,
    "bernoulli": _Bernoulli,
    "gaussian": _Gaussian,
    "embedding": _Gaussian,
}


def check_outputs(spec: HeadSpec, who: str, output: np.ndarray) -> None:
    """Refuse outputs that no comparison can use; minus infinity is a class masked out.

    Raises:
        KfeError: The output is not finite.
    """
    masked = np.isneginf(output) if spec.kind == "categorical" and not spec.probabilities else False
    if not np.all(np.isfinite(output) | masked):
        raise KfeError(f"output '{spec.name}' of {who} has NaN or infinity: check the inputs and the model's precision")


def _double(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float64)


def _log(probabilities: np.ndarray, floor: np.floating) -> np.ndarray:
    return np.log(np.maximum(_double(probabilities), float(floor)))


def _divergences(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Sum of p log(p / q) for each sample, where what has no probability in the reference counts for nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(tuple(range(1, terms.ndim)))
