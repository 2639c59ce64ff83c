"""Scales and weights of heads: several weigh alike, one stays as it is."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnx_kfe.calibration import Statistics, collect, open_dataset
from onnx_kfe.calibration import input_specs as specs_of
from onnx_kfe.graph import Network, open_network

X = np.random.default_rng(0).standard_normal((400, 3, 4, 5)).astype(np.float32)


def two_maps(outputs: str = "float[N, 6, 4, 5] p, float[N, 6, 1, 1] q") -> Network:
    """Classes at 20 positions beside classes at one, each behind a convolution of its own with the same weights."""
    body = """
        a = Conv(x, u) p = Softmax<axis = 1>(a)
        m = ReduceMean<axes = [2, 3]>(x) b = Conv(m, v) q = Softmax<axis = 1>(b)
    """
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 4, 5] x) => ({outputs}) {{ {body} }}'
    model = parser.parse_model(text)
    for name in "uv":
        weight = np.random.default_rng(1).standard_normal((6, 3, 1, 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return open_network(model)


def collected(network: Network, **options) -> Statistics:
    return collect(network, open_dataset({"x": X}, specs_of(network.model)), **options)


def test_a_map_of_many_positions_weighs_as_much_as_one_of_few():
    statistics = collected(two_maps())
    assert [head.weight for head in statistics.heads] == [10.5 / 20, 10.5]
    traces = {
        name: np.trace(layer.cotangent_second_moment[0]) / layer.samples for name, layer in statistics.layers.items()
    }
    large, small = traces.values()
    assert large == pytest.approx(small, rel=0.25)  # were it not for the weights, 20 times as much
    alone = collected(two_maps("float[N, 6, 4, 5] p"))
    (before,) = alone.layers.values()
    assert np.trace(before.cotangent_second_moment[0]) / before.samples / large == pytest.approx(20 / 10.5, rel=0.05)


def test_one_head_has_the_weight_one_whatever_its_size():
    for outputs in ("float[N, 6, 4, 5] p", "float[N, 6, 1, 1] q"):
        (head,) = collected(two_maps(outputs)).heads
        assert (head.weight, head.scale) == (1.0, 1.0)
    (head,) = collected(two_maps("float[N, 6, 4, 5] a")).heads
    assert head.weight == 1.0
    assert head.scale != 1.0


def test_an_embedding_has_as_many_decisions_as_channels():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 4, 5] x) => (float[N, 12, 8] e, float[N, 6] q) {
        s = Constant<value_ints = [0, 12, 5]>() r = Reshape(x, s) e = MatMul(r, u)
        m = ReduceMean<axes = [1], keepdims = 0>(r) b = MatMul(m, v) q = Softmax<axis = 1>(b)
    }"""
    made = parser.parse_model(text)
    arrays = {
        "u": np.random.default_rng(1).standard_normal((5, 8)),
        "v": np.random.default_rng(2).standard_normal((5, 6)),
    }
    made.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items())
    embedding, classes = collected(open_network(made), heads={"e": "embedding"}).heads
    assert (embedding.weight, classes.weight) == (4.5 / 8, 4.5)
    means = (X[:64].reshape(-1, 12, 5) @ arrays["u"]).mean(1)
    assert embedding.scale == pytest.approx(means.std(), rel=1e-4)


def test_elements_count_where_there_are_no_classes():
    statistics = collected(two_maps("float[N, 6, 4, 5] a, float[N, 6, 1, 1] q"), heads={"a": "bernoulli"})
    assert [head.weight for head in statistics.heads] == [60.5 / 120, 60.5]
