"""Models that ONNX Runtime has optimised are pruned like the models that it was given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

import onnx_kfe as kfe
from onnx_kfe.graph import find_layers, load, normalize
from tests.cases import load_case
from tests.graph.fusions.transformer import HEADS, WIDTH, sentences, transformer
from tests.networks import classifier, samples
from tests.tiny import node, run, serialized, tiny, weights

MICROSOFT = [helper.make_opsetid("com.microsoft", 1)]


def optimized(model: bytes, folder: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime writes it, for any processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def fused_operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node if node.domain}


def assert_pruned_alike(
    fused: onnx.ModelProto, plain: onnx.ModelProto, data: dict[str, np.ndarray], names: dict[str, str]
) -> None:
    """Check layers, statistics, choices and outputs of two models; `names` are those that differ in the first."""
    assert not {node.domain for node in normalize(load(fused)).graph} - {""}
    reached = [[layer.name for layer in kfe.inspect(model).prunable] for model in (fused, plain)]
    assert sorted(names.get(name, name) for name in reached[0]) == sorted(reached[1])
    statistics = [kfe.collect(model, data) for model in (fused, plain)]
    whole = kfe.prune(fused, statistics[0], kfe.Macs(1.0), measure=False)
    assert not whole.plan.changed
    np.testing.assert_allclose(run(whole.model, data)["logits"], run(plain, data)["logits"], rtol=1e-4, atol=1e-5)
    results = [
        kfe.prune(model, given, kfe.Macs(0.7), measure=False)
        for model, given in zip((fused, plain), statistics, strict=True)
    ]
    choices = [{n: (c.form, c.ranks) for n, c in result.plan.choices.items()} for result in results]
    assert {names.get(name, name): choice for name, choice in choices[0].items()} == choices[1]
    assert results[0].plan.changed
    assert set(ir.from_proto(results[0].model).opset_imports) == {""}
    found, wanted = (run(result.model, data)["logits"] for result in results)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_convolutional_network(tmp_path):
    plain = classifier()
    fused = optimized(plain.SerializeToString(), tmp_path)
    assert fused_operators(fused) == {"FusedConv"}
    assert_pruned_alike(fused, plain, {"x": samples(32)}, {})


def test_a_transformer_that_onnx_runtime_fused(tmp_path):
    plain = transformer()
    fused = optimized(plain, tmp_path)
    assert fused_operators(fused) == {"FusedMatMul", "BiasGelu"}
    assert {"LayerNormalization"} <= {node.op_type for node in fused.graph.node}  # in opset 13
    assert_pruned_alike(fused, onnx.load_from_string(plain), sentences(32), {})


def test_a_transformer_that_the_optimizer_for_transformers_fused(tmp_path):
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    plain = onnx.load_from_string(transformer(17))
    onnx.save(plain, tmp_path / "plain.onnx")
    fused = optimizer.optimize_model(
        str(tmp_path / "plain.onnx"), "bert", num_heads=HEADS, hidden_size=WIDTH, opt_level=0
    ).model
    assert fused_operators(fused) == {
        "EmbedLayerNormalization", "Attention", "SkipLayerNormalization", "BiasGelu",
    }  # fmt: skip
    names = {f"Attention_0/{part}": f"/block/{part}/MatMul" for part in ("query", "key", "value")}
    assert_pruned_alike(fused, plain, sentences(32), names)


@pytest.mark.parametrize(
    "name", ["inverted_residual-17", "attention-13", "tokenizer_transformer-17", "mlp-11", "video-17"]
)
def test_zoo(name, tmp_path):
    case = load_case(name)
    fused = optimized(case.serialized, tmp_path)
    assert fused_operators(fused)
    normal = normalize(load(fused))
    assert set(normal.opset_imports) == {""}
    layers, wanted = (
        [(n.geometry, n.prunable) for n in find_layers(model)] for model in (normal, normalize(load(case.model)))
    )
    assert Counter(layers) == Counter(wanted)
    inputs = case.inputs(3)
    assert fused_operators(optimized(serialized(normal), tmp_path)) == fused_operators(fused)
    for output, array in run(case.model, inputs).items():
        np.testing.assert_allclose(run(normal, inputs)[output], array, rtol=1e-4, atol=1e-4)


def stopping(opset: int) -> onnx.ModelProto:
    """Linear layers in front of, inside and behind an Attention in a form that stays: its second output is used."""
    nodes = [
        node("MatMul", ["x", "w0"], ["a"], "first"),
        node("Attention", ["a", "w1", "b1"], ["c", "present"], "middle", domain="com.microsoft", num_heads=2),
        node("FusedMatMul", ["c", "c"], ["d"], "behind", domain="com.microsoft", transB=1),
        node("MatMul", ["d", "w2"], ["y"], "last"),
    ]
    constants = {"w0": weights(5, 8), "w1": weights(8, 24, seed=1), "b1": weights(24), "w2": weights(4, 6, seed=2)}
    outputs = {"y": ["n", 4, 6], "present": [2, "n", 2, 4, 4]}
    return tiny(nodes, {"x": ["n", 4, 5]}, outputs, constants, opset=opset, opsets=MICROSOFT)


@pytest.mark.parametrize("opset", [13, 18])
def test_what_stays_is_a_reason_and_no_error(opset):
    model = stopping(opset)
    network = kfe.inspect(model)
    reasons = {layer.name: layer.reason for layer in network.layers}
    assert reasons.pop("middle") == "inside com.microsoft.Attention with output 1 in use"
    assert reasons == {"first": None, "behind": "no constant weight", "last": None}
    assert [node.op_type for node in network.model.graph if node.domain] == ["Attention"]
    assert network.model.opset_imports["com.microsoft"] == 1
    inputs = {"x": weights(16, 4, 5, seed=3)}
    np.testing.assert_allclose(run(network.model, inputs)["y"], run(model, inputs)["y"], rtol=1e-5, atol=1e-5)
    statistics = kfe.collect(model, inputs, heads={"y": "gaussian", "present": "none"})
    assert list(statistics.layers) == ["last"]
    assert statistics.skipped["first"] == "no gradient rule for com.microsoft.Attention (node 'middle')"


def test_operators_without_a_decomposition_are_named():
    nodes = [
        node("GemmFastGelu", ["x", "w"], ["h"], "mine", domain="com.microsoft"),
        node("MatMul", ["h", "v"], ["y"], "last"),
    ]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"w": weights(4, 5), "v": weights(5, 3)}, opsets=MICROSOFT)
    mine, last = find_layers(normalize(load(model)))
    assert (mine.name, mine.reason) == ("mine", "inside com.microsoft.GemmFastGelu, which has no decomposition")
    assert last.name == "last"


def test_nodes_in_bodies_are_decomposed():
    branch = tiny([node("Gelu", ["a"], ["e"], "inner", domain="com.microsoft")], {}, {"e": [1, 4]}).graph
    other = tiny([node("Abs", ["a"], ["e"])], {}, {"e": [1, 4]}).graph
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("ReduceMin", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["t"], to=9),
        node("If", ["t"], ["y"], then_branch=branch, else_branch=other),
    ]
    model = tiny(nodes, {"x": [1, 4]}, {"y": [1, 4]}, opsets=MICROSOFT)
    normal = normalize(load(model))
    assert set(normal.opset_imports) == {""}
    for inputs in ({"x": weights(1, 4)}, {"x": np.zeros((1, 4), np.float32)}):
        np.testing.assert_allclose(run(normal, inputs)["y"], run(model, inputs)["y"], rtol=1e-5, atol=1e-6)


def test_names_that_are_taken_are_not_given_again():
    nodes = [
        node("Relu", ["x"], ["gelu/Div_1"], "gelu/Erf_2"),
        node("Gelu", ["gelu/Div_1"], ["y"], "gelu", domain="com.microsoft"),
    ]
    model = tiny(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, opsets=MICROSOFT)
    normal = normalize(load(model))
    inputs = {"x": weights(2, 4)}
    np.testing.assert_allclose(run(normal, inputs)["y"], run(model, inputs)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("domain", "operator"),
    [("com.microsoft.nchwc", "Conv"), ("com.ms.internal.nhwc", "Conv"), ("com.microsoft", "NhwcFusedConv")],
)
def test_layouts_of_one_processor_are_refused_with_advice(domain, operator):
    nodes = [node(operator, ["x", "w"], ["y"], "blocked", domain=domain)]
    model = tiny(
        nodes, {"x": [1, 8, 4, 4]}, {"y": [1, 8, 4, 4]}, {"w": weights(8, 8, 1, 1)},
        opsets=[helper.make_opsetid(domain, 1)],
    )  # fmt: skip
    with pytest.raises(
        kfe.KfeError, match=r"node 'blocked'.*prune the model that ONNX Runtime was given, then optimise"
    ):
        kfe.inspect(model)
