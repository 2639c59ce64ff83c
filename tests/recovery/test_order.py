"""The order in which layers are solved, of weights that are shared and of others."""

from __future__ import annotations

import onnx
import pytest

from onnx_kfe.graph import open_network
from onnx_kfe.recovery._order import solving_order
from tests.cases import load_case
from tests.tied import pyramid, siamese, stacked


@pytest.mark.parametrize("name", ["inception-17", "unet-13", "attention-13"])
def test_without_shared_weights_it_is_that_of_the_graph(name: str):
    layers = open_network(load_case(name).model).prunable
    assert solving_order(layers) == (layers, [])


@pytest.mark.parametrize(
    ("model", "order", "settled"),
    [
        # the head of the first level comes before the third level, and waits for it
        (pyramid(), ["Conv0", "Conv2", "Conv4", "Conv6", "Conv8", "Conv10"], []),
        (siamese(), ["p/first", "p/second", "last"], []),
        (stacked(), ["MatMul19"], ["MatMul0", "MatMul3"]),
        # what is between the two is solved in front of neither, and around both
        (load_case("shared-11").model, ["/0/0.0/Conv", "/3/3.0/Conv", "/6/6.2/Gemm"], ["/1/Conv"]),
    ],
)
def test_layers_come_behind_what_they_read(model: onnx.ModelProto, order: list[str], settled: list[str]):
    found = solving_order(open_network(model).prunable)
    assert [[layer.name for layer in part] for part in found] == [order, settled]
