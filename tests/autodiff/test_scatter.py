import numpy as np
import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal

INDICES = np.array([[0, 2], [3, 1], [1, 0]])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_elements(axis, dynamic):
    assert_gradients(
        [("ScatterElements", "x i u", "y", {"axis": axis})],
        {"x": normal(4, 5), "u": normal(3, 2, seed=1)},
        lambda x, u: x.scatter(axis, torch.tensor(INDICES), u),
        constants={"i": INDICES},
        shapes={"x": ["N", "T"]} if dynamic else None,
    )


@pytest.mark.parametrize(("reduction", "name"), [("add", "sum"), ("max", "amax"), ("min", "amin")])
def test_elements_reduced(reduction, name):
    """Position 1 is written twice."""
    indices = np.array([[0, 2], [1, 1], [1, 0]])
    assert_gradients(
        [("ScatterElements", "x i u", "y", {"axis": 0, "reduction": reduction})],
        {"x": normal(4, 5), "u": normal(3, 2, seed=1)},
        lambda x, u: x.scatter_reduce(0, torch.tensor(indices), u, name),
        constants={"i": indices},
    )


@pytest.mark.parametrize("reduction", ["none", "add"])
@pytest.mark.parametrize("width", [1, 2])
def test_nd(width, reduction):
    """Whole slices, or their rows."""
    indices = INDICES[:, :width]
    places = tuple(torch.tensor(column) for column in indices.T)
    assert_gradients(
        [("ScatterND", "x i u", "y", {"reduction": reduction})],
        {"x": normal(4, 3, 2), "u": normal(3, *[3, 2][width - 1 :], seed=1)},
        lambda x, u: x.index_put(places, u, accumulate=reduction == "add"),
        constants={"i": indices},
        shapes={"x": ["N", 3, 2]},
    )


@pytest.mark.parametrize(("reduction", "function"), [("max", torch.maximum), ("min", torch.minimum)])
def test_nd_reduced(reduction, function):
    rows = [0, 3, 1]
    assert_gradients(
        [("ScatterND", "x i u", "y", {"reduction": reduction})],
        {"x": normal(4, 5), "u": normal(3, 5, seed=1)},
        lambda x, u: x.index_put((torch.tensor(rows),), function(x[rows], u)),
        constants={"i": np.array(rows)[:, None]},
    )


def test_products_are_blocked():
    inputs = {"x": normal(4, 5), "u": normal(3, 2)}
    model = build([("ScatterElements", "x i u", "y", {"reduction": "mul"})], inputs, constants={"i": INDICES})
    assert "with products" in differentiate(model, ["x"]).blocked.popitem()[1]
