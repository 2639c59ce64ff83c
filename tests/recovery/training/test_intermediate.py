"""Values within both models: found by name, given as outputs, and met by training."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import with_outputs
from onnx_kfe.recovery.training import find_intermediate
from tests.networks import classifier, samples
from tests.tiny import node, run, tiny, weights

X = samples(96)


def residual(seed: int = 0, activation: str | None = "Relu", width: int = 6) -> onnx.ModelProto:
    """Two convolutions around which the input of the second is added, then a pooled classifier."""
    constants = {
        "w0": weights(width, 3, 3, 3, seed=seed) / 3, "w1": weights(width, width, 3, 3, seed=seed + 1) / 5,
        "shift": weights(1, width, 1, 1, seed=3), "w": weights(5, width, seed=seed + 2),
    }  # fmt: skip
    behind = [node(activation, ["sum"], ["behind"])] if activation else []
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="conv0", pads=[1, 1, 1, 1]),
        node("Add", ["c0", "shift"], ["shifted"]),
        node("Relu", ["shifted"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        node("Add", ["c1", "r0"], ["sum"]),
        *behind,
        node("GlobalAveragePool", ["behind" if activation else "sum"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Gemm", ["flat", "w"], ["logits"], name="fc", transB=1),
    ]
    return tiny(nodes, {"x": ["N", 3, 8, 8]}, {"logits": ["N", 5]}, constants)


@pytest.mark.parametrize(("activation", "expected"), [("Relu", ["behind"]), (None, ["sum"]), ("Softmax", ["sum"])])
def test_auto_is_what_comes_out_of_residual_sums(activation: str | None, expected: list[str]) -> None:
    models = [ir.from_proto(residual(seed, activation)) for seed in (0, 5)]
    assert find_intermediate(*models, ["auto"]) == expected


def test_values_by_name() -> None:
    student, teacher = (ir.from_proto(residual(seed)) for seed in (0, 5))
    assert find_intermediate(student, teacher, ["c1", "r0"]) == ["c1", "r0"]
    with pytest.raises(UsageError, match="--intermediate 'nope' is none of the teacher's; some that both have: 'c0'"):
        find_intermediate(student, teacher, ["nope"])
    other = ir.from_proto(classifier())
    with pytest.raises(UsageError, match="--intermediate 'c2' is no value that both models compute"):
        find_intermediate(student, other, ["c2"])
    with pytest.raises(UsageError, match="--intermediate auto: the models have no residual sums in common"):
        find_intermediate(student, other, ["auto"])


def test_outputs_are_added_to_a_copy() -> None:
    model = residual()
    given = ir.from_proto(model)
    extended = with_outputs(given, ["behind", "c0"])
    assert [value.name for value in given.graph.outputs] == ["logits"]
    assert [value.name for value in extended.graph.outputs] == ["logits", "behind", "c0"]
    found = run(ir.to_proto(extended), {"x": X[:4]})
    np.testing.assert_allclose(found["logits"], run(model, {"x": X[:4]})["logits"], rtol=1e-5)
    assert found["behind"].min() == 0
    assert found["c0"].shape == (4, 6, 8, 8)


def test_training_meets_them() -> None:
    """The teacher's classifier ignores all channels but one, so that outputs say little of the others."""
    teacher = residual(5)
    for tensor in teacher.graph.initializer:
        if tensor.name == "w":
            array = weights(5, 6, seed=7)
            array[:, 1:] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    student = onnx.ModelProto.FromString(teacher.SerializeToString())
    for tensor in student.graph.initializer:
        if tensor.name == "w1":
            array = onnx.numpy_helper.to_array(tensor) + weights(6, 6, 3, 3, seed=9) / 10
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w1"))

    def distance(model: onnx.ModelProto) -> float:
        values = [run(ir.to_proto(with_outputs(ir.from_proto(m), ["behind"])), {"x": X}) for m in (model, teacher)]
        return float(np.square(values[0]["behind"] - values[1]["behind"]).mean())

    options = {"epochs": 15, "batch": 16, "learning_rate": 5e-3, "measure": False, "device": "cpu", "threads": 1}
    plain, met = (
        kfe.finetune(student, {"x": X}, teacher=teacher, intermediate=names, **options) for names in ((), ["auto"])
    )
    assert [value.name for value in met.model.graph.output] == ["logits"]
    assert list(map(str, met.model.graph.node)) == list(map(str, student.graph.node))
    assert distance(met.model) < 0.3 * distance(student)
    assert distance(met.model) < 0.5 * distance(plain.model)


def test_what_cannot_be_compared() -> None:
    options = {"measure": False, "device": "cpu", "epochs": 1, "threads": 1}
    with pytest.raises(UsageError, match="--intermediate compares with a teacher: give --teacher"):
        kfe.finetune(residual(), {"x": X, "labels": np.zeros(96, np.int64)}, intermediate=["c0"], **options)
    narrow = residual(width=4)
    with pytest.raises(KfeError, match=r"'behind' is \[\d+, 4, 8, 8\] in the model, \[\d+, 6, 8, 8\] in its teacher"):
        kfe.finetune(narrow, {"x": X}, teacher=residual(), intermediate=["auto"], **options)
