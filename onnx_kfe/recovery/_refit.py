"""Refit: front to back, each layer solved anew for the inputs that the layers already compressed give it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration import (
    DEFAULT_MEMORY,
    Dataset,
    LayerStatistics,
    Statistics,
    batch_size,
    batches,
    fixed_batch,
    input_specs,
)
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer, Network
from onnx_kfe.kfe import Array
from onnx_kfe.planning import DENSE, FORMS, REMOVED, Candidate, LayerProblem, Plan, Stage, compose
from onnx_kfe.recovery._activations import Activations
from onnx_kfe.recovery._checkpoint import Checkpoint
from onnx_kfe.recovery._lockstep import FEWEST_SAMPLES, Lockstep
from onnx_kfe.recovery._order import solving_order
from onnx_kfe.recovery._samples import Block, Samples
from onnx_kfe.recovery._solve import InputMoments, fit
from onnx_kfe.rewrite import Chain, removed_chain, solve_chain

__all__ = ["refit", "refusal", "settled_layers"]

_DENSE_STEPS = 2  # towards what is reachable, of a whole weight
_CODE_STEPS = 3  # and of the last factor of a chain


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
    weight is the ridge regression of y on ``x'``, with a mind to the activation that follows (see `fit`); it is
    compressed under the covariance of ``x'`` and the old G, and its last factor and bias are solved once more in the
    same way. Layers that stay dense are solved anew as well: they take up part of the error. ConvTranspose is not: it
    stays as it is, or becomes what the plan alone makes of it. Branches that are left out give their mean output, as
    they did in the original. Nodes that share a weight are solved as one, on the inputs of all of them; where one of
    them reads what another gave, their layer is as of the plan alone, too, and the others are solved around it.

    Args:
        network: The original, narrowed as the plan says.
        plan: Forms and ranks.
        statistics: G of every layer, of what is left of it.
        data: Samples; labels are not used.
        memory: Bytes to keep in memory: three quarters for activations, of which the rest goes to a temporary folder,
            one for the columns of a layer, of which there are fewer where they would not fit.
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
    known = _known(network, plan, statistics)
    layers, settled = solving_order([layer for layer in known if plan.choices[layer.name].form != REMOVED])
    size = batch_size(network, {name: array.shape for name, array in first.sample.items()})
    solved = Checkpoint(checkpoint, plan, statistics)
    chains = {
        layer.name: removed_chain(LayerProblem(layer, statistics.layers[layer.name]))
        for layer in known
        if layer.name in plan.removed
    }
    for layer in settled:
        chains[layer.name] = _unfitted(layer, plan.choices[layer.name], statistics.layers[layer.name])
    columns = memory // 4
    with Activations(memory - columns) as kept:
        models = Lockstep(network, layers, list(chains.values()), kept, columns, providers, threads)
        specs = input_specs(network.model)
        models.take(batches(data, size, specs), size > 1 and fixed_batch(specs) is None)
        for layer in settled:
            progress(layer.name)
        for layer in layers:
            chain = solved.load(layer)
            if chain is None:
                choice, old = plan.choices[layer.name], statistics.layers[layer.name]
                chain = (
                    _unfitted(layer, choice, old)
                    if layer.transposed
                    else _refitted(layer, choice, old, models.samples(layer))
                )
                chain = dataclasses.replace(chain, bias=chain.bias - network.shifts.get(layer.name, 0.0))
                solved.save(chain)
            models.replace(chain)
            chains[layer.name] = chain
            progress(layer.name)
    solved.remove()
    return chains


def refusal(network: Network, data: Dataset) -> str | None:
    """Why a model cannot be refitted on these data; None where it can."""
    batch = fixed_batch(input_specs(network.model)) or 1
    if len(list(itertools.islice(data, FEWEST_SAMPLES * batch))) < FEWEST_SAMPLES * batch:
        return f"it takes at least {FEWEST_SAMPLES * batch} samples"
    bodies = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    for node in network.model.graph:
        if any(attribute.type in bodies for attribute in node.attributes.values()):
            return f"a graph with {node.op_type} cannot be evaluated in segments"
    return "a graph with functions cannot be evaluated in segments" if network.model.functions else None


def settled_layers(network: Network, plan: Plan, statistics: Statistics) -> list[str]:
    """Names of the layers that a refit compresses but does not solve anew: those that feed themselves."""
    known = _known(network, plan, statistics)
    _, settled = solving_order([layer for layer in known if plan.choices[layer.name].form != REMOVED])
    return [layer.name for layer in settled]


def _unfitted(layer: Layer, choice: Candidate, old: LayerStatistics) -> Chain:
    """The chain of one layer as of the plan alone."""
    problem = LayerProblem(layer, old)
    if choice.form == DENSE:
        return _dense(layer, problem.weight, problem.bias(problem.weight))
    return solve_chain(problem, choice)


def _dense(layer: Layer, weight: Array, bias: Array) -> Chain:
    return Chain(layer, DENSE, [Stage(weight, tuple(range(weight.ndim - 3)))], bias)


def _refitted(layer: Layer, choice: Candidate, old: LayerStatistics, samples: Sequence[Samples]) -> Chain:
    """The chain of one layer, given its columns by group."""
    assert layer.geometry is not None
    old_bias = layer.bias()
    bias = np.zeros(layer.geometry.out_channels) if old_bias is None else old_bias
    moments = [_moments(group) for group in samples]
    weight, bias = _fit(layer.weight(), bias, samples, moments, old.output_factor, _DENSE_STEPS)
    if choice.form == DENSE:
        return _dense(layer, weight, bias)
    means, covariances = zip(*(_pooled(*parts) for parts in moments), strict=True)
    problem = LayerProblem(layer, _with_inputs(old, np.stack(means), np.stack(covariances)), weight, bias)
    *encoder, decoder = stages = FORMS[choice.form].stages(problem, choice.ranks)
    if decoder.reorders:  # no factor at the end to be solved again
        return Chain(layer, choice.form, stages, problem.bias(compose(stages)))
    codes = [_encoded(weight, group) for weight, group in zip(compose(encoder), samples, strict=True)]
    moments = [_moments(group) for group in codes]
    bias = problem.bias(compose(stages))
    weight, bias = _fit(decoder.weight, bias, codes, moments, old.output_factor, _CODE_STEPS)
    return Chain(layer, choice.form, [*encoder, Stage(weight, decoder.axes)], bias)


def _moments(group: Samples) -> tuple[InputMoments, InputMoments]:
    return InputMoments.of(group.fitted), InputMoments.of(group.held_out)


def _pooled(first: InputMoments, second: InputMoments) -> tuple[Array, Array]:
    """Mean and covariance over both."""
    share = first.columns / (first.columns + second.columns)
    mean = share * first.mean + (1 - share) * second.mean
    return mean, share * first.covariance + (1 - share) * second.covariance


def _with_inputs(old: LayerStatistics, mean: Array, covariance: Array) -> LayerStatistics:
    """The statistics with other inputs: mean ``[groups, i]`` and centred second moment ``[groups, i, i]``."""
    second = covariance + mean[:, :, None] * mean[:, None, :]
    return dataclasses.replace(
        old, input_second_moment=old.positions * second, input_sum=old.positions * mean, eigen=None
    )  # fmt: skip


def _encoded(weight: Array, group: Samples) -> Samples:
    """The samples behind all stages but the last, which takes patches of them along the axes that it carries."""
    matrix = weight.reshape(len(weight), -1).astype(np.float32)
    inner = matrix.shape[1]

    def encoded(block: Block) -> Block:
        codes = matrix @ block.inputs.reshape(inner, -1)
        return dataclasses.replace(block, inputs=codes.reshape(-1, block.inputs.shape[1]))

    return dataclasses.replace(
        group, fitted=[encoded(b) for b in group.fitted], held_out=[encoded(b) for b in group.held_out]
    )


def _fit(
    weight: Array,
    bias: Array,
    samples: Sequence[Samples],
    moments: Sequence[tuple[InputMoments, InputMoments]],
    output_factor: Array,
    steps: int,
) -> tuple[Array, Array]:
    """`fit` of every group: weight ``[groups, o, ...]`` and bias ``[out]``."""
    fitted = [
        fit(w.reshape(len(w), -1), b, group, parts, factor, steps)
        for w, b, group, parts, factor in zip(
            weight, bias.reshape(len(weight), -1), samples, moments, output_factor, strict=True
        )
    ]
    weights, biases = zip(*fitted, strict=True)
    return np.stack(weights).reshape(weight.shape), np.concatenate(biases)


def _known(network: Network, plan: Plan, statistics: Statistics) -> list[Layer]:
    """The layers of the plan that there are statistics of, in graph order."""
    prunable = {layer.name: layer for layer in network.prunable}
    names = [node.name or "" for node in network.model.graph]
    return [prunable[n] for n in names if n in prunable and n in plan.choices and n in statistics.layers]
