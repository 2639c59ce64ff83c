"""Rotate heads of attention: the same function, with the channels of each head in order of what they matter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnx_kfe.calibration import LayerStatistics, Statistics
from onnx_kfe.graph import Layer, Network, Product, find_groups, find_products
from onnx_kfe.kfe import Array, Balance, balance
from onnx_kfe.rewrite._reweigh import ReweighPass, Weights

__all__ = ["Rotated", "rotate"]


class Rotated(NamedTuple):
    """A network whose heads are rotated.

    Attributes:
        network: The network.
        statistics: The statistics that it would have, as far as they follow from those of the original.
    """

    network: Network
    statistics: Statistics


@dataclass(frozen=True)
class _Bases:
    """Bases of a layer's channels, filled head by head: ``outputs @ y`` and ``inputs @ x`` replace y and x."""

    layer: Layer
    outputs: Array
    inputs: Array

    @staticmethod
    def of(layer: Layer) -> _Bases:
        assert layer.geometry is not None
        return _Bases(layer, np.eye(layer.geometry.out_channels), np.eye(layer.geometry.in_channels))

    def weights(self) -> Weights:
        """Weight and bias in them; of a MatMul what is to be added to the bias that the graph adds."""
        turned = np.tensordot(self.outputs, self.layer.weight()[0], 1)
        turned = np.moveaxis(np.tensordot(turned, np.linalg.inv(self.inputs), (1, 0)), -1, 1)
        before = _bias(self.layer)
        bias = self.outputs @ before
        return Weights(turned[None], bias - before if self.layer.op_type == "MatMul" else bias)


def rotate(network: Network, statistics: Statistics) -> Rotated:
    """Give the channels of every head in the basis in which dropping the last of them costs least.

    With R invertible, queries ``R^-T q`` and keys ``R k`` have the same products, and an output layer that reads values
    ``R v`` by ``W R^-1`` gives the same. R is such that the first r channels of a head cost least of all rank-r
    projections under K-FAC, see `balance`. Channel pruning, which drops channels of the same index in all heads, is
    then the joint low rank of both layers. Layers without statistics are left as they are, and so are networks that
    have lost channels: what is left of their heads is in order.

    Args:
        network: The network; it is not modified.
        statistics: Collected on it.

    Raises:
        KfeError: The statistics are of another model.
    """
    statistics.check_model(network.fingerprint, network.name)
    products = () if network.whole is not None else find_products(network, find_groups(network)).found
    layers = {layer.name: layer for layer in network.prunable}
    bases: dict[str, _Bases] = {}
    for product in products:
        seen = statistics.layers.get(product.second.layer)
        if seen is None:
            continue
        first, second = (
            bases.setdefault(side.layer, _Bases.of(layers[side.layer])) for side in (product.first, product.second)
        )
        for here, there in zip(product.first.places, product.second.places, strict=True):
            found = _balance(product, second.layer, seen, there)
            first.outputs[np.ix_(here, here)] = found.forward if product.read else found.backward.T
            (second.inputs if product.read else second.outputs)[np.ix_(there, there)] = found.forward
    if not bases:
        return Rotated(network, statistics)
    model = ReweighPass({name: each.weights() for name, each in bases.items()})(network.model.clone()).model
    rotated = {
        name: each.in_basis(bases[name].outputs, bases[name].inputs) if name in bases else each
        for name, each in statistics.layers.items()
    }
    return Rotated(network.reweighed(model), dataclasses.replace(statistics, layers=rotated))


def _balance(product: Product, layer: Layer, seen: LayerStatistics, places: npt.NDArray[np.int64]) -> Balance:
    """The basis of one head that its second layer asks for.

    Means do not count: that of what is read goes into the bias, and that of the keys changes all scores of a query
    alike, which leaves their softmax as it is. The mean of the queries counts, in the gradients by the keys.
    """
    weight, inputs, outputs = layer.weight()[0], seen.centred_input_factor[0], seen.output_factor[0]
    matrix, head = weight.reshape(len(weight), -1), np.ix_(places, places)
    if product.read:
        columns = matrix[:, places]
        return balance(inputs[head], columns.T @ outputs @ columns)
    return balance(matrix[places] @ inputs @ matrix[places].T, outputs[head])


def _bias(layer: Layer) -> Array:
    """The bias ``[out]`` of a layer, for a MatMul that of the Add behind it."""
    assert layer.geometry is not None
    own = layer.bias()
    if own is not None:
        return own
    uses, out = list(layer.node.outputs[0].uses()), layer.geometry.out_channels
    added = uses[0].node.inputs if len(uses) == 1 and uses[0].node.op_type == "Add" else ()
    biases = (value.const_value.numpy() for value in added if value is not None and value.const_value is not None)
    return next((bias.astype(np.float64) for bias in biases if bias.shape == (out,)), np.zeros(out))
