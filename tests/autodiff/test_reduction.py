import numpy as np
import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, run

REDUCTIONS = {
    "ReduceSum": lambda x, a, k: x.sum(a, k),
    "ReduceMean": lambda x, a, k: x.mean(a, k),
    "ReduceMax": lambda x, a, k: x.amax(a, k),
    "ReduceMin": lambda x, a, k: x.amin(a, k),
    "ReduceSumSquare": lambda x, a, k: (x * x).sum(a, k),
    "ReduceL1": lambda x, a, k: x.abs().sum(a, k),
    "ReduceL2": lambda x, a, k: (x * x).sum(a, k).sqrt(),
    "ReduceLogSum": lambda x, a, k: x.sum(a, k).log(),
    "ReduceLogSumExp": lambda x, a, k: x.logsumexp(a, k),
}


@pytest.mark.parametrize("mode", ["static", "dynamic", "computed axes"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [(1,), (-1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("operator", REDUCTIONS)
def test_over_axes(operator, axes, keepdims, mode):
    x = normal(2, 3, 4)
    inputs = {"x": np.abs(x) + 0.1 if operator == "ReduceLogSum" else x}
    array = {"axes": np.array(axes)}
    computed = mode == "computed axes"
    assert_gradients(
        [(operator, "x axes", "y", {"keepdims": int(keepdims)})],
        {**inputs, **array} if computed else inputs,
        lambda x, *_: REDUCTIONS[operator](x, axes, keepdims),
        constants={} if computed else array,
        shapes=None if mode == "static" else {"x": ["N", 3, "T"]},
    )


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_product_of_zeros(zeros, keepdims):
    x = normal(3, 5)
    x[1, :zeros] = 0
    assert_gradients(
        [("ReduceProd", "x axes", "y", {"keepdims": int(keepdims)})],
        {"x": x},
        lambda x: x.prod(1, keepdims),
        constants={"axes": np.array([1])},
        shapes={"x": ["N", "T"]},
    )


def test_softmax_of_rows_that_are_masked_as_a_whole():
    """As exporters write attention: what the mask leaves nothing of is replaced."""
    mask = np.zeros((3, 4), np.float32)
    mask[1] = -np.inf
    mask[2, 1:] = -np.inf
    nodes = [
        ("Add", "x m", "s", {}),
        ("Softmax", "s", "p", {}),
        ("IsNaN", "p", "n", {}),
        ("Where", "n zero p", "y", {}),
    ]
    model = build(nodes, {"x": normal(3, 4)}, constants={"m": mask, "zero": np.float32(0)})
    differentiate(model, ["x"])
    seed = normal(3, 4, seed=1)
    got = run(model, {"x": normal(3, 4), "dy": seed})["d(x)"]
    first = torch.tensor(normal(3, 4)[0], requires_grad=True)
    (expected,) = torch.autograd.grad(first.softmax(0), first, torch.tensor(seed[0]))
    np.testing.assert_allclose(got, [expected.numpy(), np.zeros(4), np.zeros(4)], atol=1e-6)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_over_everything(keepdims, dynamic):
    shapes = {"x": ["N", 3, "T"]} if dynamic else None
    for axes in ("", " axes"):
        assert_gradients(
            [("ReduceMean", f"x{axes}", "y", {"keepdims": int(keepdims)})],
            {"x": normal(2, 3, 4)},
            lambda x: x.mean((0, 1, 2), keepdims),
            constants={"axes": np.array([], np.int64)} if axes else None,
            shapes=shapes,
        )


def test_over_nothing():
    assert_gradients(
        [("ReduceSum", "x axes", "y", {"noop_with_empty_axes": 1})],
        {"x": normal(2, 3)},
        lambda x: x * 1.0,
        constants={"axes": np.array([], np.int64)},
    )


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(("operator", "function"), [("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax)])
def test_softmax(operator, function, axis):
    assert_gradients(
        [(operator, "x", "y", {"axis": axis})],
        {"x": 3 * normal(2, 5, 4)},
        lambda x: function(x, axis),
        shapes={"x": ["N", 5, "T"]},
    )


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_cumulative_sum(reverse, exclusive):
    def function(x):
        x = x.flip(1) if reverse else x
        total = x.cumsum(1) - (x if exclusive else 0)
        return total.flip(1) if reverse else total

    attributes = {"reverse": reverse, "exclusive": exclusive}
    assert_gradients(
        [("CumSum", "x axis", "y", attributes)], {"x": normal(2, 5)}, function, constants={"axis": np.int64(1)}
    )
