"""How much more the Fisher information holds than A (x) G, where the positions of a sample have something in common."""

import math

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnx_kfe.calibration import Statistics, _moments, collect, open_dataset, sample_noise
from onnx_kfe.calibration import input_specs as specs_of
from onnx_kfe.graph import Network, open_network

RANDOM = np.random.default_rng(0)
COMMON = RANDOM.standard_normal((40, 3, 1, 1)) * 2 + 1
IMAGES = (RANDOM.standard_normal((40, 3, 4, 5)) + COMMON).astype(np.float32)


def network_of(body: str, x: str, y: str, **weights: tuple[int, ...]) -> Network:
    inner = ", ".join(f"float{list(shape)} {name}" for name, shape in weights.items())
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({x}) => ({y}) <{inner}> {{ {body} }}')
    for name, shape in weights.items():
        model.graph.initializer.append(
            numpy_helper.from_array(np.random.default_rng(1).standard_normal(shape).astype(np.float32), name)
        )
    return open_network(model)


def collected(network: Network, x: np.ndarray, **options: object) -> Statistics:
    return collect(network, open_dataset({"x": x}, specs_of(network.model)), heads={"y": "gaussian"}, **options)


def pooled() -> Network:
    """A pointwise convolution whose positions all get the same gradient."""
    return network_of(
        "c = Conv(x, w) y = GlobalAveragePool(c)", "float[N, 3, 4, 5] x", "float[N, 2, 1, 1] y", w=(2, 3, 1, 1)
    )


def test_before_a_global_pooling_the_trace_is_that_of_the_fisher(monkeypatch: pytest.MonkeyPatch):
    """The gradient of a sample is ``T g mean(x)^T``; noise and images are independent, so its square is a product."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)  # at all positions
    network = pooled()
    statistics = collected(network, IMAGES)
    (layer,) = statistics.layers.values()
    shapes = {"y": (1, 2, 1, 1)}
    noise = np.stack([sample_noise(statistics.heads, shapes, 0, n)[0] for n in range(len(IMAGES))])
    gradient = noise / statistics.heads[0].scale  # of the sum over positions
    means = IMAGES.astype(np.float64).mean((2, 3))
    exact = np.square(means - means.mean(0)).sum(1).mean() * np.square(gradient).sum() / len(IMAGES)
    traces = np.trace(layer.centred_input_factor[0]) * np.trace(layer.output_factor[0])
    assert layer.coherence * traces == pytest.approx(exact, rel=1e-4)
    assert layer.coherence > 5


def test_nodes_with_one_weight_and_different_numbers_of_positions(monkeypatch: pytest.MonkeyPatch):
    """Both pool to the same means; each of the two gradients is then as strong as the other, whatever its positions."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    body = "c = Conv(x, w) y = GlobalAveragePool(c) s = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(x)"
    body += " d = Conv(s, w) z = GlobalAveragePool(d)"
    outputs = "float[N, 2, 1, 1] y, float[N, 2, 1, 1] z"
    network = network_of(body, "float[N, 3, 8, 8] x", outputs, w=(2, 3, 1, 1))
    x = np.repeat(np.repeat(IMAGES[..., :4], 2, 2), 2, 3)
    statistics = collect(network, open_dataset({"x": x}, specs_of(network.model)))
    (layer,) = statistics.layers.values()
    shapes = {head.output: (1, 2, 1, 1) for head in statistics.heads}
    drawn = [sample_noise(statistics.heads, shapes, 0, n) for n in range(len(x))]
    means = x.astype(np.float64).mean((2, 3))
    gradients = [
        np.concatenate([rows[place] for rows in drawn]) / head.scale for place, head in enumerate(statistics.heads)
    ]
    total = sum(np.square(gradient).sum() for gradient in gradients) / len(x)
    exact = np.square(means - means.mean(0)).sum(1).mean() * total
    traces = np.trace(layer.centred_input_factor[0]) * np.trace(layer.output_factor[0])
    assert layer.coherence * traces == pytest.approx(exact, rel=0.1)
    assert layer.positions == len(x) * (64 + 16)


def test_independent_positions_are_what_the_factors_assume():
    x = np.random.default_rng(2).standard_normal((400, 3, 4, 5)).astype(np.float32)
    body = "y = Conv(x, w)"
    network = network_of(body, "float[N, 3, 4, 5] x", "float[N, 2, 4, 5] y", w=(2, 3, 1, 1))
    (layer,) = collected(network, x).layers.values()
    assert layer.coherence == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("body", "shape"),
    [("y = Gemm(x, w)", "N, 3"), ("y = MatMul(x, w)", "N, 7, 3"), ("y = MatMul(x, w)", "N, 2, 7, 3")],
)
def test_rows_of_products(body: str, shape: str):
    """Every axis but the first and the last is a position; one position is coherent with itself."""
    network = network_of(body, f"float[{shape}] x", f"float[{shape[:-1]}4] y", w=(3, 4))
    sizes = [int(size) for size in shape.split(",")[1:]]
    x = np.random.default_rng(3).standard_normal((10, *sizes)).astype(np.float32)
    (layer,) = collected(network, x).layers.values()
    flat = x.reshape(10, -1, 3).astype(np.float64)
    assert layer.common.rows == 10
    assert np.allclose(layer.common.input_mean, flat.mean(1).sum(0), rtol=1e-4, atol=1e-5)
    assert layer.common.input_mean_square == pytest.approx(np.square(flat.mean(1)).sum(), rel=1e-5)
    if flat.shape[1] == 1:
        assert layer.coherence == pytest.approx(1.0)
