"""Tables of embeddings: listed with their parameters, and never pruned."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_kfe._tables import layer_rows, show_layers
from onnx_kfe.graph import find_embeddings, load, normalize, open_network
from onnx_kfe.planning import Macs, Planner
from tests.planning.problems import statistics_of
from tests.tiny import node, weights


def language_model() -> onnx.ModelProto:
    """Tokens and their places looked up and added, and what is no such table: shapes, a stack, a column."""
    nodes = [
        node("Gather", ["words", "tokens"], ["word"], "look up"),
        node("Shape", ["tokens"], ["shape"], "shape"),
        node("Gather", ["shape", "one"], ["length"], "length"),
        node("Gather", ["places", "ids"], ["place"], "place"),
        node("Add", ["word", "place"], ["h"], "sum"),
        node("MatMul", ["h", "w"], ["m"], "product"),
        node("Gather", ["m", "one"], ["last"], "last", axis=1),
        node("Gather", ["columns", "ids"], ["column"], "column", axis=1),
        node("ReduceSum", ["column"], ["total"], keepdims=0),
        node("Cast", ["length"], ["float"], to=TensorProto.FLOAT),
        node("Mul", ["total", "float"], ["scaled"]),
        node("Add", ["last", "scaled"], ["y"]),
    ]
    arrays = {
        "words": weights(50, 8), "places": weights(12, 8), "columns": weights(3, 12), "w": weights(8, 8),
        "one": np.array(1),
    }  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 5]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [5]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_tables_that_are_looked_up_are_found():
    found = find_embeddings(normalize(load(language_model())))
    assert [(table.name, table.parameters, table.macs) for table in found] == [("look up", 400, 0), ("place", 96, 0)]
    assert {table.reason for table in found} == {"a table of embeddings, looked up"}
    assert not any(table.prunable for table in found)


def test_inspect_lists_them(capsys):
    network = open_network(language_model())
    assert [layer.name for layer in network.layers] == ["product"]
    rows = {row["name"]: row for row in layer_rows(network)}
    assert list(rows) == ["product", "look up", "place"]
    assert (rows["look up"]["operator"], rows["look up"]["parameters"], rows["look up"]["prunable"]) == (
        "Gather",
        400,
        False,
    )
    show_layers(network)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Gather 50x8" in shown
    assert "cannot be pruned: 2 x a table of embeddings, looked up (look up, place)" in shown
    assert "1 of 1 layers can be pruned: 100%" in shown


def test_no_plan_touches_them():
    network = open_network(language_model())
    plan = Planner(network, statistics_of(network), round_to=1).plan(Macs(0.6))
    assert set(plan.changed) == {"product"}
    assert set(plan.choices) == {"product"}
