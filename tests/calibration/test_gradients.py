"""Saliencies and second moments in the eigenbases against per-sample gradients of torch; keeping and merging them."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from onnx_kfe import pipeline
from onnx_kfe.calibration import Statistics, _moments, collect, collect_eigen_moments, merge, open_dataset
from onnx_kfe.calibration import input_specs as specs_of
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import Network, open_network
from onnx_kfe.kfe import BASES, IMPORTANCES
from tests.calibration.per_sample import Gradients, per_sample_gradients
from tests.calibration.test_collect import CONVOLUTIONS, TOLERANCE, network_of, noise_of
from tests.cases import load_case
from tests.networks import classifier, samples
from tools.torch_oracle import relative_error

SAMPLES = 10
CASES = [
    "strided_shortcut-17",
    "grouped-11",
    "conv1d-13",
    "video-17",
    "dilated-11",
    "mlp-11",
    "attention-dynamo",
    "pyramid-11",
    "two_heads-dynamo",
    *CONVOLUTIONS,
    "free extent",
]


@pytest.fixture(autouse=True)
def all_positions(monkeypatch: pytest.MonkeyPatch):
    """Factors at every position, so that what is centred is centred at the mean over all."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)


def opened(name: str) -> tuple[Network, dict[str, np.ndarray]]:
    """A case of the zoo, or two convolutions of which the first has the padding, stride or dilation of that name."""
    if "-" in name:
        case = load_case(name)
        return open_network(case.model), case.inputs(SAMPLES)
    body = f"a = Conv {CONVOLUTIONS.get(name, '')} (x, w) b = Relu(a) y = Conv(b, v)"
    free = name == "free extent"
    network = network_of(body, "float[N, 3, H, W] x" if free else "float[N, 3, 9, 8] x", w=(6, 3, 3, 3), v=(4, 6, 2, 1))
    x = np.random.default_rng(0).standard_normal((SAMPLES, 3, 9, 8)).astype(np.float32)
    return network.with_input_shapes({"x": (1, 3, 9, 8)}) if free else network, {"x": x}


@cache
def measured(name: str) -> tuple[Network, Statistics, list[dict[str, Gradients]]]:
    """A network, its EKFAC statistics, and what torch says of every sample."""
    network, feeds = opened(name)
    data = open_dataset(feeds, specs_of(network.model))
    statistics = collect_eigen_moments(network, collect(network, data, seed=5), data)
    noise = noise_of(network, statistics.heads, feeds, seed=5)
    return network, statistics, per_sample_gradients(network, statistics.heads, feeds, noise)


@pytest.mark.parametrize("name", CASES)
def test_saliency_is_the_mean_squared_gradient_of_a_gate(name: str):
    network, statistics, gradients = measured(name)
    assert set(statistics.layers) == {layer.name for layer in network.prunable}
    for layer, found in statistics.layers.items():
        expected = np.mean([np.square(one[layer].gate) for one in gradients], axis=0)
        assert expected.max() > 0
        assert relative_error(found.saliency, expected) < TOLERANCE, layer


@pytest.mark.parametrize("name", CASES)
def test_second_moments_are_those_of_rotated_gradients(name: str):
    """Of the gradient by the weight while the bias makes up for the mean: every tap by itself, loops over groups."""
    network, statistics, gradients = measured(name)
    for layer, found in statistics.layers.items():
        geometry = next(one.geometry for one in network.prunable if one.name == layer)
        mean = found.mean.reshape(geometry.groups, -1, geometry.taps)
        for group in range(geometry.groups):
            moments = found.eigen_moments(group)
            expected = np.zeros_like(moments.second_moment)
            for one in gradients:
                centred = one[layer].weight[group] - np.multiply.outer(one[layer].shift[group], mean[group])
                for tap in range(geometry.taps):
                    rotated = moments.output_basis.T @ centred[:, :, tap] @ moments.input_basis
                    expected[:, :, tap] += np.square(rotated) / len(gradients)
            assert expected.max() > 0
            assert relative_error(moments.second_moment, expected) < TOLERANCE, layer


@pytest.mark.parametrize("name", ["grouped-11", "mlp-11"])
def test_bases_are_those_of_the_factors(name: str):
    network, statistics, _ = measured(name)
    for layer in network.prunable:
        sums = statistics.layers[layer.name]
        for group, weight in enumerate(layer.weight()):
            factors = sums.centred_input_factor[group], sums.output_factor[group]
            moments = sums.eigen_moments(group)
            plain = BASES["kfe"](weight, *factors)
            there = BASES["kfe"](weight, *factors, eigen=moments)
            np.testing.assert_array_equal(there.input_basis, plain.input_basis)
            np.testing.assert_array_equal(there.output_basis, plain.output_basis)
            np.testing.assert_array_equal(there.variances, moments.second_moment)
            assert relative_error(there.variances, plain.variances) > 1e-3  # measured, not products


def test_taylor_scores_of_collected_saliencies():
    network, statistics, gradients = measured("mlp-11")
    layer = network.prunable[0]
    sums = statistics.layers[layer.name]
    there = BASES["channel"](
        layer.weight()[0], sums.centred_input_factor[0], sums.output_factor[0], saliency=sums.saliency[0]
    )
    expected = 0.5 * np.mean([one[layer.name].gate[0] ** 2 for one in gradients], axis=0)
    np.testing.assert_allclose(IMPORTANCES["taylor"](there).rows, expected, rtol=1e-3, atol=1e-9)


def equal(left: Statistics, right: Statistics) -> None:
    for name, layer in left.layers.items():
        other = right.layers[name]
        np.testing.assert_array_equal(layer.saliency_sum, other.saliency_sum)
        for key in ("input_basis", "output_basis", "second_moment"):
            np.testing.assert_array_equal(getattr(layer.eigen, key), getattr(other.eigen, key))


def test_saving_and_loading(tmp_path: Path):
    _, statistics, _ = measured("grouped-11")
    statistics.save(tmp_path / "stats")
    equal(statistics, Statistics.load(tmp_path / "stats"))


def test_files_of_before_load_and_ask_for_a_collection_where_it_matters(tmp_path: Path):
    """An old file has neither saliencies nor moments."""
    network, statistics, _ = measured("mlp-11")
    statistics.save(tmp_path / "new")
    with safetensors.safe_open(tmp_path / "new", framework="numpy") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    added = ("saliency_sum", "input_basis", "output_basis", "second_moment")
    kept = {key: tensor for key, tensor in tensors.items() if key.rpartition("/")[2] not in added}
    assert len(kept) == len(tensors) - len(added) * len(statistics.layers)
    safetensors.numpy.save_file(kept, tmp_path / "old", metadata)
    old = Statistics.load(tmp_path / "old")
    layer = network.prunable[0]
    sums = old.layers[layer.name]
    assert sums.saliency is None
    assert sums.eigen_moments(0) is None
    np.testing.assert_array_equal(sums.input_factor, statistics.layers[layer.name].input_factor)
    there = BASES["channel"](layer.weight()[0], sums.input_factor[0], sums.output_factor[0], saliency=sums.saliency)
    with pytest.raises(KfeError, match="collect the statistics again"):
        IMPORTANCES["taylor"](there)
    assert (sums + dataclasses.replace(statistics.layers[layer.name], eigen=None)).saliency is None


def test_shards_add_their_saliencies():
    network = open_network(classifier())
    data = open_dataset({"x": samples(150)}, specs_of(network.model))
    whole = collect(network, data)
    merged = merge([collect(network, data, shard=(index, 2)) for index in (1, 0)])
    for name, layer in whole.layers.items():
        np.testing.assert_allclose(merged.layers[name].saliency, layer.saliency, rtol=1e-6)
    found, expected = (collect_eigen_moments(network, statistics, data) for statistics in (merged, whole))
    for name, layer in expected.layers.items():
        sums = found.layers[name].eigen_moments(0).second_moment
        assert relative_error(sums, layer.eigen_moments(0).second_moment) < 1e-3, name


def test_moments_merge_in_one_basis_alone():
    network, statistics, _ = measured("mlp-11")
    layer = statistics.layers[network.prunable[0].name]
    np.testing.assert_array_equal((layer + layer).eigen_moments(0).second_moment, layer.eigen_moments(0).second_moment)
    turned = dataclasses.replace(layer.eigen, input_basis=-layer.eigen.input_basis)
    for eigen in (turned, None):
        with pytest.raises(KfeError, match="different eigenbases"):
            layer + dataclasses.replace(layer, eigen=eigen)


def test_what_cannot_be_collected_is_refused():
    network = open_network(classifier())
    data, fewer = (open_dataset({"x": samples(count)}, specs_of(network.model)) for count in (150, 100))
    with pytest.raises(KfeError, match="merge the shards first"):
        collect_eigen_moments(network, collect(network, data, shard=(0, 2)), data)
    with pytest.raises(KfeError, match="100 samples, but the statistics are of 150"):
        collect_eigen_moments(network, collect(network, data), fewer)
    with pytest.raises(KfeError, match="another model"):
        collect_eigen_moments(open_network(classifier(seed=1)), collect(network, data), data)
    with pytest.raises(UsageError, match="--curvature ekfac"):
        pipeline.collect(classifier(), {"x": samples(8)}, curvature="ekfac", shard=(0, 2))
    with pytest.raises(UsageError, match="it can be kfac, ekfac"):
        pipeline.collect(classifier(), {"x": samples(8)}, curvature="shampoo")


def test_the_public_function_collects_both():
    plain, both = (pipeline.collect(classifier(), samples(24), curvature=curvature) for curvature in ("kfac", "ekfac"))
    for name, layer in both.layers.items():
        assert plain.layers[name].eigen is None
        assert layer.eigen is not None
        np.testing.assert_array_equal(layer.input_second_moment, plain.layers[name].input_second_moment)
