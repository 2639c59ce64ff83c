"""Models without channels against the originals with zeros in the weights of the channels that went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes import PreconditionError

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import ChannelGroups, LayerCut, Network, count_parameters, find_groups, find_layers, open_network
from onnx_kfe.rewrite import ChannelPass
from tests.cases import load_case
from tests.tiny import run, weights
from tests.topologies import IMAGE, TOPOLOGIES, Builder

Masks = dict[str, np.ndarray]

UNITS: Mapping[str, list[int]] = {  # of the groups that can be pruned
    "plain-13": [8, 16, 12],
    "residual-11": [8, 8, 8],
    "strided_shortcut-17": [8, 16, 16, 16],
    "dense-13": [8, 8, 8, 8],
    "inverted_residual-17": [8, 16, 8, 16, 8],
    "depthwise_separable-13": [8, 16, 12],
    "grouped-11": [4, 4, 4],
    "shuffle-13": [8, 8, 8],
    "inception-17": [8, 8, 8, 8, 4, 4, 8, 8, 8, 4, 4],
    "unet-13": [8, 16, 16, 8, 8],
    "pyramid-11": [8, 16, 8],
    "autoencoder-13": [8, 16, 8],
    "conv1d-13": [8, 16, 12],
    "dilated-11": [8, 12, 12, 8],
    "mlp-11": [24, 16],
    "gelu_mlp-17": [32],
    "attention-13": [8, 32],
    "tokenizer_transformer-17": [8, 32],
    "two_heads-13": [8, 16],
    "activations-13": [8, 8, 8, 8, 8, 8],
    "shared-11": [8, 8],
    "denoiser-17": [12, 12, 12],
    "zero_padding_shortcut": [8, 12, 8],
    "gated_mlp": [20],
    "depthwise_multiplier": [6],
    "grouped_transposed": [4, 6],
    "pixel_shuffle": [6, 5, 5],
    "channel_shuffle": [2, 2, 6, 4],
    "flattened": [6, 10],
    "decoder": [5, 6],
    "shared_biases": [8, 8],
    "shared_weights": [8],
    "gathered": [5, 3],
    "sliced": [6, 2, 4, 5],
    "old_attributes": [3],
    "new_split": [4, 4, 3],
    "equal_split": [6, 6, 4],
    "computed_target": [5, 5],
    "tokens": [10],
    "resized_alike": [8],
    "normalized": [8],
    "half_precision": [8, 8],
}


def model_of(name: str) -> onnx.ModelProto:
    return TOPOLOGIES[name]() if name in TOPOLOGIES else load_case(name).model


def random_masks(groups: ChannelGroups, seed: int) -> Masks:
    """Between one and all but one unit of each group that can be pruned go."""
    random = np.random.default_rng(seed)
    masks = {group.name: np.ones(group.size, bool) for group in groups.groups if group.prunable}
    for mask in masks.values():
        mask[random.permutation(mask.size)[: random.integers(1, mask.size)]] = False
    return masks


def zeroed(network: Network, cuts: Mapping[str, LayerCut]) -> onnx.ModelProto:
    """The model with zeros for what layers lose of weights and biases."""
    proto = ir.to_proto(network.model.clone())
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for layer in proto.graph.node:
        if layer.name not in cuts or layer.input[1] not in constants:
            continue
        cut, attributes = cuts[layer.name], {each.name: each.i for each in layer.attribute}
        kept = np.outer(cut.rows, cut.columns)
        groups = attributes.get("group", 1)
        if layer.op_type == "MatMul" or (layer.op_type == "Gemm" and not attributes.get("transB")):
            kept = kept.T
        elif groups > 1:
            blocks = kept.reshape(groups, len(cut.rows) // groups, groups, -1)
            kept = np.concatenate([blocks[group, :, group] for group in range(groups)])
            if layer.op_type == "ConvTranspose":
                kept = np.concatenate([blocks[group, :, group].T for group in range(groups)])
        elif layer.op_type == "ConvTranspose":
            kept = kept.T
        masks = [kept.reshape(*kept.shape, *[1] * (constants[layer.input[1]].ndim - 2)), cut.rows]
        for place, mask in zip(range(1, len(layer.input)), masks, strict=False):
            name = f"{layer.name} zeroed {place}"
            proto.graph.initializer.append(numpy_helper.from_array(constants[layer.input[place]] * mask, name))
            layer.input[place] = name
    return proto


def feeds_of(model: onnx.ModelProto, batch: int) -> dict[str, np.ndarray]:
    """Noise around a level of each sample."""
    (value,) = model.graph.input
    first, *others = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
    shape = [first or batch, *(size or 7 for size in others)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return {value.name: weights(*shape, seed=batch, dtype=dtype)}


def pruned(network: Network, masks: Masks) -> ir.Model:
    model = ChannelPass(network, masks)(network.model.clone()).model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def assert_same(network: Network, smaller: ir.Model, cuts: Mapping[str, LayerCut]) -> None:
    """Same outputs as with zeros, which are others than before."""
    original, reference = ir.to_proto(network.model), zeroed(network, cuts)
    for batch in (1, 3):
        feeds = feeds_of(original, batch)
        wanted, before = run(reference, feeds), run(original, feeds)
        scale = {name: np.abs(array).max() for name, array in wanted.items()}
        for name, array in run(smaller, feeds).items():
            assert array.dtype == wanted[name].dtype
            precision = 1e-4 if array.dtype == np.float32 else 1e-2
            np.testing.assert_allclose(array, wanted[name], rtol=precision, atol=precision * scale[name], err_msg=name)
        assert max(np.abs(before[name] - wanted[name]).max() / scale[name] for name in wanted) > 1e-2


@pytest.mark.parametrize("name", UNITS)
def test_what_is_left_computes_the_same(name):
    network = open_network(model_of(name))
    groups = find_groups(network)
    assert [group.size for group in groups.groups if group.prunable] == UNITS[name]
    for seed in (0, 1):
        masks = random_masks(groups, seed)
        cuts = groups.cut(masks)
        smaller = pruned(network, masks)
        assert_same(network, smaller, cuts)
        assert_as_cut(smaller, cuts)
        assert_interface(network.model, smaller)


def assert_as_cut(smaller: ir.Model, cuts: Mapping[str, LayerCut]) -> None:
    """Layers have the channels, and so the parameters, that were said to be left."""
    for layer in find_layers(smaller):
        cut, geometry = cuts[layer.name], layer.geometry
        found = geometry.out_channels, geometry.in_channels, geometry.groups
        assert found == (cut.rows.sum(), cut.columns.sum(), cut.groups), layer.name
        weight = layer.node.inputs[1]
        if weight.const_value is not None:
            left = cut.rows.sum() * cut.columns.sum() // cut.groups * geometry.taps
            assert weight.const_value.size == left


def assert_interface(original: ir.Model, smaller: ir.Model) -> None:
    """Names, inputs, outputs and what is said of the model are as they were, and nothing is left over."""
    before, after = ir.to_proto(original), ir.to_proto(smaller)
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert after.opset_import == before.opset_import
    assert after.metadata_props == before.metadata_props
    nodes = {node.name: (node.op_type, list(node.output)) for node in before.graph.node}
    assert {node.name: (node.op_type, list(node.output)) for node in after.graph.node}.items() <= nodes.items()
    for node in smaller.graph:
        assert any(value.uses() or value.is_graph_output() for value in node.outputs), node.name
    assert all(value.uses() for value in smaller.graph.initializers.values())
    known = {value.name for node in original.graph for value in node.outputs if value.shape is not None}
    for node in smaller.graph:
        for value in node.outputs:
            assert value.shape is not None or value.name not in known, value.name


REAL: Mapping[str, tuple[int, int]] = {  # groups that can be pruned, and others
    "cifar10_resnet20": (12, 1),
    "cifar10_cct_vit": (12, 3),
    "fastestdet_coco": (34, 6),
    "ultraface_rfb320": (25, 4),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name, assets: Path):
    network = open_network(assets / "models" / f"{name}.onnx")
    groups = find_groups(network)
    prunable = sum(group.prunable for group in groups.groups)
    assert (prunable, len(groups.groups) - prunable) == REAL[name]
    masks = random_masks(groups, 0)
    smaller = pruned(network, masks)
    assert_same(network, smaller, groups.cut(masks))
    assert_as_cut(smaller, groups.cut(masks))


def test_nothing_changes_where_nothing_goes():
    network = open_network(load_case("inverted_residual-17").model)
    masks = {group.name: np.ones(group.size, bool) for group in find_groups(network).groups}
    result = ChannelPass(network, masks)(network.model.clone())
    assert not result.modified
    assert ir.to_proto(result.model).graph.initializer == ir.to_proto(network.model).graph.initializer


def test_parameters_that_are_left_are_those_of_the_cut():
    network = open_network(load_case("plain-13").model)
    groups = find_groups(network)
    masks = random_masks(groups, 3)
    left = 0
    for layer in network.layers:
        cut = groups.cut(masks)[layer.name]
        left += cut.rows.sum() * (cut.columns.sum() * layer.geometry.taps + 1)
    assert count_parameters(pruned(network, masks)) == left < count_parameters(network.model)


def test_shared_constants_are_copied_where_their_readers_differ():
    """A layer that loses others than its neighbour reads a bias of its own; where only one loses, the other's stays."""
    network = open_network(TOPOLOGIES["shared_biases"]())
    first, second = (group.name for group in find_groups(network).groups if group.prunable)
    shared = {value.name for value in network.model.graph.initializers.values() if len(value.uses()) > 1}
    assert len(shared) == 1
    one, other = np.arange(8) < 5, np.arange(8) > 1
    for masks in ({first: one}, {second: one}, {first: one, second: other}, {first: one, second: one}):
        smaller = pruned(network, masks)
        assert_same(network, smaller, find_groups(network).cut(masks))
        sizes = {name: value.const_value.size for name, value in smaller.graph.initializers.items() if name in shared}
        alike = len(masks) == 2 and masks[first] is masks[second]
        assert set(sizes.values()) == ({5} if alike else set() if len(masks) == 2 else {8})


def test_a_shared_weight_stays_one():
    network = open_network(TOPOLOGIES["shared_weights"]())
    smaller = pruned(network, random_masks(find_groups(network), 0))
    assert set(smaller.graph.initializers) == set(network.model.graph.initializers)


def test_a_computed_target_becomes_a_constant_and_what_computed_it_goes():
    network = open_network(TOPOLOGIES["computed_target"]())
    groups = find_groups(network)
    assert "Shape" in {node.op_type for node in network.model.graph}
    name = next(group.name for group in groups.groups if group.prunable)
    half = pruned(network, {name: np.arange(5) < 2})
    assert "Shape" in {node.op_type for node in half.graph}  # for the other group
    smaller = pruned(network, random_masks(groups, 0))
    assert not {"Shape", "Gather"} & {node.op_type for node in smaller.graph}
    targets = [node.inputs[1].const_value.numpy() for node in smaller.graph if node.op_type == "Reshape"]
    assert len(targets) == 4
    assert all(max(target[:2]) == 0 and min(target[2:]) > 0 for target in targets)


def test_groups_that_cannot_be_cut_are_refused():
    network = open_network(load_case("plain-13").model)
    with pytest.raises(UsageError, match="graph output 'logits'"):
        ChannelPass(network, {"/4/4.2/Gemm": np.arange(5) > 0})(network.model.clone())


def test_another_model_is_refused():
    network = open_network(load_case("plain-13").model)
    b = Builder()
    other = open_network(b.model(IMAGE, b.conv("x", 3, 4))).model
    with pytest.raises(PreconditionError, match="not a copy"):
        ChannelPass(network, {})(other)
