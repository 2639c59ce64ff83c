import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal

INT = np.int64


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("operator", "parameter", "attributes", "function"),
    [
        ("Reshape", [0, -1], {}, lambda x: x.reshape(x.shape[0], -1)),
        ("Reshape", [-1, 4], {}, lambda x: x.reshape(-1, 4)),
        ("Flatten", None, {"axis": 2}, lambda x: x.reshape(-1, 4)),
        ("Unsqueeze", [0, 2], {}, lambda x: x[None, :, None]),
        ("Squeeze", [1], {}, lambda x: x[:, 0]),
        ("Transpose", None, {"perm": [2, 0, 1]}, lambda x: x.permute(2, 0, 1)),
        ("Transpose", None, {}, lambda x: x.permute(2, 1, 0)),
        ("Identity", None, {}, lambda x: x * 1.0),
        ("Dropout", None, {}, lambda x: x * 1.0),
    ],
)
def test_reshaping(operator, parameter, attributes, function, dynamic):
    x = normal(2, 1 if operator == "Squeeze" else 3, 4)
    assert_gradients(
        [(operator, "x" if parameter is None else "x p", "y", attributes)],
        {"x": x},
        function,
        constants=None if parameter is None else {"p": np.array(parameter, INT)},
        shapes={"x": ["N", x.shape[1], "T"]} if dynamic else None,
    )


def test_reshape_of_nothing():
    model = build([("Reshape", "x p", "y", {"allowzero": 1})], {"x": normal(0, 3)}, constants={"p": np.array([3, 0])})
    assert not differentiate(model, ["x"]).blocked


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis, dynamic):
    shape = [2, 3, 4]
    inputs = {}
    for index, name in enumerate("abc"):
        shape[axis] = index + 1
        inputs[name] = normal(*shape, seed=index)
    shapes = {name: ["N" if axis else f"N{name}", *array.shape[1:2], f"T{name}"] for name, array in inputs.items()}
    assert_gradients(
        [("Concat", "a b c", "y", {"axis": axis})],
        inputs,
        lambda *t: torch.cat(t, axis),
        shapes=shapes if dynamic else None,
    )


@pytest.mark.parametrize("axis", [1, -1])
def test_split(axis):
    nodes = [("Split", "x sizes", "a b", {"axis": axis})]
    x, sizes = {"x": normal(2, 5, 5)}, {"sizes": np.array([2, 3])}
    assert_gradients(nodes, x, lambda x: x.split([2, 3], axis), constants=sizes, outputs=("a", "b"))
    # A part that does not reach a head counts as zero.
    assert_gradients(nodes, x, lambda x: x.split([2, 3], axis)[1], constants=sizes, outputs=("b",))


@pytest.mark.parametrize("dynamic", [False, True])
def test_expand(dynamic):
    shapes = {"x": ["N", "C", "T"]} if dynamic else None
    for target in ([2, 3, 4], [5, 2, 3, 4], [3, 1]):
        assert_gradients(
            [("Expand", "x p", "y", {})],
            {"x": normal(2, 1, 4)},
            lambda x, t=tuple(target): x.expand(torch.broadcast_shapes(x.shape, t)),
            constants={"p": np.array(target, INT)},
            shapes=shapes,
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_tile(computed, dynamic):
    repeats = {"p": np.array([3, 2])}
    assert_gradients(
        [("Tile", "x p", "y", {})],
        {"x": normal(2, 3), **(repeats if computed else {})},
        lambda x, *_: x.tile(3, 2),
        constants={} if computed else repeats,
        shapes={"x": ["N", "T"]} if dynamic else None,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("amounts", [[0, 1, 2, 0, 2, 1], [0, -1, 1, 0, 0, -2]])
def test_pad_with_zeros(amounts, dynamic):
    for computed in (False, True):
        pads = {"p": np.array(amounts, INT)}
        assert_gradients(
            [("Pad", "x p", "y", {})],
            {"x": normal(2, 4, 5), **(pads if computed else {})},
            lambda x, *_: F.pad(x, [amounts[2], amounts[5], amounts[1], amounts[4]]),
            constants={} if computed else pads,
            shapes={"x": ["N", "C", "T"]} if dynamic else None,
        )


def test_pad_along_axes():
    assert_gradients(
        [("Pad", "x p _ axes", "y", {})],
        {"x": normal(2, 4, 5)},
        lambda x: F.pad(x, [0, 0, 1, 2]),
        constants={"p": np.array([1, 2]), "axes": np.array([-2])},
    )


@pytest.mark.parametrize(("mode", "torch_mode"), [("reflect", "reflect"), ("edge", "replicate"), ("wrap", "circular")])
def test_pad_with_copies(mode, torch_mode):
    assert_gradients(
        [("Pad", "x p", "y", {"mode": mode})],
        {"x": normal(2, 3, 4, 5)},
        lambda x: F.pad(x, [2, 1, 1, 3], mode=torch_mode),
        constants={"p": np.array([0, 0, 1, 2, 0, 0, 3, 1])},
    )


def test_cast_there_and_back():
    nodes = [("Cast", "x", "h", {"to": 11}), ("Mul", "h h", "k", {}), ("Cast", "k", "y", {"to": 1})]
    assert_gradients(nodes, {"x": normal(2, 3)}, lambda x: (x.double() ** 2).float())


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode):
    def function(x):
        if mode == "CRD":
            return F.pixel_shuffle(x, 2)
        n, c, h, w = x.shape
        return x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)

    assert_gradients([("DepthToSpace", "x", "y", {"blocksize": 2, "mode": mode})], {"x": normal(2, 12, 3, 4)}, function)


def test_space_to_depth():
    def function(x):
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)

    assert_gradients([("SpaceToDepth", "x", "y", {"blocksize": 2})], {"x": normal(2, 3, 4, 6)}, function)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("diagonal", [None, -1, 2])
def test_triangle(upper, diagonal):
    triangle = torch.triu if upper else torch.tril
    assert_gradients(
        [("Trilu", "x" if diagonal is None else "x k", "y", {"upper": upper})],
        {"x": normal(2, 4, 5)},
        lambda x: triangle(x, diagonal or 0),
        constants={} if diagonal is None else {"k": np.int64(diagonal)},
        shapes={"x": ["N", "T", 5]},
    )


def test_reverse_sequence():
    assert_gradients(
        [("ReverseSequence", "x n", "y", {"time_axis": 1, "batch_axis": 0})],
        {"x": normal(2, 4, 3)},
        lambda x: torch.stack([torch.cat([part[:n].flip(0), part[n:]]) for part, n in zip(x, (3, 4), strict=True)]),
        constants={"n": np.array([3, 4])},
    )
