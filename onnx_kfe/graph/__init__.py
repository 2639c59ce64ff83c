"""The model as a graph: loading and saving, normalising, shapes and layers."""

from onnx_kfe.graph._affine import clip_bounds
from onnx_kfe.graph._branches import Branch, Junction, find_branches, find_junction, only_feeding
from onnx_kfe.graph._embeddings import find_embeddings
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
from onnx_kfe.graph._outputs import computed_values, with_outputs
from onnx_kfe.graph._precision import in_single_precision
from onnx_kfe.graph._serialize import in_one_message, serialize
from onnx_kfe.graph._shapes import concrete_shapes, infer_shapes, nominal_input_shapes, without_weights
from onnx_kfe.graph.groups import (
    ChannelGroup,
    ChannelGroups,
    LayerCut,
    Member,
    Product,
    Products,
    find_groups,
    find_products,
)

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
    "Product",
    "Products",
    "check_output",
    "clip_bounds",
    "computed_values",
    "concrete_shapes",
    "count_macs",
    "count_parameters",
    "find_branches",
    "find_embeddings",
    "find_groups",
    "find_junction",
    "find_layers",
    "find_products",
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
    "with_outputs",
    "without_weights",
]
