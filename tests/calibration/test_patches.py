"""Second moments on a grid of positions: all phases of the grid together are all positions, each once."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration import (
    LayerStatistics,
    _moments,
    collect,
    collect_eigen_moments,
    find_heads,
    input_specs,
    open_dataset,
)
from onnx_kfe.calibration._collect import _Sums
from onnx_kfe.calibration._grid import PHASES, grid_phase, grid_strides, rows_on_grid
from onnx_kfe.calibration._instrument import PHASE_INPUT, differentiable_copy, instrument, noise_input
from onnx_kfe.calibration._moments import _INPUT_COST, _OUTPUT_COST
from onnx_kfe.graph import open_network, serialize
from onnx_kfe.runtime import create_session
from tests.networks import mixer

SAMPLES = 3


@dataclass(frozen=True)
class Geometry:
    """A convolution, or a matrix product over tokens where there is no kernel."""

    channels: tuple[int, int]
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    groups: int = 1
    dynamic: bool = False

    def model(self) -> bytes:
        inputs, outputs = self.channels
        random = np.random.default_rng(0)
        attributes = {"strides": self.strides, "dilations": self.dilations, "pads": self.pads}
        given = {key: value for key, value in attributes.items() if value}
        if self.kernel:
            weight = random.standard_normal((outputs, inputs // self.groups, *self.kernel)).astype(np.float32)
            node = helper.make_node(
                "Conv", ["x", "w"], ["y"], "layer", group=self.groups, auto_pad=self.auto_pad, **given
            )
        else:
            weight = random.standard_normal((inputs, outputs)).astype(np.float32)
            node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
        free = [f"s{axis}" if self.dynamic else n for axis, n in enumerate(self.size)]
        shape = ["N", inputs, *free] if self.kernel else ["N", *free, inputs]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
        opset = [helper.make_opsetid("", 21)]
        return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()

    @property
    def input_shape(self) -> tuple[int, ...]:
        inputs = self.channels[0]
        return (SAMPLES, inputs, *self.size) if self.kernel else (SAMPLES, *self.size, inputs)

    def patches(self, x: np.ndarray) -> np.ndarray:
        """``[positions, groups, channels * taps]``, one window of the padded input after the other."""
        if not self.kernel:
            return x.reshape(-1, 1, x.shape[-1])
        spatial = len(self.kernel)
        strides, dilations = self.strides or (1,) * spatial, self.dilations or (1,) * spatial
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, self.kernel, strict=True)]
        begin, end = self._pads(strides, reach)
        x = np.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
        extent = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
        rows = []
        for sample in x:
            for place in itertools.product(*map(range, extent)):
                window = tuple(
                    slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, dilations, strict=True)
                )
                rows.append(sample[(slice(None), *window)].reshape(self.groups, -1))
        return np.array(rows)

    def _pads(self, strides: tuple[int, ...], reach: list[int]) -> tuple[list[int], list[int]]:
        if self.auto_pad == "NOTSET":
            pads = self.pads or (0,) * 2 * len(self.kernel)
            return list(pads[: len(pads) // 2]), list(pads[len(pads) // 2 :])
        totals = [max((math.ceil(n / s) - 1) * s + r - n, 0) for n, s, r in zip(self.size, strides, reach, strict=True)]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (less, more) if self.auto_pad == "SAME_UPPER" else (more, less)


GEOMETRIES = {
    "3x3": Geometry((6, 2), (9, 7), (3, 3), pads=(1, 1, 1, 1)),
    "unpadded": Geometry((6, 2), (9, 7), (3, 3)),
    "1x1": Geometry((12, 2), (8, 6), (1, 1)),
    "1x1 strided": Geometry((12, 2), (8, 6), (1, 1), strides=(2, 2)),
    "strided": Geometry((6, 2), (12, 11), (3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    "dilated, asymmetric": Geometry((5, 2), (9, 10), (3, 2), (1, 2), (2, 3), (2, 1, 1, 3)),
    "padding beyond the kernel": Geometry((4, 2), (5, 6), (3, 3), pads=(4, 3, 4, 3)),
    "same upper": Geometry((5, 2), (9, 8), (3, 4), strides=(2, 3), auto_pad="SAME_UPPER"),
    "same lower": Geometry((5, 2), (9, 8), (4, 3), strides=(2, 2), auto_pad="SAME_LOWER"),
    "grouped": Geometry((8, 4), (9, 7), (3, 3), pads=(1, 1, 1, 1), groups=2),
    "grouped, unlike channels": Geometry((4, 12), (6, 6), (3, 2), pads=(1, 1, 1, 0), groups=2),
    "wide output": Geometry((2, 24), (8, 7), (1, 1)),
    "wide output 3x3": Geometry((2, 48), (8, 7), (3, 3), strides=(2, 1), pads=(1, 1, 1, 1)),
    "1-D": Geometry((6, 2), (23,), (5,), strides=(2,), pads=(2, 1)),
    "1-D wide": Geometry((2, 30), (23,), (3,)),
    "3-D": Geometry((6, 2), (5, 6, 4), (3, 3, 3), pads=(1, 1, 1, 1, 1, 1)),
    "3-D, thin": Geometry((16, 2), (4, 3, 5), (2, 3, 2), pads=(1, 2, 0, 0, 1, 1)),
    "3-D 1x1x1 strided": Geometry((12, 2), (5, 4, 6), (1, 1, 1), strides=(1, 2, 3)),
    "3-D dilated": Geometry((4, 2), (6, 7, 8), (2, 3, 1), (2, 1, 3), (3, 2, 1), (1, 2, 0, 3, 0, 1)),
    "3-D same": Geometry((4, 2), (5, 6, 7), (3, 2, 4), strides=(2, 1, 2), auto_pad="SAME_LOWER"),
    "3-D grouped, free size": Geometry((8, 4), (5, 4, 6), (3, 2, 3), pads=(1, 0, 1, 1, 1, 1), groups=2, dynamic=True),
    "tokens": Geometry((12, 3), (10,)),
    "tokens wide": Geometry((3, 12), (2, 10)),
    "free size": Geometry((6, 2), (9, 7), (3, 3), strides=(2, 2), pads=(1, 0, 2, 1), dynamic=True),
}


class Probed:
    """The statistics of the only layer of a model, at chosen phases."""

    def __init__(self, geometry: Geometry) -> None:
        random = np.random.default_rng(1)
        self.x = random.standard_normal(geometry.input_shape).astype(np.float32)
        shapes = {"x": (1, *geometry.input_shape[1:])}
        network = open_network(
            ModelProto.FromString(geometry.model()), input_shapes=shapes if geometry.dynamic else None
        )
        (self.layer,) = network.prunable
        heads = find_heads(network)
        instrumented = instrument(differentiable_copy(network.model), network.prunable, heads)
        assert not instrumented.skipped
        (self.probe,) = instrumented.probes
        self.session = create_session(serialize(instrumented.part(instrumented.probes)))
        y = create_session(geometry.model()).run(None, {"x": self.x})[0]
        self.noise = random.standard_normal(y.shape).astype(np.float32)
        self.noise_name = noise_input(heads[0])

    def at(self, phase: tuple[int, ...]) -> tuple[LayerStatistics, float, float]:
        """The statistics, scaled up to all positions, and the share of inputs and cotangents seen."""
        feeds = {"x": self.x, self.noise_name: self.noise, PHASE_INPUT: np.array(phase, np.int64)}
        wanted = {value.name for value in self.session.get_inputs()}
        values = self.session.run(self.probe.outputs, {k: v for k, v in feeds.items() if k in wanted})
        results = dict(zip(self.probe.outputs, values, strict=True))
        sums = _Sums(self.probe)
        sums.add(results, SAMPLES)
        geometry = self.layer.geometry
        assert geometry is not None
        positions = int(results[self.probe.output_size]) / geometry.out_channels
        inputs = int(results[self.probe.input_size]) / (geometry.patch_size * geometry.groups)
        cotangents = int(results[self.probe.cotangent_size]) / geometry.out_channels
        return sums.statistics(), inputs / positions, cotangents / positions


def _phases(geometry: Geometry, extent: tuple[int, ...], share: float) -> list[tuple[int, ...]]:
    """Every place where the grid over positions of some extent can start."""
    extent = extent if geometry.kernel else extent[-1:]
    known = (None,) * len(extent) if geometry.dynamic else extent
    strides = [min(stride, n) for stride, n in zip(grid_strides(known, min(1.0, share)), extent, strict=True)]
    return list(itertools.product(*([-(-start * PHASES // s) for start in range(s)] for s in (*strides, 1, 1)[:3])))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_all_phases_together_are_all_patches(name: str):
    geometry = GEOMETRIES[name]
    probed = Probed(geometry)
    patches = geometry.patches(probed.x.astype(np.float64))
    extent = probed.noise.shape[2:] if geometry.kernel else probed.noise.shape[1:-1]
    share = _INPUT_COST * geometry.channels[1] / geometry.groups / patches.shape[-1]
    moment, total, seen = 0.0, 0.0, 0.0
    for phase in _phases(geometry, extent, share):
        statistics, inputs, _ = probed.at(phase)
        assert statistics.positions == len(patches)
        moment, total = moment + inputs * statistics.input_second_moment, total + inputs * statistics.input_sum
        seen += inputs
    assert seen == pytest.approx(1)
    assert np.allclose(moment, np.einsum("tgi,tgj->gij", patches, patches), rtol=1e-4, atol=1e-4)
    assert np.allclose(total, patches.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_all_phases_together_are_all_cotangents(name: str):
    geometry = GEOMETRIES[name]
    probed = Probed(geometry)
    rows = np.moveaxis(probed.noise, 1, -1) if geometry.kernel else probed.noise
    rows = rows.reshape(-1, geometry.groups, geometry.channels[1] // geometry.groups).astype(np.float64)
    extent = probed.noise.shape[2:] if geometry.kernel else probed.noise.shape[1:-1]
    share = _OUTPUT_COST * math.prod((geometry.channels[0] // geometry.groups, *geometry.kernel)) / rows.shape[-1]
    moment, seen = 0.0, 0.0
    for phase in _phases(geometry, extent, share):
        statistics, _, cotangents = probed.at(phase)
        moment, seen = moment + cotangents * statistics.cotangent_second_moment, seen + cotangents
    assert seen == pytest.approx(1)
    assert np.allclose(moment, np.einsum("tgi,tgj->gij", rows, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["3x3", "tokens", "1-D", "3-D", "wide output"])
def test_the_grid_leaves_positions_out(name: str):
    """So that the tests above say something."""
    _, inputs, cotangents = Probed(GEOMETRIES[name]).at((0, 0, 0))
    assert min(inputs, cotangents) < 0.7


EXTENTS = [(1,), (7,), (100,), (1, 1), (4, 4), (7, 7), (1, 50), (50, 1), (14, 13), (112, 112), (None, 7), (None, None)]
SHARES = [1.0, 0.9, 0.5, 0.3, 0.1, 0.03, 1e-4]


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("share", SHARES)
def test_grid_strides_take_about_the_share_wanted(extent: tuple[int | None, ...], share: float):
    strides = grid_strides(extent, share)
    sizes = [1024 if size is None else size for size in extent]
    assert len(strides) == len(extent)
    assert all(1 <= stride <= max(size, 1) for stride, size in zip(strides, sizes, strict=True))
    wanted = max(share, min(1.0, 4 / math.prod(sizes)))
    assert 0.5 * wanted <= 1 / math.prod(strides) <= 2.5 * wanted
    if share == 1:
        assert set(strides) == {1}


@pytest.mark.parametrize("seed", [0, 5])
def test_any_few_batches_in_a_row_take_rows_from_everywhere(seed):
    phases = np.array([grid_phase(seed, place) for place in range(200)])
    assert phases.min() >= 0
    assert phases.max() < PHASES
    for first in range(0, 190, 10):
        places = np.sort(phases[first : first + 8], axis=0) / PHASES
        gaps = np.diff(places, axis=0, append=places[:1] + 1)
        assert gaps.max() < 0.4
    for stride in (5, 64):
        counts = np.bincount(phases[:, 0] * stride // PHASES, minlength=stride)
        assert abs(counts - 200 / stride).max() < 3


def test_grid_strides_of_no_axes():
    assert grid_strides((), 0.1) == ()


def test_a_constant_on_the_left_has_the_statistics_of_the_transposed_product(monkeypatch):
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)
    x = np.random.default_rng(0).standard_normal((20, 6, 7)).astype(np.float32)
    found, wanted = {}, {}
    for left, layers in ((True, found), (False, wanted)):
        network = open_network(mixer(left=left))
        data = open_dataset({"x": x}, input_specs(network.model))
        statistics = collect_eigen_moments(network, collect(network, data), data)
        assert not statistics.skipped
        layers |= statistics.layers
    assert list(found) == list(wanted) == ["mix0", "mix1", "head"]
    inputs = x.astype(np.float64)
    assert np.allclose(
        found["mix0"].input_second_moment[0], np.einsum("nct,ndt->cd", inputs, inputs), rtol=1e-4, atol=1e-3
    )
    for name, layer in found.items():
        other = wanted[name]
        assert layer.positions == other.positions
        for attribute in ("input_factor", "mean", "output_factor", "saliency", "coherence"):
            assert np.allclose(getattr(layer, attribute), getattr(other, attribute), rtol=1e-4, atol=1e-6), attribute
        moments, others = layer.eigen_moments(0).second_moment, other.eigen_moments(0).second_moment
        assert np.allclose(moments, others, rtol=1e-3, atol=1e-3 * others.max())


def test_the_rows_taken_of_sequences_cover_all_positions():
    """Of successive entries those of successive positions, each once in as many entries as the stride."""
    length, entries, stride = 10, 15, 5
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="rows"), ir_version=10)
    x, phase = (
        ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for name, dtype, shape in (("x", ir.DataType.FLOAT, ["n", "t", 1]), ("phase", ir.DataType.INT64, [3]))
    )
    model.graph.inputs.extend([x, phase])
    rows = rows_on_grid(Emitter(model.graph), x, 1, 1 / stride, phase)
    model.graph.outputs.append(rows)
    given = np.arange(entries * length, dtype=np.float32).reshape(entries, length, 1)
    for start in (0, 3):
        (taken,) = create_session(serialize(model)).run(
            None, {"x": given, "phase": np.full(3, -(-start * PHASES // stride))}
        )
        assert len(taken) == entries * length / stride
        counts = np.bincount(taken.reshape(-1).astype(int) % length, minlength=length)
        np.testing.assert_array_equal(counts, entries / stride)
    (nothing,) = create_session(serialize(model)).run(None, {"x": given[:, :0], "phase": np.zeros(3, np.int64)})
    assert nothing.size == 0
