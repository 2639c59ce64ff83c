"""Chains of full rank in the place of layers, and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

import onnx_kfe as kfe
from onnx_kfe.graph import count_macs, find_groups
from onnx_kfe.kfe import BASES
from onnx_kfe.planning import LayerProblem, find_method
from onnx_kfe.recovery.schedules import of_directions
from tests.networks import classifier, samples
from tests.recovery.schedules.models import output, subject
from tests.topologies import Builder

X = samples(4, seed=2)


def test_chains_of_full_rank_compute_what_the_layers_did() -> None:
    what = subject("kfe")
    assert count_macs(what.network.model) > count_macs(ir.from_proto(classifier()))
    np.testing.assert_allclose(output(what.network.model, X), output(classifier(), X), rtol=1e-4, atol=1e-4)


def test_targets_are_what_the_ranks_leave_out() -> None:
    what = subject("kfe")
    sizes = {group.name: group.size for group in find_groups(what.network).groups if group.prunable}
    for layer, choice in what.plan.changed.items():
        inside, outside = choice.ranks
        kept = [sizes[f"{layer}/kfe_c_obd_{n}"] - what.targets.get(f"{layer}/kfe_c_obd_{n}", 0) for n in (0, 1)]
        assert kept == [inside, outside]
    assert {layer.rpartition("_")[0] for layer in what.targets} == {core.rpartition("_")[0] for core in what.cores}


def test_chains_that_lose_nothing_are_dense_layers_again() -> None:
    what = subject("kfe")
    everything = {group.name: np.ones(group.size, bool) for group in find_groups(what.network).groups}
    model, plan = what.without(what.network.model, everything)
    assert count_macs(model) == count_macs(ir.from_proto(classifier()))
    assert plan == what.plan
    np.testing.assert_allclose(output(model, X), output(classifier(), X), rtol=1e-4, atol=1e-4)


def test_norms_in_a_core_are_importances() -> None:
    """Squared norms are EigenDamage's ``l^g_i l^a_j sum_k W*_ijk^2``, eigenvalues relative and damped."""
    network = kfe.inspect(classifier())
    statistics = kfe.collect(network, {"x": samples(64)}, threads=1)
    plan = kfe.plan(network, statistics, kfe.Macs(0.4), method="c-obd", basis="kfe")
    form = find_method("c-obd", "kfe").form
    assert form is not None
    what = of_directions(network, statistics, plan, form)
    seen, layer = statistics.layers["conv2"], next(layer for layer in network.layers if layer.name == "conv2")
    (core,) = (each.weight()[0] for each in what.network.layers if each.name == "conv2/kfe_c_obd_1")
    outputs, inputs = np.square(core).sum((1, 2, 3)), np.square(core).sum((0, 2, 3))
    (group,) = LayerProblem(layer, seen).groups
    found = BASES["kfe"](layer.weight()[0], group.input_factor, group.output_factor)
    products = found.variances[:, :, 0]
    scaled = np.square(found.weight).sum(2) * products / products.mean()
    for damped, exact in ((outputs, scaled.sum(1)), (inputs, scaled.sum(0))):
        large = exact > np.median(exact)
        np.testing.assert_allclose(damped[large], exact[large], rtol=0.25)


def test_pointwise_layers_have_two_stages() -> None:
    b = Builder()
    x = b.op("Relu", b.conv(b.relu_conv("x", 3, 24), 24, 16, 1))
    model = b.model(["n", 3, 8, 8], b.gemm(b.op("Flatten", b.op("GlobalAveragePool", x)), 16, 5))
    network = kfe.inspect(model)
    statistics = kfe.collect(network, {"x": samples(64)}, threads=1)
    plan = kfe.plan(network, statistics, kfe.Params(0.85), method="c-obd", basis="kfe")
    form = find_method("c-obd", "kfe").form
    assert form is not None
    what = of_directions(network, statistics, plan, form)
    pointwise = {n: c.ranks for n, c in plan.changed.items() if n == "Conv2"}
    assert pointwise
    assert what.targets["Conv2/kfe_c_obd_0"] == 16 - min(pointwise["Conv2"])
    assert "Conv2/kfe_c_obd_0" in what.cores  # the narrower side is the output
    np.testing.assert_allclose(output(what.network.model, X), output(model, X), rtol=1e-4, atol=1e-4)
