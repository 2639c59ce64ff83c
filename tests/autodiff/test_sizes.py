import numpy as np
import pytest

from onnx_kfe.autodiff._sizes import unify_sizes
from tests.autodiff.graphs import build, differentiate, normal, operators, run, values

IMAGE = {"x": ["N", 4, "H", "W"]}


def named(nodes, inputs, shapes, constants=None):
    """The shapes of all values, by name, after unification; and those that a run with other sizes gives."""
    model = build(nodes, inputs, constants=constants, shapes=shapes)
    unify_sizes(model.graph)
    return {name: value.shape for name, value in values(model).items() if value.shape is not None}


def test_same_convolution_keeps_its_sizes():
    nodes = [("Conv", "x w", "y", {"pads": [1] * 4})]
    shapes = named(nodes, {"x": normal(2, 4, 6, 7)}, IMAGE, {"w": normal(4, 4, 3, 3)})
    assert shapes["y"] == ["N", 4, "H", "W"]


@pytest.mark.parametrize("attributes", [{"strides": [2, 2]}, {"pads": [2] * 4}, {"dilations": [2, 2]}])
def test_equal_convolutions_give_equal_sizes(attributes):
    nodes = [
        ("Conv", "x w", "a", attributes),
        ("Conv", "x w", "b", attributes),
        ("Conv", "x w", "c", {**attributes, "strides": [3, 3]}),
        ("Add", "a b", "y", {}),
    ]
    shapes = named(nodes, {"x": normal(2, 4, 12, 13)}, IMAGE, {"w": normal(4, 4, 3, 3)})
    assert shapes["a"] == shapes["b"] == shapes["y"]
    assert shapes["a"] not in (shapes["c"], shapes["x"])
    assert shapes["a"][2] != shapes["a"][3]


def test_reshapes_there_and_back():
    nodes = [
        ("Reshape", "x rows", "r", {}),
        ("MatMul", "r w", "m", {}),
        ("Reshape", "m apart", "p", {}),
        ("Add", "p x", "y", {}),
    ]
    constants = {"rows": np.array([-1, 8]), "apart": np.array([-1, 5, 8]), "w": normal(8, 8)}
    shapes = named(nodes, {"x": normal(2, 5, 8)}, {"x": ["N", 5, 8]}, constants)
    assert shapes["r"] == ["5*N", 8]
    assert shapes["p"] == shapes["y"] == ["N", 5, 8]


def test_a_known_size_becomes_a_number():
    nodes = [("Reshape", "x t", "y", {})]
    shapes = named(nodes, {"x": normal(2, 6)}, {"x": ["N", 6]}, {"t": np.array([0, 2, -1])})
    assert shapes["y"] == ["N", 2, 3]


def test_sizes_that_may_differ_keep_their_names_apart():
    nodes = [("Add", "a b", "y", {})]
    shapes = named(nodes, {"a": normal(1, 3), "b": normal(4, 3)}, {"a": ["A", 3], "b": ["B", 3]})
    assert len({str(shapes[name][0]) for name in "aby"}) == 3


def test_slices_resizes_and_concatenations():
    nodes = [
        ("Slice", "x one two axis", "s", {}),
        ("Resize", "s _ scales", "r", {}),
        ("Concat", "x x", "y", {"axis": 1}),
    ]
    constants = {"one": np.array([1]), "two": np.array([2]), "axis": np.array([1])}
    constants["scales"] = np.array([1, 1, 2, 3], np.float32)
    shapes = named(nodes, {"x": normal(2, 4, 6, 7)}, IMAGE, constants)
    assert shapes["s"] == ["N", 1, "H", "W"]
    assert shapes["r"] == ["N", 1, "2*H", "3*W"]
    assert shapes["y"] == ["N", 8, "H", "W"]


def test_a_residual_network_of_unknown_size_needs_no_arithmetic_on_shapes():
    nodes = [
        ("Conv", "x w", "a", {"pads": [1] * 4, "strides": [2, 2]}),
        ("Relu", "a", "b", {}),
        ("Conv", "b w", "c", {"pads": [1] * 4}),
        ("Conv", "x v", "d", {"strides": [2, 2]}),
        ("Add", "c d", "e", {}),
        ("Conv", "e w", "f", {"pads": [1] * 4}),
        ("Add", "e f", "y", {}),
    ]
    x = {"x": normal(2, 4, 9, 8)}
    model = build(nodes, x, constants={"w": normal(4, 4, 3, 3), "v": normal(4, 4, 1, 1)}, shapes=IMAGE)
    differentiate(model, ["a", "c"])
    assert "NonZero" not in operators(model)
    got = run(model, {**x, "dy": normal(2, 4, 5, 4)})
    assert got["d(a)"].shape == (2, 4, 5, 4)
