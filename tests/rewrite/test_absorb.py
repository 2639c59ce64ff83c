"""Gathers of channels that the nodes around them take over, run by ONNX Runtime before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from onnx_kfe.graph import open_network
from onnx_kfe.planning import FORMS, Candidate, Plan, network_cost
from onnx_kfe.rewrite import AbsorbPass, apply_plan, sketch_plan
from tests.networks import classifier, samples
from tests.tiny import node, run, tiny, weights

C = 8  # channels of most values
PADDED = {"pads": [1, 1, 1, 1]}
ARRAYS = {
    "w": weights(C, C, 3, 3) / 4, "b": weights(C, seed=1), "v": weights(6, C, 3, 3, seed=2) / 4,
    "c": weights(6, seed=3), "u": weights(5, C, 1, 1, seed=4), "grouped": weights(C, 4, 3, 3, seed=5) / 4,
    "closing": weights(C, 4, 3, 3, seed=15) / 4,
    "deep": weights(C, 1, 3, 3, seed=6), "wide": weights(12, 4, 3, 3, seed=7) / 4,
    "slope": np.abs(weights(C, 1, 1, seed=8)), "half": np.float32(0.5), "map": weights(1, C, 6, 6, seed=9),
    "row": weights(6, seed=10), "zero": np.float32(0), "six": np.float32(6),
    "narrow": weights(1, C, 1, 1, seed=11), "many": weights(1, 1, 1, 1, 1), "matrix": weights(C, 5, seed=12),
    "p": np.array([3, 0, 6, 1, 7, 2, 5, 4]), "q": np.array([1, 5, 2, 7, 0, 4, 6, 3]), "same": np.arange(C),
    "back": np.argsort([3, 0, 6, 1, 7, 2, 5, 4]), "within": np.array([2, 0, 1, 3, 6, 7, 5, 4]),
    "exchange": np.array([5, 4, 7, 6, 2, 0, 1, 3]), "twice": np.array([0, 0, 1, 2, 3, 4, 5, 6]),
    "first": np.array(0), "five": np.array([4, 3, 2, 1, 0]),
}  # fmt: skip


def graph(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **changed: np.ndarray) -> onnx.ModelProto:
    """A model of ``x`` [n, 8, 6, 6] with the constants that its nodes read, its shapes inferred."""
    arrays = ARRAYS | changed
    read = names_read(nodes) | set(outputs)
    shapes = {name: arrays[name].shape if name in arrays else () for name in outputs}
    element = onnx.helper.np_dtype_to_tensor_dtype(arrays["w"].dtype)
    constants = {name: array for name, array in arrays.items() if name in read}
    model = tiny(list(nodes), {"x": ["n", C, 6, 6]}, shapes, constants, dtype=element)
    for value in model.graph.output:
        if value.name not in arrays:
            value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def names_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """What nodes read, and those of their bodies."""
    bodies = (attribute.g.node for each in nodes for attribute in each.attribute)
    return {name for each in nodes for name in each.input}.union(*map(names_read, bodies))


def conv(source: str, target: str, *constants: str, name: str = "", **options: object) -> onnx.NodeProto:
    return node("Conv", [source, *constants], [target], name or f"conv_{target}", **PADDED, **options)


def act(op_type: str, *values: str, **options: object) -> onnx.NodeProto:
    """A node, its last value the output."""
    return node(op_type, list(values[:-1]), [values[-1]], f"{op_type}_{values[-1]}".lower(), **options)


def gather(source: str, target: str, indices: str = "p", **options: object) -> onnx.NodeProto:
    return node("Gather", [source, indices], [target], f"gather_{target}", **{"axis": 1, **options})


def absorb(
    model: onnx.ModelProto, owned: Callable[[ir.Node], bool] = lambda node: True
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model after the pass, checked, of the same interface and with no constant that nothing reads."""
    absorbing = AbsorbPass(owned)
    result = absorbing(ir.from_proto(model))
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert list(proto.graph.input) == list(model.graph.input)
    assert list(proto.graph.output) == list(model.graph.output)
    used = names_read(proto.graph.node) | {value.name for value in proto.graph.output}
    assert {each.name for each in proto.graph.initializer} <= used
    assert result.modified == (len(proto.graph.node) < len(model.graph.node))
    return proto, absorbing.declined


def kinds(model: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in model.graph.node]


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, rtol: float = 1e-5) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(before.graph.input[0].type.tensor_type.elem_type)
    for batch in (1, 3):
        feeds = {"x": weights(batch, C, 6, 6, seed=batch).astype(dtype)}
        wanted, found = run(before, feeds), run(after, feeds)
        assert list(found) == list(wanted)
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype == dtype
            assert np.ptp(array.astype(float)) > 0.1
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * np.abs(array).max(), err_msg=name)


FRONT, BACK = conv("x", "h", "w", "b"), conv("g", "y", "closing", group=2)  # BACK cannot take p
START, END = conv("x", "h", "grouped", "b", group=2), conv("g", "y", "v", "c")  # nor can START
ALIKE = [
    [act("Relu", "h", "a")],
    [act("LeakyRelu", "h", "a", alpha=0.2)],
    [act("Elu", "h", "a")],
    [act("Clip", "h", "zero", "six", "a")],
    [act("Sigmoid", "h", "a")],
    [act("HardSigmoid", "h", "a")],
    [act("HardSwish", "h", "a")],
    [act("Tanh", "h", "a")],
    [act("Identity", "h", "a")],
    [act("MaxPool", "h", "a", kernel_shape=[2, 2])],
    [act("AveragePool", "h", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
    [act("GlobalMaxPool", "h", "a")],
    [act("GlobalAveragePool", "h", "a")],
    [act("Mul", "h", "half", "a")],
    [act("Add", "half", "h", "a")],
    [act("Sub", "row", "h", "a")],
    [act("Div", "h", "slope", "a")],
    [act("Add", "map", "h", "a")],
    [act("PRelu", "h", "slope", "a")],
    [act("Mul", "h", "narrow", "s"), act("Relu", "s", "t"), act("MaxPool", "t", "a", kernel_shape=[2, 2])],
]


@pytest.mark.parametrize("between", ALIKE, ids=lambda nodes: "-".join(each.op_type for each in nodes))
def test_nodes_that_treat_channels_alike_are_passed(between):
    """On both sides: the convolution in front takes the order, or the one behind."""
    in_front = graph(FRONT, *between, gather("a", "g"), BACK)
    behind = graph(conv("x", "k", "grouped", "b", group=2), gather("k", "h"), *between, conv("a", "y", "v", "c"))
    for model in (in_front, behind):
        after, declined = absorb(model)
        assert kinds(after) == [kind for kind in kinds(model) if kind != "Gather"]
        assert not declined
        assert_same(model, after)
        assert set(constants(after)) == set(constants(model)) - {"p"}  # in place: names stay


def test_rows_and_bias_move_in_front():
    after, _ = absorb(graph(FRONT, act("Relu", "h", "a"), gather("a", "g"), BACK))
    np.testing.assert_array_equal(constants(after)["w"], ARRAYS["w"][ARRAYS["p"]])
    np.testing.assert_array_equal(constants(after)["b"], ARRAYS["b"][ARRAYS["p"]])
    np.testing.assert_array_equal(constants(after)["closing"], ARRAYS["closing"])


def test_columns_move_behind():
    after, _ = absorb(graph(START, gather("h", "g"), END))
    np.testing.assert_array_equal(constants(after)["v"], ARRAYS["v"][:, ARRAYS["back"]])
    np.testing.assert_array_equal(constants(after)["c"], ARRAYS["c"])


TAKEN = {
    "no bias": [conv("x", "h", "w"), gather("h", "g"), BACK],
    "straight from the input": [gather("x", "g"), END],
    "several convolutions": [gather("x", "g"), act("Relu", "g", "a"), conv("a", "s", "v"), conv("a", "y", "u"),
                             conv("g", "t", "w"), act("Relu", "s", "z"), act("Relu", "t", "k")],
    "two in a row": [START, gather("h", "a"), act("Relu", "a", "s"), gather("s", "g", "q"), END],
    "two that undo each other": [START, gather("h", "a"), act("Relu", "a", "s"), gather("s", "g", "back"), BACK],
    "depthwise in front": [FRONT, conv("h", "s", "deep", "b", group=C), gather("s", "g"), BACK],
    "depthwise behind": [START, gather("h", "s"), conv("s", "g", "deep", "b", group=C), END],
    "groups kept in front": [START, gather("h", "g", "within"), BACK],
    "groups kept behind": [gather("x", "g", "within"), conv("g", "y", "wide", group=2)],
    "groups exchanged in front": [FRONT, act("Relu", "h", "a"), conv("a", "s", "grouped", "b", group=2),
                                  gather("s", "g", "exchange"), BACK],
    "groups exchanged behind": [gather("x", "h", "exchange"), conv("h", "s", "wide", "wb", group=2),
                                act("Relu", "s", "a"), conv("a", "y", "wv", "c")],
    "input of the graph, all in place": [gather("x", "g", "same"), act("Relu", "g", "y")],
    "output of the graph, all in place": [FRONT, act("Relu", "h", "z"), gather("h", "y", "same")],
    "output of the graph": [FRONT, act("Relu", "h", "a"), gather("a", "y")],
    "an output behind": [FRONT, gather("h", "y"), act("Relu", "y", "z")],
}  # fmt: skip
MORE = {"wb": weights(12, seed=13), "wv": weights(6, 12, 3, 3, seed=14)}


@pytest.mark.parametrize("name", TAKEN)
def test_neighbours_take_over(name):
    written = {value for each in TAKEN[name] for value in each.output}
    model = graph(*TAKEN[name], outputs=tuple(out for out in ("y", "z", "k") if out in written), **MORE)
    after, declined = absorb(model)
    assert kinds(after) == [kind for kind in kinds(model) if kind != "Gather"]
    assert not declined
    assert_same(model, after)


def body(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    """An If that runs the nodes, which give ``r``, whatever its condition."""
    inner = tiny(list(nodes), {}, {"r": ["n", 6, 6, 6]}).graph
    return [act("ReduceMin", "x", "m", keepdims=0), act("Cast", "m", "t", to=9),
            node("If", ["t"], ["y"], "if", then_branch=inner, else_branch=inner)]  # fmt: skip


def declining(nodes: list[onnx.NodeProto], in_front: str, behind: str, *outputs: str) -> tuple:
    return nodes, f"in front, {in_front}; behind, {behind}", outputs or ("y",)


GRAPH_INPUT = "'x' is computed by no node"
GROUPS_BEHIND, GROUPS_IN_FRONT = "the groups of Conv 'conv_y' would mix", "the groups of Conv 'conv_h' would mix"
UNKNOWN = "it is not known to put all channels into a constant order"
ADD = [act("Add", "h", "x", "a"), gather("a", "g"), BACK]
LEFT = {
    "residual sum in front": declining([FRONT, *ADD], "Add 'add_a' reads two computed values", GROUPS_BEHIND),
    "residual sum behind": declining([START, gather("h", "g"), act("Add", "g", "x", "y")],
                                     GROUPS_IN_FRONT, "Add 'add_y' reads two computed values"),
    "twice into one sum": declining([gather("x", "g"), act("Mul", "g", "g", "y")],
                                    GRAPH_INPUT, "Mul 'mul_y' reads two computed values"),
    "one of several readers": declining([gather("x", "g"), conv("g", "y", "v"), act("Softmax", "g", "z", axis=1)],
                                        GRAPH_INPUT, "it meets Softmax 'softmax_z'", "y", "z"),
    "read twice": declining([FRONT, gather("h", "g"), BACK, act("Relu", "h", "z")],
                            "'h' is read 2 times", GROUPS_BEHIND, "y", "z"),
    "read twice further in front": declining([FRONT, act("Relu", "h", "a"), act("Relu", "h", "z"), gather("a", "g"),
                                              BACK], "'h' is read 2 times", GROUPS_BEHIND, "y", "z"),
    "output in front": declining([FRONT, gather("h", "g"), BACK], "'h' is a graph output", GROUPS_BEHIND, "y", "h"),
    "output behind": declining([START, gather("h", "g"), act("Relu", "g", "y")],
                               GROUPS_IN_FRONT, "'y' is a graph output"),
    "both": declining([gather("x", "y")], GRAPH_INPUT, "'y' is a graph output"),
    "concatenation": declining([FRONT, act("Concat", "h", "h", "a", axis=2), gather("a", "g"), BACK],
                               "it meets Concat 'concat_a'", GROUPS_BEHIND),
    "a product": declining([gather("x", "g"), act("GlobalAveragePool", "g", "a"), act("Flatten", "a", "f"),
                            act("MatMul", "f", "matrix", "y")], GRAPH_INPUT, "it meets Flatten 'flatten_f'"),
    "pooling that tells where": declining(
        [FRONT, node("MaxPool", ["h"], ["a", "i"], "pool", kernel_shape=[2, 2]), gather("a", "g"), BACK],
        "it meets MaxPool 'pool'", GROUPS_BEHIND),
    "computed weight": declining([act("Relu", "w", "rw"), conv("x", "h", "rw"), gather("h", "g"), BACK],
                                 "Conv 'conv_h' has no constant weight", GROUPS_BEHIND),
    "computed weight behind": declining([act("Relu", "w", "rw"), gather("x", "g"), conv("g", "y", "rw")],
                                        GRAPH_INPUT, "Conv 'conv_y' has no constant weight"),
    "computed bias": declining([act("Relu", "b", "rb"), conv("x", "h", "w", "rb"), gather("h", "g"), BACK],
                               "Conv 'conv_h' has no constant bias", GROUPS_BEHIND),
    "depthwise without an end": declining([conv("x", "h", "deep", group=C), gather("h", "g"), BACK],
                                          GRAPH_INPUT, GROUPS_BEHIND),
    "one channel in front": declining(
        [conv("x", "h", "one"), act("Mul", "h", "narrow", "a"), gather("a", "g"), BACK],
        "'h' is not known to have 8 channels", GROUPS_BEHIND),
    "more axes": declining([gather("x", "g"), act("Mul", "g", "many", "y")], GRAPH_INPUT, "Mul 'mul_y' may add axes"),
    "a body": declining([gather("x", "g"), *body(conv("g", "r", "v"))], GRAPH_INPUT,
                        "Conv 'conv_r' of a body reads it"),
    "another axis": ([FRONT, gather("h", "g", "five", axis=2), conv("g", "y", "v")], UNKNOWN, ("y",)),
    "not all different": ([FRONT, gather("h", "g", "twice"), BACK], UNKNOWN, ("y",)),
    "not all channels": ([gather("x", "g", "five"), conv("g", "y", "few")], UNKNOWN, ("y",)),
    "a single channel": ([gather("x", "g", "first"), act("Flatten", "g", "y")], UNKNOWN, ("y",)),
    "computed indices": ([act("Abs", "p", "i"), gather("x", "g", "i"), END], UNKNOWN, ("y",)),
    "from input to output": ([gather("x", "y", "same")],
                             "it is all that is between 'x' and the graph output 'y'", ("y",)),
    "from output to output": ([FRONT, gather("h", "y", "same")],
                              "it is all that is between 'h' and the graph output 'y'", ("y", "h")),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_says_why(name):
    nodes, reason, outputs = LEFT[name]
    model = graph(*nodes, outputs=outputs, one=weights(1, C, 3, 3, seed=13), few=weights(6, 5, 3, 3, seed=14))
    after, declined = absorb(model)
    assert list(declined.values()) == [reason]
    assert next(iter(declined)).startswith("gather_")
    assert kinds(after) == kinds(model)
    before = constants(model)
    for key, array in constants(after).items():  # nothing is half done
        np.testing.assert_array_equal(array, before[key])
    if "one" not in before:
        assert_same(model, after)


def test_channels_that_are_not_known_stay():
    model = graph(FRONT, gather("h", "g"), BACK)
    model.graph.ClearField("value_info")
    _, declined = absorb(model)
    assert declined == {"gather_g": UNKNOWN}


def test_constants_that_can_be_fed_stay():
    model = graph(FRONT, gather("h", "g"), BACK)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, ARRAYS["w"].shape))
    after, declined = absorb(model)
    assert declined == {"gather_g": f"in front, Conv 'conv_h' has no constant weight; behind, {GROUPS_BEHIND}"}
    assert kinds(after) == kinds(model)


def test_a_body_may_read_what_is_absorbed_in_front():
    model = graph(FRONT, gather("h", "g"), *body(conv("g", "r", "v")), conv("x", "z", "v"), outputs=("y", "z"))
    after, declined = absorb(model)
    assert "Gather" not in kinds(after)
    assert not declined
    assert_same(model, after)


def test_shared_weights_stay_shared():
    """Of two that read a weight none changes alone; where all readers are to change, they do so together."""
    model = graph(conv("x", "s", "w", "b"), conv("s", "h", "w", "b"), gather("h", "g"), BACK)
    after, declined = absorb(model)
    assert "Gather" in kinds(after)
    assert "shares its weight" in declined["gather_g"]
    both = graph(gather("x", "g"), conv("g", "y", "w", "b"), conv("g", "z", "w", "b"), outputs=("y", "z"))
    after, _ = absorb(both)
    assert "Gather" not in kinds(after)
    assert constants(after).keys() == {"w/reordered", "b"}  # the outputs come as they were, so does the bias
    assert_same(both, after)


def test_other_shared_constants_are_copied():
    model = graph(conv("x", "s", "v", "b"), conv("s", "h", "w", "b"), gather("h", "g"), BACK, v=ARRAYS["w"] + 1)
    after, _ = absorb(model)
    assert_same(model, after)
    assert {"w", "b", "b/reordered"} <= constants(after).keys()
    np.testing.assert_array_equal(constants(after)["b"], ARRAYS["b"])
    orders = graph(gather("x", "s"), act("Relu", "s", "a"), gather("a", "y", "q"), gather("x", "z"), outputs=("y", "z"))
    after, _ = absorb(orders, lambda node: node.name == "gather_y")
    assert constants(after).keys() == {"p", "p/reordered"}
    assert_same(orders, after)


def test_weights_that_are_outputs_stay():
    model = graph(FRONT, gather("h", "g"), BACK, outputs=("y", "w"))
    after, _ = absorb(model)
    assert "Gather" not in kinds(after)
    assert_same(model, after)


def test_only_owned_gathers_go():
    """The shuffle of a model's own stays, and takes over what is composed with it."""
    model = graph(START, gather("h", "a", "p"), act("Relu", "a", "s"), gather("s", "g", "q"), BACK)
    after, declined = absorb(model, lambda node: node.name == "gather_g")
    assert [each.name for each in after.graph.node if each.op_type == "Gather"] == ["gather_a"]
    assert not declined
    np.testing.assert_array_equal(constants(after)["p"], ARRAYS["p"][ARRAYS["q"]])
    assert_same(model, after)
    untouched, declined = absorb(model, lambda node: False)
    assert untouched == ir.to_proto(ir.from_proto(model))
    assert not declined


def test_an_order_that_came_to_fit_goes_too():
    """The first mixes groups on both sides, until the second exchanges pairs in it: then those in front are kept."""
    exchange, kept = np.array([4, 5, 2, 3, 0, 1, 6, 7]), np.array([0, 2, 1, 3, 4, 5, 7, 6])
    model = graph(START, gather("h", "a", "mixing"), conv("a", "k", "pairs", group=4), gather("k", "g", "exchange"),
                  act("Tanh", "g", "y"), pairs=weights(C, 2, 3, 3, seed=13) / 4, mixing=kept[np.argsort(exchange)],
                  exchange=exchange)  # fmt: skip
    _, declined = absorb(model, lambda node: node.name == "gather_a")
    assert list(declined) == ["gather_a"]
    after, declined = absorb(model)
    assert "Gather" not in kinds(after)
    assert not declined
    assert_same(model, after)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 1e-2), (np.float32, 1e-5)])
def test_types_stay(dtype, rtol):
    cast = {key: array.astype(dtype) for key, array in ARRAYS.items() if array.dtype == np.float32}
    model = graph(FRONT, act("PRelu", "h", "slope", "a"), gather("a", "k"), conv("k", "s", "grouped", group=2),
                  gather("s", "g", "q32"), act("Mul", "g", "narrow", "z"), gather("z", "t", "p"), conv("t", "y", "v"),
                  q32=ARRAYS["q"].astype(np.int32), **cast)  # fmt: skip
    after, _ = absorb(model)
    assert "Gather" not in kinds(after)
    assert {array.dtype for array in constants(after).values()} == {np.dtype(dtype)}
    assert_same(model, after, rtol)
    composed = graph(gather("x", "h", "q32"), act("Relu", "h", "a"), gather("a", "y", "p"),
                     q32=ARRAYS["q"].astype(np.int32), **cast)  # fmt: skip
    after, _ = absorb(composed, lambda node: node.name == "gather_y")
    assert {key: array.dtype for key, array in constants(after).items()} == {"q32": np.dtype(np.int32)}
    assert_same(composed, after, rtol)


def test_random_chains_stay_exact():
    """Random orders, groups and nodes in between: whatever goes, what comes out is the same."""
    random = np.random.default_rng(0)
    gone = 0
    for _ in range(40):
        nodes, arrays, value = [], {}, "x"
        for place in range(6):
            kind, target = random.choice(["gather", "conv", "act", "sum"], p=[0.4, 0.35, 0.15, 0.1]), f"v{place}"
            if kind == "gather":
                size = random.choice([1, 2, 4, 8])  # of blocks that keep together
                blocks = np.arange(C).reshape(-1, size)[random.permutation(C // size)]
                arrays[f"i{place}"] = random.permuted(blocks, axis=1).reshape(-1)
                nodes.append(gather(value, target, f"i{place}"))
            elif kind == "conv":
                groups = int(random.choice([1, 2, 4, 8]))
                arrays[f"w{place}"] = weights(C, C // groups, 3, 3, seed=place) / np.float32(np.sqrt(C / groups * 9))
                arrays[f"b{place}"] = weights(C, seed=place)
                nodes.append(conv(value, target, f"w{place}", f"b{place}", group=groups))
            else:
                other = "x" if kind == "sum" else "slope"
                nodes.append(act("Add" if kind == "sum" else "Mul", value, other, target))
            value = target
        model = graph(*nodes, act("Tanh", value, "y"), **arrays)
        after, declined = absorb(model)
        assert len(declined) == kinds(after).count("Gather")
        assert_same(model, after, 1e-4)
        gone += kinds(model).count("Gather") - kinds(after).count("Gather")
    assert gone > 40


def test_nodes_without_names_are_refused():
    model = graph(FRONT, gather("h", "g"), BACK)
    model.graph.node[0].name = model.graph.node[1].name
    with pytest.raises(PreconditionError, match="gather_g"):
        absorb(model)


def separated(groups: int = 2) -> onnx.ModelProto:
    """The shared classifier, its last two convolutions block-diagonal in channels that are mixed up."""
    model = classifier()
    random = np.random.default_rng(1)
    labels = [random.permutation(np.arange(size) % groups) for size in (8, 16, 16)]
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2"):
            place = int(tensor.name[1])
            apart = labels[place][:, None] != labels[place - 1]
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[apart] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def test_block_diagonal_layers_in_a_row():
    """Where the groups of two layers agree, nothing is left between them, and nothing is lost."""
    model = separated()
    network = open_network(model)
    form = FORMS["block_diagonal"]
    names = ("conv1", "conv2")
    geometries = {layer.name: layer.geometry for layer in network.prunable}
    choices = {n: Candidate("block_diagonal", (2,), form.cost(geometries[n], (2,)), 0.0) for n in names}
    plan = Plan(network.fingerprint, choices, network_cost(network))
    smaller, _ = apply_plan(network, plan, None)
    kind = [each.op_type for each in smaller.graph]
    assert kind == ["Conv", "Relu", "Conv", "Relu", "Conv", "Gather", "Relu", *kind[7:]]
    assert "Gather" not in kind[7:]
    assert [each.attributes.get_int("group", 1) for each in smaller.graph if each.op_type == "Conv"] == [1, 2, 2]
    feeds = {"x": samples(4)}
    wanted, found = run(model, feeds)["logits"], run(smaller, feeds)["logits"]
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    sketch = [each.op_type for each in sketch_plan(network, plan).graph]  # of orders at random: one is left between
    assert sketch.count("Gather") == 2
