"""The Fisher information of single weights, which methods rest on that weigh them one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnx_kfe.autodiff import Emitter, append_gradients
from onnx_kfe.calibration import HEAD_KINDS, Head, differentiable_copy, emit_source
from onnx_kfe.graph import Network, serialize
from onnx_kfe.kfe import Array
from onnx_kfe.runtime import create_session

__all__ = ["input_fisher"]


def input_fisher(
    network: Network, head: Head, samples: Iterable[Mapping[str, np.ndarray]], seed: int = 0
) -> dict[str, Array]:
    """``sum_o F_oi`` of every layer, with ``F_oi`` the mean over samples of the squared derivative by ``W_oi``.

    The derivatives are those of the log-likelihood of a target sampled from the head. The backward pass is appended to
    the graph, then the derivatives by the weights, of which only the sums of squares come out.

    Args:
        network: The model; its prunable layers are MatMuls of inputs ``[N, T, i]``.
        head: An output with a probability model.
        samples: Inputs of one sample each.
        seed: Seed of the targets.

    Returns:
        ``[i]`` by layer name.
    """
    session = create_session(_with_squares(network, head, seed))
    squares = zip(*(session.run(None, dict(sample)) for sample in samples), strict=True)
    return {layer.name: np.mean(of_layer, 0, float) for layer, of_layer in zip(network.prunable, squares, strict=True)}


def _with_squares(network: Network, head: Head, seed: int) -> bytes:
    """The model that gives ``[i]`` for each layer: the squares summed over the outputs o and the samples of a batch."""
    model = differentiable_copy(network.model)
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    emit = Emitter(graph, prefix="fisher/")
    source = emit_source(emit, head, values)
    noise = emit.op("RandomNormalLike", source, like=source, seed=float(seed))
    seeds = {source: HEAD_KINDS[head.kind](emit, source, noise, head)}
    gradients = append_gradients(graph, seeds, [values[layer.output] for layer in network.prunable])
    squares = []
    for layer in network.prunable:
        columns = emit.transpose(values[layer.input], (0, 2, 1))
        by_weight = emit.op("MatMul", columns, gradients.cotangents[values[layer.output]])
        squares.append(emit.op("ReduceSumSquare", by_weight, emit.ints(0, 2), keepdims=0))
    graph.outputs.clear()
    graph.outputs.extend(squares)
    return serialize(model)
