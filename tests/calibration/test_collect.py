"""Collection: the factors against torch, the conventions against brute force, and what may not change them."""

import itertools
import math
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser

from onnx_kfe.calibration import Head, Statistics, _moments, _weight_file, collect, merge, open_dataset, sample_noise
from onnx_kfe.calibration import input_specs as specs_of
from onnx_kfe.calibration._instrument import Instrumented, Probe
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Network, _serialize, open_network, serialize
from onnx_kfe.kfe import predicted_loss
from onnx_kfe.runtime import Mapped, create_session
from tests.cases import INPUT, load_case
from tests.tied import pyramid, samples, siamese, stacked, upsampled
from tests.tiny import node, tiny, weights
from tests.topologies import Builder
from tools.bench_memory import encoder
from tools.torch_oracle import Noise, Output, TorchOracle, relative_error

TOLERANCE = 1e-4


@pytest.fixture
def all_positions(monkeypatch: pytest.MonkeyPatch):
    """Statistics at every position, whatever they cost."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)


def collected(network: Network, feeds: dict[str, np.ndarray], **options) -> Statistics:
    return collect(network, open_dataset(feeds, specs_of(network.model)), **options)


def noise_of(network: Network, heads: list[Head], feeds: dict[str, np.ndarray], seed: int = 0) -> Noise:
    names = [head.output for head in heads]
    one = {name: array[:1] for name, array in feeds.items()}
    values = create_session(serialize(network.original)).run(names, one)
    shapes = {name: value.shape for name, value in zip(names, values, strict=True)}
    return lambda index: sample_noise(heads, shapes, seed, index)


def assert_factors_agree(network: Network, statistics: Statistics, feeds: dict[str, np.ndarray]) -> None:
    """The factors of all layers that have any equal those of torch, on the normalised graph."""
    layers = [layer for layer in network.prunable if layer.name in statistics.layers]
    outputs = {h.output: Output(h.kind, h.axis, h.probabilities, h.scale) for h in statistics.heads}
    oracle = TorchOracle(onnx.ModelProto.FromString(serialize(network.model)), layers, outputs)
    count = len(next(iter(feeds.values())))
    oracle.add(feeds, range(count), noise_of(network, statistics.heads, feeds, statistics.seed))
    for name, expected in oracle.factors().items():
        found = statistics.layers[name]
        assert relative_error(found.input_factor, expected["A"]) < TOLERANCE, name
        assert relative_error(found.mean, expected["mean"]) < TOLERANCE, name
        assert relative_error(found.output_factor, expected["G"]) < TOLERANCE, name


@pytest.mark.parametrize("length", ["t", 7])
def test_all_tokens_of_sequences_of_any_length_count(length) -> None:
    """Of those of one length as many as are cheap."""
    b = Builder()
    hidden = b.op("Relu", b.matmul("x", 12, 40))
    network = open_network(b.model(["n", length, 12], b.matmul(hidden, 40, 3)))
    feeds = {"x": weights(6, 7, 12)}
    statistics = collected(network, feeds)
    inside = np.maximum(feeds["x"] @ network.layers[0].weight()[0].T + b.constants["k1"], 0).reshape(-1, 40)
    wanted = inside.T @ inside / 6
    exact = relative_error(statistics.layers["MatMul3"].input_factor[0], wanted) < TOLERANCE
    assert exact is (length == "t")
    if length == "t":
        assert_factors_agree(network, statistics, feeds)


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize(
    "name",
    [
        "plain-13",
        "residual-dynamo",
        "strided_shortcut-17",
        "inverted_residual-17",
        "grouped-11",
        "shuffle-13",
        "inception-17",
        "conv1d-13",
        "video-17",
        "dilated-11",
        "mlp-11",
        "gelu_mlp-17",
        "attention-dynamo",
        "tokenizer_transformer-17",
        "unet-13",
        "pyramid-11",
        "autoencoder-13",
        "two_heads-dynamo",
        "denoiser-17",
    ],
)
def test_factors_equal_those_of_torch(name: str):
    case = load_case(name)
    network = open_network(case.model)
    feeds = case.inputs(12)
    statistics = collected(network, feeds)
    assert {head.output: head.kind for head in statistics.heads} == dict(case.heads)
    assert not statistics.skipped
    assert set(statistics.layers) == {layer.name for layer in network.prunable}
    assert_factors_agree(network, statistics, feeds)


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize("make", [pyramid, stacked, siamese, upsampled])
def test_nodes_that_share_a_weight_add_up(make: Callable[[], onnx.ModelProto]):
    model = make()
    network, feeds = open_network(model), samples(model, 12)
    statistics = collected(network, feeds)
    assert set(statistics.layers) == {layer.name for layer in network.prunable}
    assert_factors_agree(network, statistics, feeds)
    (layer, *_) = (layer for layer in network.prunable if layer.twins)
    seen = statistics.layers[layer.name]
    assert seen.positions == 12 * sum(use.geometry.positions for use in layer.uses)
    if not layer.geometry.kernel:  # whose patches are its inputs
        inputs = [use.input for use in layer.uses]
        inner = network.model.clone()
        values = {value.name: value for node in inner.graph for value in node.outputs}
        inner.graph.outputs.extend(values[name] for name in inputs if name in values)
        session = create_session(serialize(inner))
        found = dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True)) | feeds
        rows = np.concatenate([found[name].reshape(-1, layer.geometry.in_channels) for name in inputs]).astype(float)
        assert relative_error(seen.input_factor[0], rows.T @ rows / 12) < TOLERANCE
        assert relative_error(seen.mean[0], rows.mean(0)) < TOLERANCE


def test_a_layer_is_skipped_where_any_of_its_nodes_has_no_gradient():
    body = "h = MatMul(x, w) r = Relu(h) p = MatMul(r, w) y = Round(p)"
    network = network_of(
        f"{body} z = MatMul(r, v)", "float[N, 6] x", "float[N, 6] y, float[N, 4] z", w=(6, 6), v=(6, 4)
    )
    (layer, other) = network.prunable
    statistics = collected(network, {"x": np.ones((4, 6), np.float32)}, heads={"y": "none"})
    assert set(statistics.layers) == {other.name}
    assert statistics.skipped == {layer.name: f"'{layer.twins[0].name}', which has the same weight: no path to a head"}


def network_of(body: str, x: str = "float[N, 3, 9, 8] x", y: str = "float[N, k, h, w] y", **weights: tuple[int, ...]):
    """A network in the ONNX text syntax, with random weights of the given shapes."""
    random = np.random.default_rng(0)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> agraph ({x}) => ({y}) {{ {body} }}')
    for name, shape in weights.items():
        values = random.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return open_network(model)


CONVOLUTIONS = {
    "same upper": '<auto_pad = "SAME_UPPER", strides = [2, 2]>',
    "same lower": '<auto_pad = "SAME_LOWER", strides = [1, 2]>',
    "valid": '<auto_pad = "VALID", strides = [2, 1]>',
    "dilated": "<dilations = [2, 1], pads = [1, 2, 3, 0]>",
    "asymmetric": "<pads = [0, 1, 2, 1], strides = [3, 2]>",
}


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_paddings_strides_and_dilations(name: str):
    body = f"a = Conv {CONVOLUTIONS[name]} (x, w) b = Relu(a) y = Conv(b, v)"
    network = network_of(body, w=(6, 3, 3, 3), v=(4, 6, 2, 1))
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 3, 9, 8)).astype(np.float32)}
    statistics = collected(network, feeds)
    assert len(statistics.layers) == 2
    assert_factors_agree(network, statistics, feeds)


@pytest.mark.usefixtures("all_positions")
def test_free_height_and_width():
    """Samples of two sizes in one collection, each weighted by its positions."""
    body = "a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) b = Relu(a) y = Conv(b, v)"
    network = network_of(body, x="float[N, 3, H, W] x", w=(6, 3, 3, 3), v=(4, 6, 1, 1))
    network = network.with_input_shapes({"x": (1, 3, 9, 8)})
    random = np.random.default_rng(0)
    large, small = (random.standard_normal((4, 3, *size)).astype(np.float32) for size in ((9, 8), (6, 5)))
    samples = [{"x": sample[None]} for sample in (*large, *small)]
    statistics = collect(network, open_dataset(samples, specs_of(network.model)))
    (head,) = statistics.heads
    oracle = TorchOracle(
        onnx.ModelProto.FromString(serialize(network.model)),
        network.prunable,
        {"y": Output("gaussian", 1, scale=head.scale)},
    )
    oracle.add({"x": large}, range(4), noise_of(network, [head], {"x": large}))
    oracle.add({"x": small}, range(4, 8), noise_of(network, [head], {"x": small}))
    for name, expected in oracle.factors().items():
        found = statistics.layers[name]
        assert found.positions == 4 * 5 * 4 + 4 * 3 * 3
        assert relative_error(found.input_factor, expected["A"]) < TOLERANCE
        assert relative_error(found.mean, expected["mean"]) < TOLERANCE
        assert relative_error(found.output_factor, expected["G"]) < TOLERANCE


def test_shards_merge_into_the_single_run():
    case = load_case("strided_shortcut-17")
    network = open_network(case.model)
    feeds = case.inputs(200)
    whole = collected(network, feeds, seed=3)
    merged = merge([collected(network, feeds, seed=3, shard=(i, 3)) for i in (2, 0, 1)])
    assert merged.samples == whole.samples == 200
    assert merged.shards == whole.shards
    for name, layer in whole.layers.items():
        for key in ("input_second_moment", "input_sum", "cotangent_second_moment"):
            assert np.allclose(getattr(merged.layers[name], key), getattr(layer, key), rtol=1e-9, atol=1e-12), name
        assert merged.layers[name].positions == layer.positions
        assert merged.layers[name].samples == layer.samples


@pytest.mark.parametrize("name", ["residual-11", "gelu_mlp-17", "tokenizer_transformer-17", "two_heads-13"])
def test_several_passes_give_exactly_what_one_does(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    case = load_case(name)
    network = open_network(case.model)
    feeds = case.inputs(20)
    whole = collected(network, feeds, threads=1)
    moments = {name: (s.input_second_moment.size, s.cotangent_second_moment.size) for name, s in whole.layers.items()}
    memory = 12 * max(map(sum, moments.values()))  # a float64 sum and a float32 addend of the largest layer

    passes: list[list[str]] = []
    models: list[ir.Model] = []

    def part(self: Instrumented, probes: list[Probe]) -> ir.Model:
        passes.append([probe.layer.name for probe in probes])
        models.append(original(self, probes))
        return models[-1]

    original = Instrumented.part
    monkeypatch.setattr(Instrumented, "part", part)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done: list[int] = []
    found = collected(network, feeds, threads=1, memory=memory, progress=done.append)

    assert len(passes) >= 2
    assert [layer for names in passes for layer in names] == list(whole.layers)
    assert all(12 * sum(sum(moments[layer]) for layer in names) <= memory for names in passes)
    matmuls = [sum(node.op_type in ("MatMul", "Gemm") for node in model.graph) for model in models]
    outputs = [len(model.graph.outputs) for model in models]
    small = 7 * len(moments)
    assert [count - small for count in outputs] == [2 * len(names) for names in passes]
    assert len({count - 2 * len(names) for count, names in zip(matmuls, passes, strict=True)}) == 1
    assert sum(done) == 20
    assert not list(tmp_path.iterdir())

    assert list(found.layers) == list(whole.layers)
    assert (found.samples, found.heads, found.skipped) == (whole.samples, whole.heads, whole.skipped)
    for layer, expected in whole.layers.items():
        seen = found.layers[layer]
        for key in ("input_second_moment", "input_sum", "cotangent_second_moment", "saliency_sum"):
            np.testing.assert_array_equal(getattr(seen, key), getattr(expected, key), err_msg=f"{layer}: {key}")
        assert (seen.positions, seen.samples) == (expected.positions, expected.samples)
        assert seen.coherence == expected.coherence


@pytest.mark.parametrize("make", [pyramid, stacked])
def test_nodes_that_share_a_weight_stay_in_one_pass(
    make: Callable[[], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
):
    """As many layers as fit a pass: a float64 sum of each, and a float32 addend of each of its nodes."""
    model = make()
    network, feeds = open_network(model), samples(model, 12)
    whole = collected(network, feeds, threads=1)
    needed = {
        layer.name: (8 + 4 * len(layer.uses)) * (seen.input_second_moment.size + seen.cotangent_second_moment.size)
        for layer in network.prunable
        if (seen := whole.layers[layer.name])
    }
    passes: list[list[str]] = []

    def part(self: Instrumented, probes: list[Probe]) -> ir.Model:
        passes.append([probe.layer.name for probe in probes])
        return original(self, probes)

    original = Instrumented.part
    monkeypatch.setattr(Instrumented, "part", part)
    memory = max(needed.values())
    found = collected(network, feeds, threads=1, memory=memory)

    assert len(passes) >= 2
    owners = network.twins
    for names in passes:
        layers = {owners.get(name, name) for name in names}
        assert names == [use.name for layer in network.prunable if layer.name in layers for use in layer.uses]
        assert sum(needed[name] for name in layers) <= memory
    for name, expected in whole.layers.items():
        seen = found.layers[name]
        for key in ("input_second_moment", "input_sum", "cotangent_second_moment", "saliency_sum"):
            np.testing.assert_array_equal(getattr(seen, key), getattr(expected, key), err_msg=f"{name}: {key}")
        assert (seen.positions, seen.samples, seen.coherence) == (
            expected.positions, expected.samples, expected.coherence,
        )  # fmt: skip


def test_models_that_no_protobuf_holds_are_collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    encoder(tmp_path / "encoder.onnx", layers=1, width=160, inner=320, heads=4, vocabulary=10, tokens=6)
    feeds = {"tokens": np.random.default_rng(0).integers(0, 10, (8, 6))}
    expected = collected(open_network(tmp_path / "encoder.onnx"), feeds)
    assert not expected.skipped

    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 2**18)
    monkeypatch.setattr(_weight_file, "_MOST_PREPACKED", 2**18)
    prepacked: list[bool] = []

    def create(model: Path, *, prepack: bool, **options: Any) -> Any:
        assert model.stat().st_size < model.with_name("weights").stat().st_size / 2
        prepacked.append(prepack)
        return create_session(model, prepack=prepack, **options)

    monkeypatch.setattr(_weight_file, "create_session", create)
    network = open_network(tmp_path / "encoder.onnx")
    assert isinstance(serialize(network.model), Mapped)
    found = collected(network, feeds)
    assert prepacked == [False, False]  # forward, and forward with backward
    assert set(found.layers) == set(expected.layers)
    for name, seen in found.layers.items():
        assert relative_error(seen.input_factor, expected.layers[name].input_factor) < 1e-5
        assert relative_error(seen.output_factor, expected.layers[name].output_factor) < 1e-5


def test_a_seed_fixes_everything():
    case = load_case("residual-11")
    network = open_network(case.model)
    feeds = case.inputs(20)
    first, again, other = (collected(network, feeds, seed=seed) for seed in (1, 1, 2))
    for name, layer in first.layers.items():
        assert np.array_equal(layer.cotangent_second_moment, again.layers[name].cotangent_second_moment)
        assert np.array_equal(layer.input_second_moment, again.layers[name].input_second_moment)
        assert relative_error(other.layers[name].output_factor, layer.output_factor) > 1e-3


@pytest.mark.parametrize(
    ("body", "culprit"),
    [
        ("n = Log(x) y = Conv(n, w)", "input"),
        ("a = Conv(x, w) b = Sqrt(a) c = Conv(b, v) y = Relu(c)", "(input|gradient)"),
        ("a = Conv(x, w) b = Relu(a) c = Sqrt(b) y = Conv(c, v)", "gradient"),
    ],
)
def test_what_is_not_finite_is_named_by_layer(body: str, culprit: str):
    """The square root of zero has an infinite slope, and NaN where that meets the zero of the ReLU."""
    network = network_of(body, w=(4, 3, 1, 1), v=(2, 4, 1, 1))
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 3, 9, 8)).astype(np.float32)}
    names = {layer.name for layer in network.prunable}
    with pytest.raises(KfeError, match=rf"layer '.*': NaN or infinity in its {culprit}") as error:
        collected(network, feeds)
    assert any(f"'{name}'" in str(error.value) for name in names)


def test_memory_does_not_grow_with_the_number_of_samples():
    network = open_network(load_case("plain-13").model)

    def stream(count: int) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
        random = np.random.default_rng(0)
        return lambda: ({INPUT: random.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(count))

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            statistics = collect(network, open_dataset(stream(count), specs_of(network.model)))
            assert statistics.samples == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # what is imported and cached once
    few, many = peak(192), peak(1920)
    sample = 3 * 12 * 12 * 4
    assert many < few + 100 * sample  # a tenth of what the samples would take


def kfac_fisher(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """``A (x) G`` of one layer by the definition: inputs ``[N, T, i]`` and cotangents ``[N, T, o]``, one by one."""
    samples, positions = x.shape[:2]
    inputs = [np.outer(x[n, t], x[n, t]) for n, t in itertools.product(range(samples), range(positions))]
    cotangents = [np.outer(g[n, t], g[n, t]) for n, t in itertools.product(range(samples), range(positions))]
    fisher = np.zeros((x.shape[2] * g.shape[2],) * 2)
    for a, b in itertools.product(inputs, cotangents):
        fisher += np.kron(a, b)
    return fisher / samples / (samples * positions)


def assert_second_order_term(statistics: Statistics, name: str, x: np.ndarray, g: np.ndarray) -> None:
    """The predicted loss of a random change equals the quadratic form of the explicit Fisher."""
    layer = statistics.layers[name]
    change = np.random.default_rng(5).standard_normal((g.shape[2], x.shape[2]))
    vec = change.reshape(-1, order="F")
    exact = 0.5 * vec @ kfac_fisher(x, g) @ vec
    assert predicted_loss(change, layer.input_factor[0], layer.output_factor[0]) == pytest.approx(exact, rel=1e-4)


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sampled(network: Network, heads: list[Head], feeds: dict[str, np.ndarray], logits: np.ndarray) -> np.ndarray:
    """The derivative of ``sum 2 sqrt(p) * noise`` at the logits."""
    noise = noise_of(network, heads, feeds)
    probabilities = softmax(logits)
    spread = np.sqrt(probabilities) * np.concatenate([noise(n)[0] for n in range(len(logits))])
    return spread - probabilities * spread.sum(1, keepdims=True)


def test_predicted_loss_is_exact_for_an_mlp():
    """Forward and backward by hand: two layers, one position each."""
    network = network_of(
        "h = MatMul(x, w) r = Relu(h) l = MatMul(r, v) y = Softmax<axis = 1>(l)",
        x="float[N, 3] x", y="float[N, 3] y", w=(3, 4), v=(4, 3),
    )  # fmt: skip
    feeds = {"x": np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32)}
    statistics = collected(network, feeds)
    first, second = network.prunable
    w, v = first.weight()[0], second.weight()[0]
    x = feeds["x"].astype(np.float64)
    hidden = x @ w.T
    relu = np.maximum(hidden, 0)
    g_logits = sampled(network, statistics.heads, feeds, relu @ v.T)
    g_hidden = (g_logits @ v) * (hidden > 0)
    assert_second_order_term(statistics, second.name, relu[:, None], g_logits[:, None])
    assert_second_order_term(statistics, first.name, x[:, None], g_hidden[:, None])


@pytest.mark.usefixtures("all_positions")
def test_predicted_loss_is_exact_for_a_convolutional_net():
    """Forward and backward by hand: a 2x2 convolution padded at the end, ReLU, average, classifier."""
    network = network_of(
        """a = Conv<pads = [0, 0, 1, 1]>(x, w) r = Relu(a) m = GlobalAveragePool(r) f = Flatten(m)
        l = MatMul(f, v) y = Softmax<axis = 1>(l)""",
        x="float[N, 1, 3, 2] x", y="float[N, 3] y", w=(2, 1, 2, 2), v=(2, 3),
    )  # fmt: skip
    feeds = {"x": np.random.default_rng(2).standard_normal((5, 1, 3, 2)).astype(np.float32)}
    statistics = collected(network, feeds)
    first, second = network.prunable
    w, v = first.weight().reshape(2, 4), second.weight()[0]
    padded = np.pad(feeds["x"].astype(np.float64), ((0, 0), (0, 0), (0, 1), (0, 1)))
    places = list(itertools.product(range(3), range(2)))
    patches = np.stack([padded[:, 0, i : i + 2, j : j + 2].reshape(-1, 4) for i, j in places], 1)
    hidden = patches @ w.T  # [N, T, 2]
    mean = np.maximum(hidden, 0).mean(1)
    g_logits = sampled(network, statistics.heads, feeds, mean @ v.T)
    g_hidden = (g_logits @ v)[:, None] / len(places) * (hidden > 0)
    assert_second_order_term(statistics, second.name, mean[:, None], g_logits[:, None])
    assert_second_order_term(statistics, first.name, patches, g_hidden)


def test_the_convention_of_shared_weights():
    """A is summed over positions and averaged over samples; G averaged over both; mu over both."""
    network = network_of("y = MatMul(x, w)", x="float[N, 5, 3] x", y="float[N, 5, 4] y", w=(3, 4))
    feeds = {"x": np.random.default_rng(3).standard_normal((7, 5, 3)).astype(np.float32)}
    heads = {"y": "gaussian"}
    statistics = collected(network, feeds, heads=heads)
    (layer,) = statistics.layers.values()
    x = feeds["x"].astype(np.float64)
    noise = noise_of(network, statistics.heads, feeds)
    g = np.concatenate([noise(n)[0] for n in range(7)]) / statistics.heads[0].scale
    assert layer.positions == 7 * 5
    assert np.allclose(layer.input_factor[0], np.einsum("nti,ntj->ij", x, x) / 7, rtol=1e-5)
    assert np.allclose(layer.mean[0], x.mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert np.allclose(layer.output_factor[0], np.einsum("nto,ntp->op", g, g) / 35, rtol=1e-4, atol=1e-7)
    centred = x - x.mean((0, 1))
    expected = np.einsum("nti,ntj->ij", centred, centred) / 7
    assert np.allclose(layer.centred_input_factor[0], expected, rtol=1e-4, atol=1e-5)


def test_gaussian_heads_are_measured_in_their_own_deviation():
    network = network_of("y = MatMul(x, w)", x="float[N, 3] x", y="float[N, 4] y", w=(3, 4))
    feeds = {"x": 10 * np.random.default_rng(3).standard_normal((50, 3)).astype(np.float32)}
    (head,) = collected(network, feeds).heads
    outputs = feeds["x"].astype(np.float64) @ network.prunable[0].weight()[0].T
    assert head.scale == pytest.approx(outputs.std(), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_an_output_without_elements_has_no_deviation():
    constants = {"w": np.eye(4, 3, dtype=np.float32), "zero": np.array([0]), "one": np.array([1])}
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Slice", ["y", "zero", "zero", "one"], ["nothing"])]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 3], "nothing": ["n", 0]}, constants)
    statistics = collected(open_network(model), {"x": weights(20, 4)})
    assert {head.output: head.scale for head in statistics.heads}["nothing"] == 1.0
    assert len(statistics.layers) == 1


def test_inputs_that_cannot_be_fed_are_named():
    model = parser.parse_model(
        """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 4] x, seq(float[N, 4]) s) => (float[N, 4] y) { y = Relu(x) }
    """
    )
    with pytest.raises(KfeError, match="input 's' is no tensor"):
        specs_of(open_network(model).model)
    del model.graph.input[1]
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(KfeError, match="input 'x' has no declared shape: declare one"):
        specs_of(open_network(model).model)


def test_predicted_loss_converges_to_the_true_fisher():
    """Where the distribution is the same for all inputs, A (x) G is the Fisher, and this its quadratic form.

    The weight is zero on the plane in which the inputs lie, so that the bias alone makes the probabilities. The form is
    the second derivative of the Kullback-Leibler divergence from the unchanged model, by autograd.
    """
    random = np.random.default_rng(4)
    samples = 4000
    directions = np.linalg.qr(random.standard_normal((5, 5)))[0]
    x = (random.standard_normal((samples, 3)) * (1, 2, 0.5) + 0.5) @ directions[:3]
    network = network_of(
        "l = Gemm(x, w, b) y = Softmax<axis = 1>(l)",
        x="float[N, 5] x", y="float[N, 4] y", w=(5, 4), b=(4,),
    )  # fmt: skip
    (layer,) = network.prunable
    weight = (random.standard_normal((4, 2)) @ directions[3:]).astype(np.float32)
    model = onnx.ModelProto.FromString(serialize(network.original))
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w"))
    network = open_network(model)
    (layer,) = network.prunable
    statistics = collected(network, {"x": x.astype(np.float32)})
    change = 0.3 * random.standard_normal((4, 5))

    w, b = torch.from_numpy(layer.weight()[0]), torch.from_numpy(layer.bias())
    inputs, d = torch.from_numpy(x), torch.from_numpy(change)
    before = (inputs @ w.T + b).log_softmax(1)

    def divergence(step: torch.Tensor) -> torch.Tensor:
        after = (inputs @ (w + step * d).T + b).log_softmax(1)
        return (before.exp() * (before - after)).sum(1).mean()

    exact = 0.5 * torch.autograd.functional.hessian(divergence, torch.zeros((), dtype=torch.float64))
    layer_statistics = statistics.layers[layer.name]
    predicted = predicted_loss(change, layer_statistics.input_factor[0], layer_statistics.output_factor[0])
    assert predicted == pytest.approx(float(exact), rel=0.05)  # two deviations of a mean over 4,000 targets
