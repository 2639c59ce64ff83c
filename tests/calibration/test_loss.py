"""A user's own loss: factors against per-sample gradients of torch, and what no loss can be."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, parser
from torch.nn import functional as F

import onnx_kfe as kfe
from onnx_kfe.calibration import Statistics, _moments, collect, merge, open_dataset, open_loss
from onnx_kfe.calibration import data_specs as specs_of
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import open_network
from tests.networks import CLASSES, classifier, samples
from tests.tiny import node, tiny, weights

COUNT = 20
X = samples(COUNT)
LABELS = np.random.default_rng(0).integers(0, CLASSES, COUNT)
INPUTS = "float[M, 5] logits, int64[M] labels"
CROSS_ENTROPY = 'l = SoftmaxCrossEntropyLoss<reduction = "none">(logits, labels)'


@pytest.fixture(autouse=True)
def all_positions(monkeypatch: pytest.MonkeyPatch):
    """Statistics at every position, whatever they cost."""
    monkeypatch.setattr(_moments, "_INPUT_COST", math.inf)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", math.inf)


def graph(
    body: str = CROSS_ENTROPY,
    inputs: str = "float[M, 5] logits, int64[M] labels",
    output: str = "float[M] l",
    opset: int = 17,
):
    return parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({output}) {{ {body} }}')


def collected(model: onnx.ModelProto, loss: onnx.ModelProto, feeds: dict[str, np.ndarray], **options) -> Statistics:
    network = open_network(model)
    own = open_loss(loss, network)
    return collect(network, open_dataset(feeds, specs_of(network.model, own)), loss=own, **options)


def linear() -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """Two linear layers, ``x`` [N, 6] to ``logits`` [N, 5], and their weights."""
    w = [weights(6, 7), weights(7, CLASSES, seed=1)]
    nodes = [
        node("MatMul", ["x", "w0"], ["h"], name="first"),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "w1"], ["logits"], name="second"),
    ]
    return tiny(nodes, {"x": ["N", 6]}, {"logits": ["N", CLASSES]}, {"w0": w[0], "w1": w[1]}), w


def cotangents(x: np.ndarray, w: list[np.ndarray], loss) -> dict[str, np.ndarray]:
    """Gradients of each sample's loss by the outputs of `linear`'s layers, by torch, one sample at a time."""
    first, second = [], []
    for place in range(len(x)):
        h = (torch.from_numpy(x[place : place + 1]).double() @ torch.from_numpy(w[0]).double()).requires_grad_()
        y = h.tanh() @ torch.from_numpy(w[1]).double()
        y.retain_grad()
        loss(y, place).backward()
        first.append(h.grad.numpy()[0])
        second.append(y.grad.numpy()[0])
    return {"first": np.array(first), "second": np.array(second)}


def assert_factors(statistics: Statistics, expected: dict[str, np.ndarray]) -> None:
    assert statistics.layers.keys() == expected.keys()
    for name, gradients in expected.items():
        found = statistics.layers[name].output_factor[0]
        wanted = gradients.T @ gradients / len(gradients)
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())


X6 = weights(COUNT, 6, seed=5)


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_cross_entropy_of_labels(opset: int, reduction: str):
    model, w = linear()
    output = "float[M] l" if reduction == "none" else "float l"
    loss = graph(CROSS_ENTROPY.replace("none", reduction), output=output, opset=opset)
    expected = cotangents(X6, w, lambda y, place: F.cross_entropy(y, torch.tensor([LABELS[place]]), reduction="sum"))
    assert_factors(collected(model, loss, {"x": X6, "labels": LABELS}), expected)


def test_arrays_of_the_data_and_inputs_of_the_model():
    """A weighted squared error between targets of the data, and an input of the model beside."""
    model, w = linear()
    body = """
        d = Sub(logits, targets) q = Mul(d, d) axes = Constant<value_ints = [1]>() s = ReduceSum<keepdims = 0>(q, axes)
        e = Exp(x) m = ReduceMean<keepdims = 0>(e, axes) p = Mul(s, m) l = Mul(p, weight)
    """
    inputs = "float[B, 5] logits, float[K, 6] x, float[K, 5] targets, float[K] weight"
    targets, weight = weights(COUNT, CLASSES, seed=7), np.abs(weights(COUNT, seed=8))

    def squared(y: torch.Tensor, place: int) -> torch.Tensor:
        factor = float(np.exp(X6[place].astype(float)).mean() * weight[place])
        return factor * (y - torch.from_numpy(targets[place]).double()).square().sum()

    feeds = {"x": X6, "targets": targets, "weight": weight}
    statistics = collected(model, graph(body, inputs, opset=18), feeds)
    assert_factors(statistics, cotangents(X6, w, squared))
    assert statistics.input_shapes == {"x": (1, 6)}


def test_the_same_expectation_as_a_head():
    """With labels drawn from the model's own distribution the empirical Fisher is that of the head."""
    model, w = linear()
    count = 8000
    x = weights(count, 6, seed=9)
    logits = np.tanh(x @ w[0]) @ w[1]
    labels = (logits + np.random.default_rng(1).gumbel(size=logits.shape)).argmax(1)
    empirical = collected(model, graph(), {"x": x, "labels": labels})
    network = open_network(model)
    heads = collect(network, open_dataset({"x": x}, specs_of(network.model, None)), heads={"logits": "categorical"})
    for name, layer in heads.layers.items():
        expected, found = layer.output_factor[0], empirical.layers[name].output_factor[0]
        np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())
        np.testing.assert_array_equal(empirical.layers[name].input_factor, layer.input_factor)


def test_second_moments_in_the_eigenbases_are_of_the_loss():
    model, w = linear()
    statistics = kfe.collect(model, {"x": X6, "labels": LABELS}, loss=graph(), curvature="ekfac")
    h = np.tanh(X6.astype(float) @ w[0])
    expected = cotangents(X6, w, lambda y, place: F.cross_entropy(y, torch.tensor([LABELS[place]])))["second"]
    moments = statistics.layers["second"].eigen_moments(0)
    centred = h - h.mean(0)
    rotated = np.einsum("no,ni->noi", expected @ moments.output_basis, centred @ moments.input_basis)
    np.testing.assert_allclose(moments.second_moment[:, :, 0], np.square(rotated).mean(0), rtol=1e-3, atol=1e-6)


def test_shards_and_files_keep_the_loss(tmp_path: Path):
    feeds = {"x": X, "labels": LABELS}
    whole = collected(classifier(), graph(), feeds)
    whole.save(tmp_path / "stats")
    assert Statistics.load(tmp_path / "stats").loss == whole.loss is not None
    assert merge([whole]).loss == whole.loss
    other = kfe.collect(classifier(), feeds)
    assert other.loss is None
    with pytest.raises(KfeError, match="different loss"):
        merge([whole, other])


def test_prune_collects_with_the_loss_and_refits_without_what_it_reads():
    targets = weights(COUNT, CLASSES, seed=3)
    body = "d = Sub(logits, targets) q = Mul(d, d) l = ReduceSum<keepdims = 0>(q, axes)"
    loss = graph(body, "float[M, 5] logits, float[M, 5] targets")
    loss.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    result = kfe.prune(classifier(), {"x": X, "targets": targets}, kfe.Macs(0.7), loss=loss, measure=False, round_to=2)
    assert result.statistics.loss is not None
    assert result.plan.changed
    again = {"x": X, "targets": targets}
    plan = kfe.prune(classifier(), again, result.plan, statistics=result.statistics, loss=loss, measure=False)
    assert plan.losses == result.losses
    with pytest.raises(UsageError, match="collected with another loss"):
        kfe.prune(classifier(), {"x": X, "labels": LABELS}, statistics=result.statistics, loss=graph())
    with pytest.raises(UsageError, match="--loss is what statistics are collected with: give --data"):
        kfe.prune(classifier(), loss=loss)


UNFIT = {
    "no output read": (
        graph("l = Mul(scores, scores)", "float[M, 5] scores, int64[M] labels"),
        r"reads scores, labels, but no output of the model \(logits\)",
    ),
    "a matrix": (
        graph("l = Mul(logits, logits)", output="float[M, 5] l"),
        r"its output 'l' is float \[N, 5\].*one value a sample",
    ),
    "integers": (graph("l = Cast<to = 7>(logits)", output="int64[M, 5] l"), "its output 'l' is int64"),
    "constant": (graph("l = Cast<to = 1>(labels) k = Relu(logits)"), "no small change of logits changes it"),
    "two outputs": (
        graph(f"{CROSS_ENTROPY} k = Relu(l)", output="float[M] l, float[M] k"),
        r"has 2 outputs \(l, k\); a loss has one",
    ),
    "another type": (
        graph(inputs="int64[M, 5] logits, int64[M] labels"),
        r"its input 'logits' is int64 \[M, 5\], the model's is float \[N, 5\]",
    ),
    "another rank": (
        graph(inputs="float[M, 5, 1] logits, int64[M] labels"),
        r"its input 'logits' is float \[M, 5, 1\], the model's is float \[N, 5\]",
    ),
    "a scalar of the data": (
        graph("e = Mul(logits, c) l = ReduceSum<keepdims = 0>(e)", "float[M, 5] logits, float c", "float l"),
        r"its input 'c' is float \[\]; what is read of the data is",
    ),
    "no gradient": (
        graph("d = Det(logits) l = Add(d, d)", "float[M, 5] logits", "float l"),
        r"no gradient rule for Det \(node '.*'\)",
    ),
}


@pytest.mark.parametrize(("loss", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_what_no_loss_can_be(loss: onnx.ModelProto, message: str):
    with pytest.raises(UsageError, match=f"--loss graph: .*{message}"):
        open_loss(loss, open_network(classifier()))


def test_opsets_that_cannot_meet():
    loss = graph()
    loss.opset_import.append(helper.make_opsetid("com.example", 2))
    loss.graph.node.append(helper.make_node("Custom", ["logits"], ["c"], domain="com.example"))
    model = classifier(opsets=[helper.make_opsetid("com.example", 1)])
    model.graph.node.append(helper.make_node("Custom", ["pooled"], ["k"], domain="com.example"))
    network = open_network(model)
    network.model.graph.opset_imports["com.example"] = 1
    with pytest.raises(UsageError, match=r"version 2 of the domain 'com\.example', the model has version 1"):
        open_loss(loss, network)
    newer = graph("n = RMSNormalization(logits, s) l = ReduceSum(n)", "float[M, 5] logits, float[5] s", opset=23)
    with pytest.raises(UsageError, match="opset 23 cannot be converted to 21"):
        open_loss(newer, open_network(classifier()))


MEAN = graph(CROSS_ENTROPY.replace("none", "mean"), output="float l")


@pytest.mark.parametrize(
    ("feeds", "loss", "message"),
    [
        ({"labels": LABELS}, MEAN, "for two samples, and .* not their mean"),
        ({}, graph(), "reads 'labels', and the data have no labels"),
        (
            {"labels": np.stack([LABELS, LABELS], 1)},
            graph(),
            r"'labels' as int64 \[\?\], .* int64 \[2, 2\]",
        ),
        ({"labels": LABELS + 99}, graph(), "--loss graph fails in ONNX Runtime"),
    ],
)
def test_what_only_the_data_show(feeds: dict[str, np.ndarray], loss: onnx.ModelProto, message: str):
    with pytest.raises(KfeError, match=message):
        kfe.collect(classifier(), {"x": X, **feeds}, loss=loss)


def test_arrays_that_the_data_lack_are_named_with_what_there_is():
    loss = graph(CROSS_ENTROPY.replace("labels", "truth"), "float[M, 5] logits, int64[M] truth")
    message = r"input truth is missing; found x; --loss graph reads truth of the data, .*\(logits, x\)"
    with pytest.raises(UsageError, match=message):
        kfe.collect(classifier(), {"x": X}, loss=loss)
