"""A thin builder of ONNX nodes at the end of an `onnx_ir` graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["Attribute", "Dim", "Emitter", "constant_of", "integers", "same_dim", "sizes_of"]

Attribute = int | float | str | Sequence[int] | ir.TensorProtocol
Dim = int | str | None
"""A size, the name of a symbolic size, or None for one nothing is known about."""


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array a value always holds, or None. Sees through `Identity`, which legacy exports put before weights."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.numpy()
        producer = value.producer()
        if producer is None or producer.op_type != "Identity" or producer.domain:
            return None
        value = producer.inputs[0]
    return None


def sizes_of(value: ir.Value) -> tuple[Dim, ...] | None:
    """The sizes of a value, symbolic ones by name; None if not even its rank is known."""
    if value.shape is None:
        array = constant_of(value)
        return None if array is None else array.shape
    return tuple(_size(size) for size in value.shape)


def _size(size: int | ir.SymbolicDim) -> Dim:
    if isinstance(size, int):
        return size
    # Exporters write "?" for sizes that need not be equal.
    return None if size.value in (None, "", "?") else str(size.value)


def same_dim(left: Dim, right: Dim) -> bool:
    """Whether two sizes are certainly equal."""
    return left is not None and left == right


def integers(sizes: Sequence[Dim] | None) -> list[int] | None:
    """The sizes if all are numbers, else None."""
    known = [size for size in sizes or () if isinstance(size, int)]
    return known if sizes is not None and len(known) == len(sizes) else None


class Emitter:
    """Appends nodes to a graph, with unique names under a prefix and each constant stored once.

    Args:
        graph: The graph that grows.
        prefix: What the names of new nodes and values start with.
    """

    def __init__(self, graph: ir.Graph, prefix: str = "gradient/") -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._names = {value.name for value in graph.inputs} | set(graph.initializers)
        self._names |= {name for node in graph for name in (node.name, *(value.name for value in node.outputs))}
        self._next = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Append a node with one output.

        Args:
            op_type: Operator of the ONNX domain.
            inputs: Its inputs; None leaves one out.
            like: A value whose type and shape the output has.
            dtype: Type of the output when there is no `like`; the type of the first input by default.
            shape: Shape of the output when there is no `like`; unknown by default.
            attributes: Attributes of the node.
        """
        return self.ops(op_type, *inputs, outputs=1, like=like, dtype=dtype, shape=shape, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs, all of one type and shape; see `op`."""
        name = self.unique(op_type)
        converted = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", op_type, inputs, converted, num_outputs=outputs, name=name)
        if dtype is None:
            dtype = self.dtype(like if like is not None else next(v for v in inputs if v is not None))
        for index, output in enumerate(node.outputs):
            output.name = name if outputs == 1 else f"{name}/{index}"
            output.type = ir.TensorType(dtype)
            if like is not None and like.shape is not None:
                output.shape = like.shape.copy()
            elif shape is not None:
                output.shape = ir.Shape(shape)
        self.graph.append(node)
        self.nodes.append(node)
        return node.outputs

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
        """Append a copy of a node of another graph, on inputs of this one."""
        name = self.unique(node.op_type)
        attributes = node.attributes.values()
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        for index, (own, output) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            output.name = f"{name}/{index}"
            output.type, output.shape = own.type, own.shape
        self.graph.append(copy)
        self.nodes.append(copy)
        return copy

    def unique(self, stem: str) -> str:
        """A name under the prefix that nothing in the graph has."""
        while (name := f"{self._prefix}{stem}_{self._next}") in self._names:
            self._next += 1
        self._names.add(name)
        self._next += 1
        return name

    @staticmethod
    def dtype(value: ir.Value) -> ir.DataType:
        """The element type of a value, float32 if the graph does not say."""
        return value.dtype if value.dtype is not None else ir.DataType.FLOAT

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer that holds an array."""
        array = np.asarray(array, order="C")  # unlike ascontiguousarray it leaves a scalar a scalar
        key = (array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            name = self.unique("constant")
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """A constant scalar of the type of a value."""
        return self.array_like(np.array(number), like)

    def array_like(self, array: np.ndarray, like: ir.Value) -> ir.Value:
        """A constant converted to the type of a value."""
        return self.constant(array.astype(self.dtype(like).numpy()))

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        """`factor * value`."""
        return value if factor == 1 else self.op("Mul", value, self.number(factor, value), like=value)

    def shape_of(self, value: ir.Value) -> ir.Value:
        """The shape of a value as an int64 vector: a constant where it is known."""
        if (sizes := integers(sizes_of(value))) is not None:
            return self.ints(*sizes)
        if value not in self._shapes:
            self._shapes[value] = self.op("Shape", value, dtype=ir.DataType.INT64)
        return self._shapes[value]

    def size_of(self, value: ir.Value, axis: int) -> ir.Value:
        """One size of a value as an int64 vector of one element."""
        sizes = sizes_of(value)
        if sizes is not None and isinstance(size := sizes[axis], int):
            return self.ints(size)
        return self.op("Slice", self.shape_of(value), self.ints(axis), self.ints(axis + 1 or 2**31 - 1), shape=(1,))

    def reshape_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """A value with as many elements as `like` in the shape of `like`."""
        sizes = sizes_of(like)
        if sizes is not None and sum(not isinstance(size, int) for size in sizes) <= 1 and 0 not in sizes:
            target = self.ints(*(size if isinstance(size, int) else -1 for size in sizes))
        else:
            target = self.shape_of(like)
        return self.op("Reshape", value, target, like=like, dtype=self.dtype(value), allowzero=int(0 in (sizes or ())))

    def expand_like(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """A value broadcast to the shape of `like`."""
        return self.op("Expand", value, self.shape_of(like), like=like)

    def zeros_like(self, value: ir.Value) -> ir.Value:
        """Zeros of the type and shape of a value."""
        zero = ir.Tensor(np.zeros(1, self.dtype(value).numpy()))
        return self.op("ConstantOfShape", self.shape_of(value), like=value, value=zero)

    def transpose(self, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """A value with its axes permuted; computed now if it is constant."""
        array = constant_of(value)
        if array is not None:
            return self.constant(array.transpose(permutation))
        sizes = sizes_of(value)
        shape = None if sizes is None else [sizes[axis] for axis in permutation]
        return self.op("Transpose", value, shape=shape, perm=list(permutation))

    def discard_unused(self, keep: set[ir.Value]) -> None:
        """Remove appended nodes and constants that nothing in `keep` depends on."""
        for node in reversed(self.nodes):
            if not any(value in keep or value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        self.nodes = [node for node in self.nodes if node.graph is not None]
        for value in self._constants.values():
            if value not in keep and not value.uses() and value.name is not None:
                self.graph.initializers.pop(value.name)
