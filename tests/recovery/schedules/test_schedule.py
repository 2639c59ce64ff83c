"""Every schedule in both bases: what goes, what is written, and that runs can be repeated and resumed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import count_macs
from onnx_kfe.recovery.schedules import SCHEDULES, find_schedule
from tests.networks import classifier, samples
from tests.recovery.schedules.models import (
    channels,
    drive,
    make,
    output,
    outputs,
    replaced,
    residual,
    subject,
    written,
)  # fmt: skip

X = samples(6, seed=9)
EACH = pytest.mark.parametrize("name", sorted(SCHEDULES))
BOTH = pytest.mark.parametrize("basis", ["channel", "kfe"])


def test_all_are_registered() -> None:
    assert set(SCHEDULES) == {"incremental", "probabilistic", "directional"}
    with pytest.raises(UsageError, match="probabilistic"):
        find_schedule("gradual")


@EACH
@BOTH
def test_as_many_go_as_planned_and_the_graph_equals_the_masked_module(name: str, basis: str) -> None:
    what = subject(basis)
    module, schedule = make(name, what)
    before = outputs(module, X)
    drive(module, schedule, 40)
    schedule.finish()
    kept = schedule.kept()
    assert {each: int((~mask).sum()) for each, mask in kept.items()} == what.targets
    smaller = written(what, module, kept)
    masked = outputs(module, X)
    assert np.abs(masked - before).max() > 0.1
    np.testing.assert_allclose(output(smaller, X), masked, rtol=1e-3, atol=1e-4)
    original = count_macs(ir.from_proto(classifier()))
    assert 0.05 < count_macs(smaller) / original <= (0.4 if basis == "kfe" else 0.6)


@EACH
def test_sums_and_activations_that_are_not_zero_at_zero(name: str) -> None:
    network = kfe.inspect(residual())
    what = channels(network, {"Conv0": 3, "Conv2": 5, "MatMul8": 4})
    module, schedule = make(name, what)
    drive(module, schedule, 30)
    schedule.finish()
    smaller = written(what, module, schedule.kept())
    np.testing.assert_allclose(output(smaller, X), outputs(module, X), rtol=1e-3, atol=1e-4)


@EACH
@BOTH
def test_one_seed_gives_one_result(name: str, basis: str) -> None:
    what = subject(basis)
    runs = []
    for _ in range(2):
        module, schedule = make(name, what)
        drive(module, schedule, 20)
        schedule.finish()
        runs.append((outputs(module, X), schedule.kept()))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    for group, mask in runs[0][1].items():
        np.testing.assert_array_equal(mask, runs[1][1][group])


@EACH
def test_a_state_goes_on_where_it_was(name: str) -> None:
    what = subject("channel")
    module, schedule = make(name, what)
    drive(module, schedule, 30)
    interrupted, first = make(name, what)
    drive(interrupted, first, 30, stop=13)
    resumed, second = make(name, what)
    resumed.load_state_dict(interrupted.state_dict())
    second.load(first.state())
    drive(resumed, second, 30, start=13)
    for ended in (schedule, second):
        ended.finish()
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], tensor)


@EACH
def test_units_that_are_zero_go_first(name: str) -> None:
    model = classifier()
    zeros = [1, 4, 9, 14]
    for constant in model.graph.initializer:
        if constant.name in ("w1", "b1"):
            array = numpy_helper.to_array(constant).copy()
            array[zeros] = 0
            constant.CopyFrom(numpy_helper.from_array(array, constant.name))
    what = replaced(subject("channel", model), conv1=len(zeros))
    module, schedule = make(name, what)
    drive(module, schedule, 20)
    schedule.finish()
    assert sorted(np.flatnonzero(~schedule.kept()["conv1"])) == zeros


@EACH
def test_directions_that_never_vary_go_first(name: str) -> None:
    """Where half of the channels repeat the others, what the layer behind reads has only half of the directions."""
    model = classifier()
    for constant in model.graph.initializer:
        if constant.name in ("w1", "b1"):
            array = numpy_helper.to_array(constant).copy()
            array[8:] = array[:8]
            constant.CopyFrom(numpy_helper.from_array(array, constant.name))
    inside = "conv2/kfe_c_obd_0"
    what = replaced(subject("kfe", model), **{inside: 8})
    (encoder,) = (layer.weight()[0, :, :, 0, 0] for layer in what.network.layers if layer.name == inside)
    repeated = np.abs(encoder[:, :8] + encoder[:, 8:]).max(1) < 1e-3  # orthogonal to all that the layer reads
    assert repeated.sum() == 8
    module, schedule = make(name, what)
    drive(module, schedule, 20)
    schedule.finish()
    np.testing.assert_array_equal(schedule.kept()[inside], ~repeated)


def test_a_group_that_would_be_empty_is_refused() -> None:
    what = replaced(subject("channel"), conv1=16)
    with pytest.raises(KfeError, match="conv1"):
        make("incremental", what)
