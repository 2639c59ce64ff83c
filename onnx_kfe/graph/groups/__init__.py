"""Channel dependency groups: which channels of which layers can only be removed together."""

from onnx_kfe.graph.groups import (
    _elementwise,
    _linear,
    _movement,
    _normalization,
    _pooling,
    _reshape,
    _selection,
)
from onnx_kfe.graph.groups._find import find_groups
from onnx_kfe.graph.groups._groups import ChannelGroup, ChannelGroups, LayerCut, Member
from onnx_kfe.graph.groups._products import Product, Products, find_products
from onnx_kfe.graph.groups._sites import Constant, Keep, Site

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "Constant",
    "Keep",
    "LayerCut",
    "Member",
    "Product",
    "Products",
    "Site",
    "find_groups",
    "find_products",
]

# Imported for the rules they register.
del _elementwise, _linear, _movement, _normalization, _pooling, _reshape, _selection
