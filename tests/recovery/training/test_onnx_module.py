"""The module's interface: names, inputs and outputs."""

from __future__ import annotations

import onnx
import pytest
import torch

import onnx_kfe as kfe
from tests.cases import build_module, load_case
from tests.recovery.training.comparison import assert_close, outputs, step
from tests.tiny import node, run, tiny, weights


def test_names_are_those_of_the_graph():
    case = load_case("attention-13")
    module = kfe.to_torch(case.model)
    assert module.input_names == ["x"]
    assert module.output_names == ["logits"]
    learnt = set(module.initializer_names.values())
    assert learnt == set(module.initializer_names) == set(module.state_dict())
    assert {key for key, _ in build_module("attention").named_parameters()} & learnt
    assert kfe.to_torch(load_case("two_heads-13").model).output_names == ["scores", "boxes"]


AWKWARD = [
    "a",
    "a.b",
    "a_",
    "x.y",
    "x_y",
    "training",
    "class.weight",
    "..",
    "onnx::Conv 1",
    'say "w"',
    "conv",
    "program",
]


def awkward() -> onnx.ModelProto:
    """Weights whose names torch or Python cannot have, or that would fall together, and a node with the name of one."""
    nodes, value = [], "forward"
    for place, name in enumerate(AWKWARD):
        nodes.append(node("MatMul", [value, name], [f"x.{place}"], name=f"node {place}"))
        value = f"x.{place}"
    nodes.append(node("BatchNormalization", [value, "s", "b", "m", "v"], ["y"], name="conv"))
    statistics = {"s": weights(4), "b": weights(4, seed=1), "m": weights(4, seed=2), "v": weights(4, seed=3) ** 2}
    arrays = {name: weights(4, 4, seed=place) / 2 for place, name in enumerate(AWKWARD)}
    return tiny(nodes, {"forward": ["n", 4]}, {"y": ["n", 4]}, arrays | statistics)


def test_awkward_names():
    model, feeds = awkward(), {"forward": weights(3, 4)}
    module = kfe.to_torch(model).eval()
    assert_close(outputs(module, feeds), run(model, feeds))
    assert sorted(module.initializer_names.values()) == sorted([*AWKWARD, "s", "b", "m", "v"])
    same = {key for key, name in module.initializer_names.items() if key == name}
    assert same == {*AWKWARD, "s", "b", "m", "v"} - {"a", "training", "class.weight", "..", 'say "w"', "program"}
    step(module, feeds)
    assert_close(run(kfe.write_back(module, model), feeds), outputs(module, feeds))


def test_inputs_by_position_and_name():
    nodes = [node("MatMul", ["left", "w"], ["h"]), node("Sub", ["h", "right"], ["y"])]
    model = tiny(nodes, {"left": ["n", 3], "right": ["n", 2]}, {"y": ["n", 2]}, {"w": weights(3, 2)})
    module = kfe.to_torch(model)
    left, right = torch.randn(4, 3), torch.randn(4, 2)
    wanted = left @ module.w - right
    torch.testing.assert_close(module(left, right), wanted)
    torch.testing.assert_close(module(left, right=right), wanted)
    torch.testing.assert_close(module(right=right, left=left), wanted)
    for given, named in (((left,), {}), ((left, right), {"right": right}), ((left,), {"wrong": right})):
        with pytest.raises(TypeError, match="the inputs are left, right"):
            module(*given, **named)
