"""The conversion by onnx2fx, which nothing else of the package imports."""

from __future__ import annotations

import onnx2fx
import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import nn
from torch.fx import GraphModule

from onnx_kfe.errors import KfeError
from onnx_kfe.exporting import quiet, reason
from onnx_kfe.recovery.training._learnt import find_learnt
from onnx_kfe.recovery.training._onnx_module import OnnxModule, module_keys
from onnx_kfe.recovery.training._operators import OPERATORS

__all__ = ["convert"]

_DOMAIN = "onnx_kfe"  # of the nodes with handlers of our own, which leaves those of onnx2fx as they are for others

_SETTINGS: dict[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), (1,)),
}
"""Inputs whose values torch takes as numbers: constants for them stay in host memory, where reading them is cheap."""

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
    _simplify_constants(model)
    inputs, outputs = ([str(value.name) for value in values] for values in (graph.inputs, graph.outputs))
    settings = {str(value.name) for value in graph.initializers.values() if _is_setting(value)}
    names = _number(list(graph.initializers.values()))
    program = _translate(model)

    children = dict(program.named_children())
    keys = dict(zip([*names, *children], module_keys([*names.values(), *children]), strict=True))
    module = OnnxModule(inputs, outputs, {keys[n]: name for n, name in names.items() if name in learnt.values})
    for number, name in names.items():
        tensor = program.get_buffer(number)
        trained = name in learnt.parameters
        module.place(keys[number], nn.Parameter(tensor) if trained else tensor, fixed=name in settings)
    for child, part in children.items():
        module.place(keys[child], part)
    for node in program.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = keys[node.target]
    program.recompile()
    module.program = type(program).forward
    return module


def _is_setting(value: ir.Value) -> bool:
    return all(use.idx in _SETTINGS.get(use.node.op_type, ()) for use in value.uses())


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
