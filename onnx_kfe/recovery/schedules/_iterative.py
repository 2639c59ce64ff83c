"""Pruning in rounds with training in between (iterative pruning, Wang et al. 2019): taking over what was learnt.

The rounds collect statistics on the model as it is, prune a part and fold the new rotations into the old ones; see
``onnx-kfe prune --iterations``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph import Layer, Network, find_layers
from onnx_kfe.kfe import Array
from onnx_kfe.planning import Directions

__all__ = ["learnt_directions", "with_weights"]


def with_weights(network: Network, model: ir.Model) -> Network:
    """A network with the constants of another model, at the nodes of the same name.

    Args:
        network: The network; it is not modified.
        model: A trained model.
    """
    trained = {node.name: node for node in model.graph}
    changed = network.model.clone()
    for node in changed.graph:
        other = trained.get(node.name)
        for old, new in zip(node.inputs, () if other is None else other.inputs, strict=False):
            if old is None or new is None or old.const_value is None or new.const_value is None:
                continue
            if old.const_value.shape == new.const_value.shape:
                old.const_value = new.const_value
    return network.reweighed(changed)


def learnt_directions(network: Network, layer: str, form: str, model: ir.Model) -> tuple[Directions, Array]:
    """The three factors of a layer as they are after training, and its bias.

    A bias that became one with an addition behind the chain is taken over with that, by `with_weights`.

    Args:
        network: The network that the layer is of.
        layer: Name of the layer.
        form: Name of the form.
        model: The trained model.

    Returns:
        The directions, and the bias ``[out]``.
    """
    stem = f"{layer}/{form}_"
    found = [each for each in find_layers(model, network.input_shapes) if each.name.startswith(stem)]
    first, core, last = (each.weight()[0] for each in sorted(found, key=_number))
    encoder, decoder = (array.reshape(array.shape[:2]) for array in (first, last))
    bias = max(found, key=_number).bias()
    for node in model.graph:
        if node.name == f"{layer}/bias_add" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            bias = node.inputs[1].const_value.numpy().astype(np.float64).reshape(-1)
    return Directions(encoder, core, decoder), np.zeros(len(decoder)) if bias is None else bias


def _number(layer: Layer) -> int:
    return int(layer.name.rpartition("_")[2])
