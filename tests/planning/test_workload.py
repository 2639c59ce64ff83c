"""Workloads against the nodes that the rewriting writes, and the models of them against torch."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_ir.passes import PassResult

from onnx_kfe.graph import open_network
from onnx_kfe.planning import FORMS, Candidate, Cost, Plan, dense_link
from onnx_kfe.planning._workload import Workload, micro_model, workloads
from onnx_kfe.rewrite import AbsorbPass, sketch_plan
from tests.planning.problems import SHAPES, model_of
from tests.tiny import node, run, serialized, tiny, weights

BATCH = 3
NOTHING = {"strides": 1, "pads": 0, "dilations": 1, "output_padding": 0}
AWKWARD = {
    "uneven pads": ({"pads": [0, 1, 2, 3], "strides": [2, 1]}, (3, 5)),
    "dilated": ({"dilations": [2, 1], "pads": [2, 0, 2, 1]}, (3, 3)),
    "same upper": ({"auto_pad": "SAME_UPPER", "strides": [2, 3]}, (3, 3)),
    "valid": ({"auto_pad": "VALID", "strides": [2, 1]}, (3, 2)),
    "plain": ({}, (3, 3)),
    "up": ({"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]}, (3, 4)),
    "up same": ({"auto_pad": "SAME_LOWER", "strides": [2, 1], "dilations": [1, 2]}, (4, 3)),
}


def awkward(name: str) -> onnx.ModelProto:
    attributes, kernel = AWKWARD[name]
    if name.startswith("up"):
        up = node("ConvTranspose", ["x", "w"], ["y"], "layer", **attributes)
        return tiny([up], {"x": ["n", 6, 5, 4]}, {"y": ["n", 8, "h", "w"]}, {"w": weights(6, 8, *kernel)})
    conv = node("Conv", ["x", "w"], ["y"], "layer", **attributes)
    return tiny([conv], {"x": ["n", 6, 9, 11]}, {"y": ["n", 8, "h", "w"]}, {"w": weights(8, 6, *kernel)})


MODELS = {**{name: lambda name=name: model_of(name) for name in SHAPES}, **{n: lambda n=n: awkward(n) for n in AWKWARD}}
CHAINS = [
    (name, form)
    for name, form in itertools.product(MODELS, FORMS)
    if FORMS[form].limits(open_network(MODELS[name]()).layers[0].geometry)  # type: ignore[arg-type]
]


def described(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """Operator, shape of what is read, shape of the weight and attributes of each linear node and Gather."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = itertools.chain(inferred.input, inferred.value_info, inferred.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    constants = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    found = []
    for part in inferred.node:
        if part.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"):
            given = {a.name: onnx.helper.get_attribute_value(a) for a in part.attribute}
            plain = {k: v for k, v in given.items() if k not in NOTHING or set(v) != {NOTHING[k]}}
            found.append((part.op_type, shapes[part.input[0]], constants[part.input[1]], plain))
    return found


def at_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """With a batch of so many, and without the shapes inferred for another."""
    del model.graph.value_info[:]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.Clear()
    return model


@pytest.mark.parametrize(("name", "form"), CHAINS)
def test_workloads_are_the_nodes_that_are_written(name, form, monkeypatch):
    """Written by another module: same operators, weights, attributes and sizes."""
    network = open_network(MODELS[name]())
    (layer,) = network.layers
    ranks = tuple(max(1, limit // 2) for limit in FORMS[form].limits(layer.geometry))
    if form == "block_diagonal":
        ranks = (2,)
        monkeypatch.setattr(AbsorbPass, "call", lambda self, model: PassResult(model, modified=False))
    plan = Plan("", {layer.name: Candidate(form, ranks, Cost(0, 0), 0.0)}, Cost(0, 0))
    written = onnx.load_from_string(serialized(sketch_plan(network, plan)))
    links = FORMS[form].links(layer.geometry, ranks)
    micro = onnx.load_from_string(serialized(micro_model(list(workloads(layer, links, BATCH)))))
    expected = described(at_batch(written, BATCH))
    assert len(expected) == len(links)
    assert described(micro) == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_workload_of_a_layer_as_it_is(name):
    network = open_network(MODELS[name]())
    (layer,) = network.layers
    (workload,) = workloads(layer, [dense_link(layer.geometry)], BATCH)
    (read,) = described(onnx.load_from_string(serialized(micro_model([workload]))))
    (expected,) = described(at_batch(onnx.load_from_string(serialized(network.model)), BATCH))
    assert read[:3] == expected[:3]
    attributes = {**expected[3], "group": layer.geometry.groups, "kernel_shape": list(layer.geometry.kernel)}
    assert read[3] == (attributes if layer.geometry.kernel else {})
    assert workload.dtype == "FLOAT"


@pytest.mark.parametrize(
    ("behind", "fused"),
    [("Relu", "Relu"), ("Clip", "Relu"), ("LeakyRelu", "LeakyRelu"), ("Sigmoid", "Sigmoid"), ("Abs", ""), (None, "")],
)
def test_the_activation_is_fused_with_the_last_link(behind, fused):
    nodes = [node("Conv", ["x", "w"], ["c"], "layer"), *([node(behind, ["c"], ["y"])] if behind else [])]
    output = "y" if behind else "c"
    model = tiny(nodes, {"x": ["n", 4, 5, 5]}, {output: ["n", 6, 3, 3]}, {"w": weights(6, 4, 3, 3)})
    (layer,) = open_network(model).layers
    chain = list(workloads(layer, FORMS["tucker"].links(layer.geometry, (2, 3)), 1))
    assert [workload.activation for workload in chain] == ["", "", fused]


def test_activations_that_are_not_fused():
    weight = {"w": weights(6, 4, 3, 3)}
    twice = [node("Conv", ["x", "w"], ["c"], "layer"), node("Relu", ["c"], ["a"]), node("Sigmoid", ["c"], ["b"])]
    shape = ["n", 6, 3, 3]
    split = tiny(twice, {"x": ["n", 4, 5, 5]}, {"a": shape, "b": shape}, weight)
    product = tiny(
        [node("Gemm", ["x", "w"], ["c"], "layer"), node("Relu", ["c"], ["y"])],
        {"x": ["n", 4]}, {"y": ["n", 6]}, {"w": weights(4, 6)},
    )  # fmt: skip
    for model in (split, product):
        (layer,) = open_network(model).layers
        (workload,) = workloads(layer, [dense_link(layer.geometry)], 1)
        assert workload.activation == ""


def conv(inputs: int, outputs: int, groups: int = 1, **options: object) -> Workload:
    given = {"leading": (BATCH,), "size": (7, 6), "kernel": (3, 2), "attributes": (), "activation": "", **options}
    return Workload("Conv", inputs, outputs, groups, dtype="FLOAT", **given)  # type: ignore[arg-type]


def product(operator: str, leading: tuple[int, ...]) -> Workload:
    return Workload(operator, 5, 4, 1, leading, (), (), (), "", "FLOAT")


ALL = [
    conv(4, 6),
    conv(6, 4, attributes=(("strides", (2, 1)), ("pads", (1, 0, 1, 2))), activation="Relu"),
    conv(4, 8, 2, activation="LeakyRelu"),
    conv(6, 6, 6, attributes=(("dilations", (2, 1)),), activation="Sigmoid"),
    conv(4, 6, attributes=(("auto_pad", "SAME_LOWER"),)),
    Workload("Gather", 6, 6, 1, (BATCH,), (7, 6), (1, 1), (), "", "FLOAT"),
    product("Gemm", (BATCH * 2,)),
    product("MatMul", (BATCH, 2)),
]


def test_a_model_of_many_workloads_computes_each():
    """The nodes apart from one another, each computed by torch from what it reads."""
    model = onnx.load_from_string(serialized(micro_model(ALL)))
    assert len(model.graph.output) == len(ALL)
    assert len(model.graph.input) == 4, "what reads the same shape has an input in common"
    random = np.random.default_rng(0)
    feeds = {
        v.name: random.normal(size=[d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
    }
    constants = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in model.graph.initializer}
    sources = {part.output[0]: part for part in model.graph.node if part.op_type == "Add"}
    assert [v.item() for n, v in constants.items() if n.startswith("offset")] == list(range(len(ALL)))
    found = run(model, feeds)
    for place, workload in enumerate(ALL):
        source = sources[f"source{place}/y"]
        read = torch.from_numpy(feeds[source.input[0]]) + place
        assert tuple(read.shape) == workload.input_shape
        weight = constants[f"w{place}/weight"]
        if workload.operator == "Conv":
            attributes = dict(workload.attributes)
            high, wide, down, right = attributes.get("pads", (0, 0, 0, 0))
            if attributes.get("auto_pad") == "SAME_LOWER":
                high, wide, down, right = 1, 1, 1, 0
            padded = torch.nn.functional.pad(read, (wide, right, high, down))
            steps = {"stride": attributes.get("strides", 1), "dilation": attributes.get("dilations", 1)}
            result = torch.nn.functional.conv2d(padded, weight, groups=workload.groups, **steps)
        else:
            result = read[:, weight] if workload.operator == "Gather" else read @ weight
        leaky = torch.nn.functional.leaky_relu
        behind = {"Relu": torch.relu, "LeakyRelu": leaky, "Sigmoid": torch.sigmoid, "": lambda value: value}
        result = behind[workload.activation](result)
        axes = tuple(range(2, result.ndim)) if workload.size else tuple(range(result.ndim))
        np.testing.assert_allclose(
            found[f"meanw{place}/y"].ravel(), result.mean(axes).numpy().ravel(), rtol=1e-4, atol=1e-5
        )


def test_weights_are_as_large_as_counted():
    constants = {t.name: t for t in onnx.load_from_string(serialized(micro_model(ALL))).graph.initializer}
    for place, workload in enumerate(ALL):
        if workload.operator != "Gather":
            size = numpy_helper.to_array(constants[f"w{place}/weight"]).size
            passed = np.prod(workload.input_shape) // workload.inputs * (workload.inputs + workload.outputs)
            assert workload.elements == size + passed


def test_keys_tell_workloads_apart_and_families_leave_the_channels_out():
    assert len({workload.key for workload in ALL}) == len(ALL)
    assert conv(4, 6).key == conv(4, 6).key
    assert conv(4, 6).family == conv(5, 7).family
    assert conv(4, 6).family != conv(4, 6, activation="Relu").family
    assert conv(4, 8, 2).family == conv(6, 6, 2).family != conv(4, 8).family
    assert conv(4, 4, 4).family == conv(9, 18, 9).family, "depthwise at any width"
    assert conv(1, 4, 1).family == conv(4, 6).family, "one input channel is not depthwise"
    assert conv(4, 4, 4).family != conv(4, 4, 2).family
