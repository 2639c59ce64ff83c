"""Channels under one threshold: importances, costs and plan files against what the graphs say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.graph import LayerCut, Network, count_macs, count_parameters, find_groups, open_network
from onnx_kfe.kfe import IMPORTANCES, predicted_loss
from onnx_kfe.planning import ChannelPlanner, LayerProblem, Macs, Params, Plan, cut_layer, network_cost
from onnx_kfe.rewrite import apply_plan
from tests.cases import load_case
from tests.planning.problems import problem_of, statistics_of
from tests.tiny import node, tiny, weights

MODELS = [
    "plain-13", "residual-11", "inverted_residual-17", "grouped-11", "inception-17", "autoencoder-13", "conv1d-13",
    "video-17", "shared-11", "two_heads-13", "attention-13", "gelu_mlp-17",
]  # fmt: skip


def with_saliencies(network: Network) -> Statistics:
    """Random statistics with random saliencies."""
    statistics = statistics_of(network)
    random = np.random.default_rng(9)
    layers = {
        layer.name: replace(statistics.layers[layer.name], saliency_sum=random.random(layer.weight().shape[:2]))
        for layer in network.prunable
    }
    return replace(statistics, layers=layers)


def residual() -> Network:
    """Two producers of the channels of a sum, the second a convolution in two groups, and readers of it."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], "left", pads=[1] * 4),
        node("Conv", ["x", "w1"], ["h"], "inner"),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "w2"], ["c"], "right", group=2),
        node("Add", ["a", "c"], ["s"]),
        node("Conv", ["s", "w3"], ["y"], "reader"),
    ]
    shapes = {"w0": (8, 4, 3, 3), "w1": (6, 4, 1, 1), "w2": (8, 3, 1, 1), "w3": (5, 8, 1, 1)}
    arrays = {name: weights(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())} | {"b0": weights(8)}
    return open_network(tiny(nodes, {"x": ["n", 4, 6, 6]}, {"y": ["n", 5, 6, 6]}, arrays))


def scores_of(planner: ChannelPlanner) -> dict[str, np.ndarray]:
    return planner._scores


def alone(problem: LayerProblem, group: int, row: int) -> float:
    """Half of ``E[(g_i (w_i - mean) x)^2]`` of one row of a group, by an explicit change of the weight."""
    part = problem.groups[group]
    change = np.zeros_like(part.weight)
    change[row] = part.weight[row]
    return predicted_loss(change, part.input_factor, part.output_factor)


def test_the_importance_of_a_unit_is_that_of_all_rows_that_go_with_it() -> None:
    network = residual()
    statistics = statistics_of(network)
    found = scores_of(ChannelPlanner(network, statistics, "kron-obd"))
    problems = {layer.name: LayerProblem(layer, statistics.layers[layer.name]) for layer in network.prunable}
    assert set(problems) == {"left", "inner", "right", "reader"}
    units = dict(zip(("left", "inner"), (4, 3), strict=True))
    assert {name: len(each) for name, each in found.items()} == units
    for unit in range(4):  # channel n of the first group of the second producer goes with n of the other
        wanted = sum(alone(problems["left"], 0, unit + half) for half in (0, 4))
        wanted += sum(alone(problems["right"], half, unit) for half in (0, 1))
        assert found["left"][unit] == pytest.approx(wanted)
    for unit in range(3):
        assert found["inner"][unit] == pytest.approx(sum(alone(problems["inner"], 0, unit + half) for half in (0, 3)))


def test_where_no_producer_is_known_the_readers_decide() -> None:
    network = residual()
    statistics = with_saliencies(network)
    lacking = replace(statistics, layers={"reader": statistics.layers["reader"]}, skipped={"left": "no rule"})
    planner = ChannelPlanner(network, lacking, "kron-obd")
    part = LayerProblem(network.prunable[-1], lacking.layers["reader"]).groups[0]
    whole = np.diag(part.weight.reshape(5, 8).T @ part.output_factor @ part.weight.reshape(5, 8))
    columns = 0.5 * whole * np.diag(part.input_factor)
    np.testing.assert_allclose(scores_of(planner)["left"], columns[:4] + columns[4:])
    skipped = planner.plan(Macs(0.9)).skipped
    assert skipped["channels of inner"] == "no statistics of its layers: none were collected"
    with pytest.raises(BudgetError, match="channels of left: no statistics of its layers: no rule"):
        ChannelPlanner(network, lacking, "taylor")  # says nothing of columns


@pytest.mark.parametrize(
    ("name", "importance"),
    [*((name, "kron-obs") for name in MODELS), *(("residual-11", importance) for importance in IMPORTANCES)],
)
def test_costs_are_those_of_the_graph_that_is_written(name, importance) -> None:
    network = open_network(load_case(name).model)
    statistics = with_saliencies(network)
    planner = ChannelPlanner(network, statistics, importance, round_to=1)
    plan = planner.plan(Macs(0.5))
    assert plan.channels
    assert not plan.changed
    model, losses = apply_plan(network, plan, statistics)
    cost = planner.planned(plan)
    assert count_macs(model, network.input_shapes) == cost.macs <= 0.5 * plan.original.macs
    # biases and what normalises by channel go too, and a layer gets a bias where the mean of others makes one
    biases = sum(layer.geometry.out_channels for layer in network.layers) + 4 * sum(
        group.size for group in find_groups(network).groups
    )
    assert abs(count_parameters(model) - cost.parameters) <= biases < plan.original.parameters
    assert plan.original == network_cost(network)
    assert sum(losses.values()) == pytest.approx(plan.predicted_loss)
    assert plan.compensates is (importance in ("c-obs", "kron-obs"))


@pytest.mark.parametrize("budgets", [[Params(0.6)], [Macs(0.8), Params(0.6)]])
def test_budgets_of_parameters(budgets) -> None:
    network = open_network(load_case("plain-13").model)
    statistics = statistics_of(network)
    model, _ = apply_plan(network, ChannelPlanner(network, statistics, "kron-obs").plan(*budgets), statistics)
    assert count_parameters(model) <= 0.6 * count_parameters(network.model)
    assert count_macs(model) <= max(b.amount for b in (*budgets, Macs(1.0)) if isinstance(b, Macs)) * count_macs(
        network.model
    )


@pytest.mark.parametrize("importance", ["magnitude-l1", "magnitude-l2"])
def test_weights_alone_are_enough_for_magnitudes(importance) -> None:
    network = residual()
    scores = scores_of(ChannelPlanner(network, None, importance))
    norms = {
        name: np.concatenate(
            [[np.linalg.norm(row.reshape(-1), int(importance[-1])) for row in group] for group in weight]
        )
        for name, weight in ((layer.name, layer.weight()) for layer in network.prunable)
    }
    np.testing.assert_allclose(scores["inner"], norms["inner"].reshape(2, 3).sum(0))
    np.testing.assert_allclose(scores["left"], (norms["left"] + norms["right"]).reshape(2, 4).sum(0))
    plan = ChannelPlanner(network, None, importance, round_to=1).plan(Macs(0.7))
    assert count_macs(apply_plan(network, plan, None)[0]) <= 0.7 * plan.original.macs
    assert plan.predicted_loss == 0


@pytest.mark.parametrize("importance", [name for name, each in IMPORTANCES.items() if each.needs != "weights"])
def test_others_need_statistics(importance) -> None:
    with pytest.raises(UsageError, match=f"--method {importance} needs statistics: give --data or --stats"):
        ChannelPlanner(residual(), None, importance)


def test_statistics_that_cannot_say_are_refused() -> None:
    network = residual()
    with pytest.raises(KfeError, match="no saliencies; collect the statistics again"):
        ChannelPlanner(network, statistics_of(network), "taylor")
    with pytest.raises(KfeError, match="another model"):
        ChannelPlanner(network, statistics_of(open_network(load_case("mlp-11").model)), "kron-obs")


def test_groups_that_stay_are_listed() -> None:
    """One operator that nobody knows keeps the channels it touches; others go."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"], "first"),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "w1"], ["b"], "second"),
        node("CumSum", ["b", "one"], ["c"], "sums"),
        node("Conv", ["c", "w2"], ["y"], "last"),
    ]
    arrays = {f"w{n}": weights(6, 6, 1, 1, seed=n) for n in range(3)} | {"one": np.array(1)}
    network = open_network(tiny(nodes, {"x": ["n", 6, 5, 5]}, {"y": ["n", 6, 5, 5]}, arrays))
    plan = ChannelPlanner(network, statistics_of(network), "kron-obs", round_to=1).plan(Macs(0.75))
    assert set(plan.channels) == {"first"}
    assert set(plan.skipped) == {"channels of second", "channels of last"}
    assert "CumSum" in plan.skipped["channels of second"]
    assert plan.skipped["channels of last"] == "graph output 'y'"
    with pytest.raises(BudgetError, match=r"of each group the best channels stay, .* can become is --macs 0\.4"):
        ChannelPlanner(network, statistics_of(network), "kron-obs", round_to=1).plan(Macs(0.3))


@pytest.mark.parametrize("compensates", [False, True])
@pytest.mark.parametrize("name", ["3x3", "grouped 3x3"])
def test_the_loss_of_a_cut_is_that_of_the_columns_that_go(name, compensates) -> None:
    problem = problem_of(name)
    groups = problem.geometry.groups
    columns = np.tile(np.arange(problem.geometry.in_channels // groups) % 2 == 0, groups)
    rows = np.tile(np.arange(problem.geometry.out_channels // groups) > 1, groups)
    cut = cut_layer(problem, LayerCut(rows, columns, groups), compensates)
    change = np.zeros_like(problem.weight)
    for g in range(groups):
        inside, outside = columns.reshape(groups, -1)[g], rows.reshape(groups, -1)[g]
        change[g][outside] -= problem.weight[g][outside]
        change[g][np.ix_(outside, inside)] += cut.weight[g]
    losses = [
        predicted_loss(each, part.input_factor, part.output_factor)
        for each, part in zip(change, problem.groups, strict=True)
    ]
    assert sum(losses) > 0
    assert cut.loss == pytest.approx(sum(losses))
    if not compensates:
        kept = problem.weight[:, :, columns.reshape(groups, -1)[0]][:, rows.reshape(groups, -1)[0]]
        np.testing.assert_array_equal(cut.weight, kept)


# The plan file


@pytest.fixture(scope="module")
def network() -> Network:
    return open_network(load_case("plain-13").model)


@pytest.fixture
def saved(network, tmp_path):
    plan = ChannelPlanner(network, statistics_of(network), "kron-obs", round_to=1).plan(Macs(0.6))
    assert len(plan.channels) > 1
    plan.save(tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def test_a_plan_with_channels_comes_back(network, saved) -> None:
    plan, path = saved
    assert Plan.load(path, network) == plan
    entry = json.loads(path.read_text())
    assert entry["compensates"] is True
    for name, kept in plan.channels.items():
        spelt = [part.split("-") for part in entry["channels"][name].split(",")]
        assert tuple(n for part in spelt for n in range(int(part[0]), int(part[-1]) + 1)) == kept


def test_edited_channels_are_taken(network, saved) -> None:
    plan, path = saved
    name = next(iter(plan.channels))
    data = json.loads(path.read_text())
    data["channels"] = {name: " 2-4, 0,3 "}
    data["layers"] = {}
    path.write_text(json.dumps(data))
    edited = Plan.load(path, network)
    assert edited.channels == {name: (0, 2, 3, 4)}
    (layer,) = (layer for layer in edited.cut_layers(network) if layer.name == name)
    assert layer.geometry.out_channels == 4
    model, _ = apply_plan(network, edited, statistics_of(network))
    cost = ChannelPlanner(network, None, "magnitude-l1").planned(edited)
    assert count_macs(model) == cost.macs < network_cost(network).macs


def test_forms_are_checked_against_what_is_left(network, saved) -> None:
    plan, path = saved
    data = json.loads(path.read_text())
    second = network.layers[1].name
    data["channels"] = {network.layers[0].name: "0-2"}
    data["layers"] = {second: {"form": "tucker", "ranks": [4, 4]}}
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"plan\.json: layer .*: rank 4 of form 'tucker' must be from 1 to 3"):
        Plan.load(path, network)
    data["layers"][second]["ranks"] = [3, 4]
    path.write_text(json.dumps(data))
    loaded = Plan.load(path, network)
    assert count_macs(apply_plan(network, loaded, statistics_of(network))[0]) < plan.original.macs


FIRST = "/0/0.0/Conv"
BAD = {
    "unknown group": ({"ghost": "0-3"}, "channels of 'ghost': no such group; see onnx-kfe inspect --groups"),
    "beyond": ({FIRST: "0-8"}, "channels of '{first}': 8 is not one of 0 to 7"),
    "far beyond": ({FIRST: "0-99999999999999"}, "channels of '{first}': 99999999999999 is not one of 0 to 7"),
    "nothing": ({FIRST: ""}, "channels of '{first}': '': write the channels kept as 0-3,7"),
    "backwards": ({FIRST: "5-2"}, "channels of '{first}': '5-2': write the channels kept as 0-3,7"),
    "garbage": ({FIRST: "all"}, "channels of '{first}': 'all': write the channels kept as 0-3,7"),
    "negative": ({FIRST: "-1"}, "write the channels kept as 0-3,7"),
    "open": ({FIRST: "3-"}, "write the channels kept as 0-3,7"),
    "a list": ({FIRST: [0, 1]}, "write the channels kept as 0-3,7"),
    "null": ({FIRST: None}, "write the channels kept as 0-3,7"),
    "no groups": (["0-3"], "channels: give those kept by group, as 0-3,7"),
    "an output": ({"/4/4.2/Gemm": "0-2"}, "channel group '/4/4.2/Gemm' cannot be pruned: graph output 'logits'"),
}


@pytest.mark.parametrize("what", BAD)
def test_channels_that_cannot_be_are_explained(network, saved, what) -> None:
    _, path = saved
    channels, message = BAD[what]
    data = json.loads(path.read_text())
    assert network.layers[0].name == FIRST
    data["channels"] = channels
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        Plan.load(path, network)
    assert message.format(first=FIRST) in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_units_that_there_are_not_are_refused(network) -> None:
    groups = find_groups(network)
    for channels, message in (({"ghost": (0,)}, "no such group"), ({FIRST: (0, 9)}, "9 is not one of 0 to 7")):
        with pytest.raises(UsageError, match=message):
            Plan("", {}, network_cost(network), channels=channels).masks(groups)
    with pytest.raises(UsageError, match="nothing would be kept"):
        groups.cut(Plan("", {}, network_cost(network), channels={FIRST: ()}).masks(groups))


def test_importance_over_what_a_unit_costs() -> None:
    """The method `channels` divides by the MACs, or parameters, of the rows and columns that go with a unit."""
    network = open_network(load_case("residual-11").model)
    statistics = statistics_of(network)
    layers = {layer.name: layer for layer in network.layers}
    plain = ChannelPlanner(network, statistics, "kron-obs")
    for kind, spent in ((Macs, lambda layer: layer.macs), (Params, lambda layer: layer.geometry.weight_parameters)):
        weighed = ChannelPlanner(network, statistics, "kron-obs", spares=kind)
        for group in find_groups(network).groups:
            if group.reason is not None:
                continue
            goes = np.zeros(group.size)
            for member in group.members:
                for unit in member.units[member.units >= 0]:
                    goes[unit] += spent(layers[member.layer]) / len(member.units)
            np.testing.assert_allclose(weighed._scores[group.name], plain._scores[group.name] / goes)
