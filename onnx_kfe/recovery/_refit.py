"""Refit: front to back, each layer solved anew for the inputs that the layers already compressed give it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration import Dataset, LayerStatistics, Statistics, batch_size, batches, fixed_batch, input_specs
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network
from onnx_kfe.planning import DENSE, FORMS, Candidate, LayerProblem, Plan, Stage, compose
from onnx_kfe.recovery._activations import Activations
from onnx_kfe.recovery._checkpoint import Checkpoint
from onnx_kfe.recovery._lockstep import FOLDS, Lockstep
from onnx_kfe.recovery._solve import JointMoments, solve
from onnx_kfe.rewrite import Chain

__all__ = ["DEFAULT_MEMORY", "refit", "refusal"]

DEFAULT_MEMORY = 4 * 2**30


def refit(
    network: Network,
    plan: Plan,
    statistics: Statistics,
    data: Dataset,
    *,
    memory: int = DEFAULT_MEMORY,
    checkpoint: Path | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Callable[[str], None] = lambda layer: None,
) -> dict[str, Chain]:
    """Solve every layer anew, in order, and compress it again.

    With ``x'`` the inputs of a layer in the smaller model as far as it is finished and y what the layer is to give, the
    weight is the ridge regression of y on ``x'`` (see `solve`); it is compressed under the covariance of ``x'`` and the
    old G, and the bias keeps the mean. Layers that stay dense are solved anew as well: they take up part of the error.

    Args:
        network: The original.
        plan: Forms and ranks.
        statistics: G of every layer.
        data: Samples; labels are not used.
        memory: Bytes of activations to keep in memory, the rest goes to a temporary folder.
        checkpoint: Folder of the layers solved so far, from which an interrupted refit goes on; removed at the end.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Called with the name of each layer that is done.

    Returns:
        What each layer becomes.

    Raises:
        KfeError: There are too few samples, activations cannot be kept, or the graph cannot be evaluated in segments.
    """
    if reason := refusal(network, data):
        raise KfeError(f"{network.name}: cannot be refitted: {reason}; use --no-refit")
    first = next(iter(data))
    layers = [layer for layer in _in_order(network) if layer.name in plan.choices and layer.name in statistics.layers]
    size = batch_size(network, {name: array.shape for name, array in first.sample.items()})
    solved = Checkpoint(checkpoint, plan, statistics)
    chains: dict[str, Chain] = {}
    with Activations(memory) as kept:
        models = Lockstep(network, layers, kept, providers, threads)
        models.take(batches(data, size, input_specs(network.model)))
        for layer in layers:
            chain = solved.load(layer)
            if chain is None:
                chain = _refitted(layer, plan.choices[layer.name], statistics.layers[layer.name], models.moments(layer))
                solved.save(chain)
            models.replace(chain)
            chains[layer.name] = chain
            progress(layer.name)
    solved.remove()
    return chains


def refusal(network: Network, data: Dataset) -> str | None:
    """Why a model cannot be refitted on these data; None where it can."""
    batch = fixed_batch(input_specs(network.model)) or 1
    if len(list(itertools.islice(data, FOLDS * batch))) < FOLDS * batch:
        return f"it takes at least {FOLDS * batch} samples"
    bodies = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    for node in network.model.graph:
        if any(attribute.type in bodies for attribute in node.attributes.values()):
            return f"a graph with {node.op_type} cannot be evaluated in segments"
    return "a graph with functions cannot be evaluated in segments" if network.model.functions else None


def _refitted(layer: Layer, choice: Candidate, old: LayerStatistics, folds: list[list[JointMoments]]) -> Chain:
    """The chain of one layer, given the joint moments by group and fold."""
    assert layer.geometry is not None
    inputs = layer.geometry.patch_size
    sums = [first + second for first, second in folds]
    flat = [
        solve(weight.reshape(len(weight), -1), (first, second), output_factor)
        for weight, (first, second), output_factor in zip(layer.weight(), folds, old.output_factor, strict=True)
    ]
    bias = np.concatenate([s.mean[inputs:] - w @ s.mean[:inputs] for s, w in zip(sums, flat, strict=True)])
    weight = np.stack(flat).reshape(layer.weight().shape)
    if choice.form == DENSE:
        return Chain(layer, DENSE, [Stage(weight, layer.op_type == "Conv")], bias)
    scale = old.positions / sums[0].positions  # from the positions on the grid to all
    statistics = dataclasses.replace(
        old,
        input_second_moment=scale * np.stack([s.second[:inputs, :inputs] for s in sums]),
        input_sum=scale * np.stack([s.total[:inputs] for s in sums]),
    )
    problem = LayerProblem(layer, statistics, weight, bias)
    stages = FORMS[choice.form].stages(problem, choice.ranks)
    return Chain(layer, choice.form, stages, problem.bias(compose(stages)))


def _in_order(network: Network) -> list[Layer]:
    prunable = {layer.name: layer for layer in network.prunable}
    return [prunable[node.name or ""] for node in network.model.graph if node.name in prunable]
