"""Replace fused nodes by what they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnx_kfe.graph._shapes import infer_shapes
from onnx_kfe.graph.fusions._registry import FUSIONS, Expansion, Unsupported, operator_name

__all__ = ["expand_fusions", "is_fusion", "reason_kept"]


def is_fusion(node: ir.Node, opset: int) -> bool:
    """Whether a node is of a fused operator that can be decomposed in some form.

    ONNX Runtime keeps some in the domain of ONNX: LayerNormalization in opsets that are older than the operator.
    """
    standard = node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, opset)
    return operator_name(node) in FUSIONS and not standard


def expand_fusions(model: ir.Model) -> None:
    """Replace fused nodes of a model, in place, by operators of ONNX; those in other forms stay as they are.

    Args:
        model: A model whose nodes have names. A layer gets the name of the node that it was fused into, of an Attention
            with ``/query``, ``/key`` or ``/value`` behind it.
    """
    opset = model.opset_imports.get("", 1)
    while fused := [node for node in model.graph.all_nodes() if is_fusion(node, opset)]:
        # Some need ranks, which are known once what comes before is of operators of ONNX.
        infer_shapes(model)
        if not sum(_replace(node, opset) for node in fused):
            break
        common.NameFixPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def reason_kept(node: ir.Node, opset: int) -> str:
    """Why the layers inside a node are out of reach.

    Args:
        node: A node that `expand_fusions` left.
        opset: Of its model.
    """
    operator = operator_name(node)
    if operator not in FUSIONS:
        return f"inside {operator}, which has no decomposition"
    expansion = Expansion(node, opset)
    try:
        _outputs(expansion)
    except Unsupported as unsupported:
        return f"inside {operator} with {unsupported}"
    finally:
        expansion.discard()
    return f"inside {operator}"


def _replace(node: ir.Node, opset: int) -> bool:
    """Replace a node if its form is one that can be."""
    expansion = Expansion(node, opset)
    try:
        outputs = _outputs(expansion)
    except Unsupported:
        expansion.discard()
        return False
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], expansion.nodes, list(outputs), list(outputs.values())
    )
    return True


def _outputs(expansion: Expansion) -> Mapping[ir.Value, ir.Value]:
    """For each output of a node that is used, the value that equals it."""
    given = FUSIONS[operator_name(expansion.node)](expansion)
    outputs = [given] if isinstance(given, ir.Value) else given
    found = {}
    for index, value in enumerate(expansion.node.outputs):
        if value.uses() or value.is_graph_output():
            equal = outputs[index] if index < len(outputs) else None
            if equal is None:
                raise Unsupported(f"output {index} in use")
            found[value] = equal
    return found
