"""Metrics of the user's own: what they are given, what is made of what they return."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, evaluate, find_metric
from tests.evaluation.small import Data, linear, serialise

RNG = np.random.default_rng(0)
OLD = RNG.standard_normal((12, 10))
NEW = OLD + 0.3 * RNG.standard_normal((12, 10))
X = RNG.standard_normal((40, 12)).astype(np.float32)
LABELS = (X @ OLD).argmax(1)
ME = "tests.evaluation.test_custom"
HEADS = [HeadSpec("y", "categorical")]


def accuracy(outputs, original, labels):
    assert outputs["y"].shape == original["y"].shape == (40, 10)
    return (outputs["y"].argmax(1) == labels).mean()


def rows(outputs, original, labels):
    """Of outputs of any length a list."""
    assert labels is None
    assert len(outputs["found"]) == len(outputs["y"]) == 40
    assert isinstance(outputs["found"], list)
    return -sum(map(len, outputs["found"]))


def broken(outputs, original, labels):
    raise ValueError("no boxes")


def endless(outputs, original, labels):
    return float("nan")


def singles(labels=None):
    return [Data({"x": X[i : i + 1]}, None if labels is None else labels[i : i + 1]) for i in range(40)]


def measured(name, labels=None, made=linear):
    model, original = made(NEW), made(OLD)
    return evaluate(model, singles(labels), reference=original, heads=HEADS, metric=f"{ME}:{name}").score


def test_a_function_of_the_outputs_and_labels():
    found = measured("accuracy", LABELS)
    right = (X @ NEW.astype(np.float32)).argmax(1) == LABELS
    assert (found.original, found.model) == (1.0, pytest.approx(right.mean()))
    assert 0 < found.drop.value < 1
    half = 1.96 * right.std() / 40**0.5
    assert (found.drop.high - found.drop.low) / 2 == pytest.approx(half, rel=0.5)


def detector(weight: np.ndarray) -> bytes:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("NonZero", ["r"], ["places"]),
        helper.make_node("Transpose", ["places"], ["found"]),
    ]
    outputs = {"y": (TensorProto.FLOAT, ["N", 10]), "found": (TensorProto.INT64, ["K", 2])}
    return serialise(nodes, {"x": (TensorProto.FLOAT, ["N", 12])}, outputs, {"w": weight.astype(np.float32)})


def test_outputs_of_any_length():
    found = measured("rows", made=detector)
    counts = [-int((X @ weight.astype(np.float32) > 0).sum()) for weight in (OLD, NEW)]
    assert (found.original, found.model) == tuple(counts)
    assert found.drop.value == counts[0] - counts[1]


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "raised ValueError: no boxes"), ("endless", "returned nan; it must be a finite")]
)
def test_functions_that_fail_are_named(name, message):
    with pytest.raises(KfeError, match=f"--metric {ME}:{name} {message}"):
        measured(name)


def test_names_that_are_no_functions():
    with pytest.raises(UsageError, match="nowhere:f: cannot be imported"):
        find_metric("nowhere:f")
    with pytest.raises(UsageError, match="expected a function"):
        find_metric(f"{ME}:ME")
    with pytest.raises(UsageError, match=r"--metric mAP: it can be agreement, .*, miou, or package\.module:function"):
        find_metric("mAP")
