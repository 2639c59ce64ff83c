"""Metrics over samples against NumPy and SciPy, and hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec, Score, evaluate
from onnx_kfe.evaluation._drop import new_scorer
from onnx_kfe.evaluation._samplewise import _ranks
from onnx_kfe.evaluation._scorers import paired_interval
from tests.evaluation.small import Data, linear

RNG = np.random.default_rng(0)
OLD = RNG.standard_normal((30, 8))
NEW = OLD + 0.7 * RNG.standard_normal((30, 8))


def scored(metric: str, kind: str, old, new, labels=None, splits=(7, 20), **options) -> Score:
    """The score of outputs given in several batches."""
    scorer = new_scorer(metric, HeadSpec("y", kind, **options), {})
    parts = [np.split(np.asarray(each), [s for s in splits if s < len(old)]) for each in (old, new)]
    given = [None] * len(parts[0]) if labels is None else np.split(np.asarray(labels), splits)
    for before, after, own in zip(*parts, given, strict=True):
        scorer.update({"y": before}, {"y": after}, own)
    return scorer.result(metric)


def test_top_five():
    labels = RNG.integers(0, 8, 30)
    found = scored("top-5", "categorical", OLD, NEW, labels)
    hits = [(np.argsort(-y, 1)[:, :5] == labels[:, None]).any(1) for y in (OLD, NEW)]
    assert (found.original, found.model) == (pytest.approx(hits[0].mean()), pytest.approx(hits[1].mean()))
    assert 0 < found.original != found.model < 1
    lost, gained = (hits[0] & ~hits[1]).mean(), (hits[1] & ~hits[0]).mean()
    assert (found.drop.low, found.drop.high) == pytest.approx(paired_interval(lost, gained, 30))


def test_top_five_needs_labels_that_are_classes():
    with pytest.raises(KfeError, match="label 8 is no class of head 'y', which has 8"):
        scored("top-5", "categorical", OLD, NEW, np.full(30, 8))


def test_cosine():
    found = scored("cosine", "gaussian", OLD, NEW)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(OLD, NEW, strict=True)]
    assert (found.original, found.model) == (1.0, pytest.approx(np.mean(expected)))
    half = 1.96 * np.std(expected, ddof=1) / 30**0.5
    assert found.drop.low == pytest.approx(1 - np.mean(expected) - half, abs=0.3 * half)
    assert found.drop.high == pytest.approx(1 - np.mean(expected) + half, abs=0.3 * half)


def test_cosine_by_hand():
    old = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    new = np.array([[3.0, 0.0], [0.0, 5.0], [-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
    assert scored("cosine", "gaussian", old, new).model == pytest.approx((1 + 0 - 1 + 1 + 0) / 5)


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(30, 2, 4, 3))


def test_psnr_of_labels():
    targets, (old, new) = images(1), (images(1) + scale * (images(seed) - 0.5) for seed, scale in ((2, 0.1), (3, 0.3)))
    found = scored("psnr", "gaussian", old, new, targets)
    peak = targets.max() - targets.min()
    before, after = (
        np.mean([10 * np.log10(peak**2 / np.square(y - t).mean()) for y, t in zip(made, targets, strict=True)])
        for made in (old, new)
    )
    assert (found.original, found.model) == (pytest.approx(before), pytest.approx(after))
    assert found.drop.value == pytest.approx(before - after)
    assert found.drop.low < 20 * np.log10(3) < found.drop.high


def test_psnr_without_labels_is_what_lacks_to_100_db():
    old = images(1)
    old[0, 0, 0, :2] = [0.0, 2.0]  # the range
    found = scored("psnr", "gaussian", old, old + 0.02)
    assert found.original == 100
    assert found.model == pytest.approx(40)
    assert found.drop.value == pytest.approx(60)
    assert scored("psnr", "gaussian", old, old).model == 100


def test_psnr_needs_labels_like_the_output():
    with pytest.raises(KfeError, match="must be arrays of its shape, 168 numbers in this batch, not int64"):
        scored("psnr", "gaussian", images(1), images(2), np.zeros(30, int))


def similarities(y: np.ndarray) -> np.ndarray:
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    return np.array([unit[i] @ unit[j] for i in range(len(y)) for j in range(i)])


def test_spearman():
    found = scored("spearman", "gaussian", OLD, NEW)
    expected = stats.spearmanr(similarities(OLD), similarities(NEW)).statistic
    assert (found.original, found.model) == (1.0, pytest.approx(expected))
    assert 0.3 < expected < 0.95
    spread = np.std(
        [
            stats.spearmanr(*(similarities(y[chosen]) for y in (OLD, NEW))).statistic
            for chosen in np.random.default_rng(1).integers(0, 30, (60, 30))
        ]
    )
    assert found.drop.high - found.drop.low == pytest.approx(2 * 1.96 * spread, rel=0.5)


def test_ranks_of_equals():
    values = RNG.integers(0, 5, 40).astype(float)
    np.testing.assert_array_equal(_ranks(values), stats.rankdata(values))


def test_spearman_of_monotone_similarities_and_of_too_few():
    assert scored("spearman", "gaussian", OLD, 5 * OLD).model == pytest.approx(1.0)
    with pytest.raises(KfeError, match="2 samples have no pairs to rank"):
        scored("spearman", "gaussian", OLD[:2], NEW[:2], splits=())


def brute_force_miou(truth: np.ndarray, decided: np.ndarray, classes: int) -> float:
    ratios = []
    for c in range(classes):
        known = truth < classes
        both = ((truth == c) & (decided == c)).sum()
        either = (((truth == c) | (decided == c)) & known).sum()
        if either:
            ratios.append(both / either)
    return float(np.mean(ratios))


@pytest.mark.parametrize("axis", [1, None])
def test_miou(axis):
    old, new = (np.random.default_rng(seed).standard_normal((30, 4, 3, 5)) for seed in (1, 2))
    new = old + 0.4 * new
    labels = np.random.default_rng(3).integers(0, 3, (30, 3, 5))  # class 3 is there only where it is decided
    labels[:, 0, 0] = 255
    found = scored("miou", "categorical", old, new, labels, axis=axis)
    for score, made in ((found.original, old), (found.model, new)):
        assert score == pytest.approx(brute_force_miou(labels, made.argmax(1), 4))
    alone = scored("miou", "categorical", old, new, axis=axis)
    assert alone.original == 1
    assert alone.model == pytest.approx(brute_force_miou(old.argmax(1), new.argmax(1), 4)) != found.model
    assert alone.drop.low < alone.drop.value < alone.drop.high


def test_miou_by_hand():
    truth, decided = np.eye(2)[[[0, 0, 1, 1]]], np.eye(2)[[[0, 1, 1, 1]]]
    assert scored("miou", "categorical", truth, decided).model == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_one_sample_tells_nothing_of_others():
    drop = scored("cosine", "gaussian", OLD[:1], NEW[:1], splits=()).drop
    assert (drop.low, drop.high) == (-np.inf, np.inf)


def test_intervals_cover_the_truth():
    """Means of many small samples of one population."""
    random = np.random.default_rng(5)
    population = random.standard_normal((4000, 6)), random.standard_normal((4000, 6))
    old, new = population[0], population[0] + 0.8 * population[1]
    truth = 1 - scored("cosine", "gaussian", old, new, splits=()).model
    draws = [random.integers(0, 4000, 60) for _ in range(60)]
    drops = [scored("cosine", "gaussian", old[d], new[d], splits=()).drop for d in draws]
    assert np.mean([drop.low <= truth <= drop.high for drop in drops]) > 0.85


def test_through_whole_models():
    weights = RNG.standard_normal((12, 6)), RNG.standard_normal((12, 6))
    x = RNG.standard_normal((25, 12)).astype(np.float32)
    models = [linear(weights[0] + part * weights[1]) for part in (0.3, 0.0)]
    batches = [Data({"x": x[i : i + 10]}) for i in range(0, 25, 10)]
    found = evaluate(
        models[0], batches, reference=models[1], heads=[HeadSpec("y", "gaussian")], metric="spearman"
    ).score
    old, new = (x @ (weights[0] + part * weights[1]) for part in (0.0, 0.3))
    assert found.metric == "spearman"
    assert found.model == pytest.approx(stats.spearmanr(similarities(old), similarities(new)).statistic, abs=1e-4)
