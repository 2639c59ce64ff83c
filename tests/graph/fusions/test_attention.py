import numpy as np
import pytest

from onnx_kfe.graph import find_layers, load, normalize
from tests.graph.fusions.fused import assert_equal_outputs, assert_expands, fused, kept
from tests.tiny import weights

X = {"x": weights(2, 5, 8)}
PROJECTION = {"w": weights(8, 24, seed=1) / 2, "b": weights(24, seed=2)}
MASKS = {
    1: np.array([3, 5]),
    2: np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
    3: np.tril(np.ones((2, 5, 5)))[:, ::-1],
}  # fmt: skip


def mask(rank: int) -> dict[str, np.ndarray]:
    return {"m": MASKS[rank].astype(np.int32)}


@pytest.mark.parametrize("opset", [12, 17, 21])
def test_attention(opset):
    normal = assert_expands("Attention", "x w b", X, constants=PROJECTION, num_heads=2, opset=opset)
    layers = [layer for layer in find_layers(normal) if layer.prunable]
    assert [layer.name for layer in layers] == ["fused/query", "fused/key", "fused/value"]
    np.testing.assert_array_equal(np.concatenate([layer.weight()[0] for layer in layers]), PROJECTION["w"].T)


def test_attention_without_bias():
    """ONNX Runtime's kernel for CPUs reads a bias that is not there."""
    without = fused("Attention", "x w", X, constants={"w": PROJECTION["w"]}, num_heads=2)
    zero = PROJECTION | {"b": np.zeros(24, np.float32)}
    assert_equal_outputs(normalize(load(without)), fused("Attention", "x w b", X, constants=zero, num_heads=2), X)


@pytest.mark.parametrize("rank", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_masks(causal, rank):
    assert_expands("Attention", "x w b m", X | mask(rank), constants=PROJECTION, num_heads=2, unidirectional=causal)


@pytest.mark.parametrize("bias", [(2, 2, 5, 5), (1, 2, 5, 5), (2, 1, 5, 5), (1, 1, 5, 5)])
def test_attention_with_a_bias_on_scores(bias):
    arrays = X | mask(2) | {"s": weights(*bias, seed=3)}
    options = {"num_heads": 2, "mask_filter_value": -3.0, "unidirectional": 1, "scale": 0.3}
    assert_expands("Attention", "x w b m - s", arrays, constants=PROJECTION, **options)
    assert_expands("Attention", "x w b - - s", X | {"s": arrays["s"]}, constants=PROJECTION, **options)


def test_values_of_another_width():
    constants = {"w": weights(8, 28, seed=1) / 2, "b": weights(28, seed=2)}
    normal = assert_expands("Attention", "x w b", X, constants=constants, num_heads=2, qkv_hidden_sizes=[8, 8, 12])
    assert [layer.geometry.out_channels for layer in find_layers(normal) if layer.prunable] == [8, 8, 12]


@pytest.mark.parametrize(
    ("inputs", "outputs", "options", "reason"),
    [
        ("x w b - p", ["y", "present"], {}, "past keys and values"),
        ("x w b", ["y"], {"do_rotary": 1}, "do_rotary"),
        ("x w b", ["y", "present"], {}, "output 1 in use"),
        ("x w b e", ["y"], {}, "a mask that may be more than a length a sequence"),
        ("x w b f", ["y"], {}, "a mask of rank 4"),
    ],
)
def test_attention_in_other_forms_is_kept(inputs, outputs, options, reason):
    extra = {"p": weights(2, 2, 2, 3, 4), "e": np.array([3, 5, 0, 0], np.int32), "f": np.ones((2, 1, 9, 9), np.int32)}
    arrays = X | {name: extra[name] for name in inputs.split() if name in extra}
    normal = kept(fused("Attention", inputs, arrays, constants=PROJECTION, outputs=outputs, num_heads=2, **options))
    (layer,) = find_layers(normal, {"x": (1, 5, 8)})
    assert (layer.name, layer.op_type) == ("fused", "Attention")
    assert layer.reason == f"inside com.microsoft.Attention with {reason}"


PARTS = {"q": weights(2, 3, 8), "k": weights(2, 5, 8, seed=1), "v": weights(2, 5, 12, seed=2)}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("inputs", ["q k v", "q k v b", "q k v b m", "q k v - m", "q k v - - s", "q k v b m s"])
def test_multi_head_attention(inputs, opset):
    constants = {"b": weights(28, seed=4)} if "b" in inputs else {}
    possible = mask(2) | {"s": weights(1, 2, 3, 5, seed=3)}
    arrays = PARTS | {name: array for name, array in possible.items() if name in inputs}
    options = {"outputs": ["y", "present_key", "present_value"], "num_heads": 2, "opset": opset}
    assert_expands("MultiHeadAttention", inputs, arrays, constants=constants, **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masks_of_keys(rank):
    masks = mask(rank) if rank < 3 else {"m": MASKS[3][:, :3].astype(np.int32)}
    options = {"num_heads": 4, "scale": 0.2, "mask_filter_value": -5.0}
    assert_expands("MultiHeadAttention", "q k v - m", PARTS | masks, **options)


def test_causal_attention():
    assert_expands("MultiHeadAttention", "x x x - m", X | mask(2), num_heads=2, unidirectional=1)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("x", {}),  # queries, keys and values in one
        ("q k v", {"unidirectional": 1}),
        ("q h h", {}),
        ("q k v - - - h h", {}),
    ],
)
def test_multi_head_attention_in_other_forms_is_kept(inputs, options):
    extra = {"h": weights(2, 2, 5, 4), "x": weights(2, 5, 2, 3, 4)}
    arrays = {name: (PARTS | extra)[name] for name in dict.fromkeys(inputs.replace("-", "").split())}
    normal = kept(fused("MultiHeadAttention", inputs, arrays, num_heads=2, **options))
    assert find_layers(normal) == []


ANGLES = weights(10, 4, seed=3)
CACHES = {"c": np.cos(ANGLES), "s": np.sin(ANGLES)}
POSITIONS = {2: np.array([[0, 3, 5, 9, 2], [1, 1, 7, 6, 4]]), 1: np.array([4])}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rank", POSITIONS)
@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 3, 5, 8)])
def test_rotary_embedding(shape, rank, interleaved, opset):
    arrays = {"x": weights(*shape), "p": POSITIONS[rank]}
    assert_expands("RotaryEmbedding", "x p c s", arrays, constants=CACHES, interleaved=interleaved, opset=opset)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding_of_some_features(interleaved):
    arrays = {"x": weights(2, 5, 36), "p": POSITIONS[2]}
    options = {"num_heads": 3, "rotary_embedding_dim": 8, "interleaved": interleaved}
    assert_expands("RotaryEmbedding", "x p c s", arrays, constants=CACHES, **options)


@pytest.mark.parametrize("options", [{"scale": 2.0}, {"is_packed_batching": 1}])
def test_rotary_embedding_in_other_forms_is_kept(options):
    arrays = {"x": weights(2, 5, 24), "p": POSITIONS[2]}
    kept(fused("RotaryEmbedding", "x p c s", arrays, constants=CACHES, **options))
