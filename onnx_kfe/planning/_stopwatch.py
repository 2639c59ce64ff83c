"""What single nodes take in ONNX Runtime, on this machine."""

from __future__ import annotations

import functools
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import serialize
from onnx_kfe.planning._workload import Workload, micro_model
from onnx_kfe.runtime import create_session, reason

__all__ = ["Refusal", "Stopwatch"]

_CPU = "CPUExecutionProvider"
_EVENT = re.compile(r"(?:InsertedPrecisionFreeCast_)?w(\d+)/.*_kernel_time")  # so named where half precision is cast
_CAST = "Cast"  # goes away between two nodes that are both run in another precision
_LINEAR = ("Conv", "Gemm", "MatMul")  # in names of operators, as fused ones have it too
_FLOOR = "floor"
_FLOORS = 8  # nodes that do nothing, beside the workloads of a session
_NODES = 200  # of a session that does nothing but pass from node to node
_ROUNDS, _FEWEST_ROUNDS = 30, 5
_SECONDS = 1.0  # for the rounds of one session, unless they are fewer than the fewest
_ELEMENTS = 2**26  # held by one session, unless a single workload has more
_MOST_WORKLOADS = 128  # of one session
_REORDERS = 3.0  # a Gather of channels leaves and enters the blocked layout, each as long as itself


class Refusal(str):
    """Why the runtime does not run a workload."""


class Stopwatch:
    """Measures workloads.

    On the CPU many share a session, whose profile says what each took, as in a graph whose convolutions keep their
    blocked layout from node to node. The profile lengthens each node by some microseconds. Nodes that do nothing show
    by how much, and that is taken off; what it takes to pass from one node to the next in a plain session is added.
    Other providers run nodes later than the profile sees them, so there each workload runs alone, as a whole.

    Args:
        providers: Execution providers, CPU when empty.
        threads: Intra-operator threads, all cores when None.
    """

    def __init__(self, providers: Sequence[str], threads: int | None) -> None:
        self._session = functools.partial(create_session, providers=providers, threads=threads)
        self._profiles = tuple(providers) in ((), (_CPU,))

    def measure(self, given: Sequence[Workload]) -> Iterator[tuple[Workload, float | Refusal]]:
        """Each workload with its seconds, or why it cannot be run; those that share a session come together.

        Raises:
            UsageError: A provider is not available.
        """
        for part in _parts(given):
            yield from zip(part, self._measured(part), strict=True)

    @functools.cached_property
    def step(self) -> float:
        """Seconds from one node to the next."""
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="steps")
        _append_idle(graph, _NODES)
        graph.outputs.append(graph[-1].outputs[0])
        return float(np.median(self._timed(ir.Model(graph, ir_version=8)))) / _NODES

    def linear_share(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> float | None:
        """Share of a model's run that convolutions and products take; None where no profile tells."""
        if not self._profiles:
            return None
        plain = _steady(_run(self._session(serialize(model)), feeds))
        seconds, operators = self._profile(model, feeds)
        lengthened = max(sum(seconds.values()) - plain, 0.0) / max(len(seconds), 1)
        rest = {name: max(value - lengthened, 0.0) for name, value in seconds.items()}
        linear = sum(value for name, value in rest.items() if any(kind in operators[name] for kind in _LINEAR))
        return linear / max(sum(rest.values()), plain)

    def _profile(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, str]]:
        """Seconds and operator of each node, by name of its event."""
        with tempfile.TemporaryDirectory(prefix="onnx-kfe-") as folder:
            session = self._session(serialize(model), profile=Path(folder, "profile"))
            rounds = len(_run(session, feeds))
            events = json.loads(Path(session.end_profiling()).read_text())
        durations: dict[str, list[float]] = defaultdict(list)
        operators = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                durations[event["name"]].append(1e-6 * event["dur"])
                operators[event["name"]] = event["args"]["op_name"]
        return {name: _steady(values[-rounds:]) for name, values in durations.items()}, operators

    def _measured(self, part: Sequence[Workload]) -> list[float | Refusal]:
        try:
            return list(self._profiled(part)) if self._profiles else [self._alone(workload) for workload in part]
        except UsageError:
            raise
        except KfeError as error:
            if len(part) == 1:
                return [Refusal(error)]
            middle = len(part) // 2
            return [*self._measured(part[:middle]), *self._measured(part[middle:])]

    def _profiled(self, part: Sequence[Workload]) -> Iterator[float]:
        model = micro_model(part)
        _append_idle(model.graph, _FLOORS)
        model.graph.outputs.append(model.graph[-1].outputs[0])
        seconds, operators = self._profile(model, _random_feeds(model))
        floor = float(np.median([value for name, value in seconds.items() if name.startswith(_FLOOR)]))
        totals = [0.0] * len(part)
        for name, value in seconds.items():
            if (match := _EVENT.match(name)) and operators[name] != _CAST:
                place = int(match[1])
                totals[place] += max(value - floor, 0.0) + self.step
        for workload, total in zip(part, totals, strict=True):
            yield total * (_REORDERS if workload.operator == "Gather" else 1.0)

    def _alone(self, workload: Workload) -> float:
        """Less what a session takes that does nothing."""
        idle = ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="idle")
        _append_idle(idle, 1)
        idle.outputs.append(idle[-1].outputs[0])
        model = micro_model([workload])
        both = (_steady(self._timed(each)) for each in (model, ir.Model(idle, ir_version=8)))
        return max(next(both) - next(both), self.step)

    def _timed(self, model: ir.Model) -> list[float]:
        return _run(self._session(serialize(model)), _random_feeds(model))


def _parts(given: Sequence[Workload]) -> Iterator[list[Workload]]:
    """As many at a time as memory allows, those that read the same side by side."""
    part: list[Workload] = []
    held = 0
    for workload in sorted(given, key=lambda each: (each.input_shape, each.dtype, each.key)):
        if part and (held + workload.elements > _ELEMENTS or len(part) == _MOST_WORKLOADS):
            yield part
            part, held = [], 0
        part.append(workload)
        held += workload.elements
    if part:
        yield part


def _append_idle(graph: ir.Graph, count: int) -> None:
    """Nodes that each negate a number, which no optimiser takes out as long as there is another kind between."""
    value = ir.Value(name=f"{_FLOOR}/x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    graph.inputs.append(value)
    for place in range(count):
        node = ir.Node("", ("Neg", "Abs")[place % 2], [value], name=f"{_FLOOR}{place}/")
        (value,) = node.outputs
        value.name, value.type = f"{_FLOOR}/y{place}", ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)


def _random_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        feeds[value.name or ""] = random.normal(size=value.shape.numpy()).astype(value.dtype.numpy())
    return feeds


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> list[float]:
    """Durations of whole runs in seconds, the first left out."""
    durations: list[float] = []
    try:
        session.run(None, feeds)
        while len(durations) < _FEWEST_ROUNDS or (len(durations) < _ROUNDS and sum(durations) < _SECONDS):
            start = time.perf_counter()
            session.run(None, feeds)
            durations.append(time.perf_counter() - start)
    except Exception as error:
        raise KfeError(reason(error)) from error
    return durations


def _steady(durations: Sequence[float]) -> float:
    """The mean of the faster half: what else the machine does only ever lengthens a run."""
    ordered = np.sort(durations)
    return float(ordered[: (len(ordered) + 1) // 2].mean())
