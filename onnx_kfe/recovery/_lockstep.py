"""The original and the smaller model side by side, evaluated over the samples as far as the layer in work."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter, sizes_of
from onnx_kfe.calibration import (
    Batch,
    channel_major,
    differentiable_copy,
    emit_samples,
    features_last,
    find_padding,
    grid_phase,
)
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network, clip_bounds, serialize
from onnx_kfe.planning import REMOVED
from onnx_kfe.recovery._activations import Activations
from onnx_kfe.recovery._samples import Activation, Block, Samples
from onnx_kfe.recovery._segments import Frontier, ancestors, join
from onnx_kfe.rewrite import Chain, FactorizePass, RemovePass
from onnx_kfe.runtime import create_session, feeds_for

__all__ = ["FEWEST_SAMPLES", "Lockstep"]

FEWEST_SAMPLES = 2
"""One to fit to and one to hold out."""

_SMALLER = "kfe/smaller/"
_PHASE = "kfe/phase"
_COLUMNS_PER_SAMPLE = 16
_COLUMNS_PER_INPUT = 16
_LEAST_MEMORY = 2**23  # bytes for the columns, however small the budget
_HOLD_OUT = 8  # one batch in so many is held out


class Lockstep:
    """Both models with the activations at their frontiers. Each sample passes each node of both once.

    Args:
        network: The original, or what is left of it when channels went.
        layers: The layers that will be asked for, in order.
        settled: What has become of others: branches that are left out, and layers that no refit changes.
        kept: Where activations are kept.
        memory: Bytes that the columns of a layer may take.
        providers: Execution providers.
        threads: Threads.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        settled: Sequence[Chain],
        kept: Activations,
        memory: int,
        providers: Sequence[str],
        threads: int | None,
    ) -> None:
        whole = network.whole or network
        self._model = whole.model
        self._wholes = {layer.name: layer for layer in whole.layers}
        self._cuts = network.cuts
        means = {chain.layer.name: chain.bias for chain in settled if chain.form == REMOVED}
        self._smaller_model = RemovePass(means, keep_sums=True)(network.model.clone()).model
        FactorizePass({chain.layer.name: chain for chain in settled if chain.form != REMOVED})(self._smaller_model)
        self._padding = find_padding(whole.model)
        self._kept = kept
        self._sizes: list[int] = []
        self._memory = memory
        self._stored: set[str] = set()
        self._options: dict[str, Any] = {"providers": providers, "threads": threads}
        nodes = [use for layer in layers for use in layer.uses]
        self._parts = {use.name: len(layer.uses) for layer in layers for use in layer.uses}
        self._ahead = set(self._parts)
        self._original = Frontier(
            self._model.graph, _targets(self._model.graph, {self._wholes[use.name].output for use in nodes})
        )  # fmt: skip
        graph = self._smaller_model.graph
        self._smaller = Frontier(graph, _targets(graph, {use.output for use in nodes}), _SMALLER)

    def take(self, data: Iterable[Batch], divisible: bool) -> None:
        """Keep the inputs, in batches enough to hold some out where batches can be divided."""
        for batch in data:
            self._take(batch.feeds, len(batch))
        if divisible and len(self._sizes) < _HOLD_OUT:
            sizes, self._sizes = self._sizes, []
            # divided only now: how many batches a stream gives is not known before
            whole = [{name: np.array(self._kept.get(n, name)) for name in self._stored} for n in range(len(sizes))]
            for n, name in itertools.product(range(len(sizes)), self._stored):
                self._kept.drop(n, name)
            for feeds, size in zip(whole, sizes, strict=True):
                parts = np.array_split(np.arange(size), min(_HOLD_OUT, size))
                for rows in parts:
                    self._take({n: array[rows] if len(parts) > 1 else array for n, array in feeds.items()}, len(rows))

    def _take(self, feeds: Mapping[str, np.ndarray], size: int) -> None:
        for name, array in feeds.items():
            self._kept.put(len(self._sizes), name, array)
        self._stored |= set(feeds)
        self._sizes.append(size)

    def replace(self, chain: Chain) -> None:
        """Write a chain into the smaller model."""
        FactorizePass({chain.layer.name: chain})(self._smaller_model)
        self._ahead -= {use.name for use in chain.layer.uses}

    def samples(self, layer: Layer) -> list[Samples]:
        """The inputs that a layer now gets, at all of its nodes, and the outputs that are wanted of it, by group.

        Wanted is its original output. Where that goes straight into an Add whose other operand is known by now, the
        original sum is: so the last layer of a residual branch makes up for the errors of the branch beside it. A bias
        that an Add of its own adds, as behind a MatMul, is passed over.
        """
        nodes = [self._samples(use, _surplus(use, layer)) for use in layer.uses]
        return [Samples.joined(parts) for parts in zip(*nodes, strict=True)]

    def _samples(self, layer: Layer, surplus: np.ndarray | None) -> list[Samples]:
        """Those of one node, beside which the surplus of its bias ``[out]`` over the layer's is added."""
        wanted, beside, bias = self._wanted(layer)
        bias = surplus if bias is None else bias if surplus is None else bias + surplus
        own = [self._smaller.value(layer.input), *([] if beside is None else [beside])]
        parts = [
            (self._original, self._original.segment([wanted]), [wanted]),
            (self._smaller, self._smaller.segment(own), own),
        ]
        model, values = join(parts, self._model.graph.opset_imports, self._model.ir_version)
        for frontier, nodes, _ in parts:
            frontier.advance(nodes)
        needed = self._original.needed() | self._smaller.needed()
        if self._padding is not None:
            needed.add(self._padding.mask)
        outputs = [name for name, value in values.items() if name in needed and value.producer() is not None]
        used = [frontier.joint_name(value) for frontier, _, values in parts for value in values]
        session, sampled = self._session(model, layer, outputs, used)
        blocks = self._run(session, outputs, sampled, layer, bias)
        for name in self._stored - needed:
            for place in range(len(self._sizes)):
                self._kept.drop(place, name)
        self._stored &= needed
        activation = _activation_of(wanted)
        period = min(_HOLD_OUT, len(blocks))
        fitted = [block for place, block in enumerate(blocks, 1) if place % period]
        held_out = blocks[period - 1 :: period]
        return [
            Samples([block[g] for block in fitted], [block[g] for block in held_out], activation)
            for g in range(len(blocks[0]))
        ]

    def _wanted(self, layer: Layer) -> tuple[ir.Value, ir.Value | None, np.ndarray | None]:
        """A value of the original, and what is part of it beside the layer: a value of the smaller model, a bias."""
        whole = self._wholes[layer.name]
        output, bias = self._original.value(whole.output), None
        added = _added(output)
        if added is not None and (bias := _bias(whole, added[1])) is not None:
            output, added = added[0], _added(added[0])
            bias = bias[self._cuts[layer.name].rows] if layer.name in self._cuts else bias
        if added is not None:
            total, other = added
            known = self._smaller.find(other.name or "")
            finished = known is not None and self._ahead.isdisjoint(node.name for node in ancestors([known]))
            if finished and _same_shape(output, other):
                return total, known, bias
        return output, None, bias

    def _session(self, model: ir.Model, layer: Layer, outputs: list[str], used: list[str]) -> tuple[Any, list[str]]:
        graph = model.graph
        named = {value.name: value for node in graph for value in node.outputs}
        graph.outputs.extend(named[name] for name in dict.fromkeys([*outputs, *used]) if name in named)
        model = differentiable_copy(model)
        graph = model.graph
        named = {v.name: v for v in (*graph.inputs, *(value for node in graph for value in node.outputs))}
        phase = ir.Value(name=_PHASE, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]))
        graph.inputs.append(phase)
        emit = Emitter(graph, prefix="kfe/refit/")
        y, x, *beside = self._real(emit, layer, [features_last(emit, layer, named[name]) for name in used])
        y = self._left(emit, layer, y)
        share = self._share(layer, 1 + len(beside))
        sampled = emit_samples(emit, layer, x, [y, *beside], phase, share)
        graph.outputs.clear()
        graph.outputs.extend([*(named[name] for name in outputs), *sampled])
        return create_session(serialize(model), **self._options), [value.name or "" for value in sampled]

    def _real(self, emit: Emitter, layer: Layer, values: list[ir.Value]) -> list[ir.Value]:
        """The values without positions that are padding."""
        padding = self._padding
        if padding is None or not padding.covers(self._wholes[layer.name]):
            return values
        graph = emit.graph
        if not any(value.name == padding.mask for value in graph.inputs):
            given = next(value for value in self._model.graph.inputs if value.name == padding.mask)
            graph.inputs.append(ir.Value(name=given.name, type=given.type, shape=given.shape))
        return [padding.real_rows(emit, value) for value in values]

    def _left(self, emit: Emitter, layer: Layer, value: ir.Value) -> ir.Value:
        """Of an output of the original the channels that the layer still has."""
        cut = self._cuts.get(layer.name)
        if cut is None or cut.rows.all():
            return value
        axis = 1 if layer.op_type == "Conv" else -1
        sizes = sizes_of(value)
        shape = None if sizes is None else list(sizes)
        if shape is not None:
            shape[axis] = int(cut.rows.sum())
        return emit.op("Gather", value, emit.ints(*np.flatnonzero(cut.rows).tolist()), axis=axis, shape=shape)

    def _share(self, layer: Layer, outputs: int) -> float:
        """Share of the positions that is enough for a regression on all inputs and fits into memory."""
        assert layer.geometry is not None
        geometry = layer.geometry
        patch, out = geometry.patch_size, geometry.out_channels // geometry.groups
        room = max(self._memory, _LEAST_MEMORY) // (4 * geometry.groups * (patch + outputs * out))
        samples = sum(self._sizes)
        enough = _COLUMNS_PER_SAMPLE * samples + _COLUMNS_PER_INPUT * patch
        return min(1.0, min(enough, room) / (self._parts[layer.name] * geometry.positions * samples))

    def _run(
        self, session: Any, outputs: list[str], sampled: list[str], layer: Layer, bias: np.ndarray | None
    ) -> list[list[Block]]:
        """Of each batch the blocks of all groups."""
        assert layer.geometry is not None
        order = channel_major(layer.geometry)
        inputs = [value.name for value in session.get_inputs()]
        blocks = []
        for place in range(len(self._sizes)):
            feeds = {name: self._kept.get(place, name) for name in inputs if name != _PHASE}
            if _PHASE in inputs:
                feeds[_PHASE] = grid_phase(0, place)
            found = session.run([*outputs, *sampled], feeds_for(session, feeds))
            for name, array in zip(outputs, found, strict=False):
                self._kept.put(place, name, array)
            x, y, *beside = found[len(outputs) :]
            if not np.isfinite(y).all():
                raise KfeError(
                    f"layer '{layer.name}': NaN or infinity while refitting; --exclude the layer or use --no-refit"
                )
            x = x[:, order]
            if bias is not None:
                beside = [bias.reshape(*y.shape[:2], 1) + (beside[0] if beside else np.zeros_like(y))]
            blocks.append([Block(x[g], y[g], beside[0][g] if beside else None) for g in range(len(x))])
        self._stored |= set(outputs)
        return blocks


def _added(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The sum that alone reads a value, and the other operand."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or value.is_graph_output():
        return None
    add, other = uses[0].node, uses[0].node.inputs[1 - uses[0].idx]
    return None if other is None else (add.outputs[0], other)


def _bias(layer: Layer, addend: ir.Value) -> np.ndarray | None:
    """The bias ``[out]`` that adding a constant to the output of a product amounts to."""
    assert layer.geometry is not None
    constant = addend.const_value if addend.is_initializer() else None
    shape = [layer.geometry.out_channels, 1] if layer.left else [layer.geometry.out_channels]
    if layer.op_type == "Conv" or constant is None or list(constant.shape) != shape:
        return None
    return constant.numpy().astype(np.float32).reshape(-1)


def _surplus(use: Layer, layer: Layer) -> np.ndarray | None:
    """What the bias ``[out]`` of a node has more than that of the layer which it shares the weight of."""
    own, given = (0.0 if bias is None else bias for bias in (use.bias(), layer.bias()))
    return None if np.array_equal(own, given) else np.asarray(own - given, np.float32)


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    return first.shape is not None and second.shape is not None and list(first.shape)[1:] == list(second.shape)[1:]


def _targets(graph: ir.Graph, names: set[str]) -> list[ir.Value]:
    """The outputs of the layers, the sums that they go into, and the sums that those go into behind a bias."""
    values = [value for node in graph for value in node.outputs if value.name in names]
    sums = [use.node.outputs[0] for value in values for use in value.uses() if use.node.op_type == "Add"]
    return values + sums + [use.node.outputs[0] for value in sums for use in value.uses() if use.node.op_type == "Add"]


def _activation_of(value: ir.Value) -> Activation:
    """The clipping activation that is all that reads a value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return Activation()
    node = uses[0].node
    if node.op_type == "Relu":
        return Activation(0.0)
    if node.op_type != "Clip" or node.domain:
        return Activation()
    bounds = clip_bounds(node)
    return Activation() if bounds is None else Activation(*bounds)
