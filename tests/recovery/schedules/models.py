"""Models, targets and a training loop of their own, that the tests of schedules share."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import torch

import onnx_kfe as kfe
from onnx_kfe.graph import Network, find_groups
from onnx_kfe.planning import Plan, find_method, network_cost
from onnx_kfe.recovery.schedules import SCHEDULES, Schedule, Subject, of_channels, of_directions
from onnx_kfe.recovery.schedules._units import find_units
from onnx_kfe.recovery.training import to_torch, write_back
from onnx_kfe.recovery.training._hook import Hook
from tests.networks import classifier, samples
from tests.tiny import run
from tests.topologies import Builder

CHANNEL_TARGETS = {"conv0": 3, "conv1": 6, "conv2": 5}


def subject(basis: str, model: onnx.ModelProto | None = None) -> Subject:
    """The classifier with half of its multiplications to go, as a plan divides them."""
    network = kfe.inspect(model or classifier())
    if basis == "channel":
        return channels(network, CHANNEL_TARGETS)
    statistics = kfe.collect(network, {"x": samples(64)}, threads=1)
    plan = kfe.plan(network, statistics, kfe.Macs(0.4), method="c-obd", basis="kfe")
    assert len(plan.changed) > 1
    form = find_method("c-obd", "kfe").form
    assert form is not None
    return of_directions(network, statistics, plan, form)


def channels(network: Network, targets: dict[str, int]) -> Subject:
    """A network that is to lose so many channels of each group."""
    sizes = {group.name: group.size for group in find_groups(network).groups}
    kept = {name: tuple(range(sizes[name] - count)) for name, count in targets.items()}
    plan = Plan(network.fingerprint, {}, network_cost(network), channels=kept)
    return of_channels(network, plan)


def residual() -> onnx.ModelProto:
    """Channels of a sum, an activation that is not 0 at 0, and a MatMul whose bias is an addition."""
    b = Builder()
    x = b.op("Sigmoid", b.conv("x", 3, 8))
    x = b.op("Add", x, b.conv(b.relu_conv(x, 8, 12), 12, 8))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    return b.model(["n", 3, 8, 8], b.matmul(b.op("Tanh", b.matmul(x, 8, 10)), 10, 5))


def make(name: str, what: Subject, seed: int = 0) -> tuple[torch.nn.Module, Schedule]:
    module = to_torch(what.network.model)
    return module, SCHEDULES[name](find_units(what.network, module, what.targets, what.cores), seed)


def drive(module: torch.nn.Module, hook: Hook, steps: int, start: int = 0, stop: int | None = None) -> None:
    """Steps of plain SGD towards outputs that mean nothing."""
    inputs = torch.from_numpy(samples(16, seed=3))
    targets = torch.linspace(-0.5, 0.5, 16)[:, None]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(start, steps if stop is None else stop):
        optimizer.zero_grad()
        (module(inputs) - targets).square().mean().backward()
        hook.after_backward(step, steps)
        optimizer.step()
        hook.after_step(step, steps)


def outputs(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(x)).numpy()


def written(what: Subject, module: torch.nn.Module, kept: dict[str, np.ndarray]) -> ir.Model:
    return what.without(write_back(module, what.network.model), kept)[0]


def output(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return next(iter(run(model, {"x": x}).values()))


def replaced(what: Subject, **targets: int) -> Subject:
    return dataclasses.replace(what, targets=targets)
