"""Models as torch modules, compared with ONNX Runtime and with the torch networks that they were exported from."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import find_branches, open_network
from onnx_kfe.planning import FORMS, Candidate, Plan, network_cost
from onnx_kfe.rewrite import RemovePass, apply_plan
from tests.cases import CASES, build_module, load_case
from tests.planning.problems import statistics_of
from tests.tiny import add_external_data, node, run, tiny, weights

Arrays = Mapping[str, np.ndarray]
FLOATS = (np.float16, np.float32, np.float64)


def outputs(module: nn.Module, feeds: Arrays) -> dict[str, np.ndarray]:
    """What a module makes of the inputs, which go by name."""
    with torch.no_grad():
        result = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    tensors = result if isinstance(result, tuple) else (result,)
    return {name: tensor.numpy() for name, tensor in zip(module.output_names, tensors, strict=True)}


def assert_close(found: Arrays, wanted: Arrays, rtol: float = 1e-4) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.ptp(array.astype(float)) > 0
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * float(np.abs(array).max()), err_msg=name)


def noise(model: onnx.ModelProto, batch: int, sizes: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Random inputs, with the sizes given where an axis behind the first is free."""
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input if v.name not in constants}
    free = iter(sizes)
    return {
        name: weights(dims[0].dim_value or batch, *(dim.dim_value or next(free) for dim in dims[1:]), seed=batch)
        for name, dims in shapes.items()
    }


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers and tensors of Constant nodes by name."""
    nodes = {each.output[0]: each.attribute[0].t for each in model.graph.node if each.op_type == "Constant"}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer} | nodes
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items() if tensor.dims is not None}


def structure(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without its weights."""
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    attributes = (each.attribute[0].t for each in bare.graph.node if each.op_type == "Constant")
    for tensor in (*bare.graph.initializer, *attributes):
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    return bare


def with_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with Constant nodes in place of its initializers."""
    nodes = [node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes += model.graph.node
    model.graph.ClearField("initializer")
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return model


def step(module: nn.Module, feeds: Arrays, rate: float = 0.1) -> None:
    """A step of gradient descent on the mean square of the outputs."""
    optimizer = torch.optim.SGD(module.parameters(), rate)
    result = module(*(torch.from_numpy(array) for array in feeds.values()))
    sum(each.square().mean() for each in (result if isinstance(result, tuple) else (result,))).backward()
    optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_gives_what_onnxruntime_gives(name):
    case = load_case(name)
    module = kfe.to_torch(case.model).eval()
    for batch in (1, 5):
        feeds = case.inputs(batch)
        assert_close(outputs(module, feeds), run(case.model, feeds))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ch_PP-OCRv4_rec_infer", (48, 96)),
        ("cifar10_cct_vit", ()),
        ("cifar10_resnet20_bn", ()),
        ("fastestdet_coco", ()),
        ("ultraface_rfb320", ()),
    ],
)
def test_real_models(assets, name, sizes):
    path = assets / "models" / f"{name}.onnx"
    module = kfe.to_torch(path).eval()
    model = onnx.load(path)
    feeds = noise(model, 2, sizes)
    assert_close(outputs(module, feeds), run(model, feeds))
    assert structure(kfe.write_back(module, path)).graph.node == structure(model).graph.node


def compressed(name: str, form: str) -> onnx.ModelProto:
    """A case with each layer in a form at half its ranks, where it has that form."""
    network = open_network(load_case(name).model)
    choices = {}
    for layer in network.prunable:
        if limits := FORMS[form].limits(layer.geometry):
            ranks = tuple(max(1, limit // 2) for limit in limits)
            choices[layer.name] = Candidate(form, ranks, FORMS[form].cost(layer.geometry, ranks), 0.0)
    assert choices
    plan = Plan(network.fingerprint, choices, network_cost(network))
    return ir.to_proto(apply_plan(network, plan, statistics_of(network))[0])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("attention-13", "two_factor"),
        ("unet-dynamo", "tucker"),
        ("inception-17", "spatial"),
        ("residual-11", "separable"),
        ("residual-dynamo", "block_diagonal"),
        ("pyramid-11", "output_low_rank"),
    ],
)
def test_compressed_models(name, form):
    model = compressed(name, form)
    module = kfe.to_torch(model).eval()
    for batch in (1, 5):
        feeds = load_case(name).inputs(batch)
        assert_close(outputs(module, feeds), run(model, feeds))
    step(module.train(), feeds)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_reordered_channels_are_among_them():
    assert "Gather" in {each.op_type for each in compressed("residual-dynamo", "block_diagonal").graph.node}


def test_removed_branches():
    """The mean that stays of a branch is a parameter."""
    network = open_network(load_case("residual-11").model)
    layer = find_branches(network)[0].layer
    model = ir.to_proto(RemovePass({layer: weights(8).astype(np.float64)})(network.model.clone()).model)
    module = kfe.to_torch(model).eval()
    feeds = load_case("residual-11").inputs(5)
    assert_close(outputs(module, feeds), run(model, feeds))
    assert any(name.endswith("/mean") for name in module.initializer_names.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["plain-13", "dense-13", "depthwise_separable-13"])
def test_gradients_are_those_of_the_torch_network(name, training):
    case = load_case(name)
    network = build_module(name.rpartition("-")[0]).requires_grad_(True).train(training)
    module = kfe.to_torch(case.model).train(training)
    feeds = case.inputs(6)
    for each in (network, module):
        step(each, feeds)
    found, wanted = dict(module.named_parameters()), dict(network.named_parameters())
    assert set(found) == set(wanted)
    for key, parameter in wanted.items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_running_statistics_are_those_of_the_torch_network_and_written_back():
    case = load_case("plain-13")
    network, module = build_module("plain").train(), kfe.to_torch(case.model)
    assert module.training
    feeds = case.inputs(6)
    with torch.no_grad():
        for each in (network, module):
            each(torch.from_numpy(feeds["x"]))
    wanted = {key: value for key, value in network.state_dict().items() if "running" in key}
    assert len(wanted) == 6
    written = constants(kfe.write_back(module, case.model))
    for key, statistic in wanted.items():
        torch.testing.assert_close(module.state_dict()[key], statistic)
        np.testing.assert_array_equal(written[key], module.state_dict()[key])
        assert not np.array_equal(written[key], constants(case.model)[key])
    assert not {key for key, _ in module.named_parameters()} & set(wanted)


def test_gradients_are_differences_of_onnxruntime():
    """Along a random direction of all parameters, by models with weights moved to and fro."""
    case = load_case("tokenizer_transformer-dynamo")
    module, feeds = kfe.to_torch(case.model).eval(), case.inputs(3)
    step(module, feeds, rate=0.0)
    torch.manual_seed(0)
    directions = {key: torch.randn_like(parameter) for key, parameter in module.named_parameters()}
    slope = sum(float((parameter.grad * directions[key]).sum()) for key, parameter in module.named_parameters())
    values = []
    for size in (1e-3, -1e-3):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for key, parameter in moved.named_parameters():
                parameter.add_(directions[key], alpha=size)
        results = run(kfe.write_back(moved, case.model), feeds)
        values.append(sum(float(np.square(array).mean()) for array in results.values()))
    assert abs(slope) > 1e-2
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("name", ["residual-11", "dense-13", "attention-13", "unet-dynamo"])
@pytest.mark.parametrize("prepare", [lambda model: model, with_constant_nodes], ids=["initializers", "nodes"])
def test_weights_written_back_and_trained(name, prepare):
    case = load_case(name)
    model = prepare(case.model)
    module, before = kfe.to_torch(model), model.SerializeToString()
    same = kfe.write_back(module, model)
    assert {key: array.tobytes() for key, array in constants(same).items()} == {
        key: array.tobytes() for key, array in constants(model).items()
    }
    assert structure(same).graph.node == structure(model).graph.node
    assert same.metadata_props == model.metadata_props

    step(module, case.inputs(4))
    written, feeds = kfe.write_back(module, model), case.inputs(5)
    assert_close(run(written, feeds), outputs(module.eval(), feeds))
    changes = [np.abs(array - run(model, feeds)[key]).max() for key, array in run(written, feeds).items()]
    assert max(changes) > 1e-3
    assert model.SerializeToString() == before
    assert structure(written).graph.node == structure(model).graph.node


def test_kinds_of_models(tmp_path):
    """A path with external data, a ModelProto and an ir.Model; the latter comes back as one."""
    model = load_case("mlp-11").model
    path = add_external_data(load_case("mlp-11").model, str(tmp_path / "model.onnx"))
    given = ir.from_proto(model)
    names = [tensor.const_value.name for tensor in given.graph.initializers.values()]
    for source, kind in ((path, onnx.ModelProto), (model, onnx.ModelProto), (given, ir.Model)):
        module = kfe.to_torch(source)
        with torch.no_grad():
            next(module.parameters()).zero_()
        written = kfe.write_back(module, source)
        assert isinstance(written, kind)
        proto = ir.to_proto(written) if kind is ir.Model else written
        key = next(iter(module.initializer_names))
        assert not constants(proto)[key].any()
        assert run(proto, load_case("mlp-11").inputs(1))
    assert [tensor.const_value.name for tensor in given.graph.initializers.values()] == names
    assert constants(ir.to_proto(given))[key].any()


def test_names_are_those_of_the_graph():
    case = load_case("attention-13")
    module = kfe.to_torch(case.model)
    assert module.input_names == ["x"]
    assert module.output_names == ["logits"]
    learnt = set(module.initializer_names.values())
    assert learnt == set(module.initializer_names) == set(module.state_dict())
    assert {key for key, _ in build_module("attention").named_parameters()} & learnt
    assert kfe.to_torch(load_case("two_heads-13").model).output_names == ["scores", "boxes"]


AWKWARD = [
    "a",
    "a.b",
    "a_",
    "x.y",
    "x_y",
    "training",
    "class.weight",
    "..",
    "onnx::Conv 1",
    'say "w"',
    "conv",
    "program",
]


def awkward() -> onnx.ModelProto:
    """Weights whose names torch or Python cannot have, or that would fall together, and a node with the name of one."""
    nodes, value = [], "forward"
    for place, name in enumerate(AWKWARD):
        nodes.append(node("MatMul", [value, name], [f"x.{place}"], name="conv" if place == 2 else f"node {place}"))
        value = f"x.{place}"
    nodes.append(node("BatchNormalization", [value, "s", "b", "m", "v"], ["y"], name="conv"))
    statistics = {"s": weights(4), "b": weights(4, seed=1), "m": weights(4, seed=2), "v": weights(4, seed=3) ** 2}
    arrays = {name: weights(4, 4, seed=place) / 2 for place, name in enumerate(AWKWARD)}
    return tiny(nodes, {"forward": ["n", 4]}, {"y": ["n", 4]}, arrays | statistics)


def test_awkward_names():
    model, feeds = awkward(), {"forward": weights(3, 4)}
    module = kfe.to_torch(model).eval()
    assert_close(outputs(module, feeds), run(model, feeds))
    assert sorted(module.initializer_names.values()) == sorted([*AWKWARD, "s", "b", "m", "v"])
    same = {key for key, name in module.initializer_names.items() if key == name}
    assert same >= {"a.b", "a_", "x.y", "x_y", "onnx::Conv 1", "conv"} - {"onnx::Conv 1"}
    step(module, feeds)
    assert_close(run(kfe.write_back(module, model), feeds), outputs(module, feeds))


def test_inputs_by_position_and_name():
    nodes = [node("MatMul", ["left", "w"], ["h"]), node("Sub", ["h", "right"], ["y"])]
    model = tiny(nodes, {"left": ["n", 3], "right": ["n", 2]}, {"y": ["n", 2]}, {"w": weights(3, 2)})
    module = kfe.to_torch(model)
    left, right = torch.randn(4, 3), torch.randn(4, 2)
    wanted = left @ module.w - right
    torch.testing.assert_close(module(left, right), wanted)
    torch.testing.assert_close(module(left, right=right), wanted)
    torch.testing.assert_close(module(right=right, left=left), wanted)
    for given, named in (((left,), {}), ((left, right), {"right": right}), ((left,), {"wrong": right})):
        with pytest.raises(TypeError, match="the inputs are left, right"):
            module(*given, **named)


def test_only_what_was_learnt_is_trained():
    nodes = [
        node("Sub", ["x", "mean"], ["centred"]),
        node("Add", ["centred", "positions"], ["placed"]),
        node("Reshape", ["flat w", "w shape"], ["w"]),
        node("MatMul", ["placed", "w"], ["h"]),
        node("Add", ["h", "b"], ["hb"]),
        node("Div", ["hb", "sqrt"], ["scaled"]),
        node("Add", ["scaled", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["s"]),
        node("MatMul", ["s", "v"], ["boxes"]),
        node("Clip", ["boxes", "low"], ["clipped"]),
        node("Mul", ["clipped", "gain"], ["gained"]),
        node("Add", ["gained", "anchors"], ["y"]),
    ]
    arrays = {
        "mean": weights(4),
        "positions": weights(1, 5, 4),
        "flat w": weights(24),
        "w shape": np.array([4, 6]),
        "b": weights(6),
        "sqrt": np.array(2.0, np.float32),
        "mask": np.where(np.arange(6) > 4, np.float32(-1e9), np.float32(0)),
        "v": weights(6, 3),
        "low": np.array(-1, np.float32),
        "gain": np.array([2.0], np.float32),
        "anchors": weights(1, 5, 3),
        "unread": weights(3),
    }
    model = tiny(nodes, {"x": ["n", 5, 4]}, {"y": ["n", 5, 3]}, arrays)
    module = kfe.to_torch(model)
    assert {key for key, _ in module.named_parameters()} == {"positions", "flat w", "b", "v"}
    assert set(module.state_dict()) == {"positions", "flat w", "b", "v"}
    feeds = {"x": weights(2, 5, 4)}
    assert_close(outputs(module, feeds), run(model, feeds))


def test_tables_are_trained_and_shared_weights_stay_shared():
    """An embedding whose table is the weight of the last layer, too."""
    nodes = [
        node("Gather", ["table", "x"], ["tokens"]),
        node("Relu", ["tokens"], ["h"]),
        node("Transpose", ["table"], ["w"], perm=[1, 0]),
        node("MatMul", ["h", "w"], ["y"]),
    ]
    model = tiny(nodes, {}, {"y": ["n", 7]}, {"table": weights(7, 4)})
    model.graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n"]))
    module, feeds = kfe.to_torch(model), {"x": np.array([1, 3, 6])}
    (table,) = module.parameters()
    reference = table.detach().clone().requires_grad_()
    (reference[feeds["x"]].relu() @ reference.T).square().mean().backward()
    step(module, feeds)
    torch.testing.assert_close(table.grad, reference.grad)
    assert_close(run(kfe.write_back(module, model), feeds), outputs(module, feeds))


def test_a_convolution_that_is_used_twice_is_one_parameter():
    case = load_case("shared-11")
    module = kfe.to_torch(case.model)
    weights_of = [each.input[1] for each in case.model.graph.node if each.op_type == "Conv"]
    assert len(weights_of) == len(set(weights_of)) + 1
    assert len(list(module.parameters())) == len(set(weights_of)) * 2 + 2
    step(module, case.inputs(4))
    assert_close(run(kfe.write_back(module, case.model), case.inputs(2)), outputs(module, case.inputs(2)))


def test_half_precision():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    arrays = {key: value.detach().numpy().astype(np.float16) for key, value in network.state_dict().items()}
    nodes = [
        node("Conv", ["x", "0.weight", "0.bias"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Flatten", ["r"], ["f"]),
        node("Gemm", ["f", "3.weight", "3.bias"], ["y"], transB=1),
    ]
    model = tiny(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 2]}, arrays, dtype=onnx.TensorProto.FLOAT16)
    module, feeds = kfe.to_torch(model), {"x": weights(3, 3, 4, 4, dtype=np.float16)}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert_close(outputs(module, feeds), run(model, feeds), rtol=5e-3)
    identical = constants(kfe.write_back(module, model))
    assert all(identical[name].tobytes() == array.tobytes() for name, array in arrays.items())

    module = module.float()  # trained in float32, written back in the type of the graph
    step(module, {"x": feeds["x"].astype(np.float32)})
    written = kfe.write_back(module, model)
    assert {array.dtype for array in constants(written).values()} == {np.dtype(np.float16)}
    assert not np.array_equal(constants(written)["0.weight"], arrays["0.weight"])
    wanted = outputs(module, {"x": feeds["x"].astype(np.float32)})["y"]
    np.testing.assert_allclose(run(written, feeds)["y"], wanted, atol=5e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["dense-13", "attention-13", "unet-dynamo"])
def test_copies_types_and_autocast(name):
    case = load_case(name)
    module, feeds = kfe.to_torch(case.model).eval(), case.inputs(2)
    wanted = run(case.model, feeds)
    other = copy.deepcopy(module)
    step(other, feeds)
    assert_close(outputs(module, feeds), wanted)
    doubled = copy.deepcopy(module).double()
    found = outputs(doubled, {key: array.astype(np.float64) for key, array in feeds.items()})
    assert_close(found, {key: array.astype(np.float64) for key, array in wanted.items()})
    with torch.autocast("cpu", torch.bfloat16):
        result = module(torch.from_numpy(feeds["x"]))
        result.float().square().mean().backward()
    (array,) = wanted.values()
    np.testing.assert_allclose(result.detach().float().numpy(), array, atol=0.1 * np.abs(array).max())
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_distributed(tmp_path):
    case = load_case("dense-13")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        module = nn.parallel.DistributedDataParallel(kfe.to_torch(case.model))
        for seed in range(2):  # the second step fails where a parameter got no gradient in the first
            step(module, case.inputs(4, seed))
    finally:
        torch.distributed.destroy_process_group()
    feeds = case.inputs(3)
    assert_close(run(kfe.write_back(module.module, case.model), feeds), outputs(module.module.eval(), feeds))


def test_dropout_drops_in_training_alone():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Dropout", ["h", "ratio"], ["y", "mask"])]
    arrays = {"w": np.eye(50, dtype=np.float32), "ratio": np.array(0.2, np.float32)}
    module = kfe.to_torch(tiny(nodes, {"x": ["n", 50]}, {"y": ["n", 50]}, arrays))
    x = torch.ones(40, 50)
    dropped = module(x) == 0
    assert 0.1 < float(dropped.float().mean()) < 0.3
    torch.testing.assert_close(module(x)[module(x) != 0].unique(), torch.tensor([1.25]))
    torch.testing.assert_close(module.eval()(x), x)


def test_a_module_of_another_model_is_refused():
    module = kfe.to_torch(load_case("residual-11").model)
    with pytest.raises(KfeError, match="another model: .* has weights '.*', .* has not"):
        kfe.write_back(module, load_case("mlp-11").model)
    with pytest.raises(KfeError, match="another model: the module has weights"):
        kfe.write_back(module, compressed("residual-11", "separable"))
    wider = tiny([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 4]}, {"w": weights(3, 4)})
    narrow = tiny([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 2]}, {"w": weights(3, 2)})
    with pytest.raises(KfeError, match=r"'w' has shape \[3, 2\], in the model it is \[3, 4\]"):
        kfe.write_back(kfe.to_torch(narrow), wider)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (node("MadeUp", ["x"], ["y"], "strange", domain="com.example"), r"operator com\.example\.MadeUp .*'strange'"),
        (node("TfIdfVectorizer", ["x"], ["y"], "strange"), "operator TfIdfVectorizer .*'strange'"),
        (node("Pad", ["x", "p"], ["y"], "strange", mode="wrap"), "operator Pad .*'strange'.* wraps"),
        (node("Resize", ["x", "", "s"], ["y"], "strange", antialias=1, mode="linear"), "Resize .*'strange'.*antialias"),
    ],
)
def test_operators_that_cannot_be_converted_are_named(operator, message):
    arrays = {"p": np.array([0, 1, 0, 1]), "s": np.array([1, 2], np.float32)}
    model = tiny(
        [operator], {"x": ["n", 4]}, {"y": ["n", "m"]}, arrays, opset=19, opsets=[helper.make_opsetid("com.example", 1)]
    )
    with pytest.raises(KfeError, match=message):
        kfe.to_torch(model)


@pytest.mark.parametrize("missing", ["torch", "onnx2fx"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "onnx_kfe.recovery.training._convert", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(KfeError, match=rf"{missing}.*pip install 'onnx-kfe\[train\]'"):
        kfe.to_torch(load_case("mlp-11").model)


def test_onnxruntime_is_what_it_is_compared_with():
    """The comparison itself can fail."""
    case = load_case("mlp-11")
    module = kfe.to_torch(case.model)
    with torch.no_grad():
        next(module.parameters()).mul_(1.01)
    with pytest.raises(AssertionError):
        assert_close(outputs(module, case.inputs(2)), run(case.model, case.inputs(2)))
    assert onnxruntime.get_available_providers()
