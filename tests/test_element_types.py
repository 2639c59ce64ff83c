"""Models in half and double precision are pruned as those in single precision, and stay what they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

import onnx_kfe as kfe
from onnx_kfe._executable import executable
from onnx_kfe.graph import load
from onnx_kfe.progress import Progress
from tests.networks import classifier, samples

TYPES = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16, TensorProto.DOUBLE: np.float64}
BUDGET = kfe.Macs(0.7)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def converted(dtype: int) -> onnx.ModelProto:
    """The classifier with weights, inputs and outputs of another element type."""
    model = classifier(opset=22, ir_version=10)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(TYPES[dtype])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = dtype
    return model


@pytest.fixture(scope="module")
def single() -> kfe.Statistics:
    return kfe.collect(classifier(opset=22, ir_version=10), samples(64), threads=1)


@pytest.mark.parametrize(
    ("dtype", "close"), [(TensorProto.FLOAT16, 2e-2), (TensorProto.BFLOAT16, 1e-1), (TensorProto.DOUBLE, 1e-5)]
)
def test_statistics_are_those_of_the_model_in_single_precision(dtype, close, single):
    found = kfe.collect(converted(dtype), samples(64), threads=1)
    assert list(found.layers) == list(single.layers) == ["conv0", "conv1", "conv2", "fc"]
    for name, layer in found.layers.items():
        for key in ("input_second_moment", "cotangent_second_moment"):
            wanted = getattr(single.layers[name], key)
            np.testing.assert_allclose(getattr(layer, key), wanted, atol=close * np.abs(wanted).max(), err_msg=name)


@pytest.mark.usefixtures("quick_benchmark")
@pytest.mark.parametrize("dtype", TYPES, ids=TensorProto.DataType.Name)
def test_a_pruned_model_is_of_the_same_type(dtype):
    model, progress = converted(dtype), Notes()
    result = kfe.prune(model, samples(64), BUDGET, threads=1, progress=progress)
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {dtype}
    assert [value.type.tensor_type.elem_type for value in result.model.graph.output] == [dtype]
    assert result.report["macs"]["after"] <= 0.7 * result.report["macs"]["before"]
    executed = dtype == TensorProto.FLOAT16  # no CPU kernels for convolutions in the others
    assert bool(result.timings) == executed
    assert any("lacks kernels" in note for note in progress.notes) != executed
    assert result.quality is not None

    x = samples(20, seed=9).astype(TYPES[dtype])
    old, new = (ReferenceEvaluator(m).run(None, {"x": x})[0].astype(np.float64) for m in (model, result.model))
    whole = kfe.prune(classifier(opset=22, ir_version=10), samples(64), BUDGET, threads=1, measure=False).model
    (reference,) = ReferenceEvaluator(whole).run(None, {"x": x.astype(np.float32)})
    (original,) = ReferenceEvaluator(classifier(opset=22, ir_version=10)).run(None, {"x": x.astype(np.float32)})
    rounding = {TensorProto.BFLOAT16: 0.05}.get(dtype, 0.005)
    assert np.std(new - old) == pytest.approx(
        np.std(reference - original), rel=0.2, abs=rounding * float(np.std(original))
    )


@pytest.mark.parametrize("dtype", TYPES, ids=TensorProto.DataType.Name)
def test_quality_of_models_that_cannot_be_executed_is_that_in_single_precision(dtype):
    quality = kfe.evaluate(converted(dtype), samples(8), reference=converted(dtype), threads=1)
    assert quality.heads[0].kl == pytest.approx(0, abs=1e-6)


def test_models_that_can_be_executed_are():
    for model in (classifier(), converted(TensorProto.FLOAT16)):
        loaded = load(model)
        assert executable(loaded) is loaded
    found = executable(load(converted(TensorProto.BFLOAT16)))
    assert found.graph.inputs[0].dtype.name == "FLOAT"
    with pytest.raises(kfe.UsageError, match="Abacus is not available"):
        executable(load(converted(TensorProto.DOUBLE)), ["Abacus"])
