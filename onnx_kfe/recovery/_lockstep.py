"""The original and the smaller model side by side, evaluated over the samples as far as the layer in work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration import Batch, channel_major, differentiable_copy, emit_joint
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network, serialize
from onnx_kfe.recovery._activations import Activations
from onnx_kfe.recovery._segments import Frontier, ancestors, join
from onnx_kfe.recovery._solve import JointMoments
from onnx_kfe.rewrite import Chain, FactorizePass
from onnx_kfe.runtime import create_session

__all__ = ["FOLDS", "Lockstep"]

FOLDS = 2
_SMALLER = "kfe/smaller/"
_PHASE = "kfe/phase"


class Lockstep:
    """Both models with the activations at their frontiers. Each sample passes each node of both once.

    Args:
        network: The original.
        layers: The layers that will be asked for, in order.
        kept: Where activations are kept.
        providers: Execution providers.
        threads: Threads.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        kept: Activations,
        providers: Sequence[str],
        threads: int | None,
    ) -> None:
        self._model = network.model
        self._smaller_model = network.model.clone()
        self._kept = kept
        self._batches = 0
        self._stored: set[str] = set()
        self._options: dict[str, Any] = {"providers": providers, "threads": threads}
        self._ahead = [layer.name for layer in layers]
        outputs = {layer.output for layer in layers}
        self._original = Frontier(self._model.graph, _targets(self._model.graph, outputs))
        graph = self._smaller_model.graph
        self._smaller = Frontier(graph, _targets(graph, outputs), _SMALLER)

    def take(self, data: Iterable[Batch]) -> None:
        """Keep the inputs, in as many batches as there are folds at least."""
        for batch in _divided(data):
            for name, array in batch.feeds.items():
                self._kept.put(self._batches, name, array)
            self._stored |= set(batch.feeds)
            self._batches += 1

    def replace(self, chain: Chain) -> None:
        """Write a chain into the smaller model."""
        FactorizePass({chain.layer.name: chain})(self._smaller_model)
        self._ahead.remove(chain.layer.name)

    def moments(self, layer: Layer) -> list[list[JointMoments]]:
        """Joint moments of the input that a layer now gets and the output that it is to give, by group and fold.

        It is to give its original output. Where that goes straight into an Add whose other operand is known by now, it
        is to give what makes the original sum: so the last layer of a residual branch makes up for the errors of the
        branch beside it.
        """
        wanted, other = self._wanted(layer)
        own = [self._smaller.value(layer.input), *([] if other is None else [other])]
        parts = [
            (self._original, self._original.segment([wanted]), [wanted]),
            (self._smaller, self._smaller.segment(own), own),
        ]
        model, values = join(parts, self._model.graph.opset_imports, self._model.ir_version)
        for frontier, nodes, _ in parts:
            frontier.advance(nodes)
        needed = self._original.needed() | self._smaller.needed()
        outputs = [name for name, value in values.items() if name in needed and value.producer() is not None]
        used = [frontier.joint_name(value) for frontier, _, values in parts for value in values]
        session, moments = self._session(model, layer, outputs, used)
        result = self._run(session, outputs, moments, layer)
        for name in self._stored - needed:
            for place in range(self._batches):
                self._kept.drop(place, name)
        self._stored &= needed
        return result

    def _wanted(self, layer: Layer) -> tuple[ir.Value, ir.Value | None]:
        """A value of the original, and one of the smaller model to be subtracted from it."""
        output = self._original.value(layer.output)
        uses = list(output.uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add":
            other = uses[0].node.inputs[1 - uses[0].idx]
            if other is not None and not other.is_initializer() and _same_shape(output, other):
                known = self._smaller.value(other.name or "")
                if not {node.name for node in ancestors([known])} & set(self._ahead):
                    return uses[0].node.outputs[0], known
        return output, None

    def _session(self, model: ir.Model, layer: Layer, outputs: list[str], used: list[str]) -> tuple[Any, list[str]]:
        graph = model.graph
        named = {value.name: value for node in graph for value in node.outputs}
        graph.outputs.extend(named[name] for name in dict.fromkeys([*outputs, *used]) if name in named)
        model = differentiable_copy(model)
        graph = model.graph
        named = {v.name: v for v in (*graph.inputs, *(value for node in graph for value in node.outputs))}
        phase = ir.Value(name=_PHASE, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
        graph.inputs.append(phase)
        emit = Emitter(graph, prefix="kfe/refit/")
        y, x, *other = (named[name] for name in used)
        if other:
            y = emit.op("Sub", y, other[0], like=y)
        moments = emit_joint(emit, layer, x, y, phase)
        graph.outputs.clear()
        graph.outputs.extend([*(named[name] for name in outputs), *moments])
        return create_session(serialize(model), **self._options), [value.name or "" for value in moments]

    def _run(self, session: Any, outputs: list[str], moments: list[str], layer: Layer) -> list[list[JointMoments]]:
        assert layer.geometry is not None
        groups, patch = layer.geometry.groups, layer.geometry.patch_size
        size = patch + layer.geometry.out_channels // groups
        second, total = np.zeros((FOLDS, groups, size, size)), np.zeros((FOLDS, groups, size))
        positions = np.zeros(FOLDS)
        inputs = [value.name for value in session.get_inputs()]
        for place in range(self._batches):
            fold = place % FOLDS
            feeds = {name: self._kept.get(place, name) for name in inputs if name != _PHASE}
            if _PHASE in inputs:  # successive batches of a fold take successive rows
                feeds[_PHASE] = np.full(2, place // FOLDS, np.int64)
            found = dict(zip([*outputs, *moments], session.run([*outputs, *moments], feeds), strict=True))
            for name in outputs:
                self._kept.put(place, name, found[name])
            second[fold] += found[moments[0]].reshape(groups, size, size)
            total[fold] += found[moments[1]].reshape(groups, size)
            positions[fold] += found[moments[2]].item() / size / groups
        self._stored |= set(outputs)
        if not np.isfinite(total).all():
            raise KfeError(
                f"layer '{layer.name}': NaN or infinity while refitting; --exclude the layer or use --no-refit"
            )
        order = np.concatenate([channel_major(layer.geometry), np.arange(patch, size)])
        return [
            [JointMoments(second[f, g][np.ix_(order, order)], total[f, g][order], positions[f]) for f in range(FOLDS)]
            for g in range(groups)
        ]


def _divided(data: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, a single one in halves."""
    batches = iter(data)
    first, second = next(batches), next(batches, None)
    if second is not None:
        yield from itertools.chain([first, second], batches)
        return
    for half in (slice(0, len(first) // 2), slice(len(first) // 2, None)):
        yield dataclasses.replace(
            first, feeds={k: v[half] for k, v in first.feeds.items()}, indices=first.indices[half], labels=None
        )


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    return first.shape is not None and second.shape is not None and list(first.shape)[1:] == list(second.shape)[1:]


def _targets(graph: ir.Graph, names: set[str]) -> list[ir.Value]:
    """The outputs of the layers, and the sums that they go into."""
    values = [value for node in graph for value in node.outputs if value.name in names]
    return values + [use.node.outputs[0] for value in values for use in value.uses() if use.node.op_type == "Add"]
