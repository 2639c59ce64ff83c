"""Einsum that is a matrix product becomes a layer, against ONNX Runtime and einsum of numpy; others stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe.graph import find_layers, load, normalize, open_network
from tests.tiny import node, run, tiny, weights

SIZES = {"b": 3, "s": 5, "d": 6, "n": 2, "h": 4, "t": 7, "e": 2}
PRODUCTS = {  # equation, place of the constant, whether anything is left around the product
    "bsd,dh->bsh": (1, []),
    "bsd,hd->bsh": (1, []),
    "bsd,dnh->bsnh": (1, ["Reshape"]),
    "bsd,dnh->bnsh": (1, ["Reshape", "Transpose"]),
    "bsnh,nhd->bsd": (1, ["Reshape"]),
    "bsnh,hnd->bsd": (1, ["Reshape"]),
    "bnsh,nhd->bsd": (1, ["Transpose", "Reshape"]),
    "hd,bsd->bsh": (0, []),
    "dnh,bsd->bnhs": (0, ["Reshape", "Transpose"]),
    "bds,dh->bhs": (1, ["Transpose", "Transpose"]),
    "bd,dh->hb": (1, ["Transpose"]),
    "bnse,denh->bdsh": (1, ["Transpose", "Reshape", "Reshape", "Transpose"]),
    "...d,dh->...h": (1, []),
    " b s d , d h -> b s h ": (1, []),
}
OTHERS = {
    "bsd,bdh->bsh": (1, "an axis of all three"),
    "bsd,sdh->bsh": (1, "products of their own for each position"),
    "bsd,h->bsdh": (1, "nothing is summed over"),
    "bsd,d->bs": (1, "no axis of its own"),
    "bsd,dh->bh": (1, "an axis of the value is summed over by itself"),
    "bsd,dnh->bsn": (1, "an axis of the constant is summed over by itself"),
    "bbd,dh->bh": (1, "a diagonal"),
    "bsd,dh": (1, "no output"),
}


def model_of(equation: str, place: int) -> onnx.ModelProto:
    terms = equation.replace(" ", "").replace("...", "bs").partition("->")[0].split(",")
    shapes = [[SIZES[axis] for axis in term] for term in terms]
    shapes[1 - place] = ["batch" if size == SIZES["b"] else size for size in shapes[1 - place]]
    names = ["w", "a"] if place == 0 else ["a", "w"]
    nodes = [node("Relu", ["x"], ["a"]), node("Einsum", names, ["y"], "layer", equation=equation)]
    rank = len(equation.replace(" ", "").replace("...", "bs").partition("->")[2]) or 3
    return tiny(nodes, {"x": shapes[1 - place]}, {"y": [f"y{n}" for n in range(rank)]}, {"w": weights(*shapes[place])})


def inputs(model: onnx.ModelProto, batch: int) -> dict[str, np.ndarray]:
    shape = [dim.dim_value or batch for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": weights(*shape, seed=batch)}


@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_become_layers(equation: str):
    place, around = PRODUCTS[equation]
    model = model_of(equation, place)
    assert not find_layers(load(model))
    normal = normalize(load(model))
    (layer,) = find_layers(normal)
    assert (layer.name, layer.op_type, layer.reason) == ("layer", "MatMul", None)
    assert [n.op_type for n in normal.graph if n.op_type not in ("Relu", "MatMul")] == around
    (array,) = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    for batch in (1, 3):
        feeds = inputs(model, batch)
        operands = [np.maximum(feeds["x"], 0), array][:: 1 if place else -1]
        found = run(normal, feeds)["y"]
        np.testing.assert_allclose(found, np.einsum(equation.replace(" ", ""), *operands), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found, run(model, feeds)["y"], rtol=1e-4, atol=1e-5)
    terms = equation.replace(" ", "").replace("...", "bs").replace("->", ",").split(",")
    axes = set("".join(terms)) - {"b"}
    assert layer.macs == np.prod([SIZES[axis] for axis in axes])


@pytest.mark.parametrize("equation", OTHERS)
def test_others_stay(equation: str):
    place, _ = OTHERS[equation]
    normal = normalize(load(model_of(equation, place)))
    assert "Einsum" in {n.op_type for n in normal.graph}


def test_a_shared_constant_and_two_values_stay():
    nodes = [
        node("Einsum", ["x", "w"], ["h"], equation="bd,dh->bh"),
        node("Einsum", ["h", "w"], ["g"], equation="bd,dh->bh"),
        node("Einsum", ["g", "x"], ["y"], equation="bd,bd->b"),
    ]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n"]}, {"w": weights(4, 4)})
    assert [n.op_type for n in normalize(load(model)).graph] == ["Einsum"] * 3


def test_statistics_are_those_of_the_product():
    """The layer reads rows of ``d``, one for each of the other axes."""
    network = open_network(model_of("bnsh,nhd->bsd", 1))
    x = weights(20, 2, 5, 4)
    seen = kfe.collect(network, {"x": x}, heads={"y": "gaussian"}).layers["layer"]
    rows = np.maximum(x, 0).transpose(0, 2, 1, 3).reshape(20, 5, 8).astype(np.float64)
    assert seen.positions == 100
    np.testing.assert_allclose(seen.input_factor[0], np.einsum("nti,ntj->ij", rows, rows) / 20, rtol=1e-4, atol=1e-5)
