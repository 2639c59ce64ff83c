"""Small graphs and the gradients their backward graphs give, against torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper

from onnx_kfe.autodiff import Gradients, append_gradients
from onnx_kfe.runtime import create_session

Node = tuple[str, str, str, dict]
"""Operator, names of its inputs, names of its outputs, attributes."""

Arrays = Mapping[str, np.ndarray]


def build(
    nodes: Sequence[Node],
    inputs: Arrays,
    *,
    outputs: Sequence[str] = ("y",),
    constants: Arrays | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    opset: int = 21,
) -> ir.Model:
    """A model with shapes inferred; `shapes` gives inputs symbolic sizes."""
    made = []
    for index, (op_type, ins, outs, attributes) in enumerate(nodes):
        names = ["" if name == "_" else name for name in ins.split()]
        made.append(helper.make_node(op_type, names, outs.split(), name=f"{op_type}{index}", **attributes))
    declared = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), (shapes or {}).get(name, array.shape)
        )
        for name, array in inputs.items()
    ]
    kind = helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(made, "graph", declared, results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))


def values(model: ir.Model) -> dict[str, ir.Value]:
    """The values of a graph by name."""
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    found += [output for node in model.graph for output in node.outputs]
    return {str(value.name): value for value in found}


def differentiate(model: ir.Model, wanted: Sequence[str], heads: Sequence[str] = ("y",)) -> Gradients:
    """Append the gradients; the seed of head `y` is a new input `dy`, the cotangent of `x` a new output `d(x)`."""
    by_name = values(model)
    seeds = {}
    for head in heads:
        value = by_name[head]
        seed = ir.Value(name=f"d{head}", type=value.type, shape=value.shape)
        model.graph.inputs.append(seed)
        seeds[value] = seed
    gradients = append_gradients(model.graph, seeds, [by_name[name] for name in wanted])
    for value, cotangent in gradients.cotangents.items():
        node = ir.node("Identity", [cotangent])
        output = node.outputs[0]
        output.name, output.type, output.shape = f"d({value.name})", value.type, value.shape
        model.graph.append(node)
        model.graph.outputs.append(output)
    return gradients


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    """All outputs by name."""
    proto = ir.serde.serialize_model(model)
    session = create_session(proto.SerializeToString(), threads=1)
    names = [output.name for output in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def assert_gradients(
    nodes: Sequence[Node],
    inputs: Arrays,
    function: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
    *,
    outputs: Sequence[str] = ("y",),
    constants: Arrays | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    wanted: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    opset: int = 21,
) -> ir.Model:
    """Check the outputs and the gradients by the float inputs against a function of torch tensors, in their order."""
    wanted = [name for name in inputs if inputs[name].dtype.kind == "f"] if wanted is None else list(wanted)
    tensors = {name: torch.tensor(array, requires_grad=name in wanted) for name, array in inputs.items()}
    expected = function(*tensors.values())
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    rng = np.random.default_rng(7)
    seeds = {
        f"d{o}": rng.standard_normal(t.shape).astype(t.detach().numpy().dtype)
        for o, t in zip(outputs, expected, strict=True)
    }
    slopes = torch.autograd.grad(expected, [tensors[n] for n in wanted], [torch.tensor(s) for s in seeds.values()])

    model = build(nodes, inputs, outputs=outputs, constants=constants, shapes=shapes, opset=opset)
    gradients = differentiate(model, wanted, outputs)
    assert not gradients.blocked, list(gradients.blocked.values())
    got = run(model, {**inputs, **seeds})
    for name, tensor in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got[name], tensor.detach().numpy(), rtol=tolerance, atol=tolerance)
    for name, slope in zip(wanted, slopes, strict=True):
        size = max(1.0, float(slope.abs().max()))
        assert got[f"d({name})"].shape == tuple(slope.shape)
        np.testing.assert_allclose(
            got[f"d({name})"], slope.numpy(), rtol=tolerance, atol=tolerance * size, err_msg=name
        )
    return model


def operators(model: ir.Model) -> list[str]:
    """The operators of the backward graph."""
    return [node.op_type for node in model.graph if str(node.name).startswith("gradient/")]


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
