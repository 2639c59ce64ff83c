"""Bodies of control-flow operators stay as they are, whatever is done to the graph around them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnx_kfe as kfe
from onnx_kfe.graph import find_layers, load, normalize
from onnx_kfe.graph._bodies import bodies, captured, seal, unseal
from tests.tiny import node, run, tiny, weights

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
FEEDS = {"x": weights(3, 5, 8, seed=9)}


def body(
    nodes: list[onnx.NodeProto], output: str, *inputs: onnx.ValueInfoProto, **arrays: np.ndarray
) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(
        nodes, "body", list(inputs), [helper.make_tensor_value_info(output, FLOAT, None)], tensors
    )
    graph.doc_string = "written by hand"
    return graph


def conditional() -> onnx.NodeProto:
    """Both branches read what a layer outside gives, have nodes of one name, and what simplifiers would remove."""
    branches = [
        body(
            [
                node("Constant", [], ["c"], "constant", value=numpy_helper.from_array(weights(1), "c")),
                node("MatMul", ["h", "w"], ["a"], "layer"),
                node("Add", ["a", "c"], ["b"], "add"),
                node("Identity", ["b"], ["r"], "same"),
            ],
            "r",
            w=weights(8, 8, seed=place),
        )
        for place in range(2)
    ]
    return node("If", ["t"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1])


def loop() -> onnx.NodeProto:
    """Carries a value, reads a layer outside and the weight of another, and has an If inside that does, too."""
    branch = body([node("Add", ["k", "h"], ["n"], "add")], "n")
    nodes = [
        node("MatMul", ["carried", "v"], ["k"], "layer"),
        node("If", ["go"], ["next"], "inner", then_branch=branch, else_branch=branch),
        node("Identity", ["go"], ["going"]),
    ]
    declared = ("turn", INT64, []), ("go", BOOL, []), ("carried", FLOAT, None)
    inner = body(nodes, "next", *(helper.make_tensor_value_info(*each) for each in declared))
    inner.output.insert(0, helper.make_tensor_value_info("going", BOOL, []))
    return node("Loop", ["two", "", "h"], ["y"], "loop", body=inner)


def scan() -> onnx.NodeProto:
    nodes = [node("MatMul", ["row", "w"], ["p"], "layer"), node("ReduceMean", ["h"], ["m"], "mean", keepdims=0)]
    inner = body(
        [*nodes, node("Add", ["p", "m"], ["o"], "add")],
        "o",
        helper.make_tensor_value_info("row", FLOAT, None),
        w=weights(8, 8),
    )
    return node("Scan", ["h"], ["y"], "scan", body=inner, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1])


def around(operator: onnx.NodeProto) -> onnx.ModelProto:
    """A layer in front, whose output goes by another name for the operator, and one behind."""
    nodes = [
        node("Cast", [], ["t"], to=BOOL),
        node("MatMul", ["x", "u"], ["f"], "first"),
        node("Identity", ["f"], ["h"], "same"),
        operator,
        node("Relu", ["y"], ["r"], "relu"),
        node("MatMul", ["r", "v"], ["z"], "last"),
    ]
    nodes[0].input.append("count")
    nodes.insert(0, node("Size", ["x"], ["count"]))
    arrays = {"u": weights(8, 8) / 3, "v": weights(8, 8, seed=1) / 3, "two": np.array(2)}
    return tiny(nodes, {"x": ["n", 5, 8]}, {"z": ["n", 5, 8]}, arrays)


def bodies_of(model: onnx.ModelProto | ir.Model) -> list[bytes]:
    """All bodies of the main graph's nodes, serialised; the library that writes models adds the types of constants."""
    proto = ir.to_proto(model if isinstance(model, ir.Model) else ir.from_proto(model))
    return [a.g.SerializeToString(deterministic=True) for n in proto.graph.node for a in n.attribute if a.HasField("g")]


@pytest.mark.parametrize("operator", [conditional, loop, scan])
def test_bodies_are_the_same_byte_for_byte(operator):
    model = around(operator())
    wanted = bodies_of(model)
    assert wanted
    normal = normalize(load(model))
    assert bodies_of(normal) == wanted
    np.testing.assert_allclose(run(normal, FEEDS)["z"], run(model, FEEDS)["z"], rtol=1e-5, atol=1e-5)


def test_bodies_are_the_same_in_a_pruned_model():
    model = around(conditional())
    result = kfe.prune(model, weights(20, 5, 8), kfe.Macs(0.98), heads={"z": "gaussian"}, round_to=1, measure=False)
    assert list(result.plan.changed) == ["last"]
    assert result.plan.skipped["first"] == "no gradient rule for If (node 'choice')"
    assert bodies_of(result.model) == bodies_of(model)


def test_layers_inside_are_listed_by_a_name_of_their_own():
    layers = find_layers(normalize(load(around(conditional()))))
    inside = "inside the body of a control-flow operator"
    assert {layer.name: layer.reason for layer in layers} == {
        "first": None, "choice/then_branch/layer": inside, "choice/else_branch/layer": inside, "last": None
    }  # fmt: skip


@pytest.mark.parametrize("condition", [True, False])
def test_an_if_whose_condition_is_constant_vanishes(condition):
    model = around(conditional())
    del model.graph.node[:2]
    model.graph.initializer.append(numpy_helper.from_array(np.array(condition), "t"))
    normal = normalize(load(model))
    assert [n.op_type for n in normal.graph].count("If") == 0
    assert len([layer for layer in find_layers(normal) if layer.prunable]) == 3
    np.testing.assert_allclose(run(normal, FEEDS)["z"], run(model, FEEDS)["z"], rtol=1e-5, atol=1e-5)


def test_captured_values():
    (operator,) = (n for n in load(around(loop())).graph if n.op_type == "Loop")
    assert list(bodies(operator)) == ["body"]
    assert [value.name for value in captured(operator)] == ["v", "h"]


def test_sealed_nodes_read_what_their_bodies_do_and_come_back():
    """Also where a value that they read goes by another name in the meantime."""
    model = around(loop())
    sealed_model = load(model)
    sealed = seal(sealed_model, ["loop"])
    copy = sealed_model.clone()
    (node_in_place,) = (n for n in copy.graph if n.name == "loop")
    assert [value and value.name for value in node_in_place.inputs] == ["two", None, "h", "v", "h"]
    assert not bodies(node_in_place)
    (first,) = (n for n in copy.graph if n.name == "first")
    (same,) = (n for n in copy.graph if n.name == "same")
    ir.convenience.replace_all_uses_with(same.outputs[0], first.outputs[0])
    copy.graph.remove(same, safe=True)
    unseal(copy, sealed)
    assert bodies_of(copy) == bodies_of(model)
    assert set(copy.opset_imports) == {""}
    np.testing.assert_array_equal(run(copy, FEEDS)["z"], run(model, FEEDS)["z"])
