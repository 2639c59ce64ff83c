import itertools

import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators, run


@pytest.mark.parametrize(("flip_a", "flip_b"), itertools.product((0, 1), repeat=2))
@pytest.mark.parametrize("bias", [(), (1,), (4,), (1, 4), (3, 1), (3, 4)])
def test_gemm(flip_a, flip_b, bias):
    a, b = normal(*((5, 3) if flip_a else (3, 5))), normal(*((4, 5) if flip_b else (5, 4)), seed=1)

    def function(a, b, c):
        return 1.5 * (a.T if flip_a else a) @ (b.T if flip_b else b) + 0.5 * c

    attributes = {"alpha": 1.5, "beta": 0.5, "transA": flip_a, "transB": flip_b}
    assert_gradients([("Gemm", "a b c", "y", attributes)], {"a": a, "b": b, "c": normal(*bias, seed=2)}, function)


SHAPES = [
    ((3, 5), (5, 4)),
    ((2, 3, 5), (5, 4)),
    ((2, 6, 3, 5), (5, 4)),
    ((3, 5), (2, 5, 4)),
    ((2, 6, 3, 5), (2, 6, 5, 4)),
    ((2, 1, 3, 5), (6, 5, 4)),
    ((2, 6, 3, 5), (1, 5, 4)),
    ((5,), (5,)),
    ((5,), (5, 4)),
    ((3, 5), (5,)),
    ((5,), (2, 5, 4)),
    ((2, 3, 5), (5,)),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_matmul(left, right, dynamic):
    shapes = {"a": [f"a{i}" for i in range(len(left))], "b": [f"b{i}" for i in range(len(right))]}
    assert_gradients(
        [("MatMul", "a b", "y", {})],
        {"a": normal(*left), "b": normal(*right, seed=1)},
        torch.matmul,
        shapes=shapes if dynamic else None,
    )


def test_matmul_by_a_constant_transposes_it_beforehand():
    model = build([("MatMul", "a w", "y", {})], {"a": normal(2, 3, 5)}, constants={"w": normal(5, 4)})
    differentiate(model, ["a"])
    assert operators(model) == ["MatMul"]


def test_constant_behind_identity():
    nodes = [("Identity", "w", "v", {}), ("MatMul", "a v", "y", {})]
    model = build(nodes, {"a": normal(3, 5)}, constants={"w": normal(5, 4)})
    differentiate(model, ["a"])
    assert operators(model) == ["MatMul"]
    seed = normal(3, 4, seed=5)
    got = run(model, {"a": normal(3, 5), "dy": seed})
    assert got["d(a)"] == pytest.approx(seed @ normal(5, 4).T, abs=1e-5)
