"""Removal of branches: allocation against brute force, and candidates against the graph that is left."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from onnx_kfe.errors import BudgetError
from onnx_kfe.graph import count_macs, count_parameters, find_branches, open_network
from onnx_kfe.planning import (
    DENSE,
    REMOVED,
    Candidate,
    Cost,
    LayerProblem,
    Macs,
    Params,
    allocate,
    network_cost,
    removal_loss,
    removals,
)
from onnx_kfe.rewrite import RemovePass
from tests.cases import load_case
from tests.planning.problems import SHAPES, problem_of, statistics_of
from tests.tiny import node, tiny, weights

FIXED = Cost(macs=500, parameters=40)  # what no candidate covers


@dataclass(frozen=True)
class Instance:
    """A random problem.

    Attributes:
        options: Candidates by layer; removals among them.
        bare: Cost of the layers without candidates, by name.
        original: Cost of the whole model.
    """

    options: Mapping[str, list[Candidate]]
    bare: Mapping[str, Cost]
    original: Cost

    def cost(self, chosen: Mapping[str, Candidate]) -> Cost:
        """Of the model, from the layers that are left alone: the costs of removals are not looked at."""
        gone = {name for choice in chosen.values() if choice.form == REMOVED for name in choice.removes}
        left = [choice.cost for choice in chosen.values() if choice.form != REMOVED]
        left += [FIXED, *(cost for name, cost in self.bare.items() if name not in gone)]
        return Cost(sum(cost.macs for cost in left), sum(cost.parameters for cost in left))

    def choices(self) -> Iterator[dict[str, Candidate]]:
        """All there are: some removals that are apart, and a candidate for each layer that they leave."""
        everything = [(name, choice) for name, found in self.options.items() for choice in found]
        cuts = [(name, choice) for name, choice in everything if choice.form == REMOVED]
        for taken in itertools.chain.from_iterable(itertools.combinations(cuts, n) for n in range(len(cuts) + 1)):
            covered = [name for own, choice in taken for name in (own, *choice.removes)]
            if len(set(covered)) < len(covered):
                continue
            plain = {k: [c for c in v if c.form != REMOVED] for k, v in self.options.items() if k not in covered}
            for picks in itertools.product(*plain.values()):
                yield dict(taken) | dict(zip(plain, picks, strict=True))


def instance(seed: int, layers: int = 5, forms: int = 2) -> Instance:
    """Five layers with candidates and three without in between, and removals nested or apart."""
    rng = np.random.default_rng(seed)
    names = [f"layer{place}" for place in range(layers)]
    order = list(names)
    for place in range(3):
        order.insert(int(rng.integers(len(order))), f"bare{place}")
    dense = {name: Cost(*(int(n) for n in rng.integers(50, 1000, 2))) for name in order}
    options = {}
    for name in names:
        options[name] = [Candidate(DENSE, (), dense[name], 0.0)]
        for rank in range(1, forms + 1):
            kept = rng.uniform(0.1, 0.95, 2)
            cost = Cost(int(kept[0] * dense[name].macs), int(kept[1] * dense[name].parameters))
            loss = float(rng.exponential() * (1 - kept.mean()) ** 2)
            options[name].append(Candidate("two_factor", (rank,), cost, loss))
    for covered in spans(rng, order):
        rest = [dense[name] for name in covered if name not in options]
        cost = Cost(-sum(c.macs for c in rest), -sum(c.parameters for c in rest))
        removal = Candidate(REMOVED, (), cost, float(rng.exponential() * len(covered) / 2), tuple(covered[:-1]))
        options[covered[-1]].insert(int(rng.integers(len(options[covered[-1]]) + 1)), removal)
    total = [FIXED, *dense.values()]
    original = Cost(sum(cost.macs for cost in total), sum(cost.parameters for cost in total))
    return Instance(options, {name: dense[name] for name in order if name not in options}, original)


def spans(rng: np.random.Generator, order: list[str]) -> list[list[str]]:
    """Three runs of layers, each ending in one with candidates of its own, apart or one within another."""
    found: list[list[str]] = []
    while len(found) < 3:
        first, last = sorted(int(n) for n in rng.integers(len(order), size=2))
        run = order[first : last + 1]
        fits = all(set(run) < set(old) or set(old) < set(run) or not set(run) & set(old) for old in found)
        if run[-1].startswith("layer") and fits and all(run[-1] != old[-1] for old in found):
            found.append(run)
    return found


@pytest.mark.parametrize("kinds", [(Macs,), (Params,), (Macs, Params)])
def test_the_least_loss_is_found(kinds):
    """Over problems that differ in whether a removal is worth it, one within another, or none can be done without."""
    seen = set()
    for seed in range(40):
        made = instance(seed)
        rng = np.random.default_rng(seed)
        budgets = [kind(float(rng.uniform(0.15, 0.8))) for kind in kinds]
        wanted = np.inf
        for chosen in made.choices():
            cost = made.cost(chosen)
            if all(budget.of(cost) <= budget.limit(budget.of(made.original)) for budget in budgets):
                wanted = min(wanted, sum(choice.loss for choice in chosen.values()))
        if wanted == np.inf:
            with pytest.raises(BudgetError):
                allocate(made.options, budgets, made.original)
            seen.add("impossible")
            continue
        chosen = allocate(made.options, budgets, made.original)
        check(made, chosen)
        assert all(budget.of(made.cost(chosen)) <= budget.limit(budget.of(made.original)) for budget in budgets)
        assert sum(choice.loss for choice in chosen.values()) == pytest.approx(wanted, rel=2e-4)
        seen.add(sum(bool(choice.removes) for choice in chosen.values()))
    assert {"impossible", 0, 1, 2} <= seen


def check(made: Instance, chosen: Mapping[str, Candidate]) -> None:
    """Each layer has one candidate, or vanishes with one other, and the costs of what was chosen say what is left."""
    assert list(chosen) == list(made.options)
    gone = [name for choice in chosen.values() for name in choice.removes]
    assert len(set(gone)) == len(gone)
    for name, choice in chosen.items():
        if name in gone:
            assert choice == Candidate(REMOVED, (), Cost(0, 0), 0.0)
        else:
            assert choice in made.options[name]
    dense = {name: next(c.cost for c in found if c.form == DENSE) for name, found in made.options.items()}
    cost = made.cost(chosen)
    saved = [(dense[name], choice.cost) for name, choice in chosen.items()]
    assert cost.macs == made.original.macs - sum(a.macs - b.macs for a, b in saved)
    assert cost.parameters == made.original.parameters - sum(a.parameters - b.parameters for a, b in saved)


@pytest.mark.parametrize("kind", [Macs, Params])
def test_the_smallest_model_is_known_exactly(kind):
    for seed in range(15):
        made = instance(seed, layers=4)
        least = min(kind(1).of(made.cost(chosen)) for chosen in made.choices())
        chosen = allocate(made.options, [kind(least)], made.original)
        check(made, chosen)
        assert kind(1).of(made.cost(chosen)) == least
        with pytest.raises(BudgetError, match=rf"the smallest this model can become is {kind.option} (\d+)") as caught:
            allocate(made.options, [kind(least - 1)], made.original)
        assert int(re.findall(r"(\d+)$", str(caught.value))[0]) == least


def test_a_removal_may_save_less_than_what_lies_within_it():
    """Removing all three leaves 90, whereas removing the first two and shrinking the third leaves 20."""
    dense = Candidate(DENSE, (), Cost(100, 100), 0.0)
    options = {
        "a": [dense],
        "b": [dense, Candidate(REMOVED, (), Cost(0, 0), 1.0, ("a",))],
        "c": [
            dense,
            Candidate(REMOVED, (), Cost(90, 90), 0.1, ("a", "b")),
            Candidate("tucker", (1,), Cost(20, 20), 3.0),
        ],
    }
    original = Cost(300, 300)
    with pytest.raises(BudgetError, match=r"the smallest this model can become is --macs 20$"):
        allocate(options, [Macs(19)], original)
    for limit, loss in ((20, 4.0), (89, 4.0), (90, 0.1), (299, 0.1)):
        chosen = allocate(options, [Macs(limit)], original)
        assert sum(choice.loss for choice in chosen.values()) == pytest.approx(loss)


def problems_of(network) -> dict[str, LayerProblem]:
    statistics = statistics_of(network)
    return {layer.name: LayerProblem(layer, statistics.layers[layer.name]) for layer in network.prunable}


ZOO = ["residual-11", "inverted_residual-17", "gelu_mlp-17", "attention-13", "pyramid-11"]


@pytest.mark.parametrize("name", ZOO)
def test_candidates_cost_what_the_graph_is_left_with(name):
    """MACs to the last; parameters but for biases and what normalisation has, which no cost of a layer counts."""
    network = open_network(load_case(name).model)
    problems = problems_of(network)
    losses = {key: removal_loss(problem) for key, problem in problems.items()}
    found = removals(network, losses)
    assert set(found) == {branch.layer for branch in find_branches(network)}
    layers = {layer.name: layer for layer in network.layers}
    original = network_cost(network)
    for key, candidate in found.items():
        assert (candidate.form, candidate.ranks, candidate.loss) == (REMOVED, (), losses[key])
        assert candidate.loss > 0
        options = {k: [Candidate(DENSE, (), Cost(layers[k].macs, layers[k].geometry.weight_parameters), 0.0)]
                   for k in losses}  # fmt: skip
        options[key].append(candidate)
        dying = [layers[k] for k in (key, *candidate.removes)]
        saved = sum(layer.macs for layer in dying)
        chosen = allocate(options, [Macs(original.macs - saved)], original)
        assert chosen[key] is candidate
        cost = sum(choice.cost.macs - options[k][0].cost.macs for k, choice in chosen.items()) + original.macs
        constant = problems[key].bias(np.zeros_like(problems[key].weight))
        smaller = RemovePass({key: constant})(network.model.clone()).model
        assert count_macs(smaller) == cost
        weight = sum(onnx_size(layer) for layer in dying)
        parameters = sum(c.cost.parameters - options[k][0].cost.parameters for k, c in chosen.items())
        assert parameters == -weight
        assert count_parameters(smaller) <= original.parameters - weight + constant.size


def onnx_size(layer) -> int:
    """Elements of a weight, 0 where it is computed."""
    value = layer.node.inputs[1]
    return value.const_value.size if value.is_initializer() else 0


def test_one_branch_a_sum_is_offered():
    """The one that loses less for its MACs, whichever comes first."""
    network = open_network(load_case("strided_shortcut-17").model)
    body, shortcut, second = find_branches(network)
    assert body.sum == shortcut.sum
    macs = {layer.name: layer.macs for layer in network.layers}
    even = sum(macs[name] for name in body.layers) / macs[shortcut.layer]  # times what the shortcut loses
    for factor, offered in ((0.9, body), (1.1, shortcut)):
        losses = dict.fromkeys((layer.name for layer in network.prunable), 1.0) | {body.layer: factor * even}
        found = removals(network, losses)
        assert set(found) == {offered.layer, second.layer}
        assert found[offered.layer].removes == offered.layers[:-1]


def test_layers_without_statistics_are_saved_all_the_same():
    """What has no candidates is on the bill of the removal; what has no candidates itself cannot be removed."""
    network = open_network(load_case("residual-11").model)
    first, second = find_branches(network)
    inner, last = first.layers
    losses = {layer.name: 1.0 for layer in network.prunable if layer.name not in (inner, second.layer)}
    (found,) = removals(network, losses).items()
    inside = next(layer for layer in network.layers if layer.name == inner)
    assert found == (last, Candidate(REMOVED, (), Cost(-inside.macs, -8 * 8 * 9), 1.0, (inner,)))


def shared_inside() -> onnx.ModelProto:
    """The first of the two convolutions of a branch has its weight in common with another operator elsewhere."""
    nodes = [
        node("Conv", ["x", "w"], ["g"], "first", pads=[1] * 4),
        node("Conv", ["g", "v"], ["h"], "last", pads=[1] * 4),
        node("Add", ["x", "h"], ["s"], "sum"),
        node("ConvTranspose", ["s", "w"], ["y"], "elsewhere", pads=[1] * 4),
    ]
    shape = ["n", 4, 6, 6]
    return tiny(nodes, {"x": shape}, {"y": shape}, {"w": weights(4, 4, 3, 3), "v": weights(4, 4, 3, 3, seed=1)})


def test_a_weight_with_another_reader_is_not_saved():
    network = open_network(shared_inside())
    (found,) = removals(network, {"last": 2.0}).values()
    assert found == Candidate(REMOVED, (), Cost(-36 * 4 * 4 * 9, 0), 2.0, ("first",))


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_that_of_no_weight(name):
    """``1/2 tr(G W A W^T)``, and as much as a two-factor form of rank 0 where there is one."""
    problem = problem_of(name)
    wanted = 0.0
    for group in problem.groups:
        w = group.weight.reshape(len(group.weight), -1)
        wanted += 0.5 * np.einsum("op,oi,ij,pj->", group.output_factor, w, group.input_factor, w)
    assert removal_loss(problem) == pytest.approx(wanted, rel=1e-9)
    assert removal_loss(problem) == pytest.approx(sum(g.factors.losses[0] for g in problem.groups), rel=1e-6)
    assert wanted > 0
