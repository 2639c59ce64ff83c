import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators, run

FUNCTIONS = [
    ("Relu", {}, torch.relu),
    ("LeakyRelu", {"alpha": 0.1}, lambda x: F.leaky_relu(x, 0.1)),
    ("LeakyRelu", {"alpha": -0.3}, lambda x: F.leaky_relu(x, -0.3)),
    ("LeakyRelu", {"alpha": 0.0}, torch.relu),
    ("ThresholdedRelu", {"alpha": 0.5}, lambda x: x * (x > 0.5)),
    ("Shrink", {"lambd": 1.5, "bias": 0.3}, lambda x: (x - 0.3 * x.sign()) * (x.abs() > 1.5)),
    ("Sigmoid", {}, torch.sigmoid),
    ("Tanh", {}, torch.tanh),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, lambda x: (0.3 * x + 0.4).clamp(0, 1)),
    ("HardSwish", {}, lambda x: F.hardswish(x * 1.0)),
    ("Elu", {"alpha": 0.7}, lambda x: F.elu(x, 0.7)),
    ("Selu", {}, torch.selu),
    ("Celu", {"alpha": 0.7}, lambda x: F.celu(x, 0.7)),
    ("Softplus", {}, F.softplus),
    ("Softsign", {}, F.softsign),
    ("Erf", {}, torch.erf),
    ("Exp", {}, torch.exp),
    ("Neg", {}, torch.neg),
    ("Abs", {}, torch.abs),
    ("Gelu", {}, F.gelu),
    ("Gelu", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("Mish", {}, F.mish),
    ("Sin", {}, torch.sin),
    ("Cos", {}, torch.cos),
    ("Atan", {}, torch.atan),
    ("Sinh", {}, torch.sinh),
    ("Cosh", {}, torch.cosh),
    ("Asinh", {}, torch.asinh),
]
POSITIVE = [
    ("Log", torch.log),
    ("Sqrt", torch.sqrt),
    ("Reciprocal", torch.reciprocal),
]
INSIDE = [
    ("Tan", torch.tan),
    ("Asin", torch.asin),
    ("Acos", torch.acos),
    ("Atanh", torch.atanh),
]


@pytest.mark.parametrize(("operator", "attributes", "function"), FUNCTIONS)
def test_on_the_real_line(operator, attributes, function):
    x = 4 * normal(5, 40)
    assert_gradients([(operator, "x", "y", attributes)], {"x": x}, function, shapes={"x": ["N", 40]})


@pytest.mark.parametrize(("operator", "function"), POSITIVE)
def test_on_positive_numbers(operator, function):
    assert_gradients([(operator, "x", "y", {})], {"x": np.abs(normal(5, 8)) + 0.1}, function)


@pytest.mark.parametrize(("operator", "function"), INSIDE)
def test_inside_the_unit_interval(operator, function):
    assert_gradients([(operator, "x", "y", {})], {"x": 0.9 * np.tanh(normal(5, 8))}, function)


def test_acosh():
    assert_gradients([("Acosh", "x", "y", {})], {"x": np.abs(normal(5, 8)) + 1.1}, torch.acosh)


LIMITS = [
    (0.0, 6.0),
    (-1.0, 1.0),
    (-0.3, None),
    (None, 0.7),
    (-3.4028234663852886e38, 0.7),
    (1e-30, 2e25),
    (None, None),
]


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clip(low, high, computed, dtype):
    limits = {n: np.array(v, dtype) for n, v in (("low", low), ("high", high)) if v is not None}
    names = ["x", "low" if low is not None else "_", "high" if high is not None else "_"]
    assert_gradients(
        [("Clip", " ".join(names), "y", {})],
        {"x": 4 * normal(5, 40, dtype=dtype), **(limits if computed else {})},
        lambda x, *_: x.clamp(low, high) if limits else x * 1.0,
        constants={} if computed else limits,
        wanted=["x"],
    )


@pytest.mark.parametrize("operator", ["Relu", "Clip"])
def test_masks_are_exactly_zero_or_one(operator):
    """Down to the neighbours of a limit, in either direction."""
    limits = {"low": np.float32(0), "high": np.float32(6)} if operator == "Clip" else {}
    near = [np.nextafter(np.float32(v), np.float32(w)) for v, w in ((6, 0), (6, 9), (1, 0), (1, 2))]
    x = np.array([0, -0.0, 1e-30, -1e-30, 6, 3e38, -3e38, *near], np.float32)
    model = build([(operator, " ".join(["x", *limits]), "y", {})], {"x": x}, constants=limits)
    differentiate(model, ["x"])
    expected = (x > 0) & ((x < 6) if operator == "Clip" else True)
    np.testing.assert_array_equal(run(model, {"x": x, "dy": np.ones_like(x)})["d(x)"], expected)


def test_activations_leave_their_input_to_the_convolution():
    """The derivative comes from the output, so that the runtime still fuses them."""
    for operator in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Clip"):
        model = build(
            [("Conv", "x w", "h", {}), (operator, "h", "y", {})],
            {"x": normal(1, 3, 4, 4)},
            constants={"w": normal(2, 3, 1, 1)},
        )
        convolution = next(iter(model.graph))
        differentiate(model, ["x"])
        assert len(convolution.outputs[0].uses()) == 1


def test_float16():
    x = normal(4, 5).astype(np.float16)
    model = build([("Relu", "x", "h", {}), ("Sigmoid", "h", "y", {})], {"x": x})
    differentiate(model, ["x"])
    got = run(model, {"x": x, "dy": np.ones_like(x)})["d(x)"]
    gate = 1 / (1 + np.exp(-x.astype(np.float32)))
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, np.where(x > 0, gate * (1 - gate), 0), atol=2e-3)
    assert "HardSigmoid" not in operators(model)
