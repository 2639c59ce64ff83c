"""Operators with handlers of the package's own, compared with ONNX Runtime, and those that are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError
from tests.cases import build_module, load_case
from tests.recovery.training.comparison import assert_close, constants, outputs
from tests.tiny import node, run, tiny, weights


def test_dropout_drops_in_training_alone():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Dropout", ["h", "ratio"], ["y", "mask"])]
    arrays = {"w": np.eye(50, dtype=np.float32), "ratio": np.array(0.2, np.float32)}
    module = kfe.to_torch(tiny(nodes, {"x": ["n", 50]}, {"y": ["n", 50]}, arrays))
    x = torch.ones(40, 50)
    dropped = module(x) == 0
    assert 0.1 < float(dropped.float().mean()) < 0.3
    torch.testing.assert_close(module(x).unique(), torch.tensor([0.0, 1.25]))
    torch.testing.assert_close(module.eval()(x), x)


def test_running_statistics_are_those_of_the_torch_network_and_written_back():
    case = load_case("plain-13")
    network, module = build_module("plain").train(), kfe.to_torch(case.model)
    assert module.training
    feeds = case.inputs(6)
    with torch.no_grad():
        for each in (network, module):
            each(torch.from_numpy(feeds["x"]))
    wanted = {key: value for key, value in network.state_dict().items() if "running" in key}
    assert len(wanted) == 6
    written = constants(kfe.write_back(module, case.model))
    for key, statistic in wanted.items():
        torch.testing.assert_close(module.state_dict()[key], statistic)
        np.testing.assert_array_equal(written[key], module.state_dict()[key])
        assert not np.array_equal(written[key], constants(case.model)[key])
    assert not {key for key, _ in module.named_parameters()} & set(wanted)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (node("MadeUp", ["x"], ["y"], "strange", domain="com.example"), r"operator com\.example\.MadeUp .*'strange'"),
        (node("TfIdfVectorizer", ["x"], ["y"], "strange"), "operator TfIdfVectorizer .*'strange'"),
        (node("Pad", ["x", "p"], ["y"], "strange", mode="wrap"), "operator Pad .*'strange'.* wraps"),
        (node("Resize", ["x", "", "s"], ["y"], "strange", antialias=1, mode="linear"), "Resize .*'strange'.*antialias"),
    ],
)
def test_operators_that_cannot_be_converted_are_named(operator, message):
    arrays = {"p": np.array([0, 1, 0, 1]), "s": np.array([1, 2], np.float32)}
    model = tiny(
        [operator], {"x": ["n", 4]}, {"y": ["n", "m"]}, arrays, opset=19, opsets=[helper.make_opsetid("com.example", 1)]
    )
    with pytest.raises(KfeError, match=message):
        kfe.to_torch(model)


CONSTANT = {"p": np.array([0, 1, -1, 2]), "a": np.array([3, 1]), "f": np.array(0.5, np.float32)}
WEIGHT = {"w": weights(4, 2, 3, 3), "b": weights(4)}


@pytest.mark.parametrize(
    ("operator", "arrays", "opset"),
    [
        (node("Pad", ["x", "p", "f", "a"], ["y"]), CONSTANT, 19),
        (node("Pad", ["x", "p", "", "a"], ["y"], mode="reflect"), CONSTANT | {"p": np.array([1, 0, 2, 0])}, 19),
        (node("Pad", ["x", "p"], ["y"], mode="edge"), {"p": np.array([0, 0, 1, 2, 0, 0, 0, 3])}, 13),
        (node("Pad", ["x"], ["y"], pads=[0, 1, 0, 0, 0, 0, 2, 0], value=0.5), {}, 9),
        (node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[0, 0, 1, 1], group=2), WEIGHT, 13),
        (
            node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 3], pads=[2, 1, 0, 3], output_padding=[1, 0]),
            WEIGHT,
            13,
        ),
        (node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], auto_pad="SAME_UPPER"), WEIGHT, 13),
        (node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], dilations=[2, 1], output_shape=[11, 10]), WEIGHT, 9),
        (node("ConvTranspose", ["x", "w"], ["y"], strides=[3, 2], output_shape=[16, 13]), WEIGHT, 13),
        (node("Clip", ["x"], ["y"]), {}, 13),
        (node("Clip", ["x", "", "f"], ["y"]), CONSTANT, 13),
        (node("Clip", ["x"], ["y"], min=-0.5, max=0.25), {}, 9),
        (node("Resize", ["x", "s"], ["y"], mode="linear"), {"s": np.array([1, 1, 2, 1.5], np.float32)}, 10),
        (node("Resize", ["x", "", "s"], ["y"]), {"s": np.array([1, 1, 0.6, 3], np.float32)}, 13),
        (node("Resize", ["x", "", "s"], ["y"], mode="cubic"), {"s": np.array([1, 1, 2, 2], np.float32)}, 13),
        (
            node("Resize", ["x", "", "", "n"], ["y"], mode="linear", coordinate_transformation_mode="align_corners"),
            {"n": np.array([2, 4, 9, 3])},
            13,
        ),
        (
            node("Resize", ["x", "", "", "n"], ["y"], axes=[3], coordinate_transformation_mode="asymmetric"),
            {"n": np.array([15])},
            18,
        ),
        (node("Upsample", ["x", "s"], ["y"], mode="linear"), {"s": np.array([1, 1, 2, 3], np.float32)}, 9),
    ],
)
def test_what_onnx2fx_gets_wrong(operator, arrays, opset):
    model = tiny([operator], {"x": [2, 4, 5, 6]}, {"y": ["a", "b", "c", "d"]}, arrays, opset=opset)
    feeds = {"x": weights(2, 4, 5, 6)}
    assert_close(outputs(kfe.to_torch(model), feeds), run(model, feeds))


def test_sizes_are_computed():
    """From the sizes of an input, by the way of every operator that makes tensors of them."""
    nodes = [
        node("Shape", ["x"], ["tail"], start=1, end=2),
        node("Size", ["x"], ["size"]),
        node("Div", ["size", "twelve"], ["batch"]),
        node("Unsqueeze", ["batch", "zero"], ["first"]),
        node("Concat", ["first", "tail"], ["shape"], axis=0),
        node("ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [2.0])),
        node("Gather", ["tail", "index"], ["count"]),
        node("Range", ["index", "count", "step"], ["steps"]),
        node("Cast", ["steps"], ["ramp"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["ones", "ramp"], ["rows"]),
        node("Flatten", ["x"], ["flat"]),
        node("MatMul", ["flat", "w"], ["h"]),
        node("Add", ["h", "rows"], ["y"]),
    ]
    arrays = {"twelve": np.array(12), "zero": np.array([0]), "index": np.array(0), "step": np.array(1)}
    model = tiny(nodes, {"x": ["n", 3, 4]}, {"y": ["n", 3]}, arrays | {"w": weights(12, 3)})
    module = kfe.to_torch(model)
    for batch in (1, 5):
        feeds = {"x": weights(batch, 3, 4)}
        assert_close(outputs(module, feeds), run(model, feeds))
