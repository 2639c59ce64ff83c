"""EigenDamage and its relatives: against the published procedure in loops, and on graphs that are run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError
from onnx_kfe.graph import Network, count_macs, count_parameters, open_network
from onnx_kfe.kfe import IMPORTANCES, EigenMoments
from onnx_kfe.planning import DENSE, DirectionPlanner, LayerProblem, Macs, Params, compose
from onnx_kfe.planning._direction_forms import DIRECTION_FORMS
from onnx_kfe.rewrite import apply_plan
from tests.planning.problems import SHAPES, layer_of, problem_of, statistics_of
from tests.tiny import node, run, tiny, weights

EIGENDAMAGE = DIRECTION_FORMS["eigendamage"]
DEPTHWISE = DIRECTION_FORMS["eigendamage-depthwise"]
UNGROUPED = [name for name, (_, groups, _) in SHAPES.items() if groups == 1 and not name.startswith("up")]
FEEDS = {"x": weights(2, 6, 9, 9, seed=20)}


def mixed() -> Network:
    """3x3 with strides, 1x1, grouped, 3x3 again, and a Gemm at the end."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], "first", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1", "b1"], ["c1"], "pointwise"),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], "grouped", pads=[1] * 4, group=2),
        node("Conv", ["c2", "w3", "b3"], ["c3"], "wide", pads=[1] * 4),
        node("GlobalAveragePool", ["c3"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["y"], "last", transB=1),
    ]
    shapes = {"w0": (12, 6, 3, 3), "w1": (16, 12, 1, 1), "w2": (16, 8, 3, 3), "w3": (14, 16, 3, 3), "w4": (10, 14)}
    arrays = {name: weights(*shape, seed=n) / 6 for n, (name, shape) in enumerate(shapes.items())}
    arrays |= {f"b{n}": weights(size, seed=n + 9) for n, size in ((0, 12), (1, 16), (3, 14), (4, 10))}
    return open_network(tiny(nodes, {"x": ["n", 6, 9, 9]}, {"y": ["n", 10]}, arrays))


@pytest.fixture(scope="module")
def network() -> Network:
    return mixed()


@pytest.fixture(scope="module")
def statistics(network: Network) -> Statistics:
    return statistics_of(network)


class Published:
    """One layer in its eigenbasis, in loops: Wang et al. 2019, section 4, with half the importance, in nats."""

    def __init__(self, layer, seen) -> None:
        self.weight = layer.weight()[0].reshape(layer.geometry.out_channels, layer.geometry.in_channels, -1)
        outputs, channels, taps = self.weight.shape
        a = np.zeros((channels, channels))
        for c in range(channels):
            for d in range(channels):
                for k in range(taps):
                    a[c, d] += seen.input_second_moment[0][c * taps + k, d * taps + k] / seen.samples / taps
        g = seen.cotangent_second_moment[0] / seen.positions
        (values_a, self.inside), (values_g, self.outside) = np.linalg.eigh(a), np.linalg.eigh(g)
        self.rotated = np.stack([self.outside.T @ self.weight[..., k] @ self.inside for k in range(taps)], -1)
        self.rows, self.columns = np.zeros(outputs), np.zeros(channels)
        for i in range(outputs):
            for j in range(channels):
                cost = 0.5 * values_g[i] * values_a[j] * sum(self.rotated[i, j, k] ** 2 for k in range(taps))
                self.rows[i] += cost
                self.columns[j] += cost

    def kept(self, threshold: float) -> tuple[list[int], list[int]]:
        sides = []
        for scores in (self.rows, self.columns):
            best = sorted(range(len(scores)), key=lambda n: -scores[n])
            sides.append(best[: max(sum(scores > threshold), math.ceil(0.05 * len(scores)))])
        return sides[0], sides[1]

    def composed(self, threshold: float) -> np.ndarray:
        rows, columns = self.kept(threshold)
        parts = [self.outside[:, rows] @ self.rotated[rows][:, columns, k] @ self.inside[:, columns].T
                 for k in range(self.rotated.shape[2])]  # fmt: skip
        return np.stack(parts, -1)


def published_cost(layer, rows: int, columns: int) -> tuple[int, int] | None:
    """MACs and parameters of the chain; None where it has no fewer parameters than the layer."""
    whole = layer.geometry
    before, after = math.prod(whole.input_size), math.prod(whole.output_size)
    if whole.taps == 1:
        narrow = min(rows, columns)
        parameters = narrow * (whole.in_channels + whole.out_channels)
        macs = parameters * after
    else:
        core = rows * columns * whole.taps
        parameters = columns * whole.in_channels + core + rows * whole.out_channels
        macs = before * columns * whole.in_channels + after * (core + rows * whole.out_channels)
    return (macs, parameters) if parameters < whole.weight_parameters else None


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
def test_eigendamage_is_the_published_procedure(network, statistics, fraction) -> None:
    layers = {layer.name: layer for layer in network.layers}
    known = {n: Published(layers[n], statistics.layers[n]) for n in ("first", "pointwise", "wide")}
    plan = DirectionPlanner(network, statistics, EIGENDAMAGE).plan(Macs(fraction))
    whole = count_macs(network.model)

    def total(threshold: float) -> int:
        macs = whole
        for name, layer in known.items():
            cost = published_cost(layers[name], *map(len, layer.kept(threshold)))
            macs += 0 if cost is None else cost[0] - layers[name].macs
        return macs

    pooled = sorted(np.concatenate([[*layer.rows, *layer.columns] for layer in known.values()]))
    met = [total(threshold) <= fraction * whole for threshold in pooled]
    # the cost need not fall everywhere: an accepted chain may take more operations, so any first crossing will do
    crossings = [n for n in range(1, len(met)) if met[n] and not met[n - 1]]
    wanted = []
    for threshold in (pooled[n] for n in crossings):
        kept = {name: layer.kept(threshold + 1e-12 * threshold) for name, layer in known.items()}
        costs = {name: published_cost(layers[name], *map(len, each)) for name, each in kept.items()}
        wanted.append({n: (len(kept[n][1]), len(kept[n][0])) for n, cost in costs.items() if cost is not None})
    changed = {name: choice.ranks for name, choice in plan.changed.items()}
    assert changed in wanted
    assert plan.changed
    threshold = pooled[crossings[wanted.index(changed)]]
    for name, choice in plan.changed.items():
        problem = LayerProblem(layers[name], statistics.layers[name])
        stages = EIGENDAMAGE.stages(problem, choice.ranks)
        composed = compose(stages)[0].reshape(known[name].weight.shape)
        np.testing.assert_allclose(composed, known[name].composed(threshold * (1 + 1e-12)), atol=1e-9)
        assert (choice.cost.macs, choice.cost.parameters) == published_cost(layers[name], *reversed(choice.ranks))
    assert plan.skipped == {
        "grouped": "form 'eigendamage' is for ungrouped layers",
        "last": "the last layer, which EigenDamage leaves as it is",
    }


def test_the_biases_of_eigendamage_stay(network, statistics) -> None:
    plan = DirectionPlanner(network, statistics, EIGENDAMAGE).plan(Macs(0.5))
    model, losses = apply_plan(network, plan, statistics)
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    biases = {layer.name: layer.bias() for layer in network.prunable}
    assert set(losses) == set(plan.changed)
    for name in plan.changed:
        assert any(array.shape == biases[name].shape and np.allclose(array, biases[name]) for array in arrays.values())
    run(model, FEEDS)
    centred = DirectionPlanner(network, statistics, DIRECTION_FORMS["kfe c-obd"]).plan(Macs(0.5))
    arrays = {
        n: v.const_value.numpy() for n, v in apply_plan(network, centred, statistics)[0].graph.initializers.items()
    }
    assert not any(np.allclose(a, biases["wide"]) for a in arrays.values() if a.shape == biases["wide"].shape)


@pytest.mark.parametrize("method", DIRECTION_FORMS)
@pytest.mark.parametrize("budget", [Macs(0.6), Params(0.6)])
def test_every_method_writes_what_it_planned(network, statistics, method, budget) -> None:
    form = DIRECTION_FORMS[method]
    plan = DirectionPlanner(network, statistics, form).plan(budget)
    model, losses = apply_plan(network, plan, statistics)
    assert {choice.form for choice in plan.changed.values()} == {form.name}
    assert count_macs(model) == DirectionPlanner(network, statistics, form).planned(plan).macs
    spent = {"macs": count_macs(model), "parameters": count_parameters(model)}
    assert spent[budget.resource] <= budget.amount * budget.of(plan.original)
    assert np.isfinite(run(model, FEEDS)["y"]).all()
    layers = {layer.name: layer for layer in network.layers}
    for name, choice in plan.changed.items():
        problem = LayerProblem(layers[name], statistics.layers[name])
        stages = form.stages(problem, choice.ranks)
        shapes = [stage.weight.shape[1:] for stage in stages]
        assert sum(math.prod(stage.weight.shape) for stage in stages) == choice.cost.parameters, shapes
        assert losses[name] == pytest.approx(choice.loss) == problem.loss(compose(stages))


@pytest.mark.parametrize("method", DIRECTION_FORMS)
@pytest.mark.parametrize("name", UNGROUPED)
def test_at_full_rank_the_chain_is_the_weight(name, method) -> None:
    form, problem = DIRECTION_FORMS[method], problem_of(name)
    ranks = form.limits(problem.geometry)
    rebuilt = compose(form.stages(problem, ranks))
    if form is DEPTHWISE and problem.geometry.taps > 1:  # a kernel that is separable by channels only, as near as it is
        kept = problem.loss(rebuilt) / problem.loss(np.zeros_like(rebuilt))
        assert 1e-6 < kept < 1
    else:
        np.testing.assert_allclose(rebuilt, problem.weight, atol=1e-10)
        assert not form.accepted(problem.geometry, ranks)


@pytest.mark.parametrize("method", [name for name in DIRECTION_FORMS if DIRECTION_FORMS[name] is not DEPTHWISE])
@pytest.mark.parametrize("name", ["1x1", "matmul"])
@pytest.mark.parametrize("ranks", [(2, 5), (5, 2), (3, 3)])
def test_two_factors_of_a_pointwise_layer_are_the_product_of_three(name, method, ranks) -> None:
    form, problem = DIRECTION_FORMS[method], problem_of(name)
    encoder, core, decoder = (getattr(form.directions(problem, ranks), part) for part in ("encoder", "core", "decoder"))
    assert (encoder.shape, core.shape[:2], decoder.shape) == (
        (ranks[0], problem.geometry.in_channels), ranks[::-1], (problem.geometry.out_channels, ranks[1])
    )  # fmt: skip
    stages = form.stages(problem, ranks)
    assert [stage.weight.shape[1] for stage in stages] == [min(ranks), problem.geometry.out_channels]
    product = decoder @ core.reshape(core.shape[:2]) @ encoder
    np.testing.assert_allclose(compose(stages)[0].reshape(product.shape), product, atol=1e-12)


@pytest.mark.parametrize("ranks", [(4, 5), (6, 3), (2, 2)])
def test_the_depthwise_variant_convolves_each_direction_by_itself(ranks) -> None:
    """Its graph computes what its stages compose to, which is near the core it was split from."""
    problem = problem_of("3x3")
    stages = DEPTHWISE.stages(problem, ranks)
    narrow = min(ranks)
    assert [stage.weight.shape for stage in stages] == [(1, narrow, 6), (narrow, 1, 1, 3, 3), (1, 8, narrow)]
    first, depthwise, last = (stage.weight for stage in stages)
    composed = np.zeros((8, 6, 3, 3))
    for d in range(narrow):
        composed += last[0][:, d, None, None, None] * depthwise[d, 0, 0] * first[0][d][None, :, None, None]
    np.testing.assert_allclose(compose(stages)[0], composed, atol=1e-12)
    core = compose(EIGENDAMAGE.stages(problem, ranks))[0]
    assert np.square(composed - core).sum() < np.square(core).sum()


@pytest.mark.parametrize("name", ["grouped 1x1", "grouped 3x3", "grouped conv1d"])
@pytest.mark.parametrize("method", DIRECTION_FORMS)
def test_grouped_layers_have_no_such_form(name, method) -> None:
    assert DIRECTION_FORMS[method].limits(layer_of(name).geometry) == ()


@pytest.mark.parametrize("method", ["eigendamage", "kfe c-obd"])
def test_measured_variances_say_what_goes(network, statistics, method) -> None:
    """With moments that turn the order around, what was kept first goes first."""
    form, layers = DIRECTION_FORMS[method], dict(statistics.layers)
    (wide,) = (layer for layer in network.layers if layer.name == "wide")
    problem = LayerProblem(wide, layers["wide"])
    (there,) = problem.coordinates("kfe", published=form.published)
    moments = 1 / np.maximum(there.variances * there.weight**4, 1e-12)
    eigen = EigenMoments(there.input_basis[None], there.output_basis[None], layers["wide"].samples * moments[None])
    layers["wide"] = replace(layers["wide"], eigen=eigen)
    turned = LayerProblem(wide, layers["wide"])
    before, after = (form.scores(each) for each in (problem, turned))
    assert np.argmax(before.rows) != np.argmax(after.rows)
    np.testing.assert_allclose(after.rows, 0.5 * (moments * there.weight**2).sum((1, 2)))
    kept = form.directions(turned, (3, 4))
    rows = np.argsort(-after.rows)[:4]
    assert {tuple(np.round(np.abs(column), 9)) for column in kept.decoder.T} == {
        tuple(np.round(np.abs(there.output_basis[:, row]), 9)) for row in rows
    }
    plans = [
        DirectionPlanner(network, replace(statistics, layers=each), form).plan(Macs(0.6))
        for each in (statistics.layers, layers)
    ]
    assert plans[0].changed["wide"].ranks != plans[1].choices["wide"].ranks


def test_what_was_settled_before_stays(network, statistics) -> None:
    first = DirectionPlanner(network, statistics, EIGENDAMAGE).plan(Macs(0.7))
    settled = {"pointwise": first.choices["pointwise"]}
    planner = DirectionPlanner(network, statistics, EIGENDAMAGE, settled=settled)
    assert set(planner.problems) == {"first", "wide"}
    plan = planner.plan(Macs(0.6))
    assert plan.choices["pointwise"] == first.choices["pointwise"]
    assert planner.planned(plan).macs == count_macs(apply_plan(network, plan, statistics)[0])


def test_layers_without_statistics_and_models_of_one_layer(network, statistics) -> None:
    lacking = replace(
        statistics, layers={n: s for n, s in statistics.layers.items() if n not in ("first", "wide")},
        skipped={"first": "no rule for Frobnicate"},
    )  # fmt: skip
    plan = DirectionPlanner(network, lacking, EIGENDAMAGE).plan(Macs(0.98))
    assert set(plan.choices) == {"pointwise"}
    assert plan.skipped["first"] == "no rule for Frobnicate"
    assert plan.skipped["wide"] == "no statistics were collected"
    assert plan.choices["pointwise"].form != DENSE
    only = replace(statistics, layers={"last": statistics.layers["last"]}, skipped={"first": "no rule for Frobnicate"})
    with pytest.raises(BudgetError, match=r"pruned: first: no rule for Frobnicate; pointwise: no statistics"):
        DirectionPlanner(network, only, EIGENDAMAGE)


def test_there_is_a_form_for_every_importance_in_the_eigenbasis() -> None:
    names = {f"kfe {name}" for name, importance in IMPORTANCES.items() if "kfe" in importance.bases}
    assert set(DIRECTION_FORMS) == {"eigendamage", "eigendamage-depthwise", *names}
    assert {form.moves_bias for name, form in DIRECTION_FORMS.items() if name in names} == {True}
