import json

import numpy as np
import pytest
from onnx import TensorProto, helper
from scipy import special

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, Rate, evaluate
from tests.evaluation.small import Data, linear, serialise

RNG = np.random.default_rng(0)
OLD = RNG.standard_normal((12, 10))
NEW = OLD + 0.3 * RNG.standard_normal((12, 10))
X = RNG.standard_normal((203, 12)).astype(np.float32)
LABELS = (X @ OLD + 3 * RNG.standard_normal((203, 10))).argmax(1)
HEAD = [HeadSpec("y", "categorical")]


def batches(*, labels=LABELS, size=32):
    for i in range(0, len(X), size):
        yield Data({"x": X[i : i + size]}, None if labels is None else labels[i : i + size])


def top(weight, k):
    order = np.argsort(-(X @ weight.astype(np.float32)), axis=1, kind="stable")[:, :k]
    return (order == LABELS[:, None]).any(1).mean()


def test_accuracy_of_both_models_from_one_pass():
    quality = evaluate(linear(NEW), batches(), reference=linear(OLD), heads=HEAD)
    assert quality.samples == 203
    for accuracy, weight in ((quality.accuracy, NEW), (quality.reference_accuracy, OLD)):
        assert accuracy.top1 == Rate.wilson(top(weight, 1), 203)
        assert accuracy.top5 == Rate.wilson(top(weight, 5), 203)
    assert 0.2 < quality.accuracy.top1.value < quality.accuracy.top5.value < 1
    p, q = (special.softmax(X.astype(float) @ w, axis=1) for w in (OLD, NEW))
    (head,) = quality.heads
    assert head.kl == pytest.approx(special.rel_entr(p, q).sum(1).mean(), rel=1e-4)
    assert head.agreement.value == (p.argmax(1) == q.argmax(1)).mean()


def test_batch_size_changes_nothing():
    one, many = (evaluate(linear(NEW), batches(size=size), reference=linear(OLD), heads=HEAD) for size in (203, 20))
    assert one.accuracy == many.accuracy
    assert one.heads[0].kl == pytest.approx(many.heads[0].kl, rel=1e-6)


def test_accuracy_without_reference_and_fidelity_without_labels():
    alone = evaluate(linear(NEW), batches(), heads=HEAD)
    assert alone.heads == ()
    assert alone.reference_accuracy is None
    unlabelled = evaluate(linear(NEW), batches(labels=None), reference=linear(OLD), heads=HEAD)
    assert unlabelled.accuracy is None
    assert unlabelled.heads[0].kl > 0


def test_an_embedding_is_compared_as_its_mean():
    x = RNG.standard_normal((30, 4, 12)).astype(np.float32)
    mask = np.arange(4) < RNG.integers(1, 5, 30)[:, None]
    spec = HeadSpec("y", "embedding", scale=2.0, mask="m")
    models = [linear(weight, rank=3) for weight in (NEW, OLD)]
    means = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    old, new = (means.astype(float) @ weight for weight in (OLD, NEW))
    data = [Data({"x": x[i : i + 8], "m": mask[i : i + 8]}) for i in range(0, 30, 8)]
    found = evaluate(models[0], data, reference=models[1], heads=[spec], metric="cosine")
    (head,) = found.heads
    errors = np.square(new - old).sum(1)
    assert head.relative_error == pytest.approx(np.sqrt(errors.sum() / np.square(old - old.mean(0)).sum()), rel=1e-4)
    assert head.nats == pytest.approx(errors.mean() / (2 * 2.0**2), rel=1e-4)
    cosines = (old * new).sum(1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
    assert found.score.model == pytest.approx(cosines.mean(), rel=1e-4)


def test_model_from_a_path(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(linear(NEW))
    for source in (path, str(path)):
        assert evaluate(source, batches(), heads=HEAD) == evaluate(linear(NEW), batches(), heads=HEAD)


def test_few_classes_have_no_top5_and_ties_go_to_the_first():
    flat = linear(np.zeros((12, 3)))
    quality = evaluate(flat, [Data({"x": X[:4]}, np.array([0, 0, 1, 2]))], heads=HEAD)
    assert quality.accuracy.top1.value == 0.5
    assert quality.accuracy.top5 is None


def test_labels_of_positions():
    x = X[:200].reshape(20, 10, 12)
    labels = LABELS[:200].reshape(20, 10)
    quality = evaluate(linear(NEW, rank=3), [Data({"x": x}, labels)], heads=HEAD)
    hits = (x @ NEW.astype(np.float32)).argmax(-1) == labels
    assert quality.accuracy.top1 == Rate.wilson(hits.mean(), 20)


def two_heads(weight):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["features"]),
        helper.make_node("Softmax", ["features"], ["p"], axis=-1),
        helper.make_node("ArgMax", ["p"], ["class"], axis=-1),
    ]
    floats = (TensorProto.FLOAT, ["N", 10])
    outputs = {"features": floats, "p": floats, "class": (TensorProto.INT64, ["N", 1])}
    return serialise(nodes, {"x": (TensorProto.FLOAT, ["N", 12])}, outputs, {"w": weight.astype(np.float32)})


def test_heads_by_default_skip_integers_and_what_one_model_lacks():
    quality = evaluate(two_heads(NEW), batches(labels=None), reference=two_heads(OLD))
    assert [(head.name, head.kind) for head in quality.heads] == [("features", "gaussian"), ("p", "gaussian")]
    quality = evaluate(two_heads(NEW), batches(labels=None), reference=linear(OLD, output="features"))
    assert [head.name for head in quality.heads] == ["features"]


@pytest.mark.parametrize(("activation", "attributes"), [("Identity", {}), ("Softmax", {"axis": -1})])
def test_labels_by_default_belong_to_the_class_scores(activation, attributes):
    models = [linear(weight, activation, **attributes) for weight in (NEW, OLD)]
    quality = evaluate(models[0], batches(), reference=models[1])
    stated = evaluate(linear(NEW), batches(), reference=linear(OLD), heads=HEAD)
    assert quality.accuracy == stated.accuracy
    assert quality.heads[0].kl == pytest.approx(stated.heads[0].kl, rel=1e-4)


def test_as_dict_is_json():
    quality = evaluate(two_heads(NEW), batches(), reference=two_heads(OLD))
    values = json.loads(json.dumps(quality.as_dict(), allow_nan=False))
    assert values["samples"] == 203
    assert values["accuracy"]["top1"]["value"] == quality.accuracy.top1.value
    assert values["heads"][1]["relative_error"] == quality.heads[1].relative_error
    constant = [linear(np.zeros((12, 2)), "Elu"), linear(np.zeros((12, 2)), "Exp")]
    endless = evaluate(constant[0], batches(labels=None), reference=constant[1])
    assert endless.heads[0].relative_error == np.inf
    assert json.loads(json.dumps(endless.as_dict(), allow_nan=False))["heads"][0]["relative_error"] is None


@pytest.mark.parametrize(
    ("heads", "data", "reference", "message"),
    [
        (HEAD, [], None, "the data has no samples"),
        (HEAD, [Data({"x": X[:0]}, LABELS[:0])], None, "the data has no samples"),
        (HEAD, list(batches(labels=None)), None, "nothing to measure.*reference model or labels"),
        ([HeadSpec("y", "gaussian")], list(batches()), None, "nothing to measure.*--head NAME=categorical"),
        (HEAD, [Data({"x": X}, LABELS), Data({"x": X})], None, "some batches of the data have labels"),
        (HEAD, [Data({"x": X}, LABELS + 1)], None, "label 10 is no class of head 'y', which has 10"),
        (HEAD, [Data({"x": X}, LABELS - 1)], None, "label -1 is no class"),
        (HEAD, [Data({"x": X}, LABELS[:-1])], None, r"must be 203 integers in this batch, not int64 \[202\]"),
        (HEAD, [Data({"x": X}, LABELS / 2)], None, "must be 203 integers in this batch, not float64"),
        (HEAD, [Data({"z": X}, LABELS)], None, r"the model has an input 'x' that the data does not give .*: z"),
        (HEAD, [Data({"x": X[:, :5]}, LABELS)], None, "the model fails in ONNX Runtime"),
        (HEAD, [Data({"x": X * np.nan}, LABELS)], None, "output 'y' of the model has NaN"),
        ([HeadSpec("q", "categorical")], list(batches()), None, "head 'q' is not an output of the model, .*: y"),
        (HEAD, list(batches()), linear(OLD, output="q"), "head 'y' is not an output of the reference model, .*: q"),
        (None, list(batches()), linear(OLD, output="q"), "no floating-point output"),
        (HEAD, list(batches()), linear(OLD[:, :7]), r"is \[32, 10\] in the model but \[32, 7\] in the reference"),
        (HEAD, list(batches()), b"no model", "the reference model: ONNX Runtime cannot load"),
    ],
)
def test_errors(heads, data, reference, message):
    with pytest.raises(KfeError, match=message):
        evaluate(linear(NEW), data, reference=reference, heads=heads)


def test_integer_head():
    with pytest.raises(UsageError, match=r"head 'class' is tensor\(int64\) in the model"):
        evaluate(two_heads(NEW), batches(), heads=[HeadSpec("class", "categorical")])
