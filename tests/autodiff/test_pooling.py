import numpy as np
import pytest
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators, run

WINDOWS = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [1, 2]},
    {"kernel_shape": [2, 2], "strides": [3, 3]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [4, 4], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
]


def arguments(window):
    return {
        "kernel_size": window["kernel_shape"],
        "stride": window.get("strides", [1, 1]),
        "padding": window.get("pads", [0, 0])[:2],
        "ceil_mode": bool(window.get("ceil_mode", 0)),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", [(8, 9), (11, 7)])
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool(window, sizes, dynamic):
    assert_gradients(
        [("MaxPool", "x", "y", window)],
        {"x": normal(2, 3, *sizes)},
        lambda x: F.max_pool2d(x, **arguments(window)),
        shapes={"x": ["N", 3, "H", "W"]} if dynamic else None,
    )


@pytest.mark.parametrize("window", WINDOWS[:3])
def test_max_pool_after_relu_agrees_on_ties(window):
    """Among the zeros the first position gets the cotangent, as in torch, and no other does."""
    assert_gradients(
        [("MaxPool", "x", "y", window)],
        {"x": np.maximum(normal(2, 3, 8, 8) - 1, 0)},
        lambda x: F.max_pool2d(x, **arguments(window)),
    )


def test_max_pool_dilated_and_in_one_and_three_dimensions():
    assert_gradients(
        [("MaxPool", "x", "y", {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 2]})],
        {"x": normal(1, 2, 8, 8)},
        lambda x: F.max_pool2d(x, 2, 2, dilation=2),
    )
    for rank, function in ((1, F.max_pool1d), (3, F.max_pool3d)):
        for stride in (1, 2):
            assert_gradients(
                [("MaxPool", "x", "y", {"kernel_shape": [2] * rank, "strides": [stride] * rank})],
                {"x": normal(1, 2, *[6, 5, 4][:rank])},
                lambda x, f=function, s=stride: f(x, 2, s),
            )


def test_max_pool_in_double():
    assert_gradients(
        [("MaxPool", "x", "y", WINDOWS[0])],
        {"x": normal(1, 2, 6, 6, dtype=np.float64)},
        lambda x: F.max_pool2d(x, 2),
    )


def test_max_pool_uses_the_indices_it_already_gives():
    model = build([("MaxPool", "x", "y i", WINDOWS[0])], {"x": normal(1, 2, 6, 6)})
    names = [output.name for output in next(iter(model.graph)).outputs]
    differentiate(model, ["x"])
    assert [output.name for output in next(iter(model.graph)).outputs] == names


@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize("sizes", [(8, 9), (11, 7)])
@pytest.mark.parametrize("window", WINDOWS)
def test_average_pool(window, sizes, count_include_pad):
    assert_gradients(
        [("AveragePool", "x", "y", {**window, "count_include_pad": count_include_pad})],
        {"x": normal(2, 3, *sizes)},
        lambda x: F.avg_pool2d(x, **arguments(window), count_include_pad=bool(count_include_pad)),
        shapes={"x": ["N", 3, *sizes]},
    )


@pytest.mark.parametrize("sizes", [(8, 9), (11, 7)])
@pytest.mark.parametrize("window", [w for w in WINDOWS if "ceil_mode" not in w])
def test_average_pool_of_unknown_size(window, sizes):
    assert_gradients(
        [("AveragePool", "x", "y", {**window, "count_include_pad": 1})],
        {"x": normal(2, 3, *sizes)},
        lambda x: F.avg_pool2d(x, **arguments(window), count_include_pad=True),
        shapes={"x": ["N", 3, "H", "W"]},
    )


def test_average_pool_of_unknown_size_declines_what_depends_on_it():
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    model = build([("AveragePool", "x", "y", window)], {"x": normal(1, 3, 8, 8)}, shapes={"x": [1, 3, "H", "W"]})
    (reason,) = differentiate(model, ["x"]).blocked.values()
    assert "AveragePool" in reason
    assert not operators(model)


def test_average_pool_in_one_and_three_dimensions():
    for rank, function in ((1, F.avg_pool1d), (3, F.avg_pool3d)):
        assert_gradients(
            [("AveragePool", "x", "y", {"kernel_shape": [3] * rank, "strides": [2] * rank, "pads": [1] * 2 * rank})],
            {"x": normal(1, 2, *[7, 6, 5][:rank])},
            lambda x, f=function: f(x, 3, 2, 1, count_include_pad=False),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_global_pools(dynamic):
    shapes = {"x": ["N", 3, "H", "W"]} if dynamic else None
    x = {"x": normal(2, 3, 4, 5)}
    assert_gradients([("GlobalAveragePool", "x", "y", {})], x, lambda x: x.mean((2, 3), True), shapes=shapes)
    assert_gradients([("GlobalMaxPool", "x", "y", {})], x, lambda x: x.amax((2, 3), True), shapes=shapes)


def test_pooled_values_stay_the_same():
    x = normal(1, 2, 6, 6)
    model = build([("MaxPool", "x", "y", WINDOWS[1])], {"x": x})
    before = run(model, {"x": x})["y"]
    differentiate(model, ["x"])
    after = run(model, {"x": x, "dy": np.ones_like(before)})["y"]
    np.testing.assert_array_equal(before, after)
