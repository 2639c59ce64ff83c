"""The backward graph: vector-Jacobian products as ONNX nodes in the graph they differentiate.

A rule is one function registered with `vjp`; the modules of this package hold them by family.
"""

from onnx_kfe.autodiff import (
    _arithmetic,
    _convolution,
    _einsum,
    _elementwise,
    _indexing,
    _linear,
    _movement,
    _nondifferentiable,
    _normalization,
    _pooling,
    _reduction,
    _resize,
    _sampling,
    _scatter,
    _trigonometric,
)
from onnx_kfe.autodiff._driver import Gradients, append_gradients
from onnx_kfe.autodiff._emitter import Emitter, sizes_of
from onnx_kfe.autodiff._registry import Declined
from onnx_kfe.autodiff._resize import interpolation

__all__ = ["Declined", "Emitter", "Gradients", "append_gradients", "interpolation", "sizes_of"]

# Imported for the rules they register.
del _arithmetic, _convolution, _einsum, _elementwise, _indexing, _linear, _movement, _nondifferentiable
del _normalization, _pooling, _reduction, _resize, _sampling, _scatter, _trigonometric
