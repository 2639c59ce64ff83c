"""Graphs that are odd in ways that ONNX allows: layers with oddities between, which other modules register.

Every graph has layers that can be pruned, before the first oddity and behind the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_kfe.errors import KfeError
from onnx_kfe.runtime import create_session
from tests.tiny import node, tiny, weights

__all__ = ["DTYPES", "NEWEST", "ODDITIES", "Draft", "OddGraph", "ir_version", "odd_graphs", "oddity"]

OLDEST = 11


def _newest() -> int:
    """The newest operator set that ONNX Runtime knows."""
    for opset in range(onnx.defs.onnx_opset_version(), OLDEST, -1):
        with contextlib.suppress(KfeError):
            relu = tiny([node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, opset=opset, ir_version=ir_version(opset))
            create_session(relu.SerializeToString())
            return opset
    return OLDEST


def ir_version(opset: int) -> int:
    """Of a model of some operator set."""
    return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


NEWEST = _newest()
DTYPES: dict[int, type] = {
    TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
}  # fmt: skip
Sample = dict[str, np.ndarray]
Make = Callable[[np.random.Generator], np.ndarray]


@dataclass
class OddGraph:
    """A model, how to draw a sample for it, and what is odd about it.

    Attributes:
        model: The model.
        makers: What draws a sample of each input.
        what: Names of the oddities, and the rest that was drawn.
        dtype: Element type of its floating-point numbers.
        refused: Pattern of the error that it ends in; None where it can be pruned.
    """

    model: onnx.ModelProto = field(repr=False)
    makers: dict[str, Make] = field(repr=False)
    what: str
    dtype: int
    refused: str | None

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Samples, each with a batch axis of 1 where its input has one."""
        random = np.random.default_rng(seed)
        return [{name: make(random) for name, make in self.makers.items()} for _ in range(count)]


class Draft:
    """A graph that grows around one value `x`, an image ``[n, width, h, w]`` or tokens ``[n, t, width]``.

    Args:
        opset: Operator set of the model.
        dtype: Its element type, a key of `DTYPES`.
        image: Whether `x` is an image.
        free: Whether its extent is free, beside the batch.
    """

    def __init__(self, opset: int, dtype: int, image: bool, free: bool) -> None:
        self.opset, self.dtype, self.image = opset, dtype, image
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.makers: dict[str, Make] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.finishers: list[Callable[[onnx.ModelProto], None]] = []
        self.width, self.axis = 4, 1 if image else -1
        extent = ["h", "w"] if image else ["t"]
        sizes = [6, 5] if image else [7]
        shape = ["n", self.width, *(extent if free else sizes)] if image else ["n", *(extent if free else sizes), 4]
        self.x = self.input("x", dtype, shape, [1, 4, *sizes] if image else [1, *sizes, 4])

    # Inputs, outputs and constants

    def input(self, name: str, dtype: int, shape: Sequence[int | str | None] | None, size: Sequence[int]) -> str:
        """An input that is declared with a shape, and drawn with sizes: normal numbers, or 0 and 1."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        numpy = helper.tensor_dtype_to_np_dtype(dtype) if dtype not in DTYPES else np.dtype(DTYPES[dtype])

        def make(random: np.random.Generator) -> np.ndarray:
            drawn = random.integers(0, 2, size) if numpy.kind in "iub" else random.standard_normal(size)
            return np.asarray(drawn).astype(numpy)

        self.makers[name] = make
        return name

    def output(self, value: str, dtype: int | None = None, shape: Sequence[int | str] | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(value, dtype or self.dtype, shape))

    def const(self, array: object, dtype: type | None = None) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.array(array, dtype)
        return name

    def number(self, array: object) -> str:
        """A constant of the model's element type."""
        return self.const(np.array(array, np.float64).astype(DTYPES[self.dtype]))

    def weight(self, *shape: int, fan_in: int = 0) -> str:
        """Normal numbers, that keep the variance of what they are multiplied with."""
        return self.number(weights(*shape, seed=len(self.constants) + len(self.nodes)) / np.sqrt(fan_in or 4))

    # Nodes

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        """A node named after its place; its output, or the first of its outputs, ``<name>.0``, ``<name>.1``, ..."""
        name = f"{op_type}{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{place}" for place in range(outputs)]
        self.nodes.append(node(op_type, list(inputs), names, name, **attributes))
        return names[0]

    def layer_weight(self, out: int | None = None, size: int = 1) -> str:
        """The weight of a layer on `x`."""
        out = out or self.width
        if not self.image:
            return self.weight(self.width, out, fan_in=self.width)
        return self.weight(out, self.width, size, size, fan_in=self.width * size**2)

    def layer(self, out: int | None = None, weight: str | None = None, size: int = 1, x: str | None = None) -> str:
        """A convolution or product; of `x`, which it becomes, unless of another value that is like it."""
        weight = weight or self.layer_weight(out, size)
        pads = {"pads": [size // 2] * 4} if self.image else {}
        y = self.op("Conv" if self.image else "MatMul", x or self.x, weight, **pads)
        if x is None:
            self.x, self.width = y, out or self.width
        return y

    def reduce(self, op_type: str, x: str, axes: Sequence[int], keepdims: int = 1) -> str:
        """A reduction, whose axes became an input with opset 18 (13 for ReduceSum)."""
        if self.opset >= (13 if op_type == "ReduceSum" else 18):
            return self.op(op_type, x, self.const(list(axes)), keepdims=keepdims)
        return self.op(op_type, x, axes=list(axes), keepdims=keepdims)

    def shaped(self, op_type: str, x: str, axes: Sequence[int]) -> str:
        """Squeeze or Unsqueeze."""
        if self.opset >= 13:
            return self.op(op_type, x, self.const(list(axes)))
        return self.op(op_type, x, axes=list(axes))

    def body(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[str],
        **constants: np.ndarray,
    ) -> onnx.GraphProto:
        """A body whose outputs are of the model's element type."""
        infos = [helper.make_tensor_value_info(name, self.dtype, None) for name in outputs]
        tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        return helper.make_graph(list(nodes), "body", list(inputs), infos, tensors)

    def model(self) -> onnx.ModelProto:
        """The model, with whatever the oddities still do to it."""
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "odd", self.inputs, self.outputs, tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in self.functions})]
        version = max(ir_version(self.opset), 8 if self.functions else 0)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, functions=self.functions)
        helper.set_model_props(model, {"author": "someone"})
        for finish in self.finishers:
            finish(model)
        return model


@dataclass(frozen=True)
class Oddity:
    """What makes a graph odd, and where it can.

    Attributes:
        add: Adds it to a draft.
        image: Whether to an image; None for either.
        since: First opset that has the operators.
        until: Last one.
        types: Element types of models it goes with.
        refused: Pattern of the error that a model with it ends in; None where it can be pruned.
    """

    add: Callable[[Draft], None]
    image: bool | None
    since: int
    until: int
    types: Sequence[int]
    refused: str | None

    def goes_with(self, opset: int, dtype: int) -> bool:
        """Whether a model of that opset and element type can have it."""
        return self.since <= opset <= self.until and dtype in self.types


ODDITIES: dict[str, Oddity] = {}


def oddity(
    *,
    image: bool | None = None,
    since: int = OLDEST,
    until: int = NEWEST,
    types: Sequence[int] = tuple(DTYPES),
    refused: str | None = None,
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Register what adds an oddity to a draft."""

    def register(function: Callable[[Draft], None]) -> Callable[[Draft], None]:
        ODDITIES[function.__name__] = Oddity(function, image, since, until, types, refused)
        return function

    return register


@st.composite
def odd_graphs(draw: Callable[[Any], Any], names: st.SearchStrategy[str], dtype: int) -> OddGraph:
    """Graphs with a certain oddity, and up to two others.

    Args:
        draw: As hypothesis gives it.
        names: Keys of `ODDITIES`, of which one is drawn.
        dtype: Element type of the models.
    """
    first = draw(names.filter(lambda name: dtype in ODDITIES[name].types))
    chosen = ODDITIES[first]
    oldest = max(13 if dtype == TensorProto.BFLOAT16 else OLDEST, chosen.since)
    opset = draw(st.integers(oldest, min(NEWEST, chosen.until)))
    image = draw(st.booleans()) if chosen.image is None else chosen.image
    fitting = [
        name
        for name, other in ODDITIES.items()
        if name != first and other.image in (None, image) and other.goes_with(opset, dtype) and not other.refused
    ]
    others = draw(st.lists(st.sampled_from(fitting), max_size=2, unique=True))
    free = draw(st.booleans())
    draft = Draft(opset, dtype, image, free)
    draft.layer(8, size=3)
    draft.x = draft.op("Relu", draft.x)
    for name in (first, *others):
        ODDITIES[name].add(draft)
        draft.layer(8)
        draft.x = draft.op("Relu", draft.x)
    draft.output(draft.layer(6))
    model = draft.model()
    if draw(st.booleans()):  # onnxsim takes no models whose outputs lack shapes
        model = onnx.shape_inference.infer_shapes(model)
    kind = "image" if image else "tokens"
    what = f"{'+'.join((first, *others))}, opset {opset}, {DTYPES[dtype].__name__}, {'free ' * free}{kind}"
    return OddGraph(model, draft.makers, what, dtype, chosen.refused)
