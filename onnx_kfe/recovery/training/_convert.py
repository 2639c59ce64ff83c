"""The conversion by onnx2fx, which nothing else of the package imports."""

from __future__ import annotations

import onnx2fx
import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import Tensor, nn
from torch.fx import GraphModule

from onnx_kfe.errors import KfeError
from onnx_kfe.exporting import quiet, reason
from onnx_kfe.recovery.training._learnt import find_learnt
from onnx_kfe.recovery.training._onnx_module import OnnxModule, module_keys
from onnx_kfe.recovery.training._operators import OPERATORS

__all__ = ["convert"]

_DOMAIN = "onnx_kfe"  # of the nodes with handlers of our own, which leaves those of onnx2fx as they are for others

for _operator, _handler in OPERATORS.items():
    onnx2fx.register_op(_operator, _handler, domain=_DOMAIN)


def convert(model: ir.Model) -> OnnxModule:
    """Convert a model.

    Args:
        model: The model, in topological order; it is modified, tensors included.

    Raises:
        KfeError: An operator cannot be converted.
    """
    _check_operators(model)
    graph = model.graph
    learnt = find_learnt(graph)
    parameters, learnt_names = set(learnt.parameters), set(learnt.values)
    _simplify_constants(model)
    inputs, outputs = ([str(value.name) for value in values] for values in (graph.inputs, graph.outputs))
    names = _number(list(graph.initializers.values()))

    program = _translate(model)
    children = dict(program.named_children())
    keys = module_keys([*names.values(), *children])
    stored = {**{number: keys[name] for number, name in names.items()}, **{name: keys[name] for name in children}}
    for node in program.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = stored[node.target]
    program.recompile()

    initializer_names = {keys[name]: name for name in names.values() if name in learnt_names}
    module = OnnxModule(type(program).forward, inputs, outputs, initializer_names)
    tensors: dict[str, Tensor] = dict(program.named_buffers())
    for number, name in names.items():
        module.place(keys[name], nn.Parameter(tensors[number]) if name in parameters else tensors[number])
    for name, child in children.items():
        module.place(keys[name], child)
    return module


def _check_operators(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        opset = model.opset_imports.get(node.domain, 1)
        if node.domain == "" and node.op_type in OPERATORS:
            continue
        if not onnx2fx.is_supported(node.op_type, node.domain, opset):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise KfeError(f"operator {operator} (node '{node.name or node.op_type}') cannot be converted to torch")


def _simplify_constants(model: ir.Model) -> None:
    """Turn every constant into an initializer that is no input and is used."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _number(initializers: list[ir.Value]) -> dict[str, str]:
    """Give initializers names that stay different where onnx2fx makes identifiers of them; old names by new."""
    names = {f"_initializer_{index}": str(value.name) for index, value in enumerate(initializers)}
    for number, value in zip(names, initializers, strict=True):
        value.name = number
    return names


def _translate(model: ir.Model) -> GraphModule:
    for node in model.graph.all_nodes():
        if node.op_type in OPERATORS and node.domain == "":
            node.domain = _DOMAIN
            if not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
                node.resize_outputs(1)  # masks of Dropout that nobody reads
    model.opset_imports[_DOMAIN] = 1
    try:
        with quiet():
            return onnx2fx.convert(ir.to_proto(model))
    except KfeError:
        raise
    except Exception as error:
        raise KfeError(f"the model cannot be converted to torch: {reason(error)}") from error
