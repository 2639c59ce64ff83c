"""Models as torch modules, compared with ONNX Runtime and with the torch networks that they were exported from."""

from __future__ import annotations

import copy
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import find_branches, open_network
from onnx_kfe.planning import FORMS, Candidate, Plan, network_cost
from onnx_kfe.rewrite import RemovePass, apply_plan
from tests.cases import CASES, build_module, load_case
from tests.planning.problems import statistics_of
from tests.recovery.training.comparison import assert_close, constants, outputs, step
from tests.tiny import add_external_data, node, run, tiny, weights


def noise(model: onnx.ModelProto, batch: int, sizes: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Random inputs, with the sizes given where an axis behind the first is free."""
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input if v.name not in constants}
    free = iter(sizes)
    return {
        name: weights(dims[0].dim_value or batch, *(dim.dim_value or next(free) for dim in dims[1:]), seed=batch)
        for name, dims in shapes.items()
    }


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


def test_a_module_of_another_model_is_refused():
    module = kfe.to_torch(load_case("residual-11").model)
    with pytest.raises(KfeError, match=r"another model: .* has weights '.*', .* has not"):
        kfe.write_back(module, load_case("mlp-11").model)
    with pytest.raises(KfeError, match=r"another model: the model has weights '.*/separable_0', the module has not"):
        kfe.write_back(module, compressed("residual-11", "separable"))
    wider = tiny([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 4]}, {"w": weights(3, 4)})
    narrow = tiny([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 2]}, {"w": weights(3, 2)})
    with pytest.raises(KfeError, match=r"'w' has shape \[3, 2\], in the model it is \[3, 4\]"):
        kfe.write_back(kfe.to_torch(narrow), wider)


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
