"""Heads: what is detected, and that the sampled targets follow the model's own distribution."""

import numpy as np
import onnx_ir as ir
import pytest
import scipy.special
import scipy.stats
import torch
from onnx import parser

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration import HEAD_KINDS, Head, detect_heads, sample_noise
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, compare
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session

LOGITS = np.array([0.5, -1.0, 2.0, 0.0, 1.0], np.float32)
DRAWS = 20_000
UNLIKELY = 1e-3  # of a test statistic, were the frequencies right; draws are seeded, so it passes always or never


def model(body: str, outputs: str) -> ir.Model:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 4] x) => ({outputs}) <float[4, 4] w = {{{", ".join(["1"] * 16)}}}> {{ h = MatMul(x, w) {body} }}
    """
    return ir.from_proto(parser.parse_model(text))


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ("y = Softmax<axis = 1>(h)", "categorical", "h"),
        ("y = LogSoftmax<axis = 1>(h)", "categorical", "y"),
        ("y = Sigmoid(h)", "bernoulli", "h"),
        ("y = Relu(h)", "gaussian", "y"),
        ("p = Softmax<axis = 1>(h) y = Identity(p)", "categorical", "h"),
        ("p = Sigmoid(h) y = Flatten(p)", "bernoulli", "h"),
        ("p = Sigmoid(h) i = Identity(p) y = Cast<to = 1>(i)", "bernoulli", "h"),
        ("p = Softmax<axis = 1>(h) y = Neg(p)", "gaussian", "y"),
    ],
)
def test_detection_by_the_last_activation(body: str, kind: str, source: str):
    (head,) = detect_heads(model(body, "float[N, 4] y"))
    assert (head.output, head.kind, head.source) == ("y", kind, source)


def test_outputs_that_are_no_tensors_carry_no_loss():
    made = model("y = Relu(h) s = SequenceConstruct(h, y)", "float[N, 4] y, seq(float[N, 4]) s")
    assert [head.output for head in detect_heads(made)] == ["y"]


def test_log_probabilities_are_logits():
    random = np.random.default_rng(0)
    old, new = (scipy.special.log_softmax(random.standard_normal((9, 4)), 1).astype(np.float32) for _ in range(2))
    (head,) = detect_heads(model("y = LogSoftmax<axis = 1>(h)", "float[N, 4] y"))
    comparison = compare(HeadSpec("y", head.kind, head.probabilities, head.axis))
    comparison.update(old, new)
    expected = scipy.special.rel_entr(np.exp(old), np.exp(new)).sum(1).mean()
    assert comparison.result().kl == pytest.approx(expected, rel=1e-5) != 0


def test_the_class_axis_is_that_of_the_softmax():
    (head,) = detect_heads(model("y = Softmax<axis = 0>(h)", "float[N, 4] y"))
    assert head.axis == 0


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("logits", "N, 4", "categorical"),
        ("class_scores", "N, 4", "categorical"),
        ("boxes", "N, 4", "gaussian"),
        ("output", "N, 4", "gaussian"),
        ("logits", "N, 2, 2", "gaussian"),
    ],
)
def test_detection_by_name_of_matrices_only(name: str, shape: str, kind: str):
    body = f"{name} = Relu(h)" if shape == "N, 4" else f"s = Constant<value_ints = [-1, 2, 2]>() {name} = Reshape(h, s)"
    (head,) = detect_heads(model(body, f"float[{shape}] {name}"))
    assert (head.kind, head.source) == (kind, name)


def test_the_user_overrules_detection():
    both = model("p = Softmax<axis = 1>(h) boxes = Relu(h)", "float[N, 4] p, float[N, 4] boxes")
    overruled = detect_heads(both, {"p": "gaussian", "boxes": "categorical"})
    assert [(head.output, head.kind, head.source) for head in overruled] == [
        ("p", "gaussian", "p"),
        ("boxes", "categorical", "boxes"),
    ]
    assert [head.output for head in detect_heads(both, {"boxes": "none"})] == ["p"]


def test_integer_outputs_are_no_heads():
    mixed = model("y = Softmax<axis = 1>(h) best = ArgMax<axis = 1>(h)", "float[N, 4] y, int64[N, 1] best")
    assert [head.output for head in detect_heads(mixed)] == ["y"]


@pytest.mark.parametrize(("sizes", "shape"), [("-1, 4", "N, 4"), ("-1, 2, 1, 2", "N, 2, 1, 2")])
def test_embeddings_are_vectors_at_positions(sizes: str, shape: str):
    other = model(f"s = Constant<value_ints = [{sizes}]>() y = Reshape(h, s)", f"float[{shape}] y")
    with pytest.raises(
        UsageError, match=rf"--head y=embedding: its shape is \[{shape}\], not \[samples, positions, ch"
    ):
        detect_heads(other, {"y": "embedding"})
    vectors = model("s = Constant<value_ints = [-1, 2, 2]>() y = Reshape(h, s)", "float[N, 2, 2] y")
    (head,) = detect_heads(vectors, {"y": "embedding"})
    assert (head.kind, head.source, head.mask, head.probabilities) == ("embedding", "y", "", False)
    (guessed,) = detect_heads(vectors)
    assert guessed.kind == "gaussian"


@pytest.mark.parametrize("kinds", [{"nowhere": "gaussian"}, {"y": "poisson"}])
def test_unknown_outputs_and_kinds_are_named(kinds: dict[str, str]):
    ((name, kind),) = kinds.items()
    with pytest.raises(UsageError, match=f"--head {name}={kind}"):
        detect_heads(model("y = Relu(h)", "float[N, 4] y"), kinds)


def test_without_any_head_there_is_nothing_to_differentiate():
    with pytest.raises(KfeError, match="best"):
        detect_heads(model("best = Cast<to = 7>(h)", "int64[N, 4] best"))


@pytest.mark.parametrize(
    ("body", "outputs", "kind", "source"),
    [
        ("best = ArgMax<axis = 1>(h)", "int64[N, 1] best", "categorical", "h"),
        ("p = Softmax<axis = 1>(h) best = ArgMax<axis = 1>(p)", "int64[N, 1] best", "categorical", "h"),
        ("s = Sigmoid(h) k = Constant<value_ints = [2]>() v, best = TopK(s, k)", "int64[N, 2] best", "bernoulli", "h"),
    ],
)
def test_where_there_are_only_indices_heads_are_what_they_are_the_largest_of(body, outputs, kind, source):
    (head,) = detect_heads(model(body, outputs))
    assert (head.kind, head.source, head.axis % 2) == (kind, source, 1)
    assert head.read_by in ("ArgMax", "TopK")


SUPPRESSED = """
    four = Constant<value_ints = [-1, 2, 4]>() t = Concat<axis = 1>(h, h) b = Reshape(t, four) boxes = Relu(b)
    l = Neg(b) c = Softmax<axis = 2>(l) s = Transpose<perm = [0, 2, 1]>(c)
    most = Constant<value_ints = [3]>() overlap = Constant<value_floats = [0.5]>()
    found = NonMaxSuppression(boxes, s, most, overlap, overlap)
    row = Constant<value_ints = [2]>() which = Gather<axis = 1>(found, row)
    picked = GatherND(boxes, which)
"""


def test_what_suppression_reads_is_the_head_and_not_what_it_picks():
    heads = detect_heads(model(SUPPRESSED, "float[K, 4] picked, int64[K, 3] found"))
    assert [(head.output, head.kind, head.source, head.axis, head.read_by) for head in heads] == [
        ("boxes", "gaussian", "boxes", -1, "NonMaxSuppression"),
        ("c", "categorical", "l", 2, "NonMaxSuppression"),
    ]
    kinds = {"c": "none", "boxes": "bernoulli"}
    (only,) = detect_heads(model(SUPPRESSED, "float[K, 4] picked"), kinds)
    assert (only.output, only.kind) == ("boxes", "bernoulli")
    with pytest.raises(UsageError, match="the model has picked, boxes, c"):
        detect_heads(model(SUPPRESSED, "float[K, 4] picked"), {"l": "gaussian"})


def test_noise_is_a_function_of_seed_and_index():
    heads = [Head("a", "categorical", "a"), Head("b", "gaussian", "b"), Head("c", "bernoulli", "c")]
    shapes = {"a": (1, 5), "b": (1, 2, 3), "c": (1, 4)}

    def flat(seed: int, index: int) -> np.ndarray:
        drawn = sample_noise(heads, shapes, seed, index)
        assert [noise.shape for noise in drawn] == list(shapes.values())
        assert {noise.dtype for noise in drawn} == {np.dtype(np.float32)}
        return np.concatenate([noise.ravel() for noise in drawn])

    assert np.array_equal(flat(3, 17), flat(3, 17))
    for other in (flat(4, 17), flat(3, 18), flat(17, 3)):
        assert not np.isclose(flat(3, 17), other).any()


def cotangents(head: Head, values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What a head's kind seeds the backward pass with, by ONNX Runtime."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
        for name, array in (("value", values), ("noise", noise))
    ]
    made = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21})
    result = HEAD_KINDS[head.kind](Emitter(made, prefix="kfe/"), *inputs, head)
    made.outputs.append(result)
    session = create_session(serialize(ir.Model(made, ir_version=10)))
    return session.run(None, {"value": values, "noise": noise})[0]


def drawn(head: Head, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise and cotangents of many samples that all have the same value."""
    noise = np.concatenate([sample_noise([head], {"y": (1, *values.shape)}, 0, i)[0] for i in range(DRAWS)])
    return noise, cotangents(head, np.repeat(values[None], DRAWS, 0), noise)


def assert_covariance(cotangent: np.ndarray, expected: np.ndarray) -> None:
    """The second moment of the cotangents is the expected covariance, within what the draws can tell."""
    products = cotangent[:, :, None].astype(np.float64) * cotangent[:, None]
    error = np.abs(products.mean(0) - expected) / np.maximum(products.std(0) / DRAWS**0.5, 1e-12)
    assert 2 * scipy.stats.norm.sf(error.max()) * error.size > UNLIKELY


def test_categorical_cotangents_have_the_fisher_of_the_softmax():
    """``diag(p) - p p^T``, the covariance of ``p - onehot(y_hat)``."""
    _, cotangent = drawn(Head("y", "categorical", "y"), LOGITS)
    p = scipy.special.softmax(LOGITS.astype(np.float64))
    assert_covariance(cotangent, np.diag(p) - np.outer(p, p))


def test_bernoulli_cotangents_have_the_fisher_of_the_sigmoid():
    _, cotangent = drawn(Head("y", "bernoulli", "y"), LOGITS)
    p = scipy.special.expit(LOGITS.astype(np.float64))
    assert_covariance(cotangent, np.diag(p * (1 - p)))


@pytest.mark.parametrize("scale", [1.0, 0.25, 30.0])
def test_gaussian_cotangents_are_in_units_of_the_scale(scale: float):
    """A standard normal over sigma, as of ``d/dy (y - y_hat)^2 / (2 sigma^2)`` with y_hat at a distance of sigma."""
    _, cotangent = drawn(Head("y", "gaussian", "y", scale=scale), LOGITS)
    assert scipy.stats.kstest(cotangent.ravel() * scale, "norm").pvalue > UNLIKELY


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_cotangents_are_gradients_of_what_stabilises_the_variance(kind: str):
    random = np.random.default_rng(0)
    values, noise = (random.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    leaf = torch.from_numpy(values.copy()).requires_grad_()
    root = leaf.softmax(1).sqrt() if kind == "categorical" else leaf.sigmoid().sqrt().asin()
    (2 * root * torch.from_numpy(noise)).sum().backward()
    found = cotangents(Head("y", kind, "y"), values, noise)
    assert leaf.grad is not None
    assert np.allclose(found, leaf.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_certain_outputs_have_finite_cotangents(kind: str):
    values = np.float32([[1000, -1000, 0]])
    found = cotangents(Head("y", kind, "y"), values, np.ones_like(values))
    assert np.isfinite(found).all()


def test_classes_on_another_axis():
    values = np.stack([LOGITS, LOGITS[::-1]], 1)[None]  # [1, classes, positions]
    noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    found = cotangents(Head("y", "categorical", "y", axis=1), values, noise)
    for place in range(2):
        column = np.ascontiguousarray(values[:, :, place]), np.ascontiguousarray(noise[:, :, place])
        assert np.allclose(found[:, :, place], cotangents(Head("y", "categorical", "y"), *column), atol=1e-6)


def test_the_weight_is_the_variance_of_the_noise():
    light, heavy = (sample_noise([Head("y", "gaussian", "y", weight=w)], {"y": (1, 5)}, 0, 0)[0] for w in (1.0, 9.0))
    np.testing.assert_array_equal(heavy, 3 * light)
