"""The model as a graph: loading and saving, normalising, shapes and layers."""

from onnx_kfe.graph._branches import Branch, Junction, find_branches, find_junction, only_feeding
from onnx_kfe.graph._io import (
    ModelSource,
    check_output,
    fingerprint,
    load,
    replace_whole,
    save,
    source_name,
)
from onnx_kfe.graph._layers import (
    Geometry,
    Layer,
    count_macs,
    count_parameters,
    find_layers,
    initializer_array,
    weight_place,
)
from onnx_kfe.graph._network import Network, open_network
from onnx_kfe.graph._normalize import normalize
from onnx_kfe.graph._opset import convert_opset
from onnx_kfe.graph._precision import in_single_precision
from onnx_kfe.graph._serialize import in_one_message, serialize
from onnx_kfe.graph._shapes import concrete_shapes, infer_shapes, nominal_input_shapes
from onnx_kfe.graph.groups import ChannelGroup, ChannelGroups, LayerCut, Member, find_groups

__all__ = [
    "Branch",
    "ChannelGroup",
    "ChannelGroups",
    "Geometry",
    "Junction",
    "Layer",
    "LayerCut",
    "Member",
    "ModelSource",
    "Network",
    "check_output",
    "concrete_shapes",
    "convert_opset",
    "count_macs",
    "count_parameters",
    "find_branches",
    "find_groups",
    "find_junction",
    "find_layers",
    "fingerprint",
    "in_one_message",
    "in_single_precision",
    "infer_shapes",
    "initializer_array",
    "load",
    "nominal_input_shapes",
    "normalize",
    "only_feeding",
    "open_network",
    "replace_whole",
    "save",
    "serialize",
    "source_name",
    "weight_place",
]
