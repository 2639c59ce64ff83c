import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from onnx_kfe.autodiff import append_gradients
from onnx_kfe.autodiff._registry import RULES, ZERO_GRADIENT
from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators, run, values

X = {"x": normal(2, 3)}
W = {"w": normal(3, 3, seed=1)}


def test_several_consumers_are_added():
    nodes = [("MatMul", "x w", "h", {}), ("Tanh", "h", "a", {}), ("Sigmoid", "h", "b", {}), ("Add", "a b", "y", {})]
    w = torch.tensor(W["w"])
    model = assert_gradients(nodes, X, lambda x: (x @ w).tanh() + (x @ w).sigmoid(), constants=W)
    assert operators(model).count("Add") == 1


def test_three_consumers_are_summed_at_once():
    nodes = [("Tanh", "x", "a", {}), ("Sigmoid", "x", "b", {}), ("Exp", "x", "c", {}), ("Sum", "a b c", "y", {})]
    model = assert_gradients(nodes, X, lambda x: x.tanh() + x.sigmoid() + x.exp())
    assert operators(model).count("Sum") == 1


def test_several_heads_one_of_which_is_used_further():
    nodes = [("Tanh", "x", "a", {}), ("Exp", "a", "b", {}), ("Sin", "x", "c", {})]
    assert_gradients(nodes, X, lambda x: (x.tanh(), x.tanh().exp(), x.sin()), outputs=("a", "b", "c"))


def test_a_wanted_head():
    model = build([("Tanh", "x", "a", {}), ("Exp", "a", "y", {})], X, outputs=("a", "y"))
    gradients = differentiate(model, ["y", "a"], ["a", "y"])
    assert not gradients.blocked
    feeds = {**X, "da": normal(2, 3, seed=2), "dy": normal(2, 3, seed=3)}
    got = run(model, feeds)
    np.testing.assert_array_equal(got["d(y)"], feeds["dy"])
    np.testing.assert_allclose(got["d(a)"], feeds["da"] + feeds["dy"] * np.exp(np.tanh(X["x"])), rtol=1e-5)


def test_only_nodes_between_the_wanted_values_and_the_heads():
    nodes = [("Exp", "x", "a", {}), ("Tanh", "a", "b", {}), ("Sin", "b", "y", {}), ("Cos", "b", "side", {})]
    model = build(nodes, X)
    differentiate(model, ["b"])
    assert operators(model) == ["Cos", "Mul"]


def test_constants_get_no_gradient():
    model = build([("MatMul", "x w", "h", {}), ("Add", "h b", "y", {})], X, constants={**W, "b": normal(3)})
    differentiate(model, ["x"])
    assert operators(model) == ["MatMul"]


def test_constants_are_stored_once():
    model = build([("MatMul", "x w", "h", {}), ("MatMul", "h w", "y", {})], X, constants=W)
    differentiate(model, ["x"])
    assert len(model.graph.initializers) == 2


def test_no_path():
    model = build([("Tanh", "x", "a", {}), ("Exp", "x", "y", {})], X)
    gradients = differentiate(model, ["a", "x"])
    assert {value.name: reason for value, reason in gradients.blocked.items()} == {"a": "no path to a head"}
    assert [value.name for value in gradients.cotangents] == ["x"]


def test_steps_give_zero_and_do_not_block():
    nodes = [("Floor", "x", "f", {}), ("Mul", "f x", "y", {})]
    assert_gradients(nodes, X, lambda x: x.floor() * x)
    nodes = [
        ("Shape", "x", "s", {}),
        ("Cast", "s", "c", {"to": 1}),
        ("ReduceProd", "c", "p", {}),
        ("Mul", "p x", "y", {}),
    ]
    assert_gradients(nodes, X, lambda x: x * x.numel() if x.shape else x)


def test_only_through_steps_is_no_path():
    model = build([("Sign", "x", "y", {})], X)
    assert list(differentiate(model, ["x"]).blocked.values()) == ["no path to a head"]


def test_an_operator_without_rule_blocks_what_is_above_it():
    nodes = [
        ("Tanh", "x", "a", {}),
        ("Exp", "a", "b", {}),
        ("Slice", "b z k", "square", {}),
        ("Det", "square", "d", {}),
        ("Mul", "b d", "c", {}),
        ("Sin", "c", "y", {}),
    ]
    constants = {"z": np.array([0, 0]), "k": np.array([2, 2])}
    model = build(nodes, X, constants=constants)
    before = len(operators(model))
    gradients = differentiate(model, ["x", "a", "b", "c"])
    assert [value.name for value in gradients.cotangents] == ["c"]
    # Through Mul alone b would have a gradient, but only part of it.
    assert set(gradients.blocked.values()) == {"no gradient rule for Det (node 'Det3')"}
    assert {value.name for value in gradients.blocked} == {"x", "a", "b"}
    # Nothing is left of the attempt.
    assert operators(model)[before:] == ["Cos", "Mul"]


def test_operators_of_other_domains_block():
    model = build([("Tanh", "x", "y", {})], X)
    next(iter(model.graph)).domain = "com.example"
    assert list(differentiate(model, ["x"]).blocked.values()) == [
        "no gradient rule for com.example.Tanh (node 'Tanh0')"
    ]


def test_bodies_block():
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    graph (float[3] x, bool c) => (float[3] y) {
        a = Tanh(x)
        b = Exp(a)
        [branch] h = If (c) <
            then_branch = g () => (float[3] t) { t = Sin(b) },
            else_branch = g () => (float[3] e) { e = Identity(b) }
        >
        y = Cos(h)
    }
    """
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    found = values(model)
    seed = ir.Value(name="dy", type=found["y"].type, shape=found["y"].shape)
    model.graph.inputs.append(seed)
    inside = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    wanted = [found["a"], found["h"], next(iter(inside)).outputs[0]]
    gradients = append_gradients(model.graph, {found["y"]: seed}, wanted)
    assert list(gradients.cotangents) == [found["h"]]
    assert list(gradients.blocked.values()) == [
        "no gradient rule for If (node 'branch')",
        "inside the body of a Loop, If or Scan",
    ]


def test_twice_on_one_graph():
    model = build([("Tanh", "x", "a", {}), ("Exp", "a", "y", {})], X)
    found = values(model)
    seeds = {}
    for index in range(2):
        seed = ir.Value(name=f"dy{index}", type=found["y"].type, shape=found["y"].shape)
        model.graph.inputs.append(seed)
        gradients = append_gradients(model.graph, {found["y"]: seed}, [found["x"]])
        (cotangent,) = gradients.cotangents.values()
        cotangent.shape = found["x"].shape
        model.graph.outputs.append(cotangent)
        seeds[f"dy{index}"] = normal(2, 3, seed=index)
    got = list(run(model, {**X, **seeds}).values())
    for index in range(2):
        slope = np.exp(np.tanh(X["x"])) * (1 - np.tanh(X["x"]) ** 2)
        np.testing.assert_allclose(got[1 + index], seeds[f"dy{index}"] * slope, rtol=1e-4)


def test_cotangents_have_the_type_and_shape_of_their_values():
    nodes = [("Conv", "x w", "h", {}), ("Relu", "h", "r", {}), ("GlobalAveragePool", "r", "y", {})]
    model = build(
        nodes, {"x": normal(1, 3, 5, 5)}, constants={"w": normal(4, 3, 3, 3)}, shapes={"x": ["N", 3, "H", "W"]}
    )
    gradients = differentiate(model, ["h", "r"])
    for value, cotangent in gradients.cotangents.items():
        assert cotangent.dtype == value.dtype
        assert cotangent.shape == value.shape


def test_no_operator_is_both_differentiable_and_not():
    assert not [name for name in RULES if name in ZERO_GRADIENT and ZERO_GRADIENT[name] is None]


@pytest.mark.parametrize("operator", sorted(RULES))
def test_rules_are_for_operators_that_exist(operator):
    assert onnx.defs.has(operator)
