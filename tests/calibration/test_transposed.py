"""Statistics of ConvTranspose: what each position of the input writes, found by running it on one element at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from onnx_kfe.calibration import Statistics, _moments, collect, find_heads, input_specs, open_dataset, sample_noise
from onnx_kfe.calibration._collect import _Sums
from onnx_kfe.calibration._grid import PHASES, grid_strides
from onnx_kfe.calibration._instrument import PHASE_INPUT, differentiable_copy, instrument, noise_input
from onnx_kfe.calibration._moments import _INPUT_COST, _OUTPUT_COST
from onnx_kfe.graph import Network, open_network, serialize
from onnx_kfe.kfe import predicted_loss
from onnx_kfe.planning import LayerProblem
from onnx_kfe.runtime import create_session
from tests.tiny import node, tiny, weights

SAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A ConvTranspose with its weight ``[c, o/groups, *kernel]`` and the extent of its input."""

    weight: tuple[int, ...]
    size: tuple[int, ...]
    attributes: dict[str, object]

    @property
    def groups(self) -> int:
        return int(self.attributes.get("group", 1))  # type: ignore[call-overload]

    @property
    def channels(self) -> int:
        return self.weight[1] * self.groups

    def model(self, *, free: bool = False, given_weight: bool = False) -> onnx.ModelProto:
        nodes = [node("ConvTranspose", ["x", "w"], ["y"], "layer", **self.attributes)]
        axes = "abc"[: len(self.size)]
        x = {"x": ["n", self.weight[0], *(axes.upper() if free else self.size)]}
        y = {"y": ["n", self.channels, *axes]}
        if given_weight:
            return tiny(nodes, x | {"w": self.weight}, y)
        return tiny(nodes, x, y, {"w": weights(*self.weight)})

    def inputs(self, samples: int = SAMPLES) -> np.ndarray:
        random = np.random.default_rng(0)
        shape = samples, self.weight[0], *self.size
        return (random.standard_normal(shape) + random.standard_normal(shape[:2] + (1,) * len(self.size))).astype("f4")

    def written(self, g: np.ndarray) -> np.ndarray:
        """Patches ``[n, t, groups, o * taps]`` of a cotangent: the derivative by each weight for inputs that are 1."""
        session = create_session(self.model(given_weight=True).SerializeToString())
        positions = math.prod(self.size)
        x = np.zeros((positions, self.groups, self.weight[0] // self.groups, positions), np.float32)
        x[:, :, 0] = np.eye(positions)[:, None]
        x = x.reshape(positions, self.weight[0], *self.size)
        columns = []
        for place in range(math.prod(self.weight[1:])):
            w = np.zeros((self.weight[0], math.prod(self.weight[1:])), np.float32)
            w[:, place] = 1
            (y,) = session.run(None, {"x": x, "w": w.reshape(self.weight)})
            by_group = (a.reshape(len(a), self.groups, -1) for a in (g.astype(np.float64), y.astype(np.float64)))
            columns.append(np.einsum("ngp,tgp->ntg", *by_group))
        return np.stack(columns, -1)


CASES = {
    "doubling": Case((3, 4, 4, 4), (3, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "plain": Case((4, 2, 3, 2), (4, 3), {}),
    "cropped more on one side": Case((3, 2, 3, 3), (4, 3), {"pads": [2, 0, 1, 2]}),
    "output padding": Case((3, 2, 3, 3), (3, 3), {"strides": [2, 3], "output_padding": [1, 2], "pads": [1, 0, 0, 1]}),
    "dilated": Case((3, 2, 3, 2), (3, 4), {"dilations": [2, 3], "strides": [1, 2], "pads": [0, 1, 2, 0]}),
    "kernel within the stride": Case((3, 2, 2, 1), (3, 4), {"strides": [3, 2]}),
    "same upper": Case((3, 2, 4, 3), (3, 4), {"auto_pad": "SAME_UPPER", "strides": [1, 2]}),
    "same lower": Case((3, 2, 4, 3), (3, 4), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    "valid": Case((3, 2, 3, 3), (3, 4), {"auto_pad": "VALID", "strides": [2, 1]}),
    "grouped": Case((6, 2, 3, 3), (3, 4), {"group": 2, "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    "1x1": Case((4, 3, 1, 1), (3, 4), {"strides": [2, 1]}),
    "1-D": Case((3, 2, 5), (7,), {"strides": [2], "pads": [2, 1], "output_padding": [1]}),
    "3-D": Case((3, 2, 2, 3, 2), (2, 3, 2), {"strides": [2, 1, 2], "pads": [0, 1, 0, 1, 0, 0]}),
}


@pytest.fixture
def all_positions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)


def collected(network: Network, x: np.ndarray) -> Statistics:
    return collect(network, open_dataset({"x": x}, input_specs(network.model)), heads={"y": "gaussian"})


def cotangents(statistics: Statistics, model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Of a Gaussian head behind the layer: the noise in units of its deviation."""
    (y,) = create_session(model.SerializeToString()).run(None, {"x": x})
    (head,) = statistics.heads
    drawn = [sample_noise([head], {"y": (1, *y.shape[1:])}, 0, index)[0] for index in range(len(x))]
    return np.concatenate(drawn) / head.scale


def rows(case: Case, x: np.ndarray) -> np.ndarray:
    """``[n, t, groups, c]``."""
    return x.reshape(len(x), case.groups, -1, math.prod(case.size)).transpose(0, 3, 1, 2).astype(np.float64)


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_factors_are_those_of_single_positions(name: str, free: bool):
    case, x = CASES[name], CASES[name].inputs()
    model = case.model(free=free)
    network = open_network(model, input_shapes={"x": (1, *x.shape[1:])} if free else None)
    statistics = collected(network, x)
    assert not statistics.skipped
    found = statistics.layers["layer"]
    patches, read = case.written(cotangents(statistics, model, x)), rows(case, x)
    assert found.positions == SAMPLES * math.prod(case.size)
    np.testing.assert_allclose(found.input_factor, np.einsum("ntgi,ntgj->gij", read, read) / SAMPLES, rtol=1e-4)
    np.testing.assert_allclose(found.mean, read.mean((0, 1)), rtol=1e-4, atol=1e-5)
    expected = np.einsum("ntgo,ntgp->gop", patches, patches) / found.positions
    np.testing.assert_allclose(found.output_factor, expected, rtol=1e-4, atol=1e-5 * expected.max())
    common = found.common
    assert common.rows == SAMPLES
    assert common.cotangent_mean_square == pytest.approx(np.square(patches.mean(1)).sum(), rel=1e-4)
    assert common.input_mean_square == pytest.approx(np.square(read.mean(1)).sum(), rel=1e-4)
    assert found.saliency.shape == (case.groups, case.channels // case.groups)


@pytest.mark.parametrize("name", ["doubling", "dilated", "grouped", "1-D"])
def test_gradients_of_single_samples_are_sums_of_what_positions_read_and_write(name: str):
    """By torch: ``dL/dW = sum_t x_t (patch of g at t)^T``, so that A and G are Kronecker factors of the Fisher."""
    case, x = CASES[name], CASES[name].inputs()
    (y,) = create_session(case.model().SerializeToString()).run(None, {"x": x})
    g = np.random.default_rng(1).standard_normal(y.shape)
    weight = torch.from_numpy(weights(*case.weight)).double().requires_grad_()
    attributes = {"stride": case.attributes.get("strides", 1), "dilation": case.attributes.get("dilations", 1)}
    convolve = F.conv_transpose1d if len(case.size) == 1 else F.conv_transpose2d
    whole = convolve(torch.from_numpy(x).double(), weight, groups=case.groups, **attributes)
    begins = case.attributes.get("pads", [0] * 2 * len(case.size))[: len(case.size)]
    places = [slice(begin, begin + n) for begin, n in zip(begins, y.shape[2:], strict=True)]
    cropped = whole[(slice(None), slice(None), *places)]  # output_padding may go beyond it
    wanted = torch.from_numpy(g)[tuple(slice(0, n) for n in cropped.shape)]
    (gradient,) = torch.autograd.grad((cropped * wanted).sum(), weight)
    found = np.einsum("ntgc,ntgo->gco", rows(case, x), case.written(g)).reshape(case.weight)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize("name", ["doubling", "dilated", "1-D"])
def test_predicted_loss_is_the_quadratic_form_of_the_explicit_fisher(name: str):
    case, x = CASES[name], CASES[name].inputs(3)
    network = open_network(case.model())
    statistics = collected(network, x)
    patches, read = case.written(cotangents(statistics, case.model(), x))[:, :, 0], rows(case, x)[:, :, 0]
    change = np.random.default_rng(5).standard_normal((case.channels, *case.weight[2:], case.weight[0]))
    change = np.moveaxis(change, -1, 1)  # [o, c, *kernel]
    matrix = np.moveaxis(change, 1, -1).reshape(-1, case.weight[0])
    seen = statistics.layers["layer"]
    pairs = itertools.product(patches.reshape(-1, len(matrix)), read.reshape(-1, len(x[0])))
    exact = 0.5 * sum(np.square(written @ matrix @ one) for written, one in pairs) / len(x) / seen.positions
    found = predicted_loss(matrix, seen.input_factor[0], seen.output_factor[0])
    assert found == pytest.approx(exact, rel=1e-4)
    problem = LayerProblem(network.layers[0], seen)
    damped = problem.loss(problem.weight + change[None]) / seen.uncentred.coherence
    assert exact < damped < 1.2 * exact  # by 5 % of the mean eigenvalue of G


def test_where_all_output_positions_have_one_gradient_the_trace_is_that_of_the_fisher(monkeypatch: pytest.MonkeyPatch):
    """``k = s``: each output position is written once, so that a sample's gradient is ``T g mean(x)^T`` at each tap."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)
    x = Case((3, 2, 2, 2), (4, 5), {}).inputs(40)
    nodes = [node("ConvTranspose", ["x", "w"], ["c"], "layer", strides=[2, 2]), node("GlobalAveragePool", ["c"], ["y"])]
    network = open_network(tiny(nodes, {"x": ["n", 3, 4, 5]}, {"y": ["n", 2, 1, 1]}, {"w": weights(3, 2, 2, 2)}))
    statistics = collected(network, x)
    layer, (head,) = statistics.layers["layer"], statistics.heads
    noise = np.stack([sample_noise([head], {"y": (1, 2, 1, 1)}, 0, n)[0].ravel() for n in range(len(x))]) / head.scale
    exact = np.square(x.mean((2, 3))).sum(1).mean() * np.square(noise / 4).sum(1).mean() * 4  # taps
    uncentred = layer.uncentred
    traces = np.trace(layer.input_factor[0]) * np.trace(layer.output_factor[0])
    assert uncentred.coherence * traces == pytest.approx(exact, rel=1e-4)
    assert uncentred.coherence > 5


THINNED = {
    "wide": Case((2, 12, 3, 3), (8, 6), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "narrow": Case((24, 2, 1, 2), (8, 6), {"pads": [0, 1, 0, 0]}),
    "grouped": Case((4, 8, 3, 2), (6, 5), {"group": 2, "strides": [1, 3]}),
    "3-D": Case((2, 6, 2, 2, 2), (4, 3, 5), {"strides": [2, 2, 2]}),
}


@pytest.mark.parametrize("name", THINNED)
def test_all_phases_of_the_grid_together_are_all_positions(name: str):
    """Statistics are taken at few positions where those of all would cost more than the layer."""
    case, x = THINNED[name], THINNED[name].inputs(2)
    network = open_network(case.model())
    geometry, heads = network.layers[0].geometry, find_heads(network)
    instrumented = instrument(differentiable_copy(network.model), network.prunable, heads)
    (probe,), session = instrumented.probes, create_session(serialize(instrumented.model))
    (y,) = create_session(case.model().SerializeToString()).run(None, {"x": x})
    noise = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
    feeds = {"x": x, noise_input(heads[0]): noise}
    wanted = {value.name for value in session.get_inputs()}

    def summed(share: float, size: str, elements: int, moment: str) -> np.ndarray:
        """Over all phases of a grid, each as much as it saw."""
        total, grid = np.zeros(()), grid_strides(case.size, min(1.0, share))
        assert math.prod(grid) > 1 or share >= 1
        for phase in itertools.product(*([-(-start * PHASES // s) for start in range(s)] for s in (*grid, 1, 1)[:3])):
            given = {**feeds, PHASE_INPUT: np.array(phase, np.int64)}
            values = session.run(probe.outputs, {key: value for key, value in given.items() if key in wanted})
            results, sums = dict(zip(probe.outputs, values, strict=True)), _Sums(probe)
            sums.add(results, len(x))
            seen = results[getattr(probe, size)].item() / elements / (len(x) * math.prod(case.size))
            total = total + seen * getattr(sums.statistics(), moment)
        return total

    read, patches = rows(case, x), case.written(noise)
    per_input = _INPUT_COST * geometry.cotangent_size / geometry.patch_size
    found = summed(per_input, "input_size", case.weight[0], "input_second_moment")
    np.testing.assert_allclose(found, np.einsum("ntgi,ntgj->gij", read, read), rtol=1e-4, atol=1e-4)
    per_cotangent = _OUTPUT_COST * geometry.patch_size / geometry.cotangent_size
    elements = geometry.groups * geometry.cotangent_size
    found = summed(per_cotangent, "cotangent_size", elements, "cotangent_second_moment")
    np.testing.assert_allclose(found, np.einsum("ntgo,ntgp->gop", patches, patches), rtol=1e-4, atol=1e-4)
