import math
import re

import numpy as np
import pytest
from scipy import special, stats

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._fidelity import HeadSpec, Rate, check_outputs, compare


def outputs(*shape, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    old = scale * rng.standard_normal(shape)
    return old.astype(np.float32), (old + rng.standard_normal(shape)).astype(np.float32)


def compared(spec, old, new, splits=()):
    comparison = compare(spec)
    for part_old, part_new in zip(np.split(old, splits), np.split(new, splits), strict=True):
        comparison.update(part_old, part_new)
    return comparison.result()


def test_outputs_without_elements_do_not_differ():
    empty = np.zeros((5, 3, 0), np.float32)
    quality = compared(HeadSpec("y", "gaussian"), empty, empty, [2])
    assert (quality.relative_error, quality.nats) == (0.0, None)


@pytest.mark.parametrize("hits", [0, 1, 37, 99, 100])
def test_wilson_interval(hits):
    known = stats.binomtest(hits, 100).proportion_ci(method="wilson")
    rate = Rate.wilson(hits / 100, 100)
    assert (rate.value, rate.low, rate.high) == pytest.approx((hits / 100, known.low, known.high), abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "axis", "given"),
    [
        ((50, 7), 1, None),
        ((50, 7, 1, 1), 1, None),
        ((20, 5, 7), 2, None),
        ((20, 7, 5), 1, 1),
        ((10, 7, 3, 4), 1, None),
    ],
)
def test_categorical_against_scipy(shape, axis, given):
    old, new = outputs(*shape)
    result = compared(HeadSpec("y", "categorical", axis=given), old, new)
    p, q = (special.softmax(y.astype(float), axis=axis) for y in (old, new))
    assert result.kl == pytest.approx(special.rel_entr(p, q).sum() / shape[0], rel=1e-10)
    same = (old.argmax(axis) == new.argmax(axis)).mean()
    assert 0.3 < same < 1
    assert result.agreement == Rate.wilson(same, shape[0])


def test_bernoulli_against_scipy():
    old, new = outputs(40, 6)
    result = compared(HeadSpec("y", "bernoulli"), old, new)
    p, q = special.expit(old.astype(float)), special.expit(new.astype(float))
    expected = (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).sum() / 40
    assert result.kl == pytest.approx(expected, rel=1e-9)
    assert result.agreement == Rate.wilson(((p > 0.5) == (q > 0.5)).mean(), 40)


def test_gaussian_loss_in_nats_is_half_the_squared_error_of_a_sample_in_units_of_the_scale():
    random = np.random.default_rng(1)
    old, new = random.standard_normal((2, 6, 3, 4))
    result = compared(HeadSpec("y", "gaussian", scale=0.5), old, new, splits=[2, 5])
    assert result.nats == pytest.approx(np.square(new - old).sum((1, 2)).mean() / 2 / 0.25)
    assert compared(HeadSpec("y", "gaussian"), old, new, splits=[3]).nats is None


@pytest.mark.parametrize(
    ("shape", "axes"), [((40, 6), 0), ((40, 3, 5, 4), (0, 2, 3)), ((40, 5, 3), (0, 1)), ((40,), 0)]
)
def test_gaussian_relative_error(shape, axes):
    old, new = outputs(*shape)
    old, new = old + 1000, new + 1000  # far from the mean zero: cancellation would show
    result = compared(HeadSpec("y", "gaussian"), old, new, splits=[1, 8, 21])
    wide_old, wide_new = old.astype(float), new.astype(float)
    scatter = ((wide_old - wide_old.mean(axes, keepdims=True)) ** 2).sum()
    expected = math.sqrt(((wide_new - wide_old) ** 2).sum() / scatter)
    assert result.relative_error == pytest.approx(expected, rel=1e-12)
    assert result.agreement is None
    assert result.kl is None


def test_gaussian_of_images_of_any_size():
    comparison = compare(HeadSpec("y", "gaussian"))
    for seed, size in enumerate((4, 9)):
        comparison.update(*outputs(1, 1, size, size, seed=seed))
    flat = [[y.ravel() for y in outputs(1, 1, size, size, seed=seed)] for seed, size in enumerate((4, 9))]
    old, new = (np.concatenate(parts) for parts in zip(*flat, strict=True))
    expected = np.linalg.norm(new - old) / np.linalg.norm(old - old.mean())
    assert comparison.result().relative_error == pytest.approx(expected, rel=1e-6)


def test_gaussian_of_a_constant():
    one = np.ones((3, 2), np.float32)
    assert compared(HeadSpec("y", "gaussian"), one, one).relative_error == 0
    assert compared(HeadSpec("y", "gaussian"), one, one + 1).relative_error == math.inf


def test_an_embedding_is_read_as_the_mean_over_real_positions():
    random = np.random.default_rng(0)
    output, mask = random.standard_normal((4, 5, 3)).astype(np.float32), np.zeros((4, 5), np.int64)
    for sample, length in enumerate((5, 1, 3)):  # the last sample is padding
        mask[sample, :length] = 1
    output[1, 4] = np.inf
    read = HeadSpec("y", "embedding", mask="m").read(output, {"m": mask})
    for sample, length in enumerate((5, 1, 3)):
        np.testing.assert_allclose(read[sample], output[sample, :length].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(read[3], np.zeros(3))
    whole = HeadSpec("y", "embedding").read(output[2:], {})
    np.testing.assert_allclose(whole, output[2:].mean(1), rtol=1e-5)
    assert HeadSpec("y", "gaussian").read(output, {}) is output


@pytest.mark.parametrize(("shape", "mask"), [((4, 5), None), ((4, 5, 3, 2), None), ((4, 6, 3), "m")])
def test_an_embedding_has_positions(shape, mask):
    with pytest.raises(UsageError, match=re.escape(f"head 'y' of shape {list(shape)} cannot be averaged")):
        HeadSpec("y", "embedding", mask=mask or "").read(np.zeros(shape), {"m": np.ones((4, 5))})


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_streaming_equals_one_batch(kind):
    old, new = outputs(60, 4)
    whole, parts = (compared(HeadSpec("y", kind), old, new, splits) for splits in ([], [1, 7, 7, 50]))
    assert parts.agreement == whole.agreement
    figure = "relative_error" if kind == "gaussian" else "kl"
    assert getattr(parts, figure) == pytest.approx(getattr(whole, figure), rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "squash"), [("categorical", lambda y: special.softmax(y, axis=-1)), ("bernoulli", special.expit)]
)
def test_probabilities_give_the_divergence_of_their_logits(kind, squash):
    old, new = outputs(50, 7)
    logits = compared(HeadSpec("y", kind), old, new)
    probabilities = compared(HeadSpec("y", kind, probabilities=True), squash(old), squash(new))
    assert probabilities.kl == pytest.approx(logits.kl, rel=1e-4)
    assert probabilities.agreement == logits.agreement
    mistaken = compared(HeadSpec("y", kind), squash(old), squash(new))
    assert mistaken.kl != pytest.approx(logits.kl, rel=0.1)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_extreme_logits_stay_exact(kind):
    old = np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32)
    assert compared(HeadSpec("y", kind), old, old).kl == 0
    other = compared(HeadSpec("y", kind), old, old[::-1].copy())
    assert other.kl == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_saturated_probabilities_stay_finite(kind):
    old, new = np.array([[0.0, 1.0]], np.float32), np.array([[1.0, 0.0]], np.float32)
    assert compared(HeadSpec("y", kind, probabilities=True), old, old).kl == pytest.approx(0, abs=1e-6)
    assert 10 < compared(HeadSpec("y", kind, probabilities=True), old, new).kl < 300


def test_masked_class_counts_for_nothing():
    old = np.array([[0.0, 1.0, -np.inf]], np.float32)
    new = np.array([[1.0, 0.0, -np.inf]], np.float32)
    masked = compared(HeadSpec("y", "categorical"), old, new)
    assert masked.kl == pytest.approx(compared(HeadSpec("y", "categorical"), old[:, :2], new[:, :2]).kl)
    check_outputs(HeadSpec("y", "categorical"), "the model", old)


@pytest.mark.parametrize(("kind", "bad"), [("categorical", np.nan), ("categorical", np.inf), ("gaussian", -np.inf)])
def test_output_that_is_not_finite(kind, bad):
    with pytest.raises(KfeError, match=r"output 'y' of the model has NaN or infinity"):
        check_outputs(HeadSpec("y", kind), "the model", np.array([[0.0, bad]]))


def test_unknown_kind_and_axis():
    with pytest.raises(UsageError, match=r"head 'y' cannot be 'poisson'.*categorical, bernoulli, gaussian"):
        HeadSpec("y", "poisson")
    for axis in (0, 2, -2):
        with pytest.raises(UsageError, match=f"classes on axis {axis}"):
            HeadSpec("y", "categorical", axis=axis).rows(np.zeros((3, 4)))
