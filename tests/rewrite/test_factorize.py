"""What is written in place of a layer, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from onnx_kfe.calibration import LayerStatistics, Statistics
from onnx_kfe.graph import Network, count_macs, count_parameters, find_layers, open_network, serialize
from onnx_kfe.planning import FORMS, Candidate, LayerProblem, Macs, Params, Plan, Planner, compose, network_cost
from onnx_kfe.rewrite import Chain, FactorizePass, apply_plan, write_chains
from tests.planning.problems import random_statistics, statistics_of
from tests.tied import pyramid, samples, siamese, stacked, upsampled
from tests.tiny import node, run, tiny, weights


def plan_for(network: Network, ranks: int | None = None, form: str | None = None) -> Plan:
    """Every layer in its first form (or the one named), at full rank (or the one given)."""
    choices = {}
    for layer in network.prunable:
        for name in FORMS if form is None else [form]:
            limits = FORMS[name].limits(layer.geometry)
            if limits:
                chosen = limits if ranks is None else tuple(min(ranks, limit) for limit in limits)
                choices[layer.name] = Candidate(name, chosen, FORMS[name].cost(layer.geometry, chosen), 0.0)
                break
    return Plan(network.fingerprint, choices, network_cost(network))


def pruned(
    model: onnx.ModelProto, ranks: int | None = None, form: str | None = None, centred: bool = False
) -> ir.Model:
    network = open_network(model)
    return apply_plan(network, plan_for(network, ranks, form), statistics_of(network) if centred else None)[0]


def assert_same(model: onnx.ModelProto, smaller: ir.Model, shape: tuple[int, ...], rtol: float = 1e-4) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    for batch in (1, 3):
        feeds = {"x": weights(batch, *shape, seed=batch).astype(dtype)}
        wanted, found = run(model, feeds), run(smaller, feeds)
        assert list(found) == list(wanted)
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * np.abs(array).max(), err_msg=name)


def convolution(
    weight: tuple[int, ...], bias: bool = True, dtype: type = np.float32, operator: str = "Conv", **attributes: object
):
    spatial, ends = len(weight) - 2, (weight[0], weight[1] * int(attributes.get("group", 1)))  # type: ignore[call-overload]
    outputs, channels = ends if operator == "Conv" else ends[::-1]
    arrays = {"w": weights(*weight, dtype=dtype)} | ({"b": weights(outputs, seed=1, dtype=dtype)} if bias else {})
    nodes = [node(operator, ["x", *arrays], ["h"], "conv", **attributes), node("Relu", ["h"], ["y"], "relu")]
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sizes = [11, 10, 7][:spatial]
    return tiny(
        nodes, {"x": ["n", channels, *sizes]}, {"y": ["n", outputs, *"abc"[:spatial]]}, arrays, dtype=element
    ), (channels, *sizes)


GEOMETRIES = [
    ((8, 6, 3, 3), {}),
    ((8, 6, 3, 3), {"pads": [1, 0, 2, 1]}),
    ((8, 6, 3, 2), {"strides": [2, 1], "dilations": [1, 3], "kernel_shape": [3, 2]}),
    ((8, 6, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((8, 6, 4, 4), {"auto_pad": "SAME_LOWER"}),
    ((8, 6, 3, 3), {"auto_pad": "VALID"}),
    ((12, 5, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((12, 4, 1, 1), {"group": 3}),
    ((8, 6, 1, 1), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
    ((8, 6, 5), {"strides": [2], "pads": [2, 1]}),
    ((8, 6, 1), {}),
    ((8, 4, 3), {"group": 2, "dilations": [2]}),
    ((8, 6, 3, 3, 3), {"strides": [2, 1, 2], "pads": [1, 0, 2, 1, 1, 0]}),
    ((8, 6, 2, 3, 1), {"dilations": [3, 2, 1], "pads": [0, 2, 0, 1, 0, 1]}),
    ((8, 6, 1, 1, 1), {"strides": [2, 1, 3], "pads": [1, 0, 0, 0, 0, 1]}),
    ((8, 6, 3, 2, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2, 1]}),
    ((12, 4, 3, 1, 2), {"group": 2}),
]
TRANSPOSED = [
    ((8, 6, 3, 3), {}),
    ((8, 6, 3, 3), {"pads": [1, 0, 2, 1]}),
    ((8, 6, 4, 3), {"strides": [2, 3], "pads": [1, 1, 1, 0], "output_padding": [1, 2]}),
    ((8, 6, 3, 2), {"strides": [2, 1], "dilations": [1, 3], "kernel_shape": [3, 2]}),
    ((8, 6, 2, 2), {"strides": [3, 2], "dilations": [3, 1], "output_padding": [2, 1], "pads": [2, 0, 1, 0]}),
    ((8, 6, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ((8, 6, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    ((8, 6, 3, 3), {"auto_pad": "VALID", "strides": [2, 2], "output_padding": [1, 0]}),
    ((12, 5, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((12, 4, 1, 1), {"group": 3}),
    ((8, 6, 1, 1), {"strides": [2, 3]}),
    ((8, 6, 4), {"strides": [2], "pads": [1, 1]}),
    ((8, 6, 1), {}),
    ((8, 4, 3), {"group": 2, "dilations": [2]}),
    ((6, 4, 3, 3, 2), {"strides": [2, 1, 2], "pads": [1, 0, 0, 1, 1, 0], "output_padding": [1, 0, 1]}),
    ((8, 3, 2, 1, 3), {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 1, 1]}),
]
EVERY = [("Conv", *geometry) for geometry in GEOMETRIES] + [("ConvTranspose", *geometry) for geometry in TRANSPOSED]


@pytest.mark.parametrize(("operator", "weight", "attributes"), EVERY)
@pytest.mark.parametrize("bias", [False, True])
def test_every_geometry_in_every_form(operator, weight, attributes, bias):
    """Borders included, a chain gives what the one weight gives that it amounts to."""
    model, shape = convolution(weight, bias, operator=operator, **attributes)
    network = open_network(model)
    (layer,) = network.layers
    for name, form in FORMS.items():
        if not (limits := form.limits(layer.geometry)):
            continue
        ranks = limits if name == "block_diagonal" else tuple(max(1, limit // 2) for limit in limits)
        stages = form.stages(LayerProblem(layer, None), ranks)
        given = np.zeros(layer.geometry.out_channels) if layer.bias() is None else layer.bias()
        smaller = write_chains(
            network, Plan("", {}, network_cost(network)), None, {"conv": Chain(layer, name, stages, given)}
        )
        composed = onnx.ModelProto()
        composed.CopyFrom(model)
        (old,) = (tensor for tensor in composed.graph.initializer if tensor.name == "w")
        dense = compose(stages).swapaxes(1, 2) if operator == "ConvTranspose" else compose(stages)
        dense = dense.reshape(weight).astype(np.float32)
        old.CopyFrom(onnx.numpy_helper.from_array(dense, "w"))
        assert_same(composed, smaller, shape)
        assert [n.op_type for n in smaller.graph][-1] == "Relu"
        assert onnx.ModelProto.FromString(serialize(smaller)).opset_import == model.opset_import
        *inner, last = (n for n in smaller.graph if n.op_type in ("Conv", "ConvTranspose"))
        assert all(len(n.inputs) == 2 for n in inner)
        assert len(last.inputs) == 2 + bias
        # a reordering that keeps the groups together is absorbed
        assert sum(n.op_type == "Gather" for n in smaller.graph) <= sum(stage.reorders for stage in stages)


@pytest.mark.parametrize(("operator", "weight", "attributes"), EVERY)
def test_every_geometry_at_full_rank(operator, weight, attributes):
    model, shape = convolution(weight, operator=operator, **attributes)
    (layer,) = open_network(model).layers
    for name, form in FORMS.items():
        if form.limits(layer.geometry) and name not in ("separable", "block_diagonal", "eigendamage_depthwise"):
            assert_same(model, pruned(model, form=name), shape)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 2e-2), (np.float32, 1e-4)])
@pytest.mark.parametrize("form", ["output_low_rank", "tucker"])
def test_weights_stay_in_their_type(dtype, rtol, form):
    model, shape = convolution((8, 6, 3, 3), dtype=dtype)
    for centred in (False, True):
        smaller = pruned(model, form=form, centred=centred)
        assert {v.const_value.dtype.numpy() for v in smaller.graph.initializers.values()} == {np.dtype(dtype)}
        assert_same(model, smaller, shape, max(rtol, 1e-5 if centred else 0))  # solves are damped


@pytest.mark.parametrize("kind", ["Gemm", "Gemm transB", "Gemm scaled", "Gemm row", "Gemm scalar", "MatMul"])
def test_products(kind):
    attributes = {"Gemm transB": {"transB": 1}, "Gemm scaled": {"alpha": 0.5, "beta": 2.0}}.get(kind, {})
    weight = weights(*((8, 6) if "transB" in attributes else (6, 8)))
    bias = {"Gemm row": weights(1, 8, seed=1), "Gemm scalar": np.float32(0.3)}.get(kind, weights(8, seed=1))
    operands = {"w": weight} if kind == "MatMul" else {"w": weight, "b": np.asarray(bias)}
    nodes = [node(kind.split()[0], ["x", *operands], ["y"], "layer", **attributes)]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 8]}, operands)
    for centred in (False, True):
        smaller = pruned(model, centred=centred)
        assert_same(model, smaller, (6,), 1e-4)
        kinds = [n.op_type for n in smaller.graph]
        assert kinds[:2] == [kind.split()[0]] * 2
        assert sum(layer.macs for layer in find_layers(smaller)) == count_macs(smaller) == 6 * 6 + 6 * 8


def matmul(*after: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **arrays: np.ndarray) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["h"], "layer"), *after]
    shapes = {name: ["n", 4, 8] for name in outputs}
    return tiny(nodes, {"x": ["n", 4, 6]}, shapes, {"w": weights(6, 8), **arrays})


@pytest.mark.parametrize("form", ["two_factor", "kfe_c_obd"])
@pytest.mark.parametrize("bias", [None, (8, 1), (8,)])
def test_a_constant_on_the_left_stays_there(form, bias):
    """An Add of one number a feature takes the bias; one along the other axis is none."""
    arrays = {"w": weights(8, 6)} | ({} if bias is None else {"b": weights(*bias, seed=1)})
    nodes = [node("MatMul", ["w", "x"], ["h"], "layer")]
    nodes += [node("Relu", ["h"], ["y"])] if bias is None else [node("Add", ["h", "b"], ["y"])]
    model = tiny(nodes, {"x": ["n", 6, 8]}, {"y": ["n", 8, 8]}, arrays)
    for centred in (False, True):
        smaller = pruned(model, form=form, centred=centred)
        assert_same(model, smaller, (6, 8))
        assert [tuple(value.is_initializer() for value in n.inputs) for n in smaller.graph][:2] == [(True, False)] * 2
        assert [layer.left for layer in find_layers(smaller)] == [True, True]
    smaller = pruned(model, ranks=3, form=form, centred=True)
    added = [] if bias == (8, 1) else ["Add"]
    assert kinds(smaller) == ["MatMul", "MatMul", *added, *("Relu" if bias is None else "Add",)]
    shapes = {tuple(value.shape) for value in smaller.graph.initializers.values()}
    assert shapes == {(3, 6), (8, 3), (8, 1), bias or (8, 1)}
    if bias is not None:
        x = weights(20, 6, 8, seed=5) + weights(1, 6, 1, seed=6)
        network = open_network(model)
        statistics = exact_statistics(network, x.swapaxes(1, 2))
        before, after = (
            run(model, {"x": x})["y"],
            run(apply_plan(network, plan_for(network, 3), statistics)[0], {"x": x})["y"],
        )
        np.testing.assert_allclose(after.mean((0, 2)), before.mean((0, 2)), rtol=1e-3, atol=1e-4)
        assert np.abs(after - before).max() > 1e-2


BIAS = weights(8, seed=1)


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


@pytest.mark.parametrize("order", [["h", "b"], ["b", "h"]])
def test_an_addition_behind_a_product_takes_the_bias(order):
    model = matmul(node("Add", order, ["y"], "add"), b=BIAS)
    smaller = pruned(model, ranks=3, centred=True)
    assert kinds(smaller) == ["MatMul", "MatMul", "Add"]
    assert "b" not in smaller.graph.initializers
    (added,) = (v for v in smaller.graph[-1].inputs if v.is_initializer())
    assert not np.allclose(added.const_value.numpy(), BIAS)
    mean_output_is_kept(model, ranks=3)
    uncentred = pruned(model, ranks=3)
    np.testing.assert_array_equal(uncentred.graph.initializers["b"].const_value.numpy(), BIAS)


def test_a_shared_addend_stays_for_the_other():
    after = [node("Add", ["h", "b"], ["y"], "add"), node("Add", ["y", "b"], ["z"], "other")]
    model = matmul(*after, outputs=("y", "z"), b=BIAS)
    smaller = pruned(model, ranks=3, centred=True)
    np.testing.assert_array_equal(smaller.graph.initializers["b"].const_value.numpy(), BIAS)
    found = run(smaller, {"x": weights(2, 4, 6)})
    np.testing.assert_allclose(found["z"] - found["y"], np.broadcast_to(BIAS, (2, 4, 8)), atol=1e-5)
    assert_same(model, pruned(model, centred=True), (4, 6))
    mean_output_is_kept(model, ranks=3)


@pytest.mark.parametrize(
    ("after", "arrays", "outputs"),
    [
        ([node("Relu", ["h"], ["y"])], {}, ("y",)),
        ([node("Add", ["h", "b"], ["y"])], {"b": weights(4, 8)}, ("y",)),
        ([node("Add", ["h", "b"], ["y"])], {"b": weights(1)}, ("y",)),
        ([node("Add", ["h", "h"], ["y"])], {}, ("y",)),
        ([node("Add", ["h", "b"], ["y"]), node("Neg", ["h"], ["z"])], {"b": BIAS}, ("y", "z")),
        ([node("Add", ["h", "b"], ["y"])], {"b": BIAS}, ("y", "h")),
        ([], {}, ("h",)),
    ],
)
def test_products_followed_by_something_else_gain_an_addition(after, arrays, outputs):
    model = matmul(*after, outputs=outputs, **arrays)
    before = [n.op_type for n in model.graph.node]
    smaller = pruned(model, ranks=3, centred=True)
    assert kinds(smaller) == ["MatMul", "MatMul", "Add", *before[1:]]
    assert kinds(pruned(model, ranks=3)) == ["MatMul", "MatMul", *before[1:]]
    for centred in (False, True):
        assert_same(model, pruned(model, centred=centred), (4, 6))
    mean_output_is_kept(model, ranks=3, value="h" if "h" in outputs else None)


def exact_statistics(network: Network, x: np.ndarray) -> Statistics:
    """Sums of a product's inputs, or of the patches of a convolution without padding."""
    (layer,) = network.prunable
    samples = random_statistics(layer, samples=len(x))
    if layer.op_type == "Conv":
        kernel = layer.geometry.kernel
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(float), kernel, axis=(2, 3))
        groups = layer.geometry.groups
        patches = windows.transpose(1, 4, 5, 0, 2, 3).reshape(groups, layer.geometry.patch_size, -1).swapaxes(1, 2)
    else:
        patches = x.astype(float).reshape(1, -1, x.shape[-1])
    moment = patches.swapaxes(1, 2) @ patches
    count = patches.shape[1]
    g = samples.cotangent_second_moment
    statistics = LayerStatistics(moment, patches.sum(1), g, count, len(x))
    return Statistics(network.fingerprint, 0, len(x), [], {}, {layer.name: statistics})


def mean_output_is_kept(model: onnx.ModelProto, ranks: int, value: str | None = None) -> None:
    """The means of what the layer computes, over the data that the statistics are of, do not move."""
    network = open_network(model)
    (layer,) = network.prunable
    shape = tuple(dim for dim in network.model.graph.inputs[0].shape if isinstance(dim, int))
    x = weights(20, *shape, seed=5) + weights(1, *shape[:1], *[1] * (len(shape) - 1), seed=6)
    statistics = exact_statistics(network, x)
    plan = plan_for(network, ranks)
    smaller, _ = apply_plan(network, plan, statistics)
    first = value or next(iter(v.name for v in network.model.graph.outputs))
    before, after = run(model, {"x": x})[first], run(smaller, {"x": x})[first]
    if not (value or linear_to(network, first)):
        return
    axes = (0, 2, 3) if layer.op_type == "Conv" else tuple(range(before.ndim - 1))
    np.testing.assert_allclose(after.mean(axes), before.mean(axes), rtol=1e-3, atol=1e-4)
    assert np.abs(after - before).max() > 1e-2  # the rank did cost something
    uncentred, _ = apply_plan(network, plan, None)
    without = run(uncentred, {"x": x})[first].mean(axes)
    assert np.abs(without - before.mean(axes)).max() > 1e-2  # and the bias did something


def linear_to(network: Network, output: str) -> bool:
    return all(n.op_type in ("MatMul", "Gemm", "Conv", "Add") for n in network.model.graph)


@pytest.mark.parametrize("form", ["output_low_rank", "input_low_rank", "tucker"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_keeps_its_mean_output(form, groups):
    arrays = {"w": weights(8, 6, 3, 3)}
    shape = [6 * groups, 7, 7]
    model = tiny(
        [node("Conv", ["x", "w"], ["y"], "conv", group=groups)], {"x": ["n", *shape]}, {"y": ["n", 8, 5, 5]}, arrays
    )
    network = open_network(model)
    x = weights(20, *shape, seed=5) + 2 * weights(1, shape[0], 1, 1, seed=6)
    smaller, _ = apply_plan(network, plan_for(network, 3, form), exact_statistics(network, x))
    before, after = run(model, {"x": x})["y"], run(smaller, {"x": x})["y"]
    np.testing.assert_allclose(after.mean((0, 2, 3)), before.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    uncentred = run(apply_plan(network, plan_for(network, 3, form), None)[0], {"x": x})["y"]
    assert np.abs(uncentred.mean((0, 2, 3)) - before.mean((0, 2, 3))).max() > 0.1


def test_a_convolution_gains_a_bias_from_centring_alone():
    model, _ = convolution((8, 6, 3, 3), bias=False)
    assert not [name for name in pruned(model, ranks=3).graph.initializers if "bias" in name]
    assert [name for name in pruned(model, ranks=3, centred=True).graph.initializers if "bias" in name]


def test_the_shared_bias_of_a_legacy_export_stays_for_the_other():
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], "first"), node("Gemm", ["h", "v", "b"], ["y"], "second")]
    arrays = {"w": weights(8, 8), "v": weights(8, 8, seed=1), "b": BIAS}
    model = tiny(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, arrays)
    network = open_network(model, exclude=["second"])
    smaller, _ = apply_plan(network, plan_for(network, 3), statistics_of(network))
    assert [n.op_type for n in smaller.graph] == ["Gemm"] * 3
    np.testing.assert_array_equal(smaller.graph.initializers["b"].const_value.numpy(), BIAS)
    assert smaller.graph[-1].inputs[2].name == "b"
    assert_same(model, apply_plan(network, plan_for(network), None)[0], (8,))


def test_an_output_of_the_graph_keeps_its_name():
    model = tiny([node("Conv", ["x", "w"], ["y"], "c")], {"x": ["n", 6, 5, 5]}, {"y": ["n", 8, "h", "w"]},
                 {"w": weights(8, 6, 3, 3)})  # fmt: skip
    smaller = pruned(model, form="tucker")
    assert [v.name for v in smaller.graph.outputs] == ["y"]
    assert_same(model, smaller, (6, 5, 5))


def test_names_come_from_the_layer():
    model, _ = convolution((8, 6, 3, 3))
    smaller = pruned(model, ranks=3, form="tucker", centred=True)
    assert [n.name for n in smaller.graph] == ["conv/tucker_0", "conv/tucker_1", "conv/tucker_2", "relu"]
    assert set(smaller.graph.initializers) == {"w/tucker_0", "w/tucker_1", "w/tucker_2", "w/bias"}
    values = [v.name for n in smaller.graph for v in n.outputs]
    assert values == ["conv/tucker_0_output", "conv/tucker_1_output", "h", "y"]


def test_taken_names_are_avoided():
    """Another initializer has the name that a new one would get, and another value that of an intermediate one."""
    arrays = {"w": weights(8, 6), "w/two_factor_0": weights(6, seed=1), "layer/bias": weights(6, seed=2)}
    nodes = [
        node("Add", ["x", "w/two_factor_0"], ["layer/two_factor_0_output"], "layer/two_factor_0"),
        node("Add", ["layer/two_factor_0_output", "layer/bias"], ["a"], "layer/two_factor_1"),
        node("Gemm", ["a", "w"], ["y"], "layer", transB=1),
    ]
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 8]}, arrays)
    smaller = pruned(model, centred=True)
    assert_same(model, smaller, (6,))
    names = [n.name for n in smaller.graph]
    assert len(set(names)) == len(names)


def test_a_model_can_be_pruned_again():
    model, shape = convolution((8, 6, 3, 3))
    once = ir.to_proto(pruned(model, form="tucker"))
    twice = pruned(once)
    assert len(once.graph.node) == 4
    assert {layer.name.split("/")[0] for layer in find_layers(twice)} == {"conv"}
    assert_same(model, twice, shape)


def test_bodies_may_read_what_a_layer_computes():
    body = tiny([node("Add", ["h", "b"], ["r"], "inner")], {}, {"r": ["n", 8]}).graph
    nodes = [node("MatMul", ["x", "w"], ["h"], "layer"), node("If", ["t"], ["y"], then_branch=body, else_branch=body)]
    arrays = {"w": weights(6, 8), "b": BIAS}
    nodes.insert(1, node("ReduceMin", ["x"], ["m"], keepdims=0))
    nodes.insert(2, node("Cast", ["m"], ["t"], to=9))
    model = tiny(nodes, {"x": ["n", 6]}, {"y": ["n", 8]}, arrays)
    for centred in (False, True):
        assert_same(model, pruned(model, centred=centred), (6,))


def test_a_layer_that_is_not_there_is_refused():
    model, _ = convolution((8, 6, 3, 3))
    network = open_network(model)
    chain = Chain(network.layers[0], "tucker", [], np.zeros(8))
    with pytest.raises(PreconditionError, match="no node named ghost"):
        FactorizePass({"ghost": chain})(network.model.clone())


def factors_of(model: ir.Model, name: str) -> list[ir.Value]:
    """The weights of the chain of a layer, in order."""
    return [each.inputs[1] for each in model.graph if (each.name or "").startswith(f"{name}/") and len(each.inputs) > 1]


@pytest.mark.parametrize("make", [pyramid, stacked, siamese, upsampled])
@pytest.mark.parametrize("centred", [False, True])
def test_nodes_that_share_a_weight_share_its_factors(make: Callable[[], onnx.ModelProto], centred: bool):
    model = make()
    network, feeds = open_network(model), samples(model, 3)
    smaller = pruned(model, centred=centred)
    for name, array in run(model, feeds).items():
        np.testing.assert_allclose(run(smaller, feeds)[name], array, rtol=1e-4, atol=1e-4 * np.abs(array).max())
    for layer in network.prunable:
        factors = [factors_of(smaller, use.name) for use in layer.uses]
        assert len(factors[0]) > 1
        assert all(other == factors[0] for other in factors)
    assert not {node.name for node in smaller.graph} & {layer.name for layer in network.layers}


@pytest.mark.parametrize("make", [pyramid, stacked, siamese, upsampled])
def test_costs_of_shared_weights_are_those_of_the_model(make: Callable[[], onnx.ModelProto]):
    """MACs at every node, parameters once, biases that come and go aside."""
    network = open_network(make())
    statistics = statistics_of(network)
    planned = Planner(network, statistics, round_to=1)
    for kind, count in ((Macs, count_macs), (Params, count_parameters)):
        plan = planned.plan(kind(0.6))
        smaller, _ = apply_plan(network, plan, statistics)
        assert any(layer.twins and layer.name in plan.changed for layer in network.prunable)
        assert count_macs(smaller) == round(planned.fraction(plan, Macs) * count_macs(network.model))
        biases = sum(8 for layer in network.prunable if layer.bias() is None) * 3
        predicted = planned.fraction(plan, Params) * count_parameters(network.model)
        assert abs(count_parameters(smaller) - predicted) <= biases
        assert count(smaller) <= 0.6 * count(network.model) + (biases if kind is Params else 0)


def test_each_node_keeps_a_bias_of_its_own():
    """It moves by what the mean over all nodes gives: ``b + (W - W_hat) mu``."""
    network = open_network(pyramid())
    statistics = statistics_of(network)
    smaller, _ = apply_plan(network, plan_for(network, ranks=2), statistics)
    layer = next(layer for layer in network.prunable if layer.name == "Conv8")
    (problem,) = [LayerProblem(layer, statistics.layers[layer.name])]
    approximation = compose(FORMS["output_low_rank"].stages(problem, (2,)))
    change = (problem.weight - approximation).reshape(len(approximation[0]), -1) @ problem.mean[0]
    assert np.abs(change).max() > 0.1
    for use in layer.uses:
        last = [each for each in smaller.graph if (each.name or "").startswith(f"{use.name}/")][-1]
        np.testing.assert_allclose(last.inputs[2].const_value.numpy(), use.bias() + change, rtol=1e-4, atol=1e-5)


def test_what_is_around_a_shared_weight_is_not_merged_with_it():
    """Reorderings stay too: the factors are read by all nodes as they are."""
    nodes = [node("Conv", [x, "w"], [y], y, pads=[1] * 4) for x, y in (("x", "g"), ("g", "h"))]
    arrays = {"w": weights(8, 8, 3, 3), "v": weights(6, 8, 1, 1)}
    model = tiny([*nodes, node("Conv", ["h", "v"], ["y"], "y")], {"x": ["n", 8, 5, 5]}, {"y": ["n", 6, 5, 5]}, arrays)
    smaller = pruned(model, form="block_diagonal", ranks=1)
    gathers = [each for each in smaller.graph if each.op_type == "Gather"]
    assert len({each.inputs[1] for each in gathers}) == 2 < len(gathers)
    assert_same(model, smaller, (8, 5, 5))
    low = pruned(model, ranks=2)
    assert [factors_of(low, "g"), factors_of(low, "y")[:0]] == [factors_of(low, "h"), []]
    assert len(factors_of(low, "g")) > 1
