"""Statistics of what is left of a layer, against those of the data without the channels that went."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kfe.calibration import LayerStatistics
from onnx_kfe.calibration._layer_statistics import PositionMeans
from onnx_kfe.kfe import EigenMoments

SAMPLES, POSITIONS, TAPS = 7, 5, 3


def statistics_of(inputs: np.ndarray, cotangents: np.ndarray, eigen: EigenMoments | None = None) -> LayerStatistics:
    """Sums over patches ``[groups, samples, positions, c, taps]``, cotangents ``[groups, samples, positions, o]``."""
    groups, samples, positions = inputs.shape[:3]
    x, g = (array.reshape(groups, samples * positions, -1) for array in (inputs, cotangents))
    means = inputs[..., TAPS // 2].mean(2).transpose(1, 0, 2).reshape(samples, -1)
    common = PositionMeans(samples, means.sum(0), np.square(means).sum(), np.square(cotangents.mean(2)).sum())
    saliency = np.square((cotangents * cotangents[:, :, ::-1]).sum(2)).sum(1)
    moments = [np.swapaxes(each, 1, 2) @ each for each in (x, g)]
    return LayerStatistics(moments[0], x.sum(1), moments[1], samples * positions, samples, common, saliency, eigen)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_left_has_the_statistics_of_its_own_data(groups) -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(groups, SAMPLES, POSITIONS, 4, TAPS)) + random.normal(size=(groups, 1, 1, 4, 1))
    cotangents = random.normal(size=(groups, SAMPLES, POSITIONS, 6))
    columns = np.array([[0, 1, 1, 0], [1, 0, 0, 1]], bool)[:groups]
    rows = np.array([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]], bool)[:groups]
    eigen = EigenMoments(np.zeros((groups, 4, 4)), np.zeros((groups, 6, 6)), np.zeros((groups, 6, 4, TAPS)))
    found = statistics_of(inputs, cotangents, eigen).cut(rows.reshape(-1), columns.reshape(-1))
    kept_inputs = np.stack([part[:, :, mask] for part, mask in zip(inputs, columns, strict=True)])
    kept_cotangents = np.stack([part[:, :, mask] for part, mask in zip(cotangents, rows, strict=True)])
    wanted = statistics_of(kept_inputs, kept_cotangents)
    for name in ("mean", "input_factor", "centred_input_factor", "output_factor", "saliency"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-12, err_msg=name)
    assert (found.positions, found.samples) == (wanted.positions, wanted.samples)
    assert found.eigen is None  # directions of another space
    np.testing.assert_allclose(found.common.input_mean, wanted.common.input_mean)
    assert found.coherence == pytest.approx(wanted.coherence, rel=0.5)  # of shares taken for alike in all channels


@pytest.mark.parametrize("side", ["outputs", "inputs", "both"])
def test_other_bases_have_the_statistics_of_the_data_in_them(side) -> None:
    random = np.random.default_rng(3)
    inputs = random.normal(size=(1, SAMPLES, POSITIONS, 4, TAPS)) + random.normal(size=(1, 1, 1, 4, 1))
    cotangents = random.normal(size=(1, SAMPLES, POSITIONS, 6))
    outward = np.eye(6) if side == "inputs" else random.normal(size=(6, 6))
    inward = np.eye(4) if side == "outputs" else random.normal(size=(4, 4))
    eigen = EigenMoments(np.zeros((1, 4, 4)), np.zeros((1, 6, 6)), np.zeros((1, 6, 4, TAPS)))
    found = statistics_of(inputs, cotangents, eigen).in_basis(outward, inward)
    wanted = statistics_of(np.einsum("dc,gspct->gspdt", inward, inputs), cotangents @ np.linalg.inv(outward))
    for name in ("mean", "input_factor", "centred_input_factor", "output_factor"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-9, err_msg=name)
    assert (found.positions, found.samples) == (wanted.positions, wanted.samples)
    assert found.saliency is None
    assert found.eigen is None
    np.testing.assert_allclose(found.common.input_mean, wanted.common.input_mean)
    assert found.coherence == pytest.approx(wanted.coherence, rel=0.5)  # of shares taken for alike in all directions


def test_orthogonal_bases_have_the_same_coherence() -> None:
    """Norms are the same in them, and so are the shares."""
    random = np.random.default_rng(4)
    whole = statistics_of(
        random.normal(size=(1, SAMPLES, POSITIONS, 4, TAPS)), random.normal(size=(1, SAMPLES, POSITIONS, 6))
    )
    bases = [np.linalg.qr(random.normal(size=(size, size)))[0] for size in (6, 4)]
    found = whole.in_basis(*bases)
    assert found.coherence == pytest.approx(whole.coherence)
    assert found.common.input_mean_square == pytest.approx(whole.common.input_mean_square)
    assert found.common.cotangent_mean_square == pytest.approx(whole.common.cotangent_mean_square)


def test_where_nothing_goes_nothing_changes() -> None:
    random = np.random.default_rng(1)
    whole = statistics_of(
        random.normal(size=(1, SAMPLES, POSITIONS, 4, TAPS)), random.normal(size=(1, SAMPLES, POSITIONS, 6))
    )
    found = whole.cut(np.ones(6, bool), np.ones(4, bool))
    for name in ("mean", "input_factor", "output_factor", "saliency", "coherence"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), err_msg=name)


def test_of_a_transposed_convolution_patches_of_the_cotangent_are_cut() -> None:
    random = np.random.default_rng(3)
    x, g = random.normal(size=(2, 40, 4)), random.normal(size=(2, 40, 3, TAPS))
    rows, columns = np.array([[1, 0, 1], [0, 1, 1]], bool), np.array([[1, 1, 0, 0], [0, 1, 0, 1]], bool)

    def sums(x: np.ndarray, g: np.ndarray) -> LayerStatistics:
        written = g.reshape(2, 40, -1)
        saliency = np.square(g).sum((1, 3))
        moments = [np.swapaxes(each, 1, 2) @ each for each in (x, written)]
        return LayerStatistics(moments[0], x.sum(1), moments[1], 40, 8, saliency_sum=saliency)

    found = sums(x, g).cut(rows.reshape(-1), columns.reshape(-1))
    wanted = sums(
        np.stack([part[:, mask] for part, mask in zip(x, columns, strict=True)]),
        np.stack([part[:, mask] for part, mask in zip(g, rows, strict=True)]),
    )
    for name in ("mean", "input_factor", "output_factor", "saliency"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-12, err_msg=name)


def test_means_that_were_not_collected_stay_so() -> None:
    random = np.random.default_rng(2)
    x, g = random.normal(size=(1, 40, 12)), random.normal(size=(1, 40, 6))
    moments = [np.swapaxes(each, 1, 2) @ each for each in (x, g)]
    found = LayerStatistics(moments[0], x.sum(1), moments[1], 40, 8).cut(np.arange(6) > 2, np.arange(4) > 1)
    assert found.coherence == 1
    assert found.saliency is None
    np.testing.assert_allclose(found.input_second_moment[0], x[0, :, 6:].T @ x[0, :, 6:])
