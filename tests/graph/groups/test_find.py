"""Groups of small graphs: who is in them, and why some stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import ChannelGroups, find_groups, open_network
from tests.cases import load_case
from tests.tiny import node, tiny
from tests.topologies import IMAGE, TOPOLOGIES, Builder


def groups_of(model: onnx.ModelProto, **options: object) -> ChannelGroups:
    return find_groups(open_network(model, **options))  # type: ignore[arg-type]


def test_a_residual_stream_is_one_group():
    groups = groups_of(load_case("residual-11").model)
    stream = groups.groups[0]
    assert (stream.name, stream.size, stream.prunable) == ("/0/0.0/Conv", 8, True)
    assert [(member.layer, member.side) for member in stream.members] == [
        ("/0/0.0/Conv", "rows"),
        ("/1/body/body.0/body.0.0/Conv", "columns"),
        ("/1/body/body.1/body.1.0/Conv", "rows"),
        ("/2/body/body.0/body.0.0/Conv", "columns"),
        ("/2/body/body.1/body.1.0/Conv", "rows"),
        ("/3/3.2/Gemm", "columns"),
    ]
    assert all(np.array_equal(member.units, np.arange(8)) for member in stream.members)


def test_padded_channels_go_with_what_they_meet():
    first, _, second, _ = groups_of(TOPOLOGIES["zero_padding_shortcut"]()).groups
    assert [(m.layer, m.side, m.units.tolist()) for m in first.members] == [
        ("Conv0", "rows", [*range(8)]),
        ("Conv2", "columns", [*range(8)]),
        ("Conv4", "rows", [-1] * 4 + [*range(8)] + [-1] * 4),
        ("Conv9", "columns", [-1] * 4 + [*range(8)] + [-1] * 4),
    ]
    assert (second.name, second.size, [m.layer for m in second.members]) == ("Conv4", 8, ["Conv4", "Conv9"])


def test_features_of_a_channel_go_with_it():
    group = groups_of(TOPOLOGIES["flattened"]()).groups[0]
    columns = {member.layer: member.units.tolist() for member in group.members if member.side == "columns"}
    assert columns == {"Gemm5": np.repeat(np.arange(6), 16).tolist(), "Gemm8": np.tile(np.arange(6), 16).tolist()}


def test_groups_that_one_layer_begins_are_numbered():
    groups = groups_of(TOPOLOGIES["sliced"]()).groups
    assert [group.name for group in groups] == ["Conv0", "Conv0:2", "Conv0:3", "Conv4", "Conv7"]
    units = [group.members[0].units for group in groups[:3]]
    assert np.all(sum(each >= 0 for each in units) == 1)  # each channel is in one of them


def test_cuts_follow_the_units():
    groups = groups_of(load_case("depthwise_separable-13").model)
    random = np.random.default_rng(0)
    kept = {group.name: random.permutation(group.size) > 2 for group in groups.groups if group.prunable}
    cuts = groups.cut(kept)
    for group in groups.groups:
        mask = kept.get(group.name, np.ones(group.size, bool))
        for member in group.members:
            side = getattr(cuts[member.layer], member.side)
            inside = member.units >= 0
            np.testing.assert_array_equal(side[inside], mask[member.units[inside]])
    depthwise = next(name for name in cuts if cuts[name].groups > 1)
    assert cuts[depthwise].groups == cuts[depthwise].columns.sum() == 5


def test_a_cut_names_all_layers_and_leaves_others_whole():
    network = open_network(load_case("attention-13").model)
    cuts = find_groups(network).cut({})
    assert list(cuts) == [layer.name for layer in network.layers]
    for layer in network.layers:
        cut, geometry = cuts[layer.name], layer.geometry
        assert (len(cut.rows), len(cut.columns)) == (geometry.out_channels, geometry.in_channels)
        assert (cut.rows.all(), cut.columns.all(), cut.groups) == (True, True, geometry.groups)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nothing": np.ones(8, bool)}, "no channel group 'nothing'"),
        ({"/0/0.0/Conv": np.zeros(8, bool)}, "nothing would be kept of channel group '/0/0.0/Conv'"),
        ({"/0/0.0/Conv": np.ones(7, bool)}, "has 8 channels, not 7"),
        ({"/4/4.2/Gemm": np.arange(5) > 0}, "'/4/4.2/Gemm' cannot be pruned: graph output 'logits'"),
    ],
)
def test_what_cannot_be_cut_is_refused(kept, message):
    with pytest.raises(UsageError, match=message):
        groups_of(load_case("plain-13").model).cut(kept)


def read_by(op_type: str, *inputs: str, **attributes: object) -> onnx.ModelProto:
    """A convolution of eight channels that an operator reads, and then another convolution."""
    b = Builder()
    x = b.conv("x", 3, 8)
    y = b.op(op_type, x, *inputs, **attributes)
    b.constants |= {"w": np.zeros((2, 8, 1, 1), np.float32), "8": np.ones(8, np.float32), "i": np.array([1])}
    used = {name for each in (*b.nodes, node("Conv", [y, "w"], ["z"])) for name in each.input}
    b.constants = {name: array for name, array in b.constants.items() if name in used}
    return b.model(IMAGE, b.op("Conv", y, "w"), opset=int(attributes.pop("opset", 17)))  # type: ignore[call-overload]


STAYS = {
    "Softmax 'Softmax1' is over it": read_by("Softmax", axis=1),
    "LRN 'LRN1' is over it": read_by("LRN", size=3),
    "ReduceMax 'ReduceMax1' is over it": read_by("ReduceMax", axes=[1]),
    "LpNormalization 'LpNormalization1' is over it": read_by("LpNormalization", axis=1),
    "CumSum 'CumSum1' is over it": read_by("CumSum", "i"),
    "Det 'Det1' has no rule": read_by("Det"),
}


@pytest.mark.parametrize("reason", STAYS)
def test_what_sees_all_channels_keeps_them(reason):
    (group, *_) = groups_of(STAYS[reason]).groups
    assert (group.name, group.size, group.reason) == ("Conv0", 8, reason)


def test_layers_that_the_user_left_out_keep_both_sides():
    model = load_case("plain-13").model
    reasons = [group.reason for group in groups_of(model, exclude=["/2/*"]).groups]
    assert reasons == ["excluded by --exclude", "excluded by --exclude", None, "graph output 'logits'"]


def test_what_a_body_reads_stays():
    b = Builder()
    x = b.conv("x", 3, 8)
    bodies = [
        helper.make_graph([node(op, [x], [op])], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT, None)])
        for op in ("Neg", "Abs")
    ]
    condition = b.op("Cast", b.op("ReduceMin", "x", keepdims=0), to=TensorProto.BOOL)
    y = b.op("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    (group,) = groups_of(b.model(IMAGE, y, b.op("Neg", x))).groups
    assert group.reason == "If 'If3' has a body that reads it"


def test_sizes_that_are_computed_with_keep_their_axis():
    """The number of channels, not that of positions."""

    def model(index: int, op_type: str) -> onnx.ModelProto:
        b = Builder()
        x = b.conv("x", 3, 8)
        size = b.op("Gather", b.op("Shape", x), b.const([index]))
        return b.model(["n", 3, "h", "w"], b.conv(x, 8, 4), b.op(op_type, size, size))

    assert groups_of(model(1, "Mul")).groups[0].reason == "Mul 'Mul4' reads the size of it"
    assert groups_of(model(2, "Mul")).groups[0].prunable


def test_a_weight_that_is_no_constant_has_no_channels():
    b = Builder()
    weight = b.op("Mul", b.weight(8, 8, 1, 1), "x")
    y = b.op("Conv", b.conv("x", 8, 8, 1), weight)
    (group, *_) = groups_of(b.model([8, 8, 1, 1], y)).groups
    assert group.reason == "Conv 'Conv2' has no constant weight"


def test_a_weight_that_others_read_keeps_its_channels():
    b = Builder()
    weight = b.weight(8, 3, 1, 1)
    y = b.op("Conv", b.op("Conv", "x", weight), b.weight(4, 8, 1, 1))
    (group, *_) = groups_of(b.model(IMAGE, y, b.op("Mul", weight, b.op("ReduceMean", "x", keepdims=0)))).groups
    assert group.reason is not None
    assert "is shared with Mul" in group.reason


def test_a_single_channel_is_not_pruned():
    b = Builder()
    gate = b.op("Sigmoid", b.conv(b.conv("x", 3, 8), 8, 1))
    groups = groups_of(b.model(IMAGE, b.conv(b.op("Mul", "x", gate), 3, 4)))
    assert {group.name: group.reason for group in groups.groups}["Conv1"] == "a single channel"


def test_samples_and_positions_are_no_channels():
    model = tiny(
        [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("MatMul", ["t", "w"], ["y"], "layer")],
        {"x": [6, 4]}, {"y": [4, 5]}, {"w": np.ones((6, 5), np.float32)},
    )  # fmt: skip
    (group,) = groups_of(model).groups
    assert (group.name, group.size, group.reason) == ("layer", 5, "graph output 'y'")
