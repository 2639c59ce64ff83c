"""The latency of layers and forms, as measured; between the ranks that were measured it is interpolated."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_kfe.graph import Layer, Network
from onnx_kfe.planning._chain import Link, dense_link
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._latency_cache import LatencyCache
from onnx_kfe.planning._stopwatch import Refusal, Stopwatch
from onnx_kfe.planning._workload import Workload, workloads

__all__ = ["DEFAULT_ROUND_TO", "LatencyModel", "measure_latency_model"]

DEFAULT_ROUND_TO = 16
_UNITS = (32, 16, 8)  # widths of a step that are looked for, else 4
_FINEST = 4
_STEP_SHARE = 0.75  # of a step's cost that its first half must bring for the step to be one
_MEASURED_RANKS = 5
_SCALES = 0.4, 1.5  # of what a layer takes within the model; beyond, something else was measured
_NANO = 1e9


@dataclass(frozen=True)
class LatencyModel:
    """What layers and the chains in their place take.

    Attributes:
        network: The model.
        batch: Samples of a run.
        original: Nanoseconds of a run of the whole original.
        normalized: The same of the normalised model, which all forms are written into; what no form replaces is the
            remainder of it.
        units: Multiples of channels that run fast, by operator.
        savings: Nanoseconds that the model takes less without a residual branch, by name of its last layer.
        scale: What a layer takes within the model, over what it takes alone.
    """

    network: Network
    batch: int
    original: int
    normalized: int
    units: Mapping[str, int]
    savings: Mapping[str, int]
    scale: float
    _tables: Mapping[Workload, _Table]

    def nanoseconds(self, layer: Layer, links: Sequence[Link]) -> int | Refusal:
        """Latency of a chain in place of a layer, at all nodes that share its weight, or why it cannot be run."""
        total = 0.0
        for workload in _all_workloads(layer, links, self.batch):
            found = self._tables[workload.family].seconds(workload)
            if isinstance(found, Refusal):
                return found
            total += found
        return round(_NANO * self.scale * total)

    def dense(self, layer: Layer) -> int:
        """Latency of a layer as it is, 0 where it could not be measured."""
        if layer.geometry is None or not _measurable(layer):
            return 0
        found = self.nanoseconds(layer, [dense_link(layer.geometry)])
        return 0 if isinstance(found, Refusal) else found

    @property
    def prunable_share(self) -> float:
        """Share of the whole latency that the prunable layers take."""
        return min(sum(map(self.dense, self.network.prunable)) / max(self.normalized, 1), 1.0)

    @property
    def bounds(self) -> str:
        """What bounds the latency that there can be, in words."""
        return (
            f"of the {1e-6 * self.original:.3g} ms that the model takes, {self.prunable_share:.0%} are in layers that "
            "can be pruned"
        )

    @property
    def refusals(self) -> list[str]:
        """Why the runtime refuses shapes that forms would need, one reason for each shape."""
        return [reason for table in self._tables.values() for reason in table.refusals]

    def round_to(self, layer: Layer) -> int:
        """The multiple of channels that runs fast."""
        return self.units.get(layer.op_type, DEFAULT_ROUND_TO)


class _Table:
    """Measured latencies of a family, over inputs and outputs."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, float | Refusal]] = defaultdict(dict)

    def add(self, workload: Workload, seconds: float | Refusal) -> None:
        self._rows[workload.inputs][workload.outputs] = seconds

    @property
    def refusals(self) -> list[str]:
        """Why workloads were refused."""
        return [str(value) for row in self._rows.values() for value in row.values() if isinstance(value, Refusal)]

    def seconds(self, workload: Workload) -> float | Refusal:
        """Bilinear in inputs and outputs, as the work is; along the diagonal where each input has one output.

        Rows in which the outputs lie between some that were measured go before the others, which are of other layers.
        """
        rows: dict[int, float | Refusal]
        if workload.groups == workload.inputs == workload.outputs > 1:
            rows = {inputs: row[inputs] for inputs, row in self._rows.items() if inputs in row}
        else:
            around = {n: row for n, row in self._rows.items() if min(row) <= workload.outputs <= max(row)}
            rows = {n: _interpolated(row, workload.outputs) for n, row in (around or self._rows).items()}
        return _interpolated(rows, workload.inputs)


def _interpolated(known: Mapping[int, float | Refusal], place: int) -> float | Refusal:
    """Linear between the neighbours; in proportion beyond the ends."""
    if place in known:
        return known[place]
    places = sorted(known)
    after = bisect_left(places, place)
    low, high = places[max(after - 1, 0)], places[min(after, len(places) - 1)]
    first, last = known[low], known[high]
    if isinstance(first, Refusal) or isinstance(last, Refusal):
        return first if isinstance(first, Refusal) else last
    if low == high:
        return first * max(place / low, 1.0)
    return first + (last - first) * (place - low) / (high - low)


def measure_latency_model(
    network: Network,
    original: float,
    normalized: float,
    feeds: Mapping[str, np.ndarray],
    savings: Mapping[str, float],
    *,
    batch: int = 1,
    providers: Sequence[str] = (),
    threads: int | None = None,
    round_to: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyModel:
    """Measure the prunable layers of a model and the forms that can take their place.

    Each distinct shape is measured once, and once only on a machine (see `LatencyCache`): the layers as they are, and
    the links of all forms at a few ranks of the grid. Which grid is measured as well: the widest step in the number of
    output channels within which fewer channels take as long.

    Args:
        network: The model.
        original: Seconds of a run of the whole model as it was given.
        normalized: Seconds of a run of the normalised model.
        feeds: Inputs of the model.
        savings: Seconds that the model takes less without a residual branch, by name of its last layer.
        batch: Samples of a run.
        providers: Execution providers, CPU when empty.
        threads: Intra-operator threads, all cores when None.
        round_to: The grid of ranks; as measured when None.
        progress: Called with the number of workloads measured and to be measured.

    Raises:
        UsageError: A provider is not available.
    """
    stopwatch = Stopwatch(providers, threads)
    known = _Known(stopwatch, LatencyCache(providers, threads), progress)
    layers = [layer for layer in network.owners if _measurable(layer)]
    probes = [(layer.op_type, _probe(layer, batch)) for layer in _costliest(network.prunable)]
    if round_to is None:
        known.measure(workload for _, probe in probes for workload in probe.values())
    units = {operator: round_to or _unit(probe, known) for operator, probe in probes}
    wanted = [
        list(_all_workloads(layer, links, batch))
        for layer in layers
        for links in _sampled_chains(layer, units.get(layer.op_type, DEFAULT_ROUND_TO))
    ]
    known.measure(itertools.chain.from_iterable(wanted))
    tables: dict[Workload, _Table] = defaultdict(_Table)
    for workload in itertools.chain.from_iterable(wanted):
        tables[workload.family].add(workload, known.seconds(workload))
    whole, dense = round(_NANO * original), round(_NANO * normalized)
    saved = {name: round(_NANO * seconds) for name, seconds in savings.items()}
    alone = LatencyModel(network, batch, whole, dense, units, saved, 1.0, dict(tables))
    share, total = stopwatch.linear_share(network.model, feeds), sum(map(alone.dense, network.owners))
    if share is None or not total:
        return alone
    low, high = _SCALES
    return replace(alone, scale=min(max(share * alone.normalized / total, low), high))


def _all_workloads(layer: Layer, links: Sequence[Link], batch: int) -> Iterator[Workload]:
    """Those of all nodes that are pruned as one."""
    return itertools.chain.from_iterable(workloads(use, links, batch) for use in layer.uses)


class _Known:
    """What the cache has, completed by the stopwatch."""

    def __init__(self, stopwatch: Stopwatch, cache: LatencyCache, progress: Callable[[int, int], None]) -> None:
        self._stopwatch, self._cache, self._progress = stopwatch, cache, progress

    def measure(self, wanted: Iterable[Workload]) -> None:
        missing = [workload for workload in dict.fromkeys(wanted) if self._cache.get(workload) is None]
        measured = []
        for pair in self._stopwatch.measure(missing):
            measured.append(pair)
            self._progress(len(measured), len(missing))
        self._cache.add(measured)

    def seconds(self, workload: Workload) -> float | Refusal:
        found = self._cache.get(workload)
        assert found is not None
        return found


def _measurable(layer: Layer) -> bool:
    """Whether the layer can be run alone: of known shape, with a constant weight."""
    weight = layer.weight_value
    constant = weight is not None and weight.const_value is not None
    return constant and layer.geometry is not None and "output_shape" not in layer.node.attributes


def _sampled_chains(layer: Layer, round_to: int) -> Iterator[list[Link]]:
    """The layer as it is, and each form at some ranks, the least and the greatest of the grid among them."""
    assert layer.geometry is not None
    yield [dense_link(layer.geometry)]
    for form in FORMS.values():
        if form.searched and layer.prunable and form.limits(layer.geometry):
            for ranks in itertools.product(*map(_spread, form.grids(layer.geometry, round_to))):
                yield form.links(layer.geometry, ranks)


def _spread(grid: Sequence[int]) -> list[int]:
    count = min(len(grid), _MEASURED_RANKS)
    return [grid[round(place * (len(grid) - 1) / max(count - 1, 1))] for place in range(count)]


def _costliest(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Of each operator the layer with most MACs."""
    for _, alike in itertools.groupby(sorted(layers, key=lambda layer: layer.op_type), lambda layer: layer.op_type):
        yield max(alike, key=lambda layer: layer.macs)


def _probe(layer: Layer, batch: int) -> dict[int, Workload]:
    """The layer, ungrouped, at numbers of output channels on and between the steps that are looked for."""
    assert layer.geometry is not None
    (dense,) = workloads(layer, [dense_link(layer.geometry)], batch)
    widest = _UNITS[0]
    base = max(widest, dense.outputs // 2 // widest * widest)
    more = {0, *_UNITS, *(unit // 2 for unit in _UNITS)}
    return {extra: replace(dense, outputs=base + extra, groups=1) for extra in more}


def _unit(probe: Mapping[int, Workload], known: _Known) -> int:
    """The widest step in which the first half brings nearly all of the cost."""
    seconds = {extra: known.seconds(workload) for extra, workload in probe.items()}
    numbers = {extra: value for extra, value in seconds.items() if not isinstance(value, Refusal)}
    if len(numbers) < len(seconds):
        return DEFAULT_ROUND_TO
    for unit in _UNITS:
        half, whole = numbers[unit // 2] - numbers[0], numbers[unit] - numbers[0]
        if whole > 0 and half >= _STEP_SHARE * whole:
            return unit
    return _FINEST
