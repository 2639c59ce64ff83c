"""Normalising changes the form of a model, and neither what it computes nor its interface."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from onnx import helper, numpy_helper

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import _serialize, find_layers, fingerprint, in_one_message, load, normalize
from tests.cases import CASES, load_case
from tests.tiny import node, run, serialized, tiny, weights
from tools.bench_memory import encoder


def interface(model: onnx.ModelProto) -> tuple[object, ...]:
    """Inputs that a user feeds and outputs, with types and free axes, and what the file says of itself."""
    constants = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in (*model.graph.input, *model.graph.output) if value.name not in constants]
    return (
        [(value.name, value.doc_string, value.type.SerializeToString(deterministic=True)) for value in values],
        sorted((opset.domain, opset.version) for opset in model.opset_import if opset.domain in ("", "ai.onnx")),
        {entry.key: entry.value for entry in model.metadata_props},
        (model.producer_name, model.producer_version, model.domain, model.model_version),
        (model.doc_string, model.graph.doc_string, model.graph.name),
    )


@pytest.mark.parametrize("name", CASES)
def test_zoo(name):
    case = load_case(name)
    original = case.model
    original.doc_string, original.graph.doc_string, original.domain = "made by hand", "a graph", "org.test"
    original.producer_name, original.producer_version, original.model_version = "someone", "1.2", 7
    original.graph.input[0].doc_string = "what goes in"
    helper.set_model_props(original, {"author": "someone", "licence": "none"})
    before = original.SerializeToString()

    normal = normalize(load(original))
    again = normalize(load(original))

    proto = ir.to_proto(normal)
    onnx.checker.check_model(proto, full_check=True)
    assert original.SerializeToString() == before
    assert interface(proto) == interface(original)
    for batch in (1, 3):
        inputs = case.inputs(batch, seed=batch)
        found, wanted = run(normal, inputs), run(original, inputs)
        for output in case.heads:
            np.testing.assert_allclose(found[output], wanted[output], rtol=1e-4, atol=1e-4)

    names = [n.name for n in normal.graph]
    assert all(names)
    assert len(set(names)) == len(names)
    assert names == [n.name for n in again.graph]
    assert fingerprint(normal) == fingerprint(again)
    kinds = Counter(n.op_type for n in normal.graph)
    assert not kinds["Constant"]
    assert not kinds["Identity"]
    if name.partition("-")[0] != "dense":  # there it comes before the convolution and a ReLU between
        assert not kinds["BatchNormalization"]
    assert all(value.uses() or value.is_graph_output() for value in normal.graph.initializers.values())


def test_legacy_exports_that_do_not_fold_have_something_to_fold():
    assert any(n.op_type == "BatchNormalization" for n in load_case("plain-13").model.graph.node)


def test_normalising_twice_changes_nothing_more():
    once = normalize(load(load_case("strided_shortcut-17").model))
    assert fingerprint(normalize(once)) == fingerprint(once)


def test_attention_stays_what_it_is_made_of(tmp_path):
    """Fused into an operator of ONNX Runtime's own, its layers would be gone, and gradients would stop there."""
    encoder(tmp_path / "encoder.onnx", layers=2, width=16, inner=32, heads=2, vocabulary=10, tokens=5)
    normal = normalize(load(tmp_path / "encoder.onnx"))
    assert {n.domain for n in normal.graph} == {""}
    assert sum(layer.prunable for layer in find_layers(normal)) == 2 * 6 + 1


def test_initializers_as_graph_inputs_become_constants():
    """IR version 3 demands them there."""
    arrays = {"w": weights(3, 2, 3, 3), "b": weights(3)}
    inputs = {"x": ["n", 2, 5, 5]} | {name: array.shape for name, array in arrays.items()}
    nodes = [node("Conv", ["x", "w", "b"], ["y"], "conv")]
    model = tiny(nodes, inputs, {"y": ["n", 3, 3, 3]}, arrays, opset=8, ir_version=3)
    onnx.checker.check_model(model)
    normal = normalize(load(model))
    onnx.checker.check_model(ir.to_proto(normal))
    assert [value.name for value in normal.graph.inputs] == ["x"]
    assert normal.opset_imports[""] == 8
    assert find_layers(normal)[0].prunable
    feeds = {"x": weights(2, 2, 5, 5, seed=1)}
    np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-5, atol=1e-6)


def test_weights_behind_identity_and_constants_are_resolved():
    """As legacy exporters write them: one bias for two layers, handed through Identity."""
    constant = numpy_helper.from_array(weights(4, 4, seed=2))
    nodes = [
        node("Identity", ["bias"], ["bias_2"]),
        node("Constant", [], ["w_2"], value=constant),
        node("Gemm", ["x", "w", "bias"], ["h"], "first"),
        node("Relu", ["h"], ["a"]),
        node("Gemm", ["a", "w_2", "bias_2"], ["y"], "second"),
    ]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": weights(4, 4), "bias": weights(4, seed=1)})
    normal = normalize(load(model))
    first, second = find_layers(normal)
    assert (first.name, second.name) == ("first", "second")
    assert first.prunable
    assert second.prunable
    np.testing.assert_array_equal(second.weight()[0], weights(4, 4, seed=2).T)
    np.testing.assert_array_equal(first.bias(), second.bias())
    feeds = {"x": weights(2, 4, seed=3)}
    np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxscript"])
def test_equal_initializers_are_not_tied_together(monkeypatch, simplifier):
    import onnxsim

    if simplifier == "onnxscript":
        monkeypatch.setattr(onnxsim, "simplify", fails)
    nodes = [node("Gemm", ["x", "a"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "b"], ["y"])]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"a": weights(4, 4), "b": weights(4, 4)})
    assert [layer.reason for layer in find_layers(normalize(load(model)))] == [None, None]


def test_an_output_by_two_names_has_both():
    nodes = [node("Gemm", ["x", "w"], ["h"], "g"), node("Identity", ["h"], ["one"]), node("Identity", ["h"], ["two"])]
    model = tiny(nodes, {"x": ["n", 4]}, {"one": ["n", 4], "two": ["n", 4]}, {"w": weights(4, 4)})
    normal = normalize(load(model))
    feeds = {"x": weights(2, 4, seed=3)}
    found, wanted = run(normal, feeds), run(model, feeds)
    assert list(found) == ["one", "two"]
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6)


def test_an_output_that_is_a_weight_or_an_input_survives():
    nodes = [node("Gemm", ["x", "w"], ["y"], "g"), node("Identity", ["x"], ["same"]), node("Identity", ["w"], ["out"])]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 4], "same": ["n", 4], "out": [4, 4]}, {"w": weights(4, 4)})
    normal = normalize(load(model))
    feeds = {"x": weights(2, 4, seed=3)}
    found, wanted = run(normal, feeds), run(model, feeds)
    assert list(found) == ["y", "same", "out"]
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6)


def test_an_unused_input_stays():
    model = tiny([node("Relu", ["x"], ["y"])], {"x": ["n", 4], "unused": ["m"]}, {"y": ["n", 4]})
    assert interface(ir.to_proto(normalize(load(model)))) == interface(model)


def test_nodes_get_names_that_do_not_disturb_those_that_have_one():
    """The second node has the name that the first would get, the fourth that of the third; bodies keep theirs."""
    body = tiny([node("Neg", ["a"], ["e"], "same")], {}, {"e": [1, 4]}).graph
    other = tiny([node("Abs", ["a"], ["e"], "same")], {}, {"e": [1, 4]}).graph
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Sin", ["a"], ["b"], "Relu_a"),
        node("Cos", ["b"], ["c"], "same"),
        node("Tanh", ["c"], ["d"], "same"),
        node("ReduceMin", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["t"], to=9),
        node("If", ["t"], ["e"], then_branch=body, else_branch=other),
        node("Add", ["d", "e"], ["y"]),
    ]
    normal = normalize(load(tiny(nodes, {"x": [1, 4]}, {"y": [1, 4]})))
    names = [n.name for n in normal.graph]
    assert len(set(names)) == len(names)
    assert [n.name for n in normal.graph.all_nodes() if n.graph is not normal.graph] == ["same", "same"]
    by_kind = {n.op_type: n.name for n in normal.graph}
    assert by_kind["Sin"] == "Relu_a"
    assert by_kind["Cos"] == "same"
    assert by_kind["Relu"] == "Relu_a_2"
    assert by_kind["Tanh"] == "Tanh_d"


def test_functions_are_inlined():
    body = [node("MatMul", ["a", "w"], ["h"]), node("Relu", ["h"], ["b"])]
    function = helper.make_function("local", "Layer", ["a", "w"], ["b"], body, [helper.make_opsetid("", 17)])
    model = tiny(
        [node("Layer", ["x", "w"], ["y"], domain="local")], {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": weights(4, 3)},
        opsets=[helper.make_opsetid("local", 1)], functions=[function],
    )  # fmt: skip
    normal = normalize(load(model))
    assert [n.op_type for n in normal.graph] == ["MatMul", "Relu"]
    assert not normal.functions
    (layer,) = find_layers(normal)
    assert layer.prunable
    feeds = {"x": weights(2, 4, seed=1)}
    np.testing.assert_allclose(run(normal, feeds)["y"], run(model, feeds)["y"], rtol=1e-5, atol=1e-6)


def test_values_of_functions_are_kept_apart_from_those_in_bodies():
    """A function and the bodies of an If both call a value h."""
    inner = [node("Neg", ["a"], ["h"]), node("Relu", ["h"], ["b"])]
    function = helper.make_function("local", "Layer", ["a"], ["b"], inner, [helper.make_opsetid("", 17)])
    body = tiny([node("Abs", ["y"], ["h"]), node("Sqrt", ["h"], ["r"])], {}, {"r": ["n", 4]}).graph
    nodes = [
        node("Layer", ["x"], ["y"], domain="local"),
        node("Size", ["x"], ["s"]),
        node("Cast", ["s"], ["t"], to=9),
        node("If", ["t"], ["z"], then_branch=body, else_branch=body),
    ]
    opsets = [helper.make_opsetid("local", 1)]
    model = tiny(nodes, {"x": ["n", 4]}, {"z": ["n", 4]}, opsets=opsets, functions=[function])
    feeds = {"x": weights(2, 4, seed=1)}
    np.testing.assert_allclose(run(normalize(load(model)), feeds)["z"], run(model, feeds)["z"], rtol=1e-6)


def test_functions_that_cannot_be_inlined_are_said_to_be():
    body = [node("Relu", ["a"], ["b"])]
    function = helper.make_function("local", "Layer", ["a"], ["b"], body, [helper.make_opsetid("", 16)])
    model = tiny(
        [node("Layer", ["x"], ["y"], domain="local")], {"x": ["n", 4]}, {"y": ["n", 4]},
        opsets=[helper.make_opsetid("local", 1)], functions=[function],
    )  # fmt: skip
    with pytest.raises(KfeError, match="functions of the model cannot be inlined: Opset mismatch"):
        normalize(load(model))


@pytest.mark.parametrize("kind", ["QuantizeLinear", "ConvInteger", "QLinearMatMul"])
def test_quantised_models_are_refused_with_advice(kind):
    model = ir.from_proto(tiny([node(kind, ["x"] * 8, ["y"], "q")], {"x": [1, 4]}, {"y": [1, 4]}))
    with pytest.raises(KfeError, match=r"quantised \(node 'q'\): prune the float model, then quantise it"):
        normalize(model)


def fails(*args: object, **options: object) -> None:
    raise RuntimeError("the simplifier fell over")


@pytest.mark.parametrize("name", ["plain-13", "attention-dynamo"])
@pytest.mark.parametrize("both", [False, True])
def test_simplifiers_that_fail_are_done_without(monkeypatch, name, both):
    import onnxsim

    case = load_case(name)
    whole = Counter(n.op_type for n in normalize(load(case.model)).graph)
    monkeypatch.setattr(onnxsim, "simplify", fails)
    if both:
        monkeypatch.setattr(onnxscript.optimizer, "fold_constants_ir", fails)
    normal = normalize(load(case.model))
    kinds = Counter(n.op_type for n in normal.graph)
    assert not kinds["Constant"]
    assert not kinds["Identity"]
    for kind in ("Conv", "Gemm", "MatMul"):
        assert kinds[kind] == whole[kind]
    assert bool(kinds["BatchNormalization"]) == (name == "plain-13" and both)
    assert interface(ir.to_proto(normal)) == interface(case.model)
    inputs = case.inputs(3)
    np.testing.assert_allclose(run(normal, inputs)["logits"], run(case.model, inputs)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("simplifier", ["onnxsim", "onnxscript"])
@pytest.mark.parametrize("kind", ["Transpose", "Reshape", "Cast", "Identity", "Squeeze"])
def test_weights_that_pass_through_something_are_folded(monkeypatch, kind, simplifier):
    """Also those larger than what simplifiers fold by themselves."""
    import onnxsim

    if simplifier == "onnxscript":
        monkeypatch.setattr(onnxsim, "simplify", fails)
    weight = weights(6, 3000)
    stored = {
        "Transpose": weight.T, "Reshape": weight.reshape(-1), "Cast": weight.astype(np.float16), "Squeeze": weight[None]
    }.get(kind, weight)  # fmt: skip
    arguments = {"Reshape": np.array([6, 3000]), "Squeeze": np.array([0])}
    arrays = {"w": np.ascontiguousarray(stored)} | ({"a": arguments[kind]} if kind in arguments else {})
    nodes = [
        node(kind, list(arrays), ["v"], "passed", **({"to": 1} if kind == "Cast" else {})),
        node("MatMul", ["x", "v"], ["y"], "layer"),
    ]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 3000]}, arrays)
    normal = normalize(load(model))
    (layer,) = find_layers(normal)
    assert (layer.prunable, layer.parameters, [n.op_type for n in normal.graph]) == (True, 18000, ["MatMul"])
    x = {"x": weights(2, 6, seed=1)}
    np.testing.assert_allclose(run(normal, x)["y"], run(model, x)["y"], rtol=1e-5, atol=1e-5)


def test_texts_are_left_where_onnxsim_fails(monkeypatch):
    import onnxsim

    monkeypatch.setattr(onnxsim, "simplify", fails)
    nodes = [node("Relu", ["x"], ["y"]), node("Identity", ["t"], ["same"])]
    model = tiny(nodes, {"x": [2]}, {"y": [2], "same": [2]}, {"t": np.array(["ä", ""], object)})
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.STRING
    assert run(normalize(load(model)), {"x": weights(2)})["same"].tolist() == ["ä", ""]


def test_missing_simplifiers_are_done_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    monkeypatch.setitem(sys.modules, "onnxscript.optimizer", None)
    normal = normalize(load(load_case("mlp-11").model))
    assert [layer.op_type for layer in find_layers(normal) if layer.prunable] == ["Gemm"] * 3


def test_models_too_large_for_one_message_are_normalised_too(monkeypatch):
    case = load_case("plain-13")
    whole = [layer.geometry for layer in find_layers(normalize(load(case.model)))]
    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 100)
    normal = normalize(load(case.model))
    assert [layer.geometry for layer in find_layers(normal)] == whole
    assert not any(n.op_type == "BatchNormalization" for n in normal.graph)
    with pytest.raises(KfeError):
        in_one_message(normal)
    inputs = case.inputs(3)
    np.testing.assert_allclose(run(normal, inputs)["logits"], run(case.model, inputs)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain-dynamo", "tokenizer_transformer-17", "unet-13"])
def test_nothing_is_printed(name, capfd):
    find_layers(normalize(load(load_case(name).model)))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_half_precision_stays():
    nodes = [node("Conv", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    arrays = {"w": weights(3, 2, 1, 1, dtype=np.float16)}
    model = tiny(nodes, {"x": ["n", 2, 4, 4]}, {"y": ["n", 3, 4, 4]}, arrays, dtype=onnx.TensorProto.FLOAT16)
    normal = normalize(load(model))
    assert normal.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert serialized(normal)
