"""The latency model on machines of known speed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from onnx_kfe.graph import Layer, Network, open_network
from onnx_kfe.planning import (
    DEFAULT_ROUND_TO,
    DENSE,
    FORMS,
    LatencyModel,
    LayerProblem,
    Link,
    candidates,
    dense_link,
    measure_latency_model,
)
from onnx_kfe.planning import _latency as latency
from onnx_kfe.planning._stopwatch import Refusal
from onnx_kfe.planning._workload import Workload, workloads
from tests.networks import classifier, samples
from tests.planning.clocks import Clock, work
from tests.planning.problems import model_of, random_statistics
from tests.tied import pyramid
from tests.tiny import node, tiny, weights

BATCH = 2
GRID = 2


@pytest.fixture(scope="module")
def network() -> Network:
    """Layers of all kinds, several of the same kind at the same size but of other widths."""
    shapes = {
        "conv": (20, 3, 3, 3), "same": (24, 20, 3, 3), "narrow": (6, 24, 1, 1), "wide": (40, 6, 1, 1),
        "grouped": (24, 20, 1, 1), "depthwise": (24, 1, 3, 3), "up": (24, 8, 2, 2),
    }  # fmt: skip
    options: dict[str, dict[str, object]] = {
        "conv": {"pads": [1] * 4}, "same": {"pads": [1] * 4}, "grouped": {"group": 2},
        "depthwise": {"group": 24, "pads": [1] * 4, "strides": [2, 2]}, "up": {"strides": [2, 2]},
    }  # fmt: skip
    nodes, value = [], "x"
    for name in shapes:
        operator = "ConvTranspose" if name == "up" else "Conv"
        nodes.append(node(operator, [value, f"w {name}"], [name], name, **options.get(name, {})))
        value = name
    nodes += [node("GlobalAveragePool", [value], ["pooled"], "pool"), node("Flatten", ["pooled"], ["flat"], "flatten")]
    nodes += [node("Gemm", ["flat", "w fc"], ["fc"], "fc", transB=1), node("MatMul", ["fc", "w m"], ["y"], "matmul")]
    constants = {f"w {name}": weights(*shape) for name, shape in shapes.items()}
    constants |= {"w fc": weights(18, 8), "w m": weights(18, 30)}
    return open_network(tiny(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 30]}, constants))


@pytest.fixture
def measured(network: Network, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LatencyModel]:
    """Measures the network with a clock in place of the stopwatch."""

    def measure(clock: Clock, of: Network = network, **options: object) -> LatencyModel:
        monkeypatch.setattr(latency, "Stopwatch", clock)
        options = {"batch": BATCH, "round_to": GRID, **options}
        return measure_latency_model(of, 5e-3, 4e-3, {}, {}, **options)  # type: ignore[arg-type]

    return measure


def layer_of(network: Network, name: str) -> Layer:
    return next(layer for layer in network.layers if layer.name == name)


def chains(network: Network, round_to: int) -> Iterator[tuple[Layer, list[Link]]]:
    """The layers as they are, and all forms at all ranks."""
    for layer in network.layers:
        if layer.geometry is not None:
            yield layer, [dense_link(layer.geometry)]
        if layer.prunable and layer.geometry is not None:
            for form in FORMS.values():
                if form.limits(layer.geometry):
                    for ranks in itertools.product(*form.grids(layer.geometry, round_to)):
                        yield layer, form.links(layer.geometry, ranks)


def summed(seconds: Callable[[Workload], float], layer: Layer, links: Sequence[Link]) -> float:
    """Nanoseconds."""
    return 1e9 * sum(seconds(workload) for workload in workloads(layer, links, BATCH))


def everything(model: LatencyModel) -> list[int | Refusal]:
    return [model.nanoseconds(layer, links) for layer, links in chains(model.network, GRID)]


def test_what_is_bilinear_is_exact_at_all_ranks(measured, network):
    clock = Clock()
    model = measured(clock)
    asked = set(clock.asked)
    between = 0
    for layer, links in chains(network, GRID):
        found = model.nanoseconds(layer, links)
        assert not isinstance(found, Refusal)
        assert found == pytest.approx(summed(work, layer, links), abs=1, rel=1e-9), (layer.name, links)
        between += not set(workloads(layer, links, BATCH)) <= asked
    assert between > 100, "most ranks were not measured"
    assert len(asked) < 500


def test_nodes_that_share_a_weight_take_their_times_together(measured):
    tied = open_network(pyramid())
    clock = Clock()
    model = measured(clock, tied)
    assert len({tuple(workloads(use, [dense_link(use.geometry)], BATCH)) for use in tied.prunable[3].uses}) == 3
    for layer, links in chains(dataclasses.replace(tied, layers=tied.prunable), GRID):
        wanted = sum(summed(work, use, links) for use in layer.uses)
        assert model.nanoseconds(layer, links) == pytest.approx(wanted, abs=1, rel=1e-9), (layer.name, links)
    total = sum(summed(work, layer, [dense_link(layer.geometry)]) for layer in tied.layers)
    assert model.prunable_share == pytest.approx(min(total / model.normalized, 1.0), rel=1e-6)


def test_each_workload_is_measured_once_and_never_again(measured):
    clock = Clock()
    seen = []
    first = measured(clock, threads=3, progress=lambda done, total: seen.append((done, total)))
    assert clock.machines == [((), 3)]
    assert len(clock.asked) == len(set(clock.asked)) == len(seen)
    assert seen == [(done + 1, len(seen)) for done in range(len(seen))]
    again = Clock(lambda workload: 1.0)
    assert everything(measured(again, threads=3)) == everything(first)
    assert again.asked == [], "it is in the cache"
    measured(again, threads=2)
    assert len(again.asked) == len(clock.asked), "which is of another number of threads"


def test_a_cache_that_is_broken_is_measured_anew(measured, cache):
    first = measured(Clock())
    (path,) = cache.rglob("*.json")
    path.write_text(path.read_text()[:1000])
    again = Clock()
    assert everything(measured(again)) == everything(first)
    assert again.asked


def test_what_is_not_bilinear_is_interpolated_between_the_ranks_measured(measured):
    """A 1x1 convolution in two: the first link is linear in its outputs, the second in its inputs."""
    conv = node("Conv", ["x", "w"], ["y"], "layer")
    alone = open_network(tiny([conv], {"x": ["n", 50, 4, 4]}, {"y": ["n", 60, 4, 4]}, {"w": weights(60, 50, 1, 1)}))

    def seconds(workload: Workload) -> float:
        return 1e-6 * math.ceil(workload.inputs / 8) * math.ceil(workload.outputs / 8) ** 1.5

    clock = Clock(seconds)
    model, (layer,) = measured(clock, alone, round_to=1), alone.layers
    ranks = sorted(w.outputs for w in clock.asked if w.inputs == 50 and w.kernel == (1, 1) and w.outputs < 50)
    assert len(ranks) == 5
    assert (ranks[0], ranks[-1]) == (1, 49)
    firsts, seconds_ = ([*ranks, 60], [*ranks, 50])
    made = {(w.inputs, w.outputs): seconds(w) for w in clock.asked}
    for rank in range(1, 50):
        first = np.interp(rank, firsts, [made[50, place] for place in firsts])
        second = np.interp(rank, seconds_, [made[place, 60] for place in seconds_])
        links = FORMS["two_factor"].links(layer.geometry, (rank,))
        assert model.nanoseconds(layer, links) == pytest.approx(1e9 * (first + second), abs=1)


def test_beyond_the_ends_in_proportion():
    known = {4: 1.0, 8: 3.0}
    assert latency._interpolated(known, 6) == 2.0
    assert latency._interpolated(known, 16) == 6.0
    assert latency._interpolated(known, 2) == 1.0, "less is not known to be faster"
    refused = {4: Refusal("no"), 8: 3.0}
    assert latency._interpolated(refused, 6) == "no"
    assert latency._interpolated(refused, 4) == "no"
    assert latency._interpolated(refused, 8) == 3.0
    assert latency._interpolated({4: 1.0, 8: Refusal("no")}, 5) == "no"


# Shapes that the runtime refuses


def test_forms_that_the_runtime_refuses_are_no_candidates(measured, network):
    layer = layer_of(network, "same")
    refused = Clock(lambda w: Refusal("no implementation") if w.groups == w.inputs > 1 else work(w))
    problem = LayerProblem(layer, random_statistics(layer))
    free, without = (
        {choice.form for choice in candidates(problem, GRID, measured(clock, threads=threads))}
        for threads, clock in enumerate((Clock(), refused), 1)
    )
    assert free >= {DENSE, "separable", "tucker"}
    assert free - without == {"separable"}


def test_only_the_refused_ranks_are_dropped(measured, network, cache):
    layer = layer_of(network, "same")

    def seconds(workload: Workload) -> float | Refusal:
        return Refusal("too few") if min(workload.inputs, workload.outputs) == 1 else work(workload)

    model = measured(Clock(seconds), round_to=1)
    refusals = {
        rank: isinstance(model.nanoseconds(layer, FORMS["output_low_rank"].links(layer.geometry, (rank,))), Refusal)
        for rank in range(1, 24)
    }
    assert refusals[1]
    last = max(rank for rank, refused in refusals.items() if refused)
    assert all(refusals[rank] for rank in range(1, last)), "between one that runs and one that does not, who knows"
    assert 1 < last < 12
    problem = LayerProblem(layer, random_statistics(layer))
    kept = {c.ranks for c in candidates(problem, 1, model) if c.form == "output_low_rank"}
    assert kept
    assert min(kept) > (last,)


def test_a_layer_that_cannot_be_run_alone_takes_no_time(measured, network):
    model = measured(Clock(lambda w: Refusal("no") if w.operator == "MatMul" else work(w)))
    assert model.dense(layer_of(network, "matmul")) == 0
    assert all(model.dense(layer_of(network, name)) > 0 for name in ("fc", "up"))


# The grid


def steps(unit: int) -> Callable[[Workload], float]:
    return lambda workload: 1e-6 * (5 + workload.inputs * math.ceil(workload.outputs / unit))


@pytest.mark.parametrize(("unit", "found"), [(32, 32), (16, 16), (8, 8), (4, 4), (1, 4)])
@pytest.mark.parametrize("name", ["conv", "fc"])
def test_the_unit_is_the_step_of_the_machine(measured, network, unit, found, name):
    layer = layer_of(network, name)
    clock = Clock(steps(unit))
    model = measured(clock, round_to=None)
    assert model.round_to(layer) == found
    probes = [w for w in clock.asked if w.operator == layer.op_type and w.outputs >= 32]
    assert {w.outputs - 32 for w in probes} >= {0, 4, 8, 16, 32}


def test_a_grouped_layer_is_probed_ungrouped(measured):
    """Any number of outputs can then be."""
    clock, grouped = Clock(), open_network(model_of("grouped 3x3"))
    measured(clock, grouped, round_to=None)
    (layer,) = grouped.layers
    assert layer.geometry is not None
    assert layer.geometry.groups == 2
    assert {w.groups for w in clock.asked if w.outputs >= 32} == {1}


def test_the_costliest_layer_of_an_operator_is_probed(measured, network):
    clock = Clock()
    measured(clock, round_to=None)
    costliest = max((la for la in network.prunable if la.op_type == "Conv"), key=lambda la: la.macs)
    assert costliest.name == "same"
    probed = [w for w in clock.asked if w.operator == "Conv" and w.outputs in (36, 48, 64)]
    assert [(w.inputs, w.groups, w.kernel) for w in probed] == 3 * [(20, 1, (3, 3))]


def test_a_grid_that_is_given_is_not_probed(measured, network):
    clock = Clock(steps(8))
    model = measured(clock, round_to=2)
    assert {model.round_to(layer) for layer in network.prunable} == {2}
    assert not [w for w in clock.asked if w.inputs == 20 and w.kernel == (3, 3) and w.outputs > 24]


def test_a_probe_that_is_refused_tells_nothing(measured, network):
    model = measured(Clock(lambda w: Refusal("no") if w.outputs == 48 else steps(8)(w)), round_to=None)
    assert model.round_to(layer_of(network, "same")) == DEFAULT_ROUND_TO
    assert model.round_to(layer_of(network, "up")) == DEFAULT_ROUND_TO, "nothing of its kind was probed"


# Within the model


def alone_share(model: LatencyModel) -> float:
    return sum(map(model.dense, model.network.layers)) / model.normalized


def test_layers_are_scaled_to_what_they_take_within_the_model(measured, network):
    alone = measured(Clock())
    share = alone_share(alone)
    assert (alone.original, alone.normalized, alone.scale) == (5_000_000, 4_000_000, 1.0)
    for factor, scale in [(0.7, 0.7), (1.2, 1.2), (0.1, 0.4), (9.0, 1.5)]:
        model = measured(Clock(share=factor * share))
        assert model.scale == pytest.approx(scale, rel=1e-3)
        layer, links = layer_of(network, "same"), FORMS["tucker"].links(layer_of(network, "same").geometry, (8, 8))
        assert model.nanoseconds(layer, links) == pytest.approx(scale * alone.nanoseconds(layer, links), rel=1e-3)
    prunable = sum(map(alone.dense, network.prunable)) / alone.normalized
    assert alone.prunable_share == pytest.approx(prunable)
    assert 0 < prunable < share


def test_layers_that_take_longer_than_the_model_share_all_of_it(measured):
    assert measured(Clock(lambda workload: 1.0)).prunable_share == 1


def test_a_model_measured_on_this_machine(monkeypatch):
    """Smoke: everything is measured, larger is not free, and the second time takes nothing."""
    monkeypatch.setattr("onnx_kfe.planning._stopwatch._ROUNDS", 5)
    network = open_network(classifier())
    model = measure_latency_model(network, 1e-3, 1e-3, {"x": samples(1)}, {}, threads=1, round_to=8)
    found = [model.nanoseconds(layer, links) for layer, links in chains(network, 8)]
    assert len(found) > 10
    assert all(isinstance(value, int) and 0 < value < 1e9 for value in found)
    assert 0.4 <= model.scale <= 1.5
    given = []
    monkeypatch.setattr(latency.Stopwatch, "measure", lambda self, missing: given.extend(missing) or iter(()))
    again = measure_latency_model(network, 1e-3, 1e-3, {"x": samples(1)}, {}, threads=1, round_to=8)
    assert given == []
    layer, links = next(chains(network, 8))
    assert model.nanoseconds(layer, links) / model.scale == pytest.approx(
        again.nanoseconds(layer, links) / again.scale, rel=1e-2
    )
