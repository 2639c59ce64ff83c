"""Drops against direct computation, their intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from onnx_kfe._floor import format_drop
from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation import METRICS, HeadQuality, HeadSpec, Quality, Rate, default_metric, evaluate, measured_drop
from tests.evaluation.small import Data, linear

RNG = np.random.default_rng(0)
OLD = RNG.standard_normal((12, 10))
NEW = OLD + 0.3 * RNG.standard_normal((12, 10))
X = RNG.standard_normal((200, 12)).astype(np.float32)
LABELS = (X @ OLD + 3 * RNG.standard_normal((200, 10))).argmax(1)
DECIDED = [(X @ weight.astype(np.float32)).argmax(1) for weight in (OLD, NEW)]


def quality(kind="categorical", labels=None, new=NEW):
    batches = [Data({"x": X[i : i + 64]}, None if labels is None else labels[i : i + 64]) for i in range(0, 200, 64)]
    return evaluate(linear(new), batches, reference=linear(OLD), heads=[HeadSpec("y", kind)])


def test_agreement():
    drop = measured_drop(quality(), "agreement")
    expected = (DECIDED[0] != DECIDED[1]).mean()
    assert drop.value == pytest.approx(expected)
    wilson = Rate.wilson(expected, 200)
    assert (drop.low, drop.high, drop.samples) == (pytest.approx(wilson.low), pytest.approx(wilson.high), 200)
    assert 0 < drop.low < drop.value < drop.high
    assert quality().heads[0].decisions == 200


def test_agreement_is_that_of_the_worst_head():
    heads = tuple(HeadQuality(name, "bernoulli", Rate.wilson(value, 50)) for name, value in (("a", 0.9), ("b", 0.7)))
    assert measured_drop(Quality(50, None, None, heads), "agreement").value == pytest.approx(0.3)


def test_accuracy_is_paired():
    found = quality(labels=LABELS)
    right = [decided == LABELS for decided in DECIDED]
    drop = measured_drop(found, "accuracy")
    assert found.lost == (right[0] & ~right[1]).mean()
    assert found.gained == (right[1] & ~right[0]).mean()
    assert drop.value == pytest.approx(right[0].mean() - right[1].mean())
    assert drop.low < drop.value < drop.high


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.01), (0.1, 0.02), (0.0, 0.0)])
def test_the_interval_of_accuracy_covers_the_truth(lost, gained):
    counts = np.random.default_rng(0).multinomial(200, [lost, gained, 1 - lost - gained], 2000) / 200
    drops = [measured_drop(Quality(200, None, None, (), a, b), "accuracy") for a, b, _ in counts]
    assert np.mean([drop.low <= lost - gained <= drop.high for drop in drops]) > 0.93
    assert max(drop.high - drop.low for drop in drops) < 0.16


def test_kl_and_its_interval():
    drop = measured_drop(quality(), "kl")
    p, q = (special.softmax((X @ weight.astype(np.float32)).astype(float), axis=1) for weight in (OLD, NEW))
    each = special.rel_entr(p, q).sum(1)
    half = 1.96 * each.std(ddof=1) / 200**0.5
    assert drop.value == pytest.approx(each.mean(), rel=1e-4)
    assert (drop.low, drop.high) == pytest.approx((each.mean() - half, each.mean() + half), rel=1e-3)
    assert quality().divergence == drop.value


def test_relative_error_and_its_interval():
    drop = measured_drop(quality("gaussian"), "relative-error")
    old, new = ((X @ weight.astype(np.float32)).astype(float) for weight in (OLD, NEW))
    errors, scatter = np.square(new - old).sum(1), np.square(old - old.mean(0)).sum()
    half = 1.96 * errors.std(ddof=1) / 200**0.5
    ends = [np.sqrt(200 * (errors.mean() + sign * half) / scatter) for sign in (-1, 1)]
    assert drop.value == pytest.approx(np.sqrt(errors.sum() / scatter), rel=1e-5)
    assert (drop.low, drop.high) == pytest.approx(ends, rel=1e-3)
    squared = measured_drop(quality("gaussian"), "unexplained-variance")
    assert squared.value == pytest.approx(errors.sum() / scatter, rel=1e-5)
    assert (squared.low, squared.high) == pytest.approx([end**2 for end in ends], rel=1e-3)
    assert quality("gaussian").divergence is None


def test_one_sample_tells_nothing_of_the_spread():
    data = [Data({"x": X[:1]})]
    found = evaluate(linear(NEW), data, reference=linear(OLD), heads=[HeadSpec("y", "categorical")])
    drop = measured_drop(found, "kl")
    assert (drop.low, drop.high) == (0.0, np.inf)
    assert found.as_dict()["heads"][0]["interval"] == [0.0, None]


@pytest.mark.parametrize("metric", METRICS)
def test_the_original_has_no_drop(metric):
    known = METRICS[metric]
    x = X.reshape(20, 10, 12) if known.positions else X
    labels = LABELS if known.labels else None
    model = linear(OLD, rank=x.ndim)
    head = HeadSpec("y", known.kinds[0])
    found = evaluate(model, [Data({"x": x}, labels)], reference=model, heads=[head], metric=metric)
    drop = measured_drop(found, metric)
    assert found.score.drop == drop
    assert drop.value == pytest.approx(0, abs=1e-12)
    assert drop.low <= 1e-12
    assert drop.samples == len(x)
    if found.score.original is not None:
        low, high = known.range
        assert found.score.original == pytest.approx(found.score.model)
        assert low <= found.score.model <= high


@pytest.mark.parametrize("metric", METRICS)
def test_a_worse_model_has_a_drop_within_its_interval(metric):
    known = METRICS[metric]
    x = X.reshape(20, 10, 12) if known.positions else X
    labels = LABELS if known.labels else None
    head = HeadSpec("y", known.kinds[0])
    models = [linear(weight, rank=x.ndim) for weight in (OLD + 4 * (NEW - OLD), OLD)]
    drop = evaluate(models[0], [Data({"x": x}, labels)], reference=models[1], heads=[head], metric=metric).score.drop
    assert drop.low <= drop.value <= drop.high
    assert drop.value > 0


def test_floors_are_written_in_the_unit_of_the_metric():
    assert [format_drop(name, 0.0123) for name in ("agreement", "psnr", "kl", "cosine", "miou")] == [
        "1.23%", "0.0123 dB", "0.0123", "0.0123", "1.23%",
    ]  # fmt: skip


def test_the_metric_must_fit():
    assert default_metric(quality()) == "agreement"
    assert default_metric(quality("gaussian")) == "unexplained-variance"
    for metric, kind, message in (
        (
            "agreement",
            "gaussian",
            r"--metric agreement: the model has no categorical or bernoulli output \(y gaussian\)",
        ),
        ("kl", "gaussian", "--metric kl: the model has no categorical or bernoulli output"),
        ("relative-error", "categorical", "--metric relative-error: the model has no gaussian or embedding output"),
        ("accuracy", "categorical", "--metric accuracy: the data have no labels .*what fits: agreement, kl"),
        ("top-5", "categorical", "--metric top-5: the data have no labels"),
        ("cosine", "gaussian", "--metric cosine: it was not asked for when quality was measured"),
        ("f1", "categorical", "--metric f1: it can be agreement, kl, unexplained-variance, relative-error, accuracy"),
    ):
        with pytest.raises(UsageError, match=message):
            measured_drop(quality(kind), metric)


@pytest.mark.parametrize(
    ("metric", "kind", "classes", "message"),
    [
        ("top-5", "categorical", 3, r"no categorical output of 6 classes or more \(y categorical of 3 classes\)"),
        (
            "psnr",
            "categorical",
            10,
            r"no gaussian output \(y categorical of 10 .*; what fits: .*accuracy, top-5",
        ),
        ("miou", "categorical", 10, "no categorical output with positions"),
        (
            "character-accuracy",
            "gaussian",
            10,
            "what fits: unexplained-variance, relative-error, cosine, psnr",
        ),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_with_what_does(metric, kind, classes, message):
    models = [linear(weight[:, :classes]) for weight in (NEW, OLD)]
    data = [Data({"x": X}, LABELS % classes if kind == "categorical" else None)]
    with pytest.raises(UsageError, match=f"--metric {metric}: .*{message}"):
        evaluate(models[0], data, reference=models[1], heads=[HeadSpec("y", kind)], metric=metric)


def test_a_metric_needs_the_original():
    with pytest.raises(UsageError, match="--metric accuracy compares with the original: give --reference"):
        evaluate(linear(NEW), [Data({"x": X}, LABELS)], heads=[HeadSpec("y", "categorical")], metric="accuracy")
