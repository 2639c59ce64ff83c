"""Bring a model into the form that every later step assumes, without changing what it computes.

Fused operators of ONNX Runtime are decomposed, functions inlined and BatchNormalization folded, constants are
initializers, weights pass through no Identity, Transpose, Reshape or Cast, products have the shapes that layers have,
every node has a unique name, initializers are no graph inputs, and shapes are inferred with their symbolic dimensions
kept. Bodies of control-flow operators stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Set

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnx_kfe.errors import KfeError
from onnx_kfe.graph._affine import AffinePass, HardSigmoidPass
from onnx_kfe.graph._bodies import bodies, seal, unseal
from onnx_kfe.graph._products import ProductPass
from onnx_kfe.graph._serialize import in_one_message
from onnx_kfe.graph._shapes import infer_shapes
from onnx_kfe.graph.fusions import expand_fusions

__all__ = ["normalize"]

logger = logging.getLogger(__name__)

# Fusing a projection's Add into a batched Gemm wraps it in two Reshapes; merging Q, K and V hides the layers that the
# user knows, and so does an Attention of ONNX Runtime's own; sharing equal initializers would tie layers together that
# only happen to start alike.
_SKIPPED_OPTIMIZERS = [
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_attention",
    "fuse_gqa",
    "eliminate_duplicate_initializer",
]
_LAYOUTS = {"com.microsoft.nchwc", "com.ms.internal.nhwc"}
_FOLDING_LIMIT = 2**28  # bytes of a constant, transposed weights among them
_ROUNDS = 2  # of folding, which makes room for rewriting and the other way round


def normalize(model: ir.Model) -> ir.Model:
    """Return the normalised model; the interface (names, dynamic axes, opset, metadata) is the original's.

    Raises:
        KfeError: The model is quantised or laid out for one processor: that comes after pruning.
    """
    _reject_finished(model)
    named = _without_functions(model.clone())
    for node in named.graph.all_nodes():  # ONNX Runtime's tools leave their own unsaid
        named.opset_imports.setdefault(node.domain, 1)
    _name_nodes(named.graph)  # before onnxsim numbers the nodes without a name
    expand_fusions(named)
    simplified = _simplify(named)
    # With a condition that is constant an If vanishes; where one stays, it is all done again without its bodies.
    sealed = seal(named, [node.name for node in simplified.graph if bodies(node)])
    if sealed:
        simplified = _simplify(named)
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveInitializersFromInputsPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )
    simplified = passes(simplified).model
    _eliminate_identities(simplified.graph)
    unseal(simplified, sealed)
    _name_nodes(simplified.graph)
    _restore_interface(simplified, model)
    infer_shapes(simplified)
    if ir.passes.Sequential(ProductPass(), HardSigmoidPass(), AffinePass())(simplified).modified:
        common.RemoveUnusedNodesPass()(simplified)
        infer_shapes(simplified)
    return simplified


def _without_functions(model: ir.Model) -> ir.Model:
    """The model with its functions inlined, in place."""
    if not model.functions:
        return model
    try:
        inlined = common.InlinePass()(model).model
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise KfeError(f"the functions of the model cannot be inlined: {reason}") from error
    inlined.functions.clear()
    _rename_apart(inlined.graph)
    return inlined


def _rename_apart(graph: ir.Graph) -> None:
    """Rename values of the main graph whose names values inside bodies have too, which inlining does not look at."""
    inside: set[str] = set()
    for body in graph.subgraphs():
        if body is not graph:
            values = (*body.inputs, *body.initializers.values(), *(value for node in body for value in node.outputs))
            inside |= {value.name for value in values if value.name}
    taken = inside | {value.name or "" for node in graph for value in node.outputs} | set(graph.initializers)
    for value in (value for node in graph for value in node.outputs if value.name in inside):
        value.name = _unique(value.name or "", taken)
        taken.add(value.name)


def _eliminate_identities(graph: ir.Graph) -> None:
    """Remove Identity but where an output of the graph would be an input, a constant or another output."""
    for node in [node for node in graph if node.op_type == "Identity" and not node.domain]:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        if output.is_graph_output():
            if value.producer() is None or value.is_graph_output():
                continue
            value.name, value.type, value.shape = output.name, output.type, output.shape
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _reject_finished(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.domain in _LAYOUTS or (node.domain == "com.microsoft" and node.op_type.startswith("Nhwc")):
            raise KfeError(
                f"the model is laid out for one kind of processor (node '{node.name or node.op_type}' of "
                f"{node.domain}): prune the model that ONNX Runtime was given, then optimise it"
            )
        if node.op_type in {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"}:
            raise KfeError(
                f"the model is quantised (node '{node.name or node.op_type}'): prune the float model, then quantise it"
            )


def _simplify(model: ir.Model) -> ir.Model:
    """onnxsim; where it fails, onnxscript's optimizer; where that fails too, the model as it is."""
    with contextlib.suppress(KfeError):
        proto = onnx.ModelProto.FromString(in_one_message(model))
        try:
            import onnxsim

            simplified, _ = onnxsim.simplify(
                proto, skipped_optimizers=_SKIPPED_OPTIMIZERS, tensor_size_threshold=f"{_FOLDING_LIMIT >> 20}MB"
            )
            return ir.from_proto(simplified)
        except Exception as error:
            logger.info("onnxsim could not simplify the model (%s); onnxscript's optimizer is used", error)
    try:
        return _simplify_in_memory(model.clone())
    except Exception as error:
        logger.info("onnxscript could not optimize the model (%s); it is used as it is", error)
        return model.clone()


def _simplify_in_memory(model: ir.Model) -> ir.Model:
    """Onnxscript's folding and rewriting, in place; not all of its optimizer, which merges equal initializers."""
    import onnxscript.optimizer
    import onnxscript.rewriter

    limit = _FOLDING_LIMIT // 4  # elements
    for _ in range(_ROUNDS):
        onnxscript.optimizer.fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=limit, output_size_limit=limit, should_fold=_may_fold
        )
        model = onnxscript.rewriter.rewrite(model)
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """None for the default: texts would be folded to what cannot be written."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return False if any(value.dtype == ir.DataType.STRING for value in values) else None


def _name_nodes(graph: ir.Graph) -> None:
    """Layers are known by node name across files, so every node gets a stable, unique one; names that are keep."""
    taken = {node.name for node in graph.all_nodes() if node.name}
    seen: set[str] = set()
    for node in graph:
        if not node.name or node.name in seen:
            output = next((value.name for value in node.outputs if value.name), "node")
            node.name = _unique(f"{node.op_type}_{output}", taken)
            taken.add(node.name)
        seen.add(node.name)


def _unique(name: str, taken: Set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Put back what simplifiers drop: metadata, documentation and the declared shapes of inputs and outputs."""
    for found, given in ((model, original), (model.graph, original.graph)):
        found.metadata_props.clear()  # onnxsim leaves its own
        found.metadata_props.update(given.metadata_props)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.model_version, model.domain = original.model_version, original.domain
    model.doc_string, model.graph.doc_string = original.doc_string, original.graph.doc_string
    model.graph.name = original.graph.name
    declared = {value.name: value for value in (*original.graph.inputs, *original.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        source = declared.get(value.name)
        if source is not None:
            value.type, value.doc_string = source.type, source.doc_string
            value.shape = source.shape.copy() if source.shape is not None else None
    expected = [v.name for v in original.graph.outputs]
    if [v.name for v in model.graph.outputs] != expected:
        raise KfeError(f"simplifying changed the outputs from {expected}; please report this model")
