"""Which constants are trained."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

import onnx_kfe as kfe
from onnx_kfe.graph import count_parameters, open_network
from onnx_kfe.rewrite import apply_plan
from tests.cases import load_case
from tests.planning.problems import statistics_of
from tests.recovery.training.comparison import assert_close, outputs, step
from tests.tied import pyramid, samples, stacked
from tests.tiny import node, run, tiny, weights


def test_only_what_was_learnt_is_trained():
    nodes = [
        node("Sub", ["x", "mean"], ["centred"]),
        node("Add", ["centred", "positions"], ["placed"]),
        node("Reshape", ["flat w", "w shape"], ["w"]),
        node("MatMul", ["placed", "w"], ["h"]),
        node("Add", ["h", "b"], ["hb"]),
        node("Div", ["hb", "sqrt"], ["scaled"]),
        node("Add", ["scaled", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["s"]),
        node("MatMul", ["s", "v"], ["boxes"]),
        node("Clip", ["boxes", "low"], ["clipped"]),
        node("Mul", ["clipped", "gain"], ["gained"]),
        node("Add", ["gained", "anchors"], ["y"]),
    ]
    arrays = {
        "mean": weights(4),
        "positions": weights(1, 5, 4),
        "flat w": weights(24),
        "w shape": np.array([4, 6]),
        "b": weights(6),
        "sqrt": np.array(2.0, np.float32),
        "mask": np.where(np.arange(6) > 4, np.float32(-1e9), np.float32(0)),
        "v": weights(6, 3),
        "low": np.array(-1, np.float32),
        "gain": np.array([2.0], np.float32),
        "anchors": weights(1, 5, 3),
        "unread": weights(3),
    }
    model = tiny(nodes, {"x": ["n", 5, 4]}, {"y": ["n", 5, 3]}, arrays)
    module = kfe.to_torch(model)
    assert {key for key, _ in module.named_parameters()} == {"positions", "flat w", "b", "v"}
    assert set(module.state_dict()) == {"positions", "flat w", "b", "v"}
    feeds = {"x": weights(2, 5, 4)}
    assert_close(outputs(module, feeds), run(model, feeds))


def test_tables_are_trained_and_shared_weights_stay_shared():
    """An embedding whose table is the weight of the last layer, too."""
    nodes = [
        node("Gather", ["table", "x"], ["tokens"]),
        node("Relu", ["tokens"], ["h"]),
        node("Transpose", ["table"], ["w"], perm=[1, 0]),
        node("MatMul", ["h", "w"], ["y"]),
    ]
    model = tiny(nodes, {}, {"y": ["n", 7]}, {"table": weights(7, 4)})
    model.graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n"]))
    module, feeds = kfe.to_torch(model), {"x": np.array([1, 3, 6])}
    (table,) = module.parameters()
    reference = table.detach().clone().requires_grad_()
    (reference[feeds["x"]].relu() @ reference.T).square().mean().backward()
    step(module, feeds)
    torch.testing.assert_close(table.grad, reference.grad)
    assert_close(run(kfe.write_back(module, model), feeds), outputs(module, feeds))


def test_a_convolution_that_is_used_twice_is_one_parameter():
    case = load_case("shared-11")
    module = kfe.to_torch(case.model)
    weights_of = [each.input[1] for each in case.model.graph.node if each.op_type == "Conv"]
    assert len(weights_of) == len(set(weights_of)) + 1
    assert len(list(module.parameters())) == len(set(weights_of)) * 2 + 2
    step(module, case.inputs(4))
    assert_close(run(kfe.write_back(module, case.model), case.inputs(2)), outputs(module, case.inputs(2)))


@pytest.mark.parametrize("make", [pyramid, stacked])
def test_factors_of_a_shared_weight_are_one_parameter_each(make):
    """Gradients of all nodes add up, as those of torch do, and the trained factors go back to all of them."""
    network = open_network(make())
    statistics = statistics_of(network)
    smaller = ir.to_proto(apply_plan(network, kfe.plan(network, statistics, kfe.Macs(0.6), round_to=1), statistics)[0])
    feeds = samples(make(), 4)
    module = kfe.to_torch(smaller)
    parameters = dict(module.named_parameters())
    counts = Counter(name for each in smaller.graph.node for name in each.input)
    shared = [key for key in parameters if counts[module.initializer_names[key]] > 1]
    assert sum(parameter.numel() for parameter in parameters.values()) == count_parameters(ir.from_proto(smaller))
    assert shared
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    step(module, feeds, rate=0.0)
    key = max(shared, key=lambda each: float(parameters[each].grad.abs().max()))
    gradient = parameters[key].grad
    place = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    losses = []
    for shift in (-1e-2, 1e-2):
        with torch.no_grad():
            parameters[key][place] = before[key][place] + shift
        losses.append(np.square(outputs(module, feeds)[module.output_names[0]].astype(np.float64)).mean())
    np.testing.assert_allclose((losses[1] - losses[0]) / 2e-2, float(gradient[place]), rtol=2e-2)
    assert_close(run(kfe.write_back(module, smaller), feeds), outputs(module, feeds))
