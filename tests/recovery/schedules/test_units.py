"""Where units live, against plain indexing of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import onnx_kfe as kfe
from onnx_kfe.graph import find_groups
from onnx_kfe.recovery.schedules._units import Units, find_units
from onnx_kfe.recovery.training import to_torch
from tests.cases import load_case
from tests.networks import classifier, samples
from tests.recovery.schedules.models import channels, output, outputs, subject, written
from tests.topologies import TOPOLOGIES

X = samples(4, seed=2)


def units_of(name: str) -> tuple[torch.nn.Module, Units]:
    network = kfe.inspect(classifier())
    module = to_torch(network.model)
    (units,) = find_units(network, module, {name: 1})
    return module, units


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_those_of_the_rows(order: int) -> None:
    module, units = units_of("conv1")
    rows = dict(module.named_parameters())["w1"].detach().numpy().reshape(16, -1)
    np.testing.assert_allclose(units.norms(order), np.linalg.norm(rows, order, axis=1), rtol=1e-5)


def test_scaling_is_of_rows_and_zeroing_of_rows_biases_and_columns() -> None:
    module, units = units_of("conv1")
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    factors = np.linspace(0.5, 1, 16)
    units.scale(factors)
    before["w1"] *= torch.from_numpy(factors).float()[:, None, None, None]
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    kept = np.arange(16) % 3 > 0
    units.zero(kept)
    before["w1"][~kept], before["b1"][~kept], before["w2"][:, ~kept] = 0, 0, 0
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_norms_in_cores_are_those_of_the_core_alone() -> None:
    what = subject("kfe")
    module = to_torch(what.network.model)
    core = "conv2/kfe_c_obd_1"
    found = {units.name: units for units in find_units(what.network, module, what.targets, what.cores)}
    (key,) = [name for name, _ in module.named_parameters() if name.startswith("w2") and name.endswith("_1")]
    weight = dict(module.named_parameters())[key].detach().numpy()
    np.testing.assert_allclose(found[core].norms(2) ** 2, np.square(weight).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        found["conv2/kfe_c_obd_0"].norms(2) ** 2, np.square(weight).sum((0, 2, 3)), rtol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("name", ["grouped-11", "attention-13", "depthwise_multiplier", "shared_biases", "gated_mlp"])
def test_a_module_with_zeros_equals_the_graph_without_the_units(name: str) -> None:
    network = kfe.inspect(TOPOLOGIES[name]() if name in TOPOLOGIES else load_case(name).model)
    targets = {group.name: 1 for group in find_groups(network).groups if group.prunable}
    assert targets
    what = channels(network, targets)
    module = to_torch(network.model)
    kept = {}
    for units in find_units(network, module, targets):
        kept[units.name] = np.arange(units.size) != units.size // 2
        units.zero(kept[units.name])
    assert kept.keys() == targets.keys()
    shape = [2 if not isinstance(size, int) else size for size in network.model.graph.inputs[0].shape]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feed = network.model.graph.inputs[0].name
    assert feed == "x"
    np.testing.assert_allclose(output(written(what, module, kept), x), outputs(module, x), rtol=1e-3, atol=1e-4)
