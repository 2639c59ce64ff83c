"""Heads of small graphs: which channels are of one head, and why some are of none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_kfe.graph import Products, find_groups, find_products, open_network
from tests.cases import load_case
from tests.topologies import IMAGE, TOKENS, TOPOLOGIES, Builder

HEADS, SIZE = 3, 5
WIDTH = HEADS * SIZE


def products_of(model: onnx.ModelProto, **options: object) -> Products:
    network = open_network(model, **options)  # type: ignore[arg-type]
    return find_products(network, find_groups(network))


def split_up(b: Builder, x: str) -> str:
    """``[n, t, heads * d]`` to ``[n, heads, t, d]``."""
    return b.op("Transpose", b.op("Reshape", x, b.const([0, 0, HEADS, SIZE])), perm=[0, 2, 1, 3])


def attend(b: Builder, q: str, k: str, v: str) -> str:
    """The mixed values of all heads ``[n, t, heads * d]``."""
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    shares = b.op("Softmax", b.op("Div", scores, b.const(np.float32(2))), axis=-1)
    return b.op("Reshape", b.op("Transpose", b.op("MatMul", shares, v), perm=[0, 2, 1, 3]), b.const([0, 0, WIDTH]))


def attention(change: Callable[[Builder, dict[str, str]], None] = lambda b, heads: None) -> onnx.ModelProto:
    """Attention of which queries, keys and values ``[n, heads, t, d]`` are changed on the way."""
    b = Builder()
    heads = {name: split_up(b, b.matmul("x", 12, WIDTH)) for name in "qkv"}
    change(b, heads)
    return b.model(TOKENS, b.matmul(attend(b, heads["q"], heads["k"], heads["v"]), WIDTH, 12))


def test_heads_of_attention() -> None:
    scores, values = products_of(attention()).found
    places = np.arange(WIDTH).reshape(HEADS, SIZE)
    assert (scores.first.layer, scores.second.layer, scores.read) == ("MatMul0", "MatMul4", False)
    assert (values.first.layer, values.second.layer, values.read) == ("MatMul8", "MatMul19", True)
    assert (scores.group, values.group) == ("MatMul0", "MatMul8")
    for side in (scores.first, scores.second, values.first, values.second):
        np.testing.assert_array_equal(side.places, places)


def test_computed_shapes() -> None:
    found, declined = products_of(TOPOLOGIES["computed_target"]())
    assert [product.first.places.shape for product in found] == [(3, 5), (3, 5)]
    assert not declined


@pytest.mark.parametrize("name", ["attention-13", "attention-dynamo", "tokenizer_transformer-17"])
def test_one_layer_for_queries_keys_and_values(name) -> None:
    """As many vision Transformers have it: three parts of one axis, picked by an index."""
    found, declined = products_of(load_case(name).model)
    scores, values = sorted(found, key=lambda product: product.read)
    assert not declined
    np.testing.assert_array_equal(scores.first.places, np.arange(16).reshape(2, 8))
    np.testing.assert_array_equal(scores.second.places, np.arange(16, 32).reshape(2, 8))
    np.testing.assert_array_equal(values.first.places, np.arange(32, 48).reshape(2, 8))
    np.testing.assert_array_equal(values.second.places, np.arange(16).reshape(2, 8))
    assert scores.group == values.group  # the index of a channel is the same in all three


def test_parts_by_slices() -> None:
    b = Builder()
    x = b.matmul("x", 12, 3 * WIDTH)
    parts = [b.op("Slice", x, b.const([n * WIDTH]), b.const([(n + 1) * WIDTH]), b.const([2])) for n in range(3)]
    mixed = attend(b, *(split_up(b, part) for part in parts))
    scores, values = products_of(b.model(TOKENS, b.matmul(mixed, WIDTH, 12))).found
    np.testing.assert_array_equal(scores.second.places, WIDTH + np.arange(WIDTH).reshape(HEADS, SIZE))
    assert (scores.group, values.group) == ("MatMul0", "MatMul0:2")


def test_heads_that_lie_the_other_way() -> None:
    """Channels of a head are not neighbours, and the output reads them in yet another order."""
    b = Builder()
    x = b.op("Reshape", b.matmul("x", 12, WIDTH), b.const([0, 0, SIZE, HEADS]))
    v = b.op("Transpose", x, perm=[0, 3, 1, 2])
    shares = b.op("Softmax", b.op("Reshape", b.matmul("x", 12, HEADS * 6), b.const([0, HEADS, 6, 6])), axis=-1)
    mixed = b.op("Reshape", b.op("Transpose", b.op("MatMul", shares, v), perm=[0, 2, 1, 3]), b.const([0, 0, WIDTH]))
    (values,) = products_of(b.model(TOKENS, b.matmul(mixed, WIDTH, 12))).found
    np.testing.assert_array_equal(values.first.places, np.arange(WIDTH).reshape(SIZE, HEADS).T)
    np.testing.assert_array_equal(values.second.places, np.arange(WIDTH).reshape(HEADS, SIZE))


def test_layers_with_nothing_between_are_one_head() -> None:
    """As the linear bottlenecks of MobileNets where there is no shortcut."""
    b = Builder()
    (found,) = products_of(b.model(IMAGE, b.conv(b.conv("x", 3, 6), 6, 4, 1))).found
    assert (found.first.layer, found.second.layer, found.read) == ("Conv0", "Conv1", True)
    np.testing.assert_array_equal(found.first.places, [range(6)])


def rotary(b: Builder, heads: dict[str, str]) -> None:
    heads["q"] = b.op("Mul", heads["q"], b.weight(SIZE))


def activated(b: Builder, heads: dict[str, str]) -> None:
    heads["v"] = b.op("Relu", heads["v"])


def biased_later(b: Builder, heads: dict[str, str]) -> None:
    heads["k"] = b.op("Add", heads["k"], b.weight(HEADS, 1, SIZE))


def read_twice(b: Builder, heads: dict[str, str]) -> None:
    heads["q"] = heads["k"]


def scaled(b: Builder, heads: dict[str, str]) -> None:
    heads["q"] = b.op("Mul", b.const(np.float32([[0.25]])), heads["q"])


def added(b: Builder, heads: dict[str, str]) -> None:
    heads["v"] = b.op("Add", heads["v"], split_up(b, b.matmul("x", 12, WIDTH)))


DECLINED: Mapping[str, tuple[Callable[[Builder, dict[str, str]], None], dict[str, str], int]] = {
    "rotary": (rotary, {"MatMul0": "Mul 'Mul12' tells its channels apart"}, 1),
    "activated": (activated, {"MatMul8": "Relu 'Relu12' tells its channels apart"}, 1),
    "biased later": (biased_later, {"MatMul0": "Add 'Add12' tells its channels apart"}, 1),
    "keys are queries": (read_twice, {"MatMul4": "MatMul 'MatMul13' has several heads share it"}, 1),
    "two values": (added, {"MatMul8": "Add 'Add16' tells its channels apart"}, 1),
    "scaled": (scaled, {}, 2),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_tells_channels_apart_declines(name) -> None:
    change, reasons, count = DECLINED[name]
    found, declined = products_of(attention(change))
    assert declined == reasons
    assert len(found) == count
    assert not {product.group for product in found} & set(declined)


def test_normalised_queries_and_layers_left_out_have_no_channels_that_can_go() -> None:
    def normalised(b: Builder, heads: dict[str, str]) -> None:
        heads["q"] = b.op("LayerNormalization", heads["q"], b.weight(SIZE), b.weight(SIZE))

    found, declined = products_of(attention(normalised))
    assert ([product.group for product in found], declined) == (["MatMul8"], {})
    found, _ = products_of(attention(), exclude=["MatMul19"])
    assert [product.group for product in found] == ["MatMul0"]


def test_shared_keys_decline() -> None:
    """One head of keys for all queries."""
    b = Builder()
    q = split_up(b, b.matmul("x", 12, WIDTH))
    k = b.op("Unsqueeze", b.matmul("x", 12, SIZE), b.const([1]))
    shares = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    v = split_up(b, b.matmul("x", 12, WIDTH))
    mixed = b.op("Reshape", b.op("Transpose", b.op("MatMul", shares, v), perm=[0, 2, 1, 3]), b.const([0, 0, WIDTH]))
    found, declined = products_of(b.model(TOKENS, b.matmul(mixed, WIDTH, 12)))
    assert [product.read for product in found] == [True]
    assert list(declined.values()) == ["MatMul 'MatMul8' has several heads share it"]


def test_no_heads_where_there_is_no_attention() -> None:
    found, declined = products_of(load_case("residual-11").model)
    assert not found
    assert not declined


def test_a_real_transformer(assets: Path) -> None:
    found, declined = products_of(onnx.load(assets / "models" / "cifar10_cct_vit.onnx"))
    assert [(product.read, product.first.places.shape) for product in found] == [(False, (4, 32)), (True, (4, 32))] * 4
    assert not declined
