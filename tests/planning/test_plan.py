"""Making a plan, and the file that a person may edit."""

from __future__ import annotations

import json
import math

import pytest
import scipy.linalg

from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.graph import count_macs, count_parameters, open_network
from onnx_kfe.planning import DENSE, FORMS, Macs, Params, Plan, Planner, network_cost
from onnx_kfe.rewrite import apply_plan
from tests.cases import load_case
from tests.planning.problems import statistics_of
from tests.tiny import node, tiny, weights


def make_plan(network, statistics, budgets, round_to=16):
    return Planner(network, statistics, round_to=round_to).plan(*budgets)


@pytest.fixture(scope="module")
def network():
    return open_network(load_case("autoencoder-13").model)


@pytest.fixture(scope="module")
def plan(network):
    return make_plan(network, statistics_of(network), [Macs(0.85)], round_to=4)


@pytest.fixture
def saved(plan, tmp_path):
    """The saved plan, and a function that edits it and loads it again."""
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


def edit(path, network, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return Plan.load(path, network)


def test_a_plan_says_what_happens_to_each_layer(network, plan):
    assert plan.original == network_cost(network)
    assert plan.original.macs == count_macs(network.model)
    assert plan.original.parameters == count_parameters(network.model)
    assert set(plan.choices) == {layer.name for layer in network.prunable}
    assert set(plan.skipped) == {layer.name for layer in network.layers if not layer.prunable}
    assert plan.changed
    assert all(choice.form != DENSE for choice in plan.changed.values())
    assert plan.budget == "--macs 0.85"
    assert plan.predicted_loss == pytest.approx(sum(c.loss for c in plan.changed.values()))


@pytest.mark.parametrize("budgets", [[Macs(0.8)], [Params(0.8)], [Macs(0.9), Params(0.8)]])
def test_the_written_model_meets_the_budgets(network, budgets):
    statistics = statistics_of(network)
    plan = make_plan(network, statistics, budgets, round_to=1)
    model, losses = apply_plan(network, plan, statistics)
    spent = {"macs": count_macs(model), "parameters": count_parameters(model)}
    biases = sum(layer.bias() is None for layer in network.prunable) * 16  # which centring may add
    for budget in budgets:
        assert spent[budget.resource] <= budget.limit(budget.of(plan.original)) + biases * (budget.resource != "macs")
    for name, loss in losses.items():
        found = 0.5 if plan.changed[name].form == "separable" else 1e-6  # that is a local optimum, found anew
        assert loss <= plan.changed[name].loss * (1 + found) + 1e-12


def test_no_budget_no_plan(network):
    with pytest.raises(UsageError, match="give a budget: --macs, --params or --latency"):
        make_plan(network, statistics_of(network), [])
    with pytest.raises(UsageError, match="--round-to 0"):
        make_plan(network, statistics_of(network), [Macs(0.8)], round_to=0)


def test_layers_without_statistics_are_left_alone(network):
    statistics = statistics_of(network)
    first, *others = (layer.name for layer in network.prunable)
    del statistics.layers[first]
    plan = make_plan(network, statistics, [Macs(0.95)], round_to=4)
    assert set(plan.choices) == set(others)
    assert plan.skipped[first] == "no statistics were collected"
    statistics.skipped[first] = "no rule for Frobnicate"
    assert make_plan(network, statistics, [Macs(0.95)], round_to=4).skipped[first] == "no rule for Frobnicate"


def test_statistics_of_another_model_are_refused(network):
    other = open_network(load_case("mlp-11").model)
    with pytest.raises(KfeError, match="another model"):
        make_plan(network, statistics_of(other), [Macs(0.8)])


def test_a_model_with_nothing_to_prune():
    other = open_network(tiny([node("Relu", ["x"], ["y"])], {"x": ["n", 4]}, {"y": ["n", 4]}))
    with pytest.raises(BudgetError, match="nothing in the model can be pruned"):
        make_plan(other, statistics_of(other), [Macs(0.5)])


def test_weights_alone_justify_only_what_is_redundant():
    low = weights(32, 2) @ weights(2, 32, seed=1)
    nodes = [node("Gemm", ["x", "low"], ["h"], "redundant"), node("Gemm", ["h", "full"], ["y"], "full")]
    arrays = {"low": low, "full": weights(32, 32, seed=2)}
    other = open_network(tiny(nodes, {"x": ["n", 32]}, {"y": ["n", 32]}, arrays))
    plan = Planner(other, None, round_to=2).smallest()
    assert {name: choice.ranks for name, choice in plan.changed.items()} == {"redundant": (2,)}
    assert Planner(other, None, round_to=2).plan(Macs(0.6)).changed == plan.changed
    with pytest.raises(BudgetError, match=r"without data, --macs 0\.4 cannot be met.*give --data"):
        Planner(other, None, round_to=2).plan(Macs(0.4))


def test_a_saved_plan_comes_back(network, plan, saved):
    assert Plan.load(saved, network) == plan
    assert json.loads(saved.read_text())["layers"].keys() == plan.choices.keys()


def test_an_edited_plan_is_counted_anew(network, saved):
    name = network.prunable[1].name
    geometry = network.prunable[1].geometry

    def change(data):
        data["layers"][name] |= {"form": "tucker", "ranks": [3, 5], "macs": 1, "parameters": 1}

    choice = edit(saved, network, change).choices[name]
    assert (choice.form, choice.ranks) == ("tucker", (3, 5))
    assert choice.cost == FORMS["tucker"].cost(geometry, (3, 5))


def test_entries_may_be_short(network, saved):
    first, second, *others = (layer.name for layer in network.prunable)

    def change(data):
        data["layers"] = {name: {"form": DENSE} for name in (first, *others)} | {
            second: {"form": "input_low_rank", "ranks": [8]}
        }

    plan = edit(saved, network, change)
    assert list(plan.changed) == [second]
    assert math.isnan(plan.changed[second].loss)
    apply_plan(network, plan, None)
    plan.save(saved)
    assert Plan.load(saved, network).changed.keys() == {second}


def layer_edit(name, **entry):
    return lambda data: data["layers"].update({name: entry})


SECOND = "/1/1.0/Conv"  # 8 to 16 channels, 3x3
IMPOSSIBLE = [
    ("ghost", {"form": "tucker", "ranks": [1, 1]}, "is not in the model"),
    (
        "/2/ConvTranspose",
        {"form": "two_factor", "ranks": [4]},
        "does not apply to it; it can be dense, output_low_rank",
    ),
    ("/2/ConvTranspose", {"form": "tucker", "ranks": [17, 4]}, "rank 17 of form 'tucker' must be from 1 to 16"),
    ("/4/ConvTranspose", {"form": "tucker", "ranks": [8, 4]}, "rank 4 of form 'tucker' must be from 1 to 3"),
    (SECOND, {"form": "mystery", "ranks": [1]}, "unknown form 'mystery'; it can be dense, removed, two_factor"),
    (SECOND, {"form": ["tucker"], "ranks": [1]}, "unknown form"),
    (SECOND, {"ranks": [1]}, "unknown form None"),
    (SECOND, {"form": "two_factor", "ranks": [4]}, "does not apply to it; it can be dense, output_low_rank, input_low"),
    (SECOND, {"form": "tucker", "ranks": [4]}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": [4, 4, 4]}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker"}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": 4}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": "44"}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": None}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": {"4": 4, "5": 5}}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": [4, 4.0]}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": [4, "4"]}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": [4, True]}, "takes a list of 2 whole"),
    (SECOND, {"form": "tucker", "ranks": [0, 4]}, "rank 0 of form 'tucker' must be from 1 to 8"),
    (SECOND, {"form": "tucker", "ranks": [-3, 4]}, "rank -3 of form 'tucker' must be from 1 to 8"),
    (SECOND, {"form": "tucker", "ranks": [9, 4]}, "rank 9 of form 'tucker' must be from 1 to 8"),
    (SECOND, {"form": "tucker", "ranks": [8, 17]}, "rank 17 of form 'tucker' must be from 1 to 16"),
    (SECOND, {"form": "tucker", "ranks": [1, 10]}, "rank 10 of form 'tucker' must be from 1 to 9"),
    (SECOND, {"form": "output_low_rank", "ranks": [17]}, "rank 17 .* must be from 1 to 16"),
]


@pytest.mark.parametrize(("name", "entry", "message"), IMPOSSIBLE)
def test_impossible_edits_are_explained(network, saved, name, entry, message):
    with pytest.raises(UsageError, match=message) as caught:
        edit(saved, network, layer_edit(name, **entry))
    assert f"layer '{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_entry_that_is_no_object_is_explained(network, saved):
    with pytest.raises(UsageError, match=f"layer '{SECOND}': unknown form"):
        edit(saved, network, lambda data: data["layers"].update({SECOND: "tucker"}))


def test_every_rank_within_the_limits_can_be_written(network, saved):
    for ranks in ([1, 1], [1, 9], [8, 16], [8, 1]):
        plan = edit(saved, network, layer_edit(SECOND, form="tucker", ranks=ranks))
        apply_plan(network, plan, statistics_of(network))


def test_plans_of_other_models_are_refused(saved):
    with pytest.raises(KfeError, match="the plan is for another model than the model"):
        Plan.load(saved, open_network(load_case("mlp-11").model))


@pytest.mark.parametrize("content", ["", "no json", "[1, 2]", "null", '{"format": "other"}', "{}", '"text"', "\xff"])
def test_files_that_are_no_plans_are_refused(network, tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(KfeError, match=r"plan\.json: not a plan") as caught:
        Plan.load(path, network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [None, [], "text"])
def test_plans_without_layers_are_refused(network, saved, layers):
    with pytest.raises(KfeError, match="not a plan"):
        edit(saved, network, lambda data: data.update(layers=layers))


def test_files_that_cannot_be_read_are_refused(network, tmp_path):
    with pytest.raises(KfeError, match="no such file"):
        Plan.load(tmp_path / "nowhere.json", network)
    with pytest.raises(KfeError, match="not a plan"):
        Plan.load(tmp_path, network)


@pytest.mark.parametrize("round_to", [4, 1])
def test_planning_factorises_each_patch_covariance_once(network, monkeypatch, round_to):
    """However many ranks there are: a solve for each took a minute for a ResNet-32 on the finest grid."""
    factorised = []
    cholesky = scipy.linalg.cholesky

    def counting(matrix, *args, **options):
        factorised.append(matrix.shape)
        return cholesky(matrix, *args, **options)

    monkeypatch.setattr(scipy.linalg, "cholesky", counting)
    monkeypatch.setattr("onnx_kfe.kfe._tucker.solve_core", None)
    make_plan(network, statistics_of(network), [Macs(0.9)], round_to=round_to)
    assert len(factorised) <= 2 * len(network.prunable)  # once over channels, once over channels and rows
    assert factorised
