import itertools

import numpy as np
import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators

FUNCTIONS = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": lambda *t: sum(t),
    "Mean": lambda *t: sum(t) / len(t),
    "Pow": torch.pow,
}
SHAPES = [
    ((2, 3, 4), (2, 3, 4)),
    ((2, 3, 4), (4,)),
    ((2, 3, 4), (3, 1)),
    ((2, 3, 4), ()),
    ((2, 1, 4), (3, 1)),
    ((1,), (2, 3, 1)),
    ((1, 1, 1), (1, 1)),
    ((), ()),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("left", "right"), SHAPES)
@pytest.mark.parametrize("operator", FUNCTIONS)
def test_broadcasting(operator, left, right, dynamic):
    a, b = np.asarray(normal(*left)), np.asarray(normal(*right, seed=1))
    if operator in ("Div", "Pow"):
        a, b = np.asarray(np.abs(a) + 0.3), np.asarray(np.abs(b) + 0.3)
    shapes = {"a": [f"a{i}" for i in range(len(left))], "b": [f"b{i}" for i in range(len(right))]}
    assert_gradients(
        [(operator, "a b", "y", {})], {"a": a, "b": b}, FUNCTIONS[operator], shapes=shapes if dynamic else None
    )


@pytest.mark.parametrize("shape", list(itertools.product((1, 3), repeat=2)))
def test_sizes_that_turn_out_equal_or_one(shape):
    """One graph, of unknown sizes, whatever they turn out to be."""
    assert_gradients(
        [("Mul", "a b", "y", {})],
        {"a": normal(*shape), "b": normal(3, 3, seed=1)},
        torch.mul,
        shapes={"a": ["A", "B"], "b": ["C", "D"]},
    )


def test_three_operands():
    inputs = {"a": normal(2, 3), "b": normal(3, seed=1), "c": normal(2, 1, seed=2)}
    assert_gradients([("Sum", "a b c", "y", {})], inputs, lambda a, b, c: a + b + c)
    assert_gradients([("Mean", "a b c", "y", {})], inputs, lambda a, b, c: (a + b + c) / 3)
    assert_gradients([("Max", "a b c", "y", {})], inputs, lambda a, b, c: torch.maximum(torch.maximum(a, b), c))


def test_one_operand_twice():
    x = {"x": normal(2, 3)}
    assert_gradients([("Mul", "x x", "y", {})], x, lambda x: x * x)
    assert_gradients([("Sub", "x x", "y", {})], x, lambda x: x - x)
    assert_gradients([("Max", "x x", "y", {})], x, lambda x: x * 1.0)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0, 0.0, 1.0])
def test_constant_powers(exponent):
    assert_gradients(
        [("Pow", "x p", "y", {})],
        {"x": np.abs(normal(4, 5)) + 0.2},
        lambda x: x**exponent,
        constants={"p": np.float32(exponent)},
    )


def test_square_of_negative_numbers_and_zero():
    x = np.array([-2.0, 0.0, 3.0], np.float32)
    assert_gradients([("Pow", "x p", "y", {})], {"x": x}, lambda x: x**2, constants={"p": np.int64(2)})


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 1)), ((), (2, 3))])
def test_where(shapes):
    condition = np.array([[True, False, True], [False, False, True]])
    a, b = np.asarray(normal(*shapes[0])), np.asarray(normal(*shapes[1], seed=1))
    assert_gradients(
        [("Where", "c a b", "y", {})],
        {"a": a, "b": b, "c": condition},
        lambda a, b, c: torch.where(c, a, b),
    )


@pytest.mark.parametrize("slope", [(3, 1, 1), (1,), (3, 4, 4)])
def test_prelu(slope):
    assert_gradients(
        [("PRelu", "x s", "y", {})],
        {"x": normal(2, 3, 4, 4), "s": normal(*slope, seed=1)},
        lambda x, s: torch.where(x < 0, x * s, x),
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["N", 3, "H", "W"], ["N", 3, "H", "W"]),
        (["N", 3, "H", "W"], [3, 1, 1]),
        (["N", 3, "H", "W"], ["N", 3, 1, 1]),
    ],
)
def test_named_sizes_need_no_arithmetic_on_shapes(left, right):
    sizes = {"N": 2, "H": 4, "W": 5}
    inputs = {name: normal(*[sizes.get(size, size) for size in shape]) for name, shape in (("a", left), ("b", right))}
    model = assert_gradients([("Add", "a b", "y", {})], inputs, torch.add, shapes={"a": left, "b": right})
    assert not {"NonZero", "Equal"} & set(operators(model))


def test_question_marks_are_not_a_name():
    model = build(
        [("Add", "a b", "y", {})], {"a": normal(1, 3), "b": normal(4, 3)}, shapes={"a": ["?", 3], "b": ["?", 3]}
    )
    differentiate(model, ["a"])
    assert "NonZero" in operators(model)


def test_mod():
    b = 1.5 + np.abs(normal(5, seed=1))
    a = 9 * normal(4, 5)
    assert_gradients([("Mod", "a b", "y", {"fmod": 1})], {"a": a, "b": b}, torch.fmod)
