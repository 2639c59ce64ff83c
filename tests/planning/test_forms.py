"""Every form on every kind of layer: it composes to the weight, loses what it predicts, and costs what it says."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Geometry, count_macs, count_parameters, find_layers, open_network
from onnx_kfe.planning import FORMS, Candidate, Cost, LayerProblem, Plan, compose, dense_cost, rank_grid
from onnx_kfe.rewrite import apply_plan
from tests.planning.problems import SHAPES, layer_of, problem_of
from tests.tiny import node, tiny, weights

SEARCHED = [name for name, form in FORMS.items() if form.searched]  # test_directions.py has the others
APPLYING = [
    (form, name)
    for form, name in product(SEARCHED, SHAPES)
    if FORMS[form].limits(layer_of(name).geometry)  # type: ignore[arg-type]
]
STRUCTURED = ("separable", "block_diagonal")  # without nested subspaces: found by search, not by decomposition
LOW_RANK = [(form, name) for form, name in APPLYING if form not in STRUCTURED]


def test_every_layer_has_a_form_and_every_form_a_layer():
    assert {name for _, name in APPLYING} == set(SHAPES)
    assert {form for form, _ in APPLYING} == set(SEARCHED)
    pointwise = {name for form, name in APPLYING if form == "two_factor"}
    assert pointwise == {"1x1", "1x1x1", "grouped 1x1", "matmul", "up 1x1"}
    assert {form for form, name in APPLYING if name in pointwise} == {"two_factor", "block_diagonal"}


@pytest.mark.parametrize("name", ["conv3d", "1x1x1", "conv1d", "matmul"])
def test_a_form_of_two_axes_is_no_form_of_other_layers(name, tmp_path):
    network = network_of(name)
    path = tmp_path / "plan.json"
    Plan(network.fingerprint, {"layer": Candidate("spatial", (1,), Cost(0, 0), 0.0)}, Cost(0, 0)).save(path)
    with pytest.raises(UsageError, match="form 'spatial' does not apply to it"):
        Plan.load(path, network)


@pytest.mark.parametrize(("form", "name"), LOW_RANK)
def test_full_rank_is_the_weight_itself(form, name):
    problem = problem_of(name)
    ranks = FORMS[form].limits(problem.geometry)
    rebuilt = compose(FORMS[form].stages(problem, ranks))
    assert rebuilt.shape == problem.weight.shape
    np.testing.assert_allclose(rebuilt, problem.weight, rtol=1e-5, atol=1e-5)
    assert problem.loss(rebuilt) == pytest.approx(0, abs=1e-8 * problem.loss(np.zeros_like(rebuilt)))


@pytest.mark.parametrize(("form", "name"), LOW_RANK)
def test_losses_are_those_of_the_weights_written(form, name):
    problem = problem_of(name)
    found = dict(FORMS[form].losses(problem, 1))
    limits = FORMS[form].limits(problem.geometry)
    grids = FORMS[form].grids(problem.geometry, 1)
    assert all(grid[0] == 1 for grid in grids)
    assert form == "spatial" or all(grid[-1] == limit - 1 for grid, limit in zip(grids, limits, strict=True))
    expected = {
        ranks for ranks in product(*grids)
        if all(rank <= limit for rank, limit in zip(ranks, FORMS[form].limits(problem.geometry, ranks), strict=True))
    }  # fmt: skip
    assert set(found) == expected
    exact = form in ("two_factor", "input_low_rank" if problem.geometry.transposed else "output_low_rank")
    for ranks, predicted in found.items():
        stages = FORMS[form].stages(problem, ranks)
        actual = problem.loss(compose(stages))
        if exact:
            assert actual == pytest.approx(predicted, rel=1e-6, abs=1e-9 * problem.loss(np.zeros_like(problem.weight)))
        else:  # writing refines the subspaces, which planning does not
            assert actual <= predicted * (1 + 1e-6)
            assert actual > 0.5 * predicted
        carried = sorted(axis for stage in stages for axis in stage.axes)
        assert carried == list(range(len(problem.geometry.kernel)))
        assert all(stage.weight.ndim == 3 + len(stage.axes) for stage in stages if not stage.reorders)


@pytest.mark.parametrize(("form", "name"), LOW_RANK)
def test_losses_fall_with_rank_and_no_random_subspace_does_better(form, name):
    problem = problem_of(name)
    found = dict(FORMS[form].losses(problem, 1))
    for ranks, loss in found.items():
        for place in range(len(ranks)):
            more = (*ranks[:place], ranks[place] + 1, *ranks[place + 1 :])
            assert found.get(more, 0.0) <= loss * (1 + 1e-9)
    rng = np.random.default_rng(0)
    if form == "two_factor" and problem.geometry.groups == 1:
        weight = problem.weight.reshape(len(problem.weight[0]), -1)
        for _ in range(100):
            basis = np.linalg.qr(rng.normal(size=(len(weight), 2)))[0]
            assert problem.loss((basis @ basis.T @ weight).reshape(problem.weight.shape)) >= found[(2,)]


def network_of(name: str):
    weight, groups, shape = SHAPES[name]
    if name == "matmul":
        nodes = [node("MatMul", ["x", "w"], ["y"], "layer")]
        return open_network(tiny(nodes, {"x": shape}, {"y": ["n", 4, 8]}, {"w": weights(*weight)}))
    kernel = weight[2:]
    pads = [k // 2 for k in kernel] * 2
    operator, channels = ("ConvTranspose", weight[1] * groups) if name.startswith("up") else ("Conv", weight[0])
    conv = node(operator, ["x", "w"], ["y"], "layer", group=groups, strides=[2] * len(kernel), pads=pads)
    return open_network(
        tiny([conv], {"x": shape}, {"y": ["n", channels, *"abc"[: len(kernel)]]}, {"w": weights(*weight)})
    )


@pytest.mark.parametrize(("form", "name"), APPLYING)
def test_cost_is_what_the_written_graph_costs(form, name):
    network = network_of(name)
    (layer,) = network.layers
    ranks = tuple(max(1, limit // 2) for limit in FORMS[form].limits(layer.geometry))
    if form == "block_diagonal":
        ranks = FORMS[form].limits(layer.geometry)
    cost = FORMS[form].cost(layer.geometry, ranks)
    assert dense_cost(layer.geometry) == Cost(count_macs(network.model), count_parameters(network.model))
    model, _ = apply_plan(network, Plan(network.fingerprint, {"layer": Candidate(form, ranks, cost, 0.0)}, cost), None)
    assert cost == Cost(count_macs(model), count_parameters(model))
    stages = FORMS[form].stages(LayerProblem(layer, None), ranks)
    assert len(find_layers(model)) == sum(not stage.reorders for stage in stages)


@pytest.mark.parametrize(("form", "name"), [pair for pair in APPLYING if pair[0] in STRUCTURED])
def test_structured_forms_lose_what_they_predict(form, name):
    problem = problem_of(name)
    everything = problem.loss(np.zeros_like(problem.weight))
    found = dict(FORMS[form].losses(problem, 1))
    assert found
    for ranks, predicted in found.items():
        stages = FORMS[form].stages(problem, ranks)
        actual = problem.loss(compose(stages))
        assert actual <= 1.5 * predicted + 1e-3 * everything  # both are local optima, from different starts
        assert predicted < everything
        assert [stage.reorders for stage in stages] == [
            link.reorders for link in FORMS[form].links(problem.geometry, ranks)
        ]


@pytest.mark.parametrize("name", ["3x3", "1x3", "conv1d", "up 3x3", "up conv1d"])
def test_a_chain_has_the_shapes_of_its_links(name):
    problem = problem_of(name)
    for form in FORMS.values():
        if limits := form.limits(problem.geometry):
            ranks = tuple(max(1, limit // 2) for limit in limits) if form.name != "block_diagonal" else limits
            for stage, link in zip(form.stages(problem, ranks), form.links(problem.geometry, ranks), strict=True):
                taps = tuple(problem.geometry.kernel[axis] for axis in link.axes)
                shape = (link.groups, link.outputs // link.groups, link.inputs // link.groups, *taps)
                assert stage.weight.shape == ((link.inputs,) if link.reorders else shape)
                assert stage.axes == link.axes


def test_ranks_of_a_transposed_convolution_by_hand():
    """3x3 from 8 to 6 channels with stride 2, 5 x 5 to 10 x 10: the last 1x1 runs at the output resolution."""
    geometry = Geometry(8, 6, (3, 3), (2, 2), 1, (10, 10), (5, 5), transposed=True)
    assert dense_cost(geometry) == Cost(25 * 48 * 9, 48 * 9)
    assert FORMS["input_low_rank"].cost(geometry, (4,)) == Cost(25 * (4 * 8 + 4 * 54), 4 * 8 + 4 * 54)
    assert FORMS["output_low_rank"].cost(geometry, (3,)) == Cost(25 * 8 * 27 + 100 * 18, 8 * 27 + 18)
    assert FORMS["tucker"].cost(geometry, (5, 3)) == Cost(25 * (40 + 5 * 27) + 100 * 18, 40 + 5 * 27 + 18)
    # strides act axis by axis: 5 x 5, then 5 x 10, then 10 x 10
    assert FORMS["spatial"].cost(geometry, (4,)) == Cost(25 * 8 * 12 + 50 * 4 * 18, 8 * 12 + 4 * 18)
    assert FORMS["separable"].cost(geometry, (7,)) == Cost(25 * (56 + 63) + 100 * 42, 56 + 63 + 42)
    assert FORMS["input_low_rank"].limits(geometry) == (8,)
    assert FORMS["output_low_rank"].limits(geometry) == (6,)
    assert FORMS["tucker"].limits(geometry) == (8, 6)
    wide = Geometry(16, 2, (1, 3), (1, 1), 1, (5, 5), (5, 5), transposed=True)
    assert FORMS["tucker"].limits(wide) == (6, 2)  # the core has 2 x 3 outputs
    assert FORMS["tucker"].limits(wide, (4, 1)) == (3, 2)


@pytest.mark.parametrize("name", ["up 3x3", "up conv3d", "up grouped 3x2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_less_input_for_a_transposed_convolution_costs_the_singular_values_dropped(name, rank):
    """`G^(1/2) W A^(1/2)` with A not centred: half the sum of the squares, and the bias stays."""
    problem = problem_of(name)
    seen, groups = problem.statistics, problem.geometry.groups
    loss = 0.0
    for weight, a, g in zip(problem.weight, seen.input_factor, seen.output_factor, strict=True):
        matrix = weight.swapaxes(0, 1).reshape(weight.shape[1], -1).T  # [o * taps, c]
        a = a + 1e-4 * np.trace(a) / len(a) * np.eye(len(a))
        g = g + 0.05 * np.trace(g) / len(g) * np.eye(len(g))
        roots = (np.linalg.cholesky(g).T, np.linalg.cholesky(a))
        values = np.linalg.svd(roots[0] @ matrix @ roots[1], compute_uv=False)
        loss += 0.5 * seen.uncentred.coherence * np.square(values[rank:]).sum()
    stages = FORMS["input_low_rank"].stages(problem, (rank,))
    assert dict(FORMS["input_low_rank"].losses(problem, 1))[rank,] == pytest.approx(loss, rel=1e-4)
    assert problem.loss(compose(stages)) == pytest.approx(loss, rel=1e-4)
    assert [stage.weight.shape[0] for stage in stages] == [groups, groups]
    np.testing.assert_array_equal(problem.bias(compose(stages)), problem.layer.bias())


def test_groups_divide_the_channels():
    form, geometry = FORMS["block_diagonal"], Geometry(12, 8, (3, 3), (1, 1), 1, (5, 5), (5, 5))
    assert form.limits(geometry) == (4,)
    assert form.grids(geometry, 16) == [[2, 4]]
    assert form.misfit(geometry, (3,)) == "3 groups do not divide its channels"
    assert form.misfit(geometry, (2,)) is None


def test_ranks_by_hand():
    """Of a 3x3 layer from 6 to 8 channels with stride 2 on 10 x 10: the first 1x1 runs at the input resolution."""
    geometry = Geometry(6, 8, (3, 3), (2, 2), 1, (5, 5), (10, 10))
    assert FORMS["output_low_rank"].cost(geometry, (4,)) == Cost(25 * (4 * 54 + 8 * 4), 4 * 54 + 8 * 4)
    assert FORMS["input_low_rank"].cost(geometry, (3,)) == Cost(100 * 18 + 25 * 8 * 27, 18 + 8 * 27)
    assert FORMS["tucker"].cost(geometry, (3, 5)) == Cost(100 * 18 + 25 * (5 * 27 + 40), 18 + 5 * 27 + 40)
    # strides act axis by axis: 10 x 10, then 5 x 10, then 5 x 5
    assert FORMS["spatial"].cost(geometry, (4,)) == Cost(50 * 4 * 18 + 25 * 8 * 12, 4 * 18 + 8 * 12)
    assert FORMS["separable"].cost(geometry, (7,)) == Cost(100 * 42 + 25 * (63 + 56), 42 + 63 + 56)
    assert FORMS["block_diagonal"].cost(geometry, (2,)) == Cost(25 * 8 * 27, 8 * 27)
    assert FORMS["two_factor"].limits(geometry) == ()
    assert FORMS["output_low_rank"].limits(geometry) == (8,)
    assert FORMS["input_low_rank"].limits(geometry) == (6,)
    assert FORMS["tucker"].limits(geometry) == (6, 8)
    narrow = Geometry(2, 16, (1, 3), (1, 1), 1, (5, 5), (5, 5))
    assert FORMS["tucker"].limits(narrow) == (2, 6)  # the core has 2 x 3 inputs
    assert FORMS["tucker"].limits(narrow, (1, 4)) == (2, 3)


@pytest.mark.parametrize("round_to", [1, 2, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("limit", [1, 2, 4, 5, 16, 31, 64, 100, 512])
def test_rank_grid(limit, round_to):
    grid = rank_grid(limit, round_to)
    assert all(1 <= rank < limit for rank in grid)
    steps = {b - a for a, b in zip([0, *grid], grid, strict=False)}
    assert len(steps) <= 1  # from the first multiple on, every one
    if grid:
        (step,) = steps
        assert round_to % step == 0
        assert grid[-1] + step >= limit
        assert step == round_to or limit < 4 * 2 * step


def test_rank_grid_by_hand():
    assert rank_grid(6, 1) == [1, 2, 3, 4, 5]
    assert rank_grid(128, 16) == [16, 32, 48, 64, 80, 96, 112]
    assert rank_grid(32, 16) == [8, 16, 24]
    assert rank_grid(16, 16) == [4, 8, 12]
    with pytest.raises(UsageError, match="--round-to 0: give 1 or more"):
        rank_grid(16, 0)


def test_saving_is_no_dearer_in_any_respect():
    assert Cost(1, 2).saves(Cost(2, 2))
    assert Cost(1, 1).saves(Cost(2, 2))
    assert not Cost(2, 2).saves(Cost(2, 2))
    assert not Cost(1, 3).saves(Cost(2, 2))


def test_the_bias_keeps_the_mean_output():
    for name in ("3x3", "grouped 3x3", "matmul"):
        problem = problem_of(name)
        change = np.random.default_rng(1).normal(size=problem.weight.shape)
        groups, out = problem.weight.shape[:2]
        before = np.einsum("goi,gi->go", problem.weight.reshape(groups, out, -1), problem.mean).ravel()
        after = np.einsum("goi,gi->go", (problem.weight + change).reshape(groups, out, -1), problem.mean).ravel()
        bias = problem.layer.bias()
        kept = before + (0 if bias is None else bias)
        np.testing.assert_allclose(after + problem.bias(problem.weight + change), kept, rtol=1e-10)


def test_knowing_nothing_leaves_the_weights_to_decide():
    """Without statistics the loss is half the squared change (up to the damping of either factor)."""
    layer = layer_of("3x3")
    problem = LayerProblem(layer, None)
    change = np.random.default_rng(0).normal(size=problem.weight.shape)
    assert problem.loss(problem.weight + change) == pytest.approx(0.5 * (change**2).sum() * 1.05, rel=1e-3)
    assert not problem.mean.any()
    np.testing.assert_array_equal(problem.bias(problem.weight + change), layer.bias())
