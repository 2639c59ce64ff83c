"""Quality of a model over data, in one pass: accuracy where there are labels, fidelity where there is a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._fidelity import HeadQuality, HeadSpec, Rate, check_outputs, compare
from onnx_kfe.evaluation._run import Model, open_model, run
from onnx_kfe.evaluation._scorers import Score, class_labels, label_ranks
from onnx_kfe.evaluation._scoring import Scoring

_MODEL, _REFERENCE = "the model", "the reference model"
_FLOATS = ("tensor(float16)", "tensor(float)", "tensor(double)")


class Batch(Protocol):
    """What `evaluate` reads of a batch."""

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """Input name -> array, samples on the first axis."""

    @property
    def labels(self) -> np.ndarray | None:
        """Integer classes [samples], or [samples, positions...] for a head with positions."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of the first categorical head.

    Attributes:
        top1: Share of the labels that are the best class (the first of equals).
        top5: Share that are among the best five; None with five classes or fewer.
    """

    top1: Rate
    top5: Rate | None


@dataclass(frozen=True)
class Quality:
    """Quality of a model; the rows before and after come from the same samples.

    Attributes:
        samples: Number of samples.
        accuracy: Accuracy of the model; None without labels or without a categorical head.
        reference_accuracy: Accuracy of the reference; None also without a reference.
        heads: Fidelity of each head to the reference; empty without a reference.
        lost: Share of the labels that the reference has right and the model wrong; None without both accuracies.
        gained: Share that the model has right and the reference wrong; None without both accuracies.
        score: What the metric that was asked for says; None without one.
    """

    samples: int
    accuracy: Accuracy | None
    reference_accuracy: Accuracy | None
    heads: tuple[HeadQuality, ...]
    lost: float | None = None
    gained: float | None = None
    score: Score | None = None

    @property
    def divergence(self) -> float | None:
        """Measured loss of all heads together in nats a sample; None where that of a head is not known."""
        found = [head.nats for head in self.heads if head.nats is not None]
        return sum(found) if found and len(found) == len(self.heads) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinity, which JSON lacks, becomes None."""
        return _jsonable(asdict(self))


def evaluate(
    model: Model,
    data: Iterable[Batch],
    *,
    reference: Model | None = None,
    heads: Sequence[HeadSpec] | None = None,
    metric: str | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
) -> Quality:
    """Measure a model over data, in one pass and in memory that grows with the samples by what a metric keeps alone.

    Args:
        model: Serialised model or its path.
        data: Batches; all with labels or none.
        reference: The original model, run on the same batches.
        heads: How to read the outputs; labels belong to the first categorical one. None takes every floating-point
            output that both models have: with labels the first that looks like class scores is categorical, every
            other one is Gaussian. An embedding is compared as its mean over the positions.
        metric: Key of `METRICS` or ``package.module:function``, for how much worse the model is than the reference.
            The function takes batches of one sample.
        providers: Execution providers in order of preference; CPU when empty.
        threads: Intra-operator threads; all cores when None.

    Returns:
        Accuracy with labels, fidelity with a reference, both with both.

    Raises:
        UsageError: A head is not an output, there is nothing to measure against, or the metric does not fit.
        KfeError: The data is empty, a label is no class, the models' outputs differ in shape or are not finite, or
            ONNX Runtime fails.
    """
    models = {_MODEL: model} if reference is None else {_MODEL: model, _REFERENCE: reference}
    sessions = {who: open_model(who, source, providers, threads) for who, source in models.items()}
    batches = iter(data)
    if (first := next(batches, None)) is None:
        raise KfeError("the data has no samples to evaluate on")
    specs = _guess_heads(sessions, first) if heads is None else tuple(heads)
    _check_heads(specs, sessions)
    names = [spec.name for spec in specs]
    scoring = None
    if metric is not None:
        reference_session = sessions.get(_REFERENCE)
        shown = [] if reference_session is None else run(_REFERENCE, reference_session, first.feeds, names)
        scoring = Scoring(metric, specs, reference_session, shown, first.labels is not None)
    classes = first.labels is not None and not (scoring is not None and scoring.own_labels)
    meter = _Meter(specs, labelled=classes, compared=reference is not None)
    for batch in chain([first], batches):
        outputs = {}
        for who, session in sessions.items():
            wanted = names if scoring is None else scoring.outputs(names)
            values = dict(zip(wanted, run(who, session, batch.feeds, wanted), strict=True))
            outputs[who] = {**values, **{spec.name: spec.read(values[spec.name], batch.feeds) for spec in specs}}
        if (batch.labels is None) != (first.labels is None):
            raise KfeError("some batches of the data have labels and some have none: give all or none")
        meter.update(outputs, batch.labels if classes else None)
        if scoring is not None:
            scoring.update(outputs[_REFERENCE], outputs[_MODEL], batch.labels)
    quality = meter.result()
    return quality if scoring is None else replace(quality, score=scoring.result(quality))


class _Meter:
    """Running sums of everything measured, over batches."""

    def __init__(self, specs: Sequence[HeadSpec], *, labelled: bool, compared: bool) -> None:
        self.samples = self.lost = self.gained = 0
        self.specs = specs
        self.labelled = labelled
        self.comparisons = [compare(spec) for spec in specs] if compared else []
        scored = [spec for spec in specs if spec.kind == "categorical"][:1] if labelled else []
        self.hits = {who: _Hits(spec) for spec in scored for who in (_MODEL, _REFERENCE)[: 1 + compared]}
        if not self.comparisons and not self.hits:
            lacks = "a categorical head (--head NAME=categorical)" if labelled else "labels"
            raise UsageError(f"there is nothing to measure quality against: give a reference model or {lacks}")

    def update(self, outputs: Mapping[str, Mapping[str, np.ndarray]], labels: np.ndarray | None) -> None:
        for who, values in outputs.items():
            for spec in self.specs:
                check_outputs(spec, who, values[spec.name])
        for spec, comparison in zip(self.specs, self.comparisons, strict=False):
            new, old = (outputs[who][spec.name] for who in (_MODEL, _REFERENCE))
            if new.shape != old.shape:
                shapes = f"{list(new.shape)} in {_MODEL} but {list(old.shape)} in {_REFERENCE}"
                raise KfeError(f"output '{spec.name}' is {shapes}: they must be one shape to be compared")
            comparison.update(old, new)
        right = {who: h.update(outputs[who][h.spec.name], np.asarray(labels)) for who, h in self.hits.items()}
        if len(right) > 1:
            self.lost += int((right[_REFERENCE] & ~right[_MODEL]).sum())
            self.gained += int((right[_MODEL] & ~right[_REFERENCE]).sum())
        self.samples += len(self.specs[0].rows(outputs[_MODEL][self.specs[0].name]))

    def result(self) -> Quality:
        if not self.samples:
            raise KfeError("the data has no samples to evaluate on")
        accuracies = {who: hits.result() for who, hits in self.hits.items()}
        heads = tuple(comparison.result() for comparison in self.comparisons)
        labels = self.hits[_MODEL].labels if len(self.hits) > 1 else 0
        flips = (self.lost / labels, self.gained / labels) if labels else (None, None)
        return Quality(self.samples, accuracies.get(_MODEL), accuracies.get(_REFERENCE), heads, *flips)


class _Hits:
    """Counts of labels that a categorical head puts first and among its first five."""

    def __init__(self, spec: HeadSpec) -> None:
        self.spec = spec
        self.samples = self.labels = self.top1 = self.top5 = self.classes = 0

    def update(self, output: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Count, and say which labels were put first."""
        scores = self.spec.rows(output)
        samples, _, self.classes = scores.shape
        index = class_labels(self.spec, labels, scores.shape)[..., None]
        rank = label_ranks(scores, index)
        self.samples += samples
        self.labels += rank.size
        self.top1 += int((rank == 0).sum())
        self.top5 += int((rank < 5).sum())
        return np.asarray(rank == 0)

    def result(self) -> Accuracy:
        top1, top5 = (Rate.wilson(hits / self.labels, self.samples) for hits in (self.top1, self.top5))
        return Accuracy(top1, top5 if self.classes > 5 else None)


def _check_heads(specs: Sequence[HeadSpec], sessions: Mapping[str, Any]) -> None:
    if not specs:
        raise UsageError("no floating-point output to measure quality on: the models must share one")
    for who, session in sessions.items():
        types = {value.name: value.type for value in session.get_outputs()}
        for spec in specs:
            if spec.name not in types:
                raise UsageError(f"head '{spec.name}' is not an output of {who}, which has: {', '.join(types)}")
            if types[spec.name] not in _FLOATS:
                raise UsageError(f"head '{spec.name}' is {types[spec.name]} in {who}: a head must be floating-point")


def _guess_heads(sessions: Mapping[str, Any], batch: Batch) -> tuple[HeadSpec, ...]:
    outputs = [{v.name: v.type for v in session.get_outputs()} for session in sessions.values()]
    names = [name for name in outputs[0] if all(own.get(name) in _FLOATS for own in outputs)]
    labels = batch.labels if batch.labels is not None and np.issubdtype(batch.labels.dtype, np.integer) else None
    specs = [HeadSpec(name, "gaussian") for name in names]
    if labels is None or not names:
        return tuple(specs)
    values = run(_MODEL, sessions[_MODEL], batch.feeds, names)
    for i, value in enumerate(values):
        spec = HeadSpec(names[i], "categorical")
        rows = spec.rows(value)
        if value.ndim >= 2 and rows.shape[-1] > 1 and rows[..., 0].size == labels.size:
            sums_to_one = bool(np.all(rows >= 0) and np.allclose(rows.sum(-1, dtype=np.float64), 1, atol=1e-3))
            specs[i] = HeadSpec(names[i], "categorical", probabilities=sums_to_one)
            break
    return tuple(specs)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
