"""Refit on the networks of the zoo: what needs no compensation stays, what does is compensated, each node runs once."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

import onnx_kfe as kfe
from onnx_kfe.calibration import Dataset, batches, input_specs, open_dataset
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Network, count_macs, find_branches, open_network, serialize
from onnx_kfe.planning import DENSE, FORMS, REMOVED, Candidate, Cost, Plan, dense_cost, network_cost
from onnx_kfe.recovery import _lockstep, refit, refusal, settled_layers
from onnx_kfe.recovery._activations import Activations
from onnx_kfe.rewrite import apply_plan, solve_plan, write_chains
from onnx_kfe.runtime import create_session
from tests.cases import INPUT, load_case
from tests.networks import mixer
from tests.tied import pyramid, samples, siamese, stacked, upsampled
from tests.tiny import node, tiny, weights

SAMPLES = 192
TOPOLOGIES = [
    "plain-13", "residual-dynamo", "strided_shortcut-17", "inverted_residual-17", "grouped-11", "dense-13", "conv1d-13",
    "video-17", "inception-17", "unet-13", "pyramid-11", "mlp-11", "attention-13", "two_heads-13", "activations-13",
    "shared-11", "denoiser-17", "autoencoder-13",
]  # fmt: skip


def samples_of(case, count: int = SAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    return case.inputs(count, seed)


def dataset(network: Network, feeds: dict[str, np.ndarray]) -> Dataset:
    return open_dataset(feeds, input_specs(network.model))


def dense_plan(network: Network) -> Plan:
    choices = {
        layer.name: Candidate(DENSE, (), dense_cost(layer.geometry), 0.0)
        for layer in network.prunable
        if layer.geometry is not None
    }
    return Plan(network.fingerprint, choices, network_cost(network))


def outputs(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return create_session(model).run(None, feeds)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_where_nothing_changes_nothing_is_changed(name: str):
    case = load_case(name)
    network = open_network(case.model)
    feeds = samples_of(case)
    plan = dense_plan(network)
    statistics = kfe.collect(network, feeds)
    chains = refit(network, plan, statistics, dataset(network, feeds))
    found = outputs(serialize(write_chains(network, plan, statistics, chains)), feeds)
    for wanted, array in zip(outputs(serialize(network.original), feeds), found, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_transposed_convolutions_become_what_the_plan_makes_of_them():
    case = load_case("autoencoder-13")
    network, feeds = open_network(case.model), samples_of(case)
    statistics, plan = kfe.collect(network, feeds), dense_plan(network)
    up = [layer for layer in network.prunable if layer.transposed]
    for layer, form, ranks in zip(up, ("tucker", "input_low_rank"), ((6, 4), (3,)), strict=True):
        plan.choices[layer.name] = Candidate(form, ranks, FORMS[form].cost(layer.geometry, ranks), 0.0)
    chains = refit(network, plan, statistics, dataset(network, feeds))
    once, _ = solve_plan(network, plan, statistics)
    for layer in up:
        for stage, wanted in zip(chains[layer.name].stages, once[layer.name].stages, strict=True):
            np.testing.assert_array_equal(stage.weight, wanted.weight)
    refitted = write_chains(network, plan, statistics, chains)
    assert [node.op_type for node in refitted.graph if "Conv" in node.op_type] == (
        ["Conv"] * 3 + ["ConvTranspose"] + ["Conv"] * 2 + ["ConvTranspose"]
    )
    assert count_macs(refitted) == network_cost(network).macs + sum(
        plan.choices[layer.name].cost.macs - layer.macs for layer in up
    )
    (wanted,), (found,) = (outputs(serialize(model), feeds) for model in (network.original, refitted))
    assert 0 < np.square(found - wanted).mean() < 0.5 * wanted.var()


def test_constants_on_the_left_are_solved_anew():
    """As the product of the transposed matrices is; and where nothing changes nothing is changed."""
    x = (weights(SAMPLES, 7, 6) @ weights(6, 6, seed=1)).swapaxes(1, 2) + weights(1, 6, 1, seed=2)
    turned = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["t", "w"], ["h"], "layer"),
        node("Transpose", ["h"], ["y"], perm=[0, 2, 1]),
    ]
    found = []
    for nodes, weight in (([node("MatMul", ["w", "x"], ["y"], "layer")], weights(8, 6)), (turned, weights(8, 6).T)):
        network = open_network(tiny(nodes, {"x": ["n", 6, 7]}, {"y": ["n", 8, 7]}, {"w": np.ascontiguousarray(weight)}))
        statistics = kfe.collect(network, {"x": x})
        plan = dense_plan(network)
        plan.choices["layer"] = Candidate("two_factor", (2,), Cost(0, 0), 0.0)
        chains = refit(network, plan, statistics, dataset(network, {"x": x}))
        found += outputs(serialize(write_chains(network, plan, statistics, chains)), {"x": x})
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3 * np.abs(found[1]).max())
    network, feeds = open_network(mixer()), {"x": weights(SAMPLES, 6, 7)}
    statistics, plan = kfe.collect(network, feeds), dense_plan(network)
    same = write_chains(network, plan, statistics, refit(network, plan, statistics, dataset(network, feeds)))
    assert [layer.left for layer in open_network(ir.to_proto(same)).layers] == [True, True, False]
    wanted, array = (outputs(serialize(model), feeds)[0] for model in (network.original, same))
    np.testing.assert_allclose(array, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def residual() -> tuple[Network, dict[str, np.ndarray], kfe.Statistics, Plan]:
    case = load_case("residual-dynamo")
    network = open_network(case.model)
    feeds = samples_of(case)
    statistics = kfe.collect(network, feeds)
    return network, feeds, statistics, kfe.plan(network, statistics, kfe.Macs(0.5), round_to=1)


def test_the_others_make_up_for_a_branch_that_is_left_out(residual):
    network, feeds, statistics, _ = residual
    (branch, *_) = find_branches(network)
    plan = dense_plan(network)
    others = tuple(name for name in branch.layers if name != branch.layer)
    for name in branch.layers:
        plan.choices[name] = Candidate(REMOVED, (), Cost(0, 0), 0.0, others if name == branch.layer else ())
    assert plan.removed == [branch.layer]
    chains = refit(network, plan, statistics, dataset(network, feeds))
    unseen = samples_of(load_case("residual-dynamo"), seed=1)
    (wanted,) = outputs(serialize(network.original), unseen)
    refitted = write_chains(network, plan, statistics, chains)
    assert not set(branch.layers) & {node.name for node in refitted.graph}
    (found,) = outputs(serialize(refitted), unseen)
    (once,) = outputs(serialize(apply_plan(network, plan, statistics)[0]), unseen)
    assert np.square(found - wanted).sum() < 0.8 * np.square(once - wanted).sum()


def test_it_brings_unseen_outputs_nearer_to_the_original(residual):
    network, feeds, statistics, plan = residual
    unseen = samples_of(load_case("residual-dynamo"), seed=1)
    (wanted,) = outputs(serialize(network.original), unseen)

    def error(model: bytes) -> float:
        return float(np.square(outputs(model, unseen)[0] - wanted).mean())

    before, _ = apply_plan(network, plan, statistics)
    chains = refit(network, plan, statistics, dataset(network, feeds))
    assert error(serialize(write_chains(network, plan, statistics, chains))) < 0.7 * error(serialize(before))


def test_every_node_runs_once(residual):
    """Of the original each, of the smaller model each but the chain of the last layer, which feeds no other."""
    network, feeds, statistics, plan = residual
    runs: Counter[str] = Counter()
    create = _lockstep.create_session

    def counted(model: bytes, **options):
        import onnx

        for made in onnx.ModelProto.FromString(model).graph.node:
            if made.op_type == "Conv":
                runs[made.output[0]] += 1
        return create(model, **options)

    with mock.patch.object(_lockstep, "create_session", counted):
        refit(network, plan, statistics, dataset(network, feeds))
    assert set(runs.values()) == {1}
    originals = [made.outputs[0].name for made in network.model.graph if made.op_type == "Conv"]
    assert set(originals) <= set(runs)


def same(first, second) -> bool:
    return all(
        np.array_equal(a.bias, second[name].bias)
        and all(np.array_equal(s.weight, t.weight) for s, t in zip(a.stages, second[name].stages, strict=True))
        for name, a in first.items()
    )


def test_the_memory_does_not_change_the_result(residual):
    network, feeds, statistics, plan = residual
    data = dataset(network, feeds)
    assert same(refit(network, plan, statistics, data), refit(network, plan, statistics, data, memory=0))


def test_the_memory_is_kept_to():
    """Activations of 100 MB and more where 16 are allowed: what numpy holds stays near that."""
    layers = [node("Conv", [f"h{n}" if n else "x", f"w{n}"], [f"h{n + 1}"], f"conv{n}", pads=[1] * 4) for n in range(3)]
    arrays = {f"w{n}": weights(16, 16, 3, 3, seed=n) for n in range(3)}
    model = tiny(layers, {"x": ["n", 16, 24, 24]}, {"h3": ["n", 16, 24, 24]}, arrays)
    network = open_network(model)
    x = np.random.default_rng(0).standard_normal((8, 16, 24, 24)).astype(np.float32)

    def stream():
        for n in range(2048):
            yield {"x": x[n % 8][None]}

    statistics = kfe.collect(network, {"x": x})
    plan = kfe.plan(network, statistics, kfe.Macs(0.5))
    data = open_dataset(stream, input_specs(network.model))
    peaks = {}
    for memory in (2**24, 2**30):
        tracemalloc.start()
        refit(network, plan, statistics, data, memory=memory)
        peaks[memory] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    one_batch = 64 * x[0].nbytes
    assert peaks[2**24] < 2**24 + 6 * one_batch
    assert peaks[2**30] > 1.5 * peaks[2**24]


def test_interrupted_it_goes_on_where_it_was(residual, tmp_path: Path):
    network, feeds, statistics, plan = residual
    data = dataset(network, feeds)
    folder = tmp_path / "small.onnx.refit"
    done: list[str] = []

    def interrupt(layer: str) -> None:
        done.append(layer)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(network, plan, statistics, data, checkpoint=folder, progress=interrupt)
    assert len(list(folder.iterdir())) == 3
    asked: list[str] = []
    samples = _lockstep.Lockstep.samples
    with mock.patch.object(
        _lockstep.Lockstep, "samples", lambda self, layer: asked.append(layer.name) or samples(self, layer)
    ):
        resumed = refit(network, plan, statistics, data, checkpoint=folder)
    assert not set(asked) & set(done)
    assert not folder.exists()
    whole = refit(network, plan, statistics, data)
    first, second = (
        outputs(serialize(write_chains(network, plan, statistics, chains)), feeds)[0] for chains in (resumed, whole)
    )
    assert np.square(first - second).mean() < 1e-4 * first.var()


def test_the_layers_of_another_plan_are_not_taken(residual, tmp_path: Path):
    network, feeds, statistics, plan = residual
    data = dataset(network, feeds)
    folder = tmp_path / "kept"

    def stop(layer: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(network, dense_plan(network), statistics, data, checkpoint=folder, progress=stop)
    resumed = refit(network, plan, statistics, data, checkpoint=folder)
    assert same(refit(network, plan, statistics, data), resumed)


def test_too_few_samples_are_said(residual):
    network, feeds, statistics, plan = residual
    with pytest.raises(KfeError, match="at least 2 samples"):
        refit(network, plan, statistics, dataset(network, {INPUT: feeds[INPUT][:1]}))
    assert refit(network, plan, statistics, dataset(network, {INPUT: feeds[INPUT][:3]}))


def test_graphs_with_bodies_are_refused():
    import onnx

    body = onnx.helper.make_graph([node("Relu", ["h"], ["r"])], "b", [], [onnx.ValueInfoProto(name="r")])
    nodes = [
        node("Conv", ["x", "w"], ["h"], "conv"),
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=onnx.TensorProto.BOOL),
        node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    model = tiny(nodes, {"x": ["n", 4, 6, 6]}, {"y": ["n", 8, 6, 6]}, {"w": weights(8, 4, 1, 1)})
    network = open_network(model)
    reason = refusal(network, dataset(network, {"x": np.ones((4, 4, 6, 6), np.float32)}))
    assert reason is not None
    assert "If" in reason


@pytest.mark.parametrize(
    ("after", "bounds"),
    [
        ([node("Relu", ["h"], ["y"])], (0.0, np.inf)),
        ([node("Clip", ["h", "low", "high"], ["y"])], (0.0, 6.0)),
        ([node("Clip", ["h", "", "high"], ["y"])], (-np.inf, 6.0)),
        ([node("Sigmoid", ["h"], ["y"])], (-np.inf, np.inf)),
        ([node("Relu", ["h"], ["r"]), node("Add", ["r", "h"], ["y"])], (-np.inf, np.inf)),
    ],
)
def test_the_activation_is_what_alone_reads_the_output(after, bounds: tuple[float, float]):
    arrays = {"w": weights(8, 4, 1, 1), "low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    model = tiny(
        [node("Conv", ["x", "w"], ["h"], "conv"), *after], {"x": ["n", 4, 6, 6]}, {"y": ["n", 8, 6, 6]}, arrays
    )
    network = open_network(model)
    x = np.random.default_rng(0).standard_normal((8, 4, 6, 6)).astype(np.float32)
    with Activations(2**30) as kept:
        models = _lockstep.Lockstep(network, network.prunable, [], kept, 2**26, (), None)
        models.take(batches(dataset(network, {"x": x}), 8, input_specs(network.model)), True)
        (samples,) = models.samples(network.prunable[0])
    assert (samples.activation.low, samples.activation.high) == bounds
    assert sum(block.inputs.shape[1] for block in (*samples.fitted, *samples.held_out)) > 8


@pytest.mark.parametrize("residual", [False, True])
def test_a_bias_that_an_add_of_its_own_adds_is_passed_over(residual: bool):
    """What is left for the layer to give is its product, and the activation behind the sums is seen."""
    arrays = {"w": weights(8, 8), "b": weights(8, seed=1)}
    shapes = {"x": ["n", 5, 8]}
    nodes = [node("MatMul", ["x", "w"], ["h"], "product"), node("Add", ["b", "h"], ["s0"])]
    nodes += [node("Add", ["s0", "x"], ["s1"])] if residual else []
    nodes += [node("Relu", [f"s{int(residual)}"], ["y"])]
    network = open_network(tiny(nodes, shapes, {"y": ["n", 5, 8]}, arrays))
    x = np.random.default_rng(0).standard_normal((16, 5, 8)).astype(np.float32)
    with Activations(2**30) as kept:
        models = _lockstep.Lockstep(network, network.prunable, [], kept, 2**26, (), None)
        models.take(batches(dataset(network, {"x": x}), 16, input_specs(network.model)), True)
        (samples,) = models.samples(network.prunable[0])
    assert samples.activation.low == 0
    for block in (*samples.fitted, *samples.held_out):
        assert block.beside is not None
        assert block.inputs.shape[1] > 0
        np.testing.assert_allclose(block.wanted - block.beside, arrays["w"].T @ block.inputs, atol=1e-5)
        beside = arrays["b"][:, None] + (block.inputs if residual else 0)
        np.testing.assert_allclose(block.beside, np.broadcast_to(beside, block.wanted.shape), atol=1e-6)


def test_a_product_behind_a_branch_that_is_cut_makes_up_for_it():
    """``x + (x W + b)`` with all of the branch but one direction gone: the next branch gives what is lacking."""
    arrays = {
        f"{kind}{n}": weights(*([16, 16] if kind == "w" else [16]), seed=10 * n) for n in range(2) for kind in "wb"
    }
    nodes = []
    for n, stream in enumerate(("x", "r0")):
        nodes += [
            node("MatMul", [stream, f"w{n}"], [f"h{n}"], f"product{n}"),
            node("Add", [f"h{n}", f"b{n}"], [f"s{n}"]),
        ]
        nodes += [node("Add", [stream, f"s{n}"], [f"r{n}"])]
    network = open_network(tiny(nodes, {"x": ["n", 5, 16]}, {"r1": ["n", 5, 16]}, arrays))
    x = np.random.default_rng(0).standard_normal((64, 5, 16)).astype(np.float32)
    statistics = kfe.collect(network, {"x": x})
    plan = dense_plan(network)
    first = network.prunable[0]
    assert first.geometry is not None
    plan.choices[first.name] = Candidate("two_factor", (8,), dense_cost(first.geometry), 0.0)
    chains = refit(network, plan, statistics, dataset(network, {"x": x}))
    (wanted,) = outputs(serialize(network.original), {"x": x})
    (found,) = outputs(serialize(write_chains(network, plan, statistics, chains)), {"x": x})
    (once,) = outputs(serialize(apply_plan(network, plan, statistics)[0]), {"x": x})
    assert np.square(found - wanted).sum() < 0.01 * np.square(once - wanted).sum()


@pytest.mark.parametrize("make", [pyramid, siamese, stacked, upsampled])
def test_nodes_that_share_a_weight_are_solved_as_one(make):
    """Nearer to the original than without a refit, on other samples too; what feeds itself is as without."""
    model = make()
    network, feeds, unseen = open_network(model), samples(model, SAMPLES), samples(model, SAMPLES, seed=1)
    statistics = kfe.collect(network, feeds)
    plan = kfe.plan(network, statistics, kfe.Macs(0.3 if make is upsampled else 0.5), round_to=1)
    assert any(layer.twins and layer.name in plan.changed for layer in network.prunable)
    before, _ = apply_plan(network, plan, statistics)
    after = write_chains(network, plan, statistics, refit(network, plan, statistics, dataset(network, feeds)))
    wanted = outputs(serialize(network.original), unseen)[0]
    errors = [np.square(outputs(serialize(each), unseen)[0] - wanted).mean() for each in (before, after)]
    assert settled_layers(network, plan, statistics) == (["MatMul0", "MatMul3"] if make is stacked else [])
    assert errors[1] < (0.5 if make is pyramid else 1.0) * errors[0]
    assert kfe.graph.count_parameters(after) <= 1.05 * kfe.graph.count_parameters(before)


@pytest.mark.parametrize("make", [pyramid, siamese, stacked, upsampled])
def test_where_nothing_changes_shared_weights_do_not_either(make):
    model = make()
    network, feeds = open_network(model), samples(model, SAMPLES)
    plan = dense_plan(network)
    statistics = kfe.collect(network, feeds)
    same = write_chains(network, plan, statistics, refit(network, plan, statistics, dataset(network, feeds)))
    wanted, found = (outputs(serialize(each), feeds)[0] for each in (network.original, same))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_what_a_chain_of_a_branch_reads_is_kept_while_other_branches_are_solved():
    arrays = {
        "w0": weights(8, 4, 1, 1),
        "w1": weights(8, 8, 3, 3),
        "w2": weights(8, 4, 1, 1),
        "w3": weights(4, 16, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w0"], ["h"], "stem"),
        node("Relu", ["h"], ["p"]),
        node("Conv", ["p", "w1"], ["b"], "branch", pads=[1, 1, 1, 1]),
        node("Conv", ["x", "w2"], ["c"], "other"),
        node("Concat", ["b", "c"], ["j"], axis=1),
        node("Conv", ["j", "w3"], ["y"], "last"),
    ]
    network = open_network(tiny(nodes, {"x": ["n", 4, 6, 6]}, {"y": ["n", 4, 6, 6]}, arrays))
    feeds = {"x": weights(16, 4, 6, 6)}
    statistics, plan = kfe.collect(network, feeds), dense_plan(network)
    plan.choices["branch"] = Candidate("tucker", (8, 8), Cost(0, 0), 0.0)
    chains = refit(network, plan, statistics, dataset(network, feeds))
    assert list(chains) == ["stem", "branch", "other", "last"]
    (wanted,), (found,) = (
        outputs(serialize(model), feeds)
        for model in (network.original, write_chains(network, plan, statistics, chains))
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
