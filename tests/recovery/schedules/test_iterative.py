"""What training changed between rounds is taken over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_kfe as kfe
from onnx_kfe._measure import Machine
from onnx_kfe._recipe import Recipe
from onnx_kfe._rounds import Rounds, prune_in_rounds
from onnx_kfe.graph import Network
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.schedules import with_weights
from onnx_kfe.rewrite import write_chains
from tests.networks import classifier, samples
from tests.recovery.schedules.models import output, residual

X = samples(4, seed=2)
BOTH = pytest.mark.parametrize("basis", ["channel", "kfe"])
MODELS = pytest.mark.parametrize("make", [classifier, residual])


Train = Callable[[ir.Model], ir.Model]


def rounds(model: onnx.ModelProto, basis: str, train: Train | None, seen: list[np.ndarray]) -> Rounds:
    """Three rounds; the outputs of what statistics are collected on go into a list."""
    network = kfe.inspect(model)

    def collect(inner: Network) -> kfe.Statistics:
        seen.append(output(inner.model, X))
        return kfe.collect(inner, {"x": samples(48)}, threads=1)

    recipe, machine = Recipe.of("c-obd", basis, rounds=3), Machine(threads=1)
    return prune_in_rounds(
        network, collect(network), [kfe.Params(0.5)], recipe, None, machine, collect, Progress(), train
    )  # fmt: skip


@BOTH
@MODELS
def test_training_that_changes_nothing_changes_nothing(basis: str, make: Callable[[], onnx.ModelProto]) -> None:
    calls = []

    def train(model: ir.Model) -> ir.Model:
        calls.append(model)
        return model.clone()

    found, plain = rounds(make(), basis, train, []), rounds(make(), basis, None, [])
    assert len(calls) == 2
    ends = [write_chains(each.network, each.plan, each.statistics, each.chains) for each in (found, plain)]
    np.testing.assert_allclose(output(ends[0], X), output(ends[1], X), rtol=1e-3, atol=1e-3)


@BOTH
@MODELS
def test_rounds_go_on_from_what_was_trained(basis: str, make: Callable[[], onnx.ModelProto]) -> None:
    """Noise in all weights stands for training."""
    trained: list[np.ndarray] = []
    seen: list[np.ndarray] = []

    def train(model: ir.Model) -> ir.Model:
        noisy = model.clone()
        random = np.random.default_rng(len(trained))
        for name, value in noisy.graph.initializers.items():
            assert value.const_value is not None
            array = value.const_value.numpy()
            noise = 1 + 0.3 * random.standard_normal(array.shape).astype(np.float32)
            value.const_value = ir.tensor(array * noise if array.dtype == np.float32 else array, name=name)
        trained.append(output(noisy, X))
        return noisy

    rounds(make(), basis, train, seen)
    assert len(seen) == 3
    for before, after in zip(trained, seen[1:], strict=True):
        assert np.abs(after - seen[0]).max() > 0.1
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_weights_are_taken_over_by_node_and_the_network_stays_as_it_was() -> None:
    network = kfe.inspect(classifier())
    other = kfe.inspect(classifier(seed=5))
    changed = with_weights(network, other.model)
    np.testing.assert_array_equal(output(changed.model, X), output(other.model, X))
    np.testing.assert_array_equal(output(network.model, X), output(classifier(), X))
    np.testing.assert_array_equal(changed.layers[0].weight(), other.layers[0].weight())
    assert changed.fingerprint == network.fingerprint
