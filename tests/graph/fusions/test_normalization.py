import numpy as np
import pytest

from tests.graph.fusions.fused import assert_expands, fused, kept
from tests.tiny import weights

X = {"x": weights(2, 3, 8)}
SCALE, BETA, BIAS = {"g": weights(8, seed=1)}, {"b": weights(8, seed=2)}, {"c": weights(8, seed=3)}
OPSETS = pytest.mark.parametrize("opset", [11, 17, 21])


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("opset", [11, 16])
def test_layer_normalization_before_it_was_an_operator_of_onnx(opset, axis):
    shape = (8,) if axis == -1 else (3, 8)
    constants = {"g": weights(*shape, seed=1), "b": weights(*shape, seed=2)}
    options = {"axis": axis, "epsilon": 0.1, "opset": opset, "domain": ""}
    assert_expands("LayerNormalization", "x g b", X, constants=constants, **options)
    assert_expands("LayerNormalization", "x g", X, constants={"g": constants["g"]}, **options)


@pytest.mark.parametrize("axis", [-1, 1])
@OPSETS
def test_simplified_layer_normalization(opset, axis):
    constants = {"g": weights(*((8,) if axis == -1 else (3, 8)), seed=1)}
    assert_expands(
        "SimplifiedLayerNormalization", "x g", X, constants=constants, axis=axis, epsilon=0.1, opset=opset, domain=""
    )


def test_squares_do_not_overflow_in_half_precision():
    x, scale = (300 * weights(2, 8)).astype(np.float16), np.ones(8, np.float16)
    normal = assert_expands(
        "SimplifiedLayerNormalization", "x g", {"x": x}, constants={"g": scale}, domain="", tolerance=1e-2
    )
    assert [node.op_type for node in normal.graph].count("Cast") == 2


@pytest.mark.parametrize("inputs", ["x s g", "x s g b", "x s g b c", "x s g - c"])
@OPSETS
def test_skip_layer_normalization(opset, inputs):
    constants = {name: array for name, array in (SCALE | BETA | BIAS).items() if name in inputs}
    arrays, options = X | {"s": weights(2, 3, 8, seed=4)}, {"constants": constants, "opset": opset, "epsilon": 0.1}
    assert_expands("SkipLayerNormalization", inputs, arrays, outputs=["y", "", "", "sum"], **options)


@pytest.mark.parametrize("skip", [(1, 3, 8), (3, 8)])
def test_skips_that_are_the_same_for_all_sequences(skip):
    arrays = X | {"s": weights(*skip, seed=4)}
    assert_expands("SkipLayerNormalization", "x s g b", arrays, constants=SCALE | BETA)


@pytest.mark.parametrize("inputs", ["x s g", "x s g c"])
@OPSETS
def test_skip_simplified_layer_normalization(opset, inputs):
    constants = {name: array for name, array in (SCALE | BIAS).items() if name in inputs}
    arrays = X | {"s": weights(2, 3, 8, seed=4)}
    options = {"constants": constants, "opset": opset, "epsilon": 0.1}
    assert_expands("SkipSimplifiedLayerNormalization", inputs, arrays, outputs=["y", "", "", "sum"], **options)


def test_statistics_that_are_used_keep_the_node():
    model = fused("SkipLayerNormalization", "x x g b", X, constants=SCALE | BETA, outputs=["y", "mean"])
    kept(model)


EMBEDDINGS = {
    "words": weights(11, 8), "places": weights(6, 8, seed=1), "kinds": weights(2, 8, seed=2),
    "g": weights(8, seed=3), "b": weights(8, seed=4),
}  # fmt: skip
TOKENS = {
    "ids": [[3, 1, 4, 1], [5, 9, 2, 6]], "segments": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "mask": [[1, 1, 1, 0], [1, 0, 0, 0]], "positions": [[1, 0, 5, 2], [3, 3, 1, 0]],
}  # fmt: skip


@pytest.mark.parametrize(
    "inputs",
    [
        "ids - words places - g b",
        "ids segments words places kinds g b",
        "ids segments words places kinds g b mask",
        "ids - words places - g b - positions",
        "ids segments words places kinds g b mask positions",
    ],
)
def test_embed_layer_normalization(inputs):
    arrays = {name: np.array(array, np.int32) for name, array in TOKENS.items() if name in inputs.split()}
    constants = {name: array for name, array in EMBEDDINGS.items() if name in inputs.split()}
    outputs = ["y", "lengths" if "mask" in arrays else "", "sum"]
    assert_expands(
        "EmbedLayerNormalization", inputs, arrays, constants=constants, outputs=outputs, integers=["lengths"],
        epsilon=0.01, mask_index_type=int("mask" in arrays), opset=13,
    )  # fmt: skip
