from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_kfe.runtime import create_session
from tests.cases import ARCHITECTURES, CASES, load_case


@pytest.mark.parametrize("name", CASES)
def test_case_agrees_with_torch(name: str) -> None:
    case = load_case(name)
    onnx.checker.check_model(case.model, full_check=True)
    session = create_session(case.serialized)
    for batch in (1, 3):
        inputs = case.inputs(batch, seed=batch)
        wanted = case.torch_outputs(inputs)
        for output, found in zip(case.heads, session.run(list(case.heads), inputs), strict=True):
            np.testing.assert_allclose(found, wanted[output], rtol=1e-3, atol=1e-4, err_msg=output)
            spread = wanted[output].std()
            assert 0.02 < spread < 20, f"{output} spreads by {spread}: the weights are badly scaled"


@pytest.mark.parametrize("name", CASES)
def test_outputs_depend_on_the_sample(name: str) -> None:
    """A network that ignores its input (dead units) would test nothing."""
    case = load_case(name)
    for output in case.torch_outputs(case.inputs(8)).values():
        assert output.std(axis=0).mean() > 0.1 * output.std()


def test_cases_cover_what_the_graph_code_must_read() -> None:
    found = {node.op_type for name in CASES for node in load_case(name).model.graph.node}
    wanted = (
        "Add AveragePool BatchNormalization Clip Concat Conv ConvTranspose Elu Erf Flatten Gemm GlobalAveragePool "
        "HardSigmoid HardSwish LayerNormalization LeakyRelu MatMul MaxPool Mul PRelu Pad ReduceMean Relu Reshape "
        "Resize Sigmoid Softmax Softplus Split Sub Tanh Transpose"
    )
    assert not set(wanted.split()) - found
    opsets = {opset.version for name in CASES for opset in load_case(name).model.opset_import if not opset.domain}
    assert {11, 13, 17} < opsets
    assert {len(ARCHITECTURES[name.rpartition("-")[0]].shape) for name in CASES} == {1, 2, 3, 4}


def test_models_are_copies() -> None:
    load_case("mlp-11").model.graph.ClearField("node")
    assert load_case("mlp-11").model.graph.node
