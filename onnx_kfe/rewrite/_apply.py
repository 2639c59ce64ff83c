"""From plan and statistics to the smaller model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

import onnx_kfe
from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Geometry, Network, in_one_message, infer_shapes
from onnx_kfe.planning import FORMS, REMOVED, Candidate, LayerProblem, Link, Plan, Stage, compose, removal_loss
from onnx_kfe.rewrite._absorb import AbsorbPass
from onnx_kfe.rewrite._factorize import Chain, FactorizePass
from onnx_kfe.rewrite._merge import Merge, MergePass, is_smaller
from onnx_kfe.rewrite._narrow import narrow
from onnx_kfe.rewrite._remove import RemovePass

__all__ = ["add_losses", "apply_plan", "removed_chain", "sketch_plan", "solve_chain", "solve_plan", "write_chains"]


def apply_plan(
    network: Network,
    plan: Plan,
    statistics: Statistics | None,
    *,
    progress: Callable[[str], None] = lambda layer: None,
) -> tuple[ir.Model, dict[str, float]]:
    """Carry out a plan in a copy of the model: `narrow`, `solve_plan`, then `write_chains`."""
    network, statistics, lost = narrow(network, plan, statistics)
    chains, losses = solve_plan(network, plan, statistics, progress=progress)
    return write_chains(network, plan, statistics, chains), add_losses(lost, losses)


def add_losses(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Sums by layer."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in (*first, *second)}


def solve_plan(
    network: Network,
    plan: Plan,
    statistics: Statistics | None,
    *,
    progress: Callable[[str], None] = lambda layer: None,
) -> tuple[dict[str, Chain], dict[str, float]]:
    """Find the weights of the planned forms, each layer by itself.

    Args:
        network: The model, narrowed as the plan says.
        plan: Forms and ranks by layer.
        statistics: What the weights of the forms are solved under; None for the weights alone.
        progress: Called with each layer's name when it is done.

    Returns:
        What each changed layer becomes, and the loss that its new weights are predicted to cost, in nats per sample.

    Raises:
        KfeError: The statistics are of another model, or lack a layer of the plan.
    """
    if statistics is not None:
        statistics.check_model(network.fingerprint, network.name)
    layers = {layer.name: layer for layer in network.layers}
    chains, losses = {}, {}
    for name, choice in _written(plan).items():
        if statistics is not None and name not in statistics.layers:
            raise KfeError(
                f"the statistics lack layer '{name}' of the plan: {statistics.skipped.get(name, 'collect again')}"
            )
        problem = LayerProblem(layers[name], statistics.layers[name] if statistics is not None else None)
        if choice.form == REMOVED:
            chains[name] = removed_chain(problem)
            losses[name] = removal_loss(problem)
        else:
            chains[name] = solve_chain(problem, choice)
            losses[name] = problem.loss(compose(chains[name].stages))
        progress(name)
    return chains, losses


def solve_chain(problem: LayerProblem, choice: Candidate) -> Chain:
    """What a layer becomes in a form at ranks."""
    form = FORMS[choice.form]
    stages = form.stages(problem, choice.ranks)
    bias = problem.bias(compose(stages) if form.moves_bias else problem.weight)
    return Chain(problem.layer, choice.form, stages, bias)


def removed_chain(problem: LayerProblem) -> Chain:
    """What stands for the last layer of a branch that is left out: its mean output, as a bias."""
    return Chain(problem.layer, REMOVED, [], problem.bias(np.zeros_like(problem.weight)))


def write_chains(network: Network, plan: Plan, statistics: Statistics | None, chains: Mapping[str, Chain]) -> ir.Model:
    """A copy of the model with chains in place of layers.

    Args:
        network: The model, narrowed as the plan says.
        plan: What the chains were solved for.
        statistics: What they were solved under.
        chains: What becomes of which layer, by layer name.

    Raises:
        KfeError: The graph that came out is invalid.
    """
    model = network.model.clone()
    removed = {name: chain.bias for name, chain in chains.items() if chain.form == REMOVED}
    chains = {name: chain for name, chain in chains.items() if name not in removed}
    model = FactorizePass(chains)(RemovePass(removed)(model).model).model
    # what is around a node is no part of a weight that it shares
    chains = {name: chain for name, chain in chains.items() if not chain.layer.twins}
    model = _merged(model, chains)
    model.metadata_props["onnx_kfe"] = _provenance(network, plan, statistics)
    infer_shapes(model)
    model = AbsorbPass(lambda node: _chain_of(node, chains) is not None)(model).model
    _check(model, network.name)
    return model


def _merged(model: ir.Model, chains: Mapping[str, Chain]) -> ir.Model:
    """Make one of the end of a chain and the beginning of the next where they meet and that is smaller."""

    def cheaper(merge: Merge) -> bool:
        first, second = _chain_of(merge.first, chains), _chain_of(merge.second, chains)
        return first is not None and second is not None and first != second and is_smaller(merge)

    return MergePass(cheaper)(model).model if chains else model


def _chain_of(node: ir.Node, chains: Mapping[str, Chain]) -> str | None:
    """Name of the layer whose chain a node was written for; None for other nodes."""
    named = (name for name, chain in chains.items() if (node.name or "").startswith(f"{name}/{chain.form}_"))
    return next(named, None)


def sketch_plan(network: Network, plan: Plan) -> ir.Model:
    """The model of a plan with weights that are noise: as fast as with those that are worth their long solution."""
    network = narrow(network, replace(plan, rotates=False), None).network
    layers = {layer.name: layer for layer in network.layers}
    random = np.random.default_rng(0)
    chains = {}
    for name, choice in _written(plan).items():
        geometry = layers[name].geometry
        assert geometry is not None
        links = [] if choice.form == REMOVED else FORMS[choice.form].links(geometry, choice.ranks)
        stages = [_noise(link, geometry, random) for link in links]
        chains[name] = Chain(layers[name], choice.form, stages, random.normal(size=geometry.out_channels))
    return write_chains(network, plan, None, chains)


def _written(plan: Plan) -> dict[str, Candidate]:
    """The changed layers, of each branch that is left out only the last one."""
    return {name: choice for name, choice in plan.changed.items() if choice.form != REMOVED or name in plan.removed}


def _noise(link: Link, geometry: Geometry, random: np.random.Generator) -> Stage:
    if link.reorders:
        return Stage(random.permutation(link.inputs).astype(np.float64))
    taps = [geometry.kernel[axis] for axis in link.axes]
    shape = (link.groups, link.outputs // link.groups, link.inputs // link.groups, *taps)
    return Stage(random.normal(size=shape) / np.sqrt(np.prod(shape[2:])), link.axes)


def _provenance(network: Network, plan: Plan, statistics: Statistics | None) -> str:
    """One line of JSON: what made the model, from what, under which budget."""
    return json.dumps(
        {
            "version": onnx_kfe.__version__, "model_hash": network.fingerprint, "budget": plan.budget,
            "samples": statistics.samples if statistics is not None else 0,
            "layers": {name: [choice.form, *choice.ranks] for name, choice in plan.changed.items()},
            **({"channels": {name: len(kept) for name, kept in plan.channels.items()}} if plan.channels else {}),
        }
    )  # fmt: skip


def _check(model: ir.Model, name: str) -> None:
    try:
        proto = onnx.ModelProto.FromString(in_one_message(model))
    except KfeError:
        return  # over 2 GiB: checked by whoever loads it, the checker needs the model in one message
    for info in proto.graph.output:  # ONNX Runtime does without shapes of outputs, the checker does not
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise KfeError(f"{name}: the rewritten graph is invalid, please report this: {error}") from error
