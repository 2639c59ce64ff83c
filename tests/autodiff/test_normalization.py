import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_batch_normalization(rank, computed):
    parameters = {"s": normal(3), "b": normal(3, seed=1), "m": normal(3, seed=2), "v": np.abs(normal(3, seed=3)) + 0.1}
    s, b, m, v = map(torch.tensor, parameters.values())
    assert_gradients(
        [("BatchNormalization", "x s b m v", "y", {"epsilon": 1e-3})],
        {"x": normal(*[2, 3, 4, 5][:rank]), **(parameters if computed else {})},
        lambda x, *_: F.batch_norm(x, m, v, s, b, False, eps=1e-3),
        constants={} if computed else parameters,
        wanted=["x"],
    )


def test_batch_normalization_of_the_scale_is_blocked():
    parameters = {name: np.abs(normal(3)) for name in "sbmv"}
    model = build([("BatchNormalization", "x s b m v", "y", {})], {"x": normal(2, 3), **parameters})
    gradients = differentiate(model, ["x", "s"])
    assert [value.name for value in gradients.cotangents] == ["x"]
    assert "input 1 of BatchNormalization" in next(iter(gradients.blocked.values()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_normalization(axis, bias, dtype):
    shape = (4, 5) if axis == 1 else (5,)
    parameters = {"s": normal(*shape, dtype=dtype), "b": normal(*shape, seed=1, dtype=dtype)}
    s, b = map(torch.tensor, parameters.values())
    assert_gradients(
        [("LayerNormalization", "x s b" if bias else "x s", "y", {"axis": axis, "epsilon": 1e-3})],
        {"x": 3 * normal(2, 4, 5, dtype=dtype) + 1},
        lambda x: F.layer_norm(x, shape, s, b if bias else None, 1e-3),
        constants=parameters if bias else {"s": parameters["s"]},
        shapes={"x": ["N", 4, 5]},
    )


def test_layer_normalization_takes_its_statistics_from_the_forward_node():
    model = build([("LayerNormalization", "x s", "y", {})], {"x": normal(2, 5)}, constants={"s": normal(5)})
    differentiate(model, ["x"])
    assert len(next(iter(model.graph)).outputs) == 3
    assert operators(model).count("ReduceMean") == 2


def test_instance_normalization():
    parameters = {"s": normal(3), "b": normal(3, seed=1)}
    s, b = map(torch.tensor, parameters.values())
    assert_gradients(
        [("InstanceNormalization", "x s b", "y", {"epsilon": 1e-3})],
        {"x": normal(2, 3, 4, 5)},
        lambda x: F.instance_norm(x, weight=s, bias=b, eps=1e-3),
        constants=parameters,
        shapes={"x": ["N", 3, "H", "W"]},
    )


def test_group_normalization():
    parameters = {"s": normal(6), "b": normal(6, seed=1)}
    s, b = map(torch.tensor, parameters.values())
    assert_gradients(
        [("GroupNormalization", "x s b", "y", {"num_groups": 3, "epsilon": 1e-3})],
        {"x": normal(2, 6, 4, 5)},
        lambda x: F.group_norm(x, 3, s, b, 1e-3),
        constants=parameters,
        shapes={"x": ["N", 6, "H", "W"]},
    )


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization(p):
    assert_gradients(
        [("LpNormalization", "x", "y", {"axis": 1, "p": p})],
        {"x": normal(2, 6, 4)},
        lambda x: x / x.norm(p, 1, True),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_local_response_normalization(size, dynamic):
    def function(x):
        squares = F.pad(x * x, (0, 0, 0, 0, size // 2, size // 2)).unfold(1, size, 1).sum(-1)
        return x * (1.5 + 2 / size * squares) ** -0.6

    assert_gradients(
        [("LRN", "x", "y", {"size": size, "alpha": 2.0, "beta": 0.6, "bias": 1.5})],
        {"x": normal(2, 7, 3, 4)},
        function,
        shapes={"x": ["N", "C", "H", 4]} if dynamic else None,
    )


@pytest.mark.parametrize(("attributes", "axes"), [({}, (0, 2, 3)), ({"axes": [1, -1]}, (1, -1))])
def test_mean_variance_normalization(attributes, axes):
    assert_gradients(
        [("MeanVarianceNormalization", "x", "y", attributes)],
        {"x": normal(2, 3, 4, 5)},
        lambda x: (x - x.mean(axes, True)) / (x.std(axes, correction=0, keepdim=True) + 1e-9),
        shapes={"x": ["N", 3, "H", "W"]},
    )
