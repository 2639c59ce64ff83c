"""Remove channels, with all that belongs to them in the layers and operators around."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_kfe.graph import LayerCut, Network, find_groups, find_layers, infer_shapes
from onnx_kfe.graph.groups import Constant, Keep, Site
from onnx_kfe.rewrite._editor import Editor, unclear_names

__all__ = ["ChannelPass"]

_Place = tuple[ir.Node, int]


class ChannelPass(InPlacePass):
    """Remove units of channel groups from a copy of a network's model.

    Constants lose the indices that belong to them, a copy where other nodes read them in full or otherwise; attributes,
    sizes, bounds and indices are counted anew, and a computed target of a Reshape becomes a constant. Nodes and values
    keep their names, inputs and outputs are as they were, and shapes in between are inferred again.

    Args:
        network: The network.
        kept: Which units ``[size]`` are kept, by the name of the group in `find_groups`; other groups are kept whole.
    """

    def __init__(self, network: Network, kept: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        super().__init__()
        self.network = network
        self.kept = dict(kept)
        self._cut: dict[str, LayerCut] = {}

    def requires(self, model: ir.Model) -> None:
        """Every node has a name of its own, and the model is a copy of the network's."""
        if unclear := unclear_names(model.graph):
            raise PreconditionError(f"not the name of a single node: '{unclear[0]}'")
        if [node.name for node in model.graph] != [node.name for node in self.network.model.graph]:
            raise PreconditionError("the model is not a copy of the network's")

    def call(self, model: ir.Model) -> PassResult:
        """Remove the channels.

        Raises:
            UsageError: A group that there is not, that cannot be pruned, or of which nothing would be kept.
        """
        groups = find_groups(dataclasses.replace(self.network, model=model))
        keep, self._cut = groups.keep(self.kept), groups.cut(self.kept)
        sites = [site for site in groups.sites if not np.all(keep(site.ids))]
        _write(_edited(sites, keep), Editor(model.graph))
        RemoveUnusedNodesPass()(model)
        _infer_anew(model)
        return PassResult(model, modified=bool(sites))

    def ensures(self, model: ir.Model) -> None:
        """The layers have as many channels as was said."""
        for layer in find_layers(model, self.network.input_shapes):
            cut, geometry = self._cut.get(layer.name), layer.geometry
            if cut is None or geometry is None:
                continue
            found = geometry.out_channels, geometry.in_channels, geometry.groups
            if found != (cut.rows.sum(), cut.columns.sum(), cut.groups):
                raise PostconditionError(f"layer {layer.name} has {found} channels and groups")


def _infer_anew(model: ir.Model) -> None:
    """Infer the shapes of values anew."""
    for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
        value.shape = None
    infer_shapes(model)


def _edited(sites: Sequence[Site], keep: Keep) -> dict[_Place, Constant]:
    """What comes to inputs of nodes; attributes are changed."""
    inputs: dict[_Place, Constant] = {}
    for site in sites:
        node, place = site.node, site.place
        if isinstance(place, str):
            attribute = node.attributes.get(place)
            _set_attribute(node, place, site.edit(None if attribute is None else np.array(attribute.value), keep))
            continue
        value = node.inputs[place] if place < len(node.inputs) else None
        given = None if value is None or value.const_value is None else value.const_value.numpy()
        array = site.edit(inputs.get((node, place), given), keep)
        if array is not None:
            inputs[node, place] = array
    return inputs


def _set_attribute(node: ir.Node, name: str, value: Constant | None) -> None:
    if value is None:
        del node.attributes[name]
    else:
        node.attributes[name] = ir.convenience.convert_attribute(name, value.tolist())


def _write(inputs: Mapping[_Place, Constant], editor: Editor) -> None:
    """Put new constants in place of old ones, or beside them where something reads those in full or otherwise."""
    places: defaultdict[ir.Value | None, list[_Place]] = defaultdict(list)
    for node, place in inputs:
        places[node.inputs[place] if place < len(node.inputs) else None].append((node, place))
    for value, read in places.items():
        arrays = [inputs[each] for each in read]
        alike = all(np.array_equal(array, arrays[0]) for array in arrays)
        if value is not None and value.const_value is not None and alike and len(value.uses()) == len(read):
            _replace(value, arrays[0])
            continue
        for (node, place), array in zip(read, arrays, strict=True):
            name = f"{node.name}/{place}" if value is None or value.const_value is None else f"{value.name}/pruned"
            dtype = ir.DataType.INT64 if value is None or value.dtype is None else value.dtype
            node.resize_inputs(max(place + 1, len(node.inputs)))
            node.replace_input_with(place, editor.constant(name, array, dtype))
        if value is not None and value.is_initializer():
            editor.drop_unused(value)


def _replace(value: ir.Value, array: Constant) -> None:
    assert value.const_value is not None
    dtype = value.const_value.dtype
    value.const_value = ir.tensor(np.ascontiguousarray(array, dtype.numpy()), dtype=dtype, name=value.name)
    value.shape = ir.Shape(array.shape)
