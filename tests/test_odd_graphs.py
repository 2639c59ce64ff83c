"""Graphs that are odd in ways that ONNX allows are pruned as others are, or refused with the reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

import onnx_kfe as kfe
import tests.odd_operators
import tests.oddities  # noqa: F401, they register what can be odd
from onnx_kfe.planning import FORMS, Candidate, Plan
from tests.odd_graphs import NEWEST, ODDITIES, OddGraph, ir_version, odd_graphs
from tests.tiny import node, run, tiny, weights

EXACT = ("two_factor", "tucker", "output_low_rank", "input_low_rank")  # give the original back at full rank
PRUNABLE = [name for name, oddity in ODDITIES.items() if not oddity.refused]
OPTIONS = {"derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate]}
CLOSE = {TensorProto.FLOAT: 1e-4, TensorProto.DOUBLE: 1e-4, TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 8e-2}


@pytest.mark.parametrize("name", ODDITIES)
def test_odd_graphs(name: str) -> None:
    @seed(list(ODDITIES).index(name))  # or all would be drawn alike
    @settings(max_examples=10, **OPTIONS)
    @given(odd_graphs(st.just(name), TensorProto.FLOAT))
    def check(graph: OddGraph) -> None:
        if graph.refused:
            with pytest.raises(kfe.KfeError, match=graph.refused):
                kfe.prune(graph.model, graph.samples(20, 0), measure=False)
        else:
            check_pruned(graph)

    check()


@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE], ids=TensorProto.DataType.Name
)
def test_odd_graphs_of_other_element_types(dtype: int) -> None:
    @settings(max_examples=50, **OPTIONS)
    @given(odd_graphs(st.sampled_from(PRUNABLE), dtype))
    def check(graph: OddGraph) -> None:
        check_pruned(graph)

    check()


def test_operator_sets_that_the_runtime_does_not_know() -> None:
    """Those of which ONNX is ahead, or that there are not."""
    newest = onnx.defs.onnx_opset_version()
    for opset in range(NEWEST + 1, newest + 2):
        constants = {"w": weights(8, 8), "v": weights(8, 8, seed=1)}
        nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
        version = ir_version(min(opset, newest))
        model = tiny(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, constants, opset=opset, ir_version=version)
        with pytest.raises(kfe.KfeError, match=r"ONNX Runtime cannot load the model|cannot be read as an ONNX model"):
            kfe.prune(model, weights(20, 8), measure=False)


def check_pruned(graph: OddGraph) -> None:
    given = graph.model.SerializeToString(deterministic=True)
    result = kfe.prune(graph.model, graph.samples(20, 0), kfe.Macs(0.98), measure=False, threads=1, round_to=1)
    assert result.plan.changed
    assert result.report["macs"]["after"] < result.report["macs"]["before"]
    assert interface(result.model, graph.model) == interface(graph.model, graph.model)
    quality = kfe.evaluate(result.model, graph.samples(3, 1), reference=graph.model, threads=1)
    assert quality.samples == 3

    exact = kfe.prune(graph.model, result.statistics, at_full_rank(result), measure=False)
    assert interface(exact.model, graph.model) == interface(graph.model, graph.model)
    execute = run if graph.dtype in (TensorProto.FLOAT, TensorProto.FLOAT16) else run_reference
    for sample in graph.samples(2, 2):
        wanted, found = execute(graph.model, sample), execute(exact.model, sample)
        assert list(found) == list(wanted)
        for key, array in wanted.items():
            assert_alike(found[key], array, CLOSE[graph.dtype])
    assert graph.model.SerializeToString(deterministic=True) == given


def at_full_rank(result: kfe.Result) -> Plan:
    """Every layer with statistics as a chain that can give the same."""
    choices = {}
    for layer in result.network.prunable:
        if layer.name in result.statistics.layers:
            form = next(FORMS[name] for name in EXACT if FORMS[name].limits(layer.geometry))
            ranks = form.limits(layer.geometry, form.limits(layer.geometry))
            choices[layer.name] = Candidate(form.name, ranks, form.cost(layer.geometry, ranks), 0.0)
    assert choices
    return Plan(result.network.fingerprint, choices, result.plan.original)


def interface(model: onnx.ModelProto, original: onnx.ModelProto) -> tuple[object, ...]:
    """What users of a model see. Shapes of outputs count where the original declares them, constants are no inputs."""
    constants = {tensor.name for tensor in original.graph.initializer}
    declared = {value.name for value in original.graph.output if value.type.tensor_type.HasField("shape")}
    properties = {entry.key: entry.value for entry in model.metadata_props if entry.key != "onnx_kfe"}
    return (
        [value for value in model.graph.input if value.name not in constants],
        [value if value.name in declared else (value.name, elements(value.type)) for value in model.graph.output],
        {opset.domain: opset.version for opset in model.opset_import if opset.domain == ""},
        (properties, model.ir_version, model.domain, model.model_version, model.doc_string, model.graph.doc_string),
    )


def elements(kind: onnx.TypeProto) -> tuple[str, int]:
    """What a value is, and of which type its elements are."""
    name = kind.WhichOneof("value")
    inner = kind.sequence_type.elem_type if name == "sequence_type" else kind
    return name, inner.tensor_type.elem_type


def run_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, object]:
    """Outputs by name, at the model's own element type, which ONNX Runtime need not have kernels for."""
    evaluator = ReferenceEvaluator(onnx.inliner.inline_local_functions(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def assert_alike(found: object, wanted: object, close: float) -> None:
    if isinstance(wanted, list):  # a sequence
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_alike(*pair, close)
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if wanted.dtype.kind == "f" or wanted.dtype.name == "bfloat16":
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=close * max(1.0, np.abs(wanted).max(initial=0.0)))
    else:
        np.testing.assert_array_equal(found, wanted)
