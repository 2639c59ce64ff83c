import numpy as np
import pytest

from onnx_kfe.graph import find_layers
from tests.graph.fusions.fused import assert_expands, fused, kept
from tests.tiny import weights

ACTIVATIONS = {"Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": (0.2,), "HardSigmoid": (0.3, 0.4), "Clip": (-0.5, 1)}
OF_GEMM = {
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "Softplus": {}, "Softsign": {}, "LeakyRelu": {"alpha": 0.2},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Elu": {"alpha": 0.7}, "ThresholdedRelu": {"alpha": 0.3},
    "Celu": {"alpha": 0.6}, "Selu": {"alpha": 1.5, "gamma": 1.1},
}  # fmt: skip


@pytest.mark.parametrize("operator", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("right", [0, 1])
def test_products_of_computed_values(left, right, operator):
    a, b = weights(2, 3, *((5, 4) if left else (4, 5))), weights(2, 3, *((6, 5) if right else (5, 6)), seed=1)
    assert_expands(operator, "a b", {"a": a, "b": b}, transA=left, transB=right, alpha=0.3)


@pytest.mark.parametrize("right", [0, 1])
def test_a_product_with_a_constant_is_a_layer_of_that_name(right):
    weight = weights(*((6, 5) if right else (5, 6)))
    normal = assert_expands(
        "FusedMatMul", "x w", {"x": weights(2, 4, 5, seed=1)}, constants={"w": weight}, transB=right, alpha=2.0
    )
    (layer,) = find_layers(normal)
    assert (layer.name, layer.op_type, layer.prunable) == ("fused", "MatMul", True)
    np.testing.assert_array_equal(layer.weight()[0], weight if right else weight.T)


def test_vectors_are_not_transposed():
    assert_expands("FusedMatMul", "a b", {"a": weights(5), "b": weights(3, 5, 4, seed=1)}, transA=1, alpha=0.5)


@pytest.mark.parametrize("attribute", ["transBatchA", "transBatchB"])
def test_other_transpositions_are_kept(attribute):
    model = fused("FusedMatMul", "x w", {"x": weights(2, 4, 5)}, constants={"w": weights(2, 5, 6)}, **{attribute: 1})
    (layer,) = find_layers(kept(model))
    assert layer.reason == f"inside com.microsoft.FusedMatMul with {attribute}"
    assert (layer.macs, layer.parameters) == (0, 60)


def test_ranks_that_nothing_tells_keep_a_transposition():
    arrays = {"x": weights(4, 5)}
    model = fused("FusedMatMul", "x w", arrays, constants={"w": weights(4, 6)}, shapes=False, transA=1)
    assert find_layers(kept(model))[0].reason == "inside com.microsoft.FusedMatMul with 'x' of unknown rank"


@pytest.mark.parametrize("activation", OF_GEMM)
def test_gemm(activation):
    normal = assert_expands(
        "FusedGemm", "x w b", {"x": weights(4, 5)}, constants={"w": weights(6, 5, seed=1), "b": weights(6, seed=2)},
        transB=1, alpha=0.5, beta=2.0, activation=activation,
        **{f"activation_{name}": value for name, value in OF_GEMM[activation].items()},
    )  # fmt: skip
    (layer,) = find_layers(normal)
    assert (layer.name, layer.op_type, layer.prunable) == ("fused", "Gemm", True)
    assert [node.op_type for node in normal.graph] == ["Gemm", activation]


def test_gemm_without_addend_and_with_transposed_input():
    arrays = {"x": weights(5, 4), "w": weights(5, 6, seed=1)}
    assert_expands("FusedGemm", "x w", arrays, transA=1, activation="Relu")


def test_an_activation_that_onnx_lacks_is_kept():
    options = {"activation": "ScaledTanh", "activation_alpha": 1.0, "activation_beta": 1.0}
    model = fused("FusedGemm", "x w", {"x": weights(4, 5)}, constants={"w": weights(5, 6)}, **options)
    assert find_layers(kept(model))[0].reason == "inside com.microsoft.FusedGemm with opset 17, which has no ScaledTanh"


@pytest.mark.parametrize("opset", [10, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution(activation, opset):
    parameters = {"activation_params": [float(p) for p in ACTIVATIONS[activation]]} if ACTIVATIONS[activation] else {}
    normal = assert_expands(
        "FusedConv", "x w b", {"x": weights(2, 4, 7, 6)}, opset=opset,
        constants={"w": weights(6, 2, 3, 2, seed=1), "b": weights(6, seed=2)},
        group=2, strides=[2, 1], pads=[1, 0, 1, 1], dilations=[1, 2], kernel_shape=[3, 2],
        activation=activation, **parameters,
    )  # fmt: skip
    (layer,) = find_layers(normal, {"x": (1, 4, 7, 6)})
    assert (layer.name, layer.op_type, layer.prunable) == ("fused", "Conv", True)
    assert layer.geometry.groups == 2
    assert [node.op_type for node in normal.graph] == ["Conv", activation]


@pytest.mark.parametrize("activation", [None, "Relu"])
@pytest.mark.parametrize("bias", ["b", "-"])
def test_convolution_and_sum(bias, activation):
    arrays = {"x": weights(2, 4, 5, 5), "z": weights(2, 6, 5, 5, seed=3)}
    constants = {"w": weights(6, 4, 3, 3, seed=1)} | ({"b": weights(6, seed=2)} if bias == "b" else {})
    options = {"activation": activation} if activation else {}
    normal = assert_expands(
        "FusedConv", f"x w {bias} z", arrays, constants=constants, auto_pad="SAME_UPPER", **options
    )  # fmt: skip
    assert find_layers(normal, {"x": (1, 4, 5, 5), "z": (1, 6, 5, 5)})[0].prunable


def test_an_activation_of_convolutions_that_is_unknown_is_kept():
    model = fused(
        "FusedConv", "x w", {"x": weights(1, 2, 4, 4)}, constants={"w": weights(3, 2, 1, 1)}, activation="Elu"
    )
    assert find_layers(kept(model))[0].reason == "inside com.microsoft.FusedConv with activation Elu"
