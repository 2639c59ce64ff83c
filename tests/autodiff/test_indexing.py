import numpy as np
import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators

END = 2**31 - 1


@pytest.mark.parametrize("mode", ["static", "dynamic", "computed"])
@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps", "index"),
    [
        ([1], [3], [1], [1], np.s_[:, 1:3]),
        ([0, -3], [END, -1], [0, 2], [1, 1], np.s_[:, :, -3:-1]),
        ([0, 0], [END, END], [2, 3], [2, 2], np.s_[:, :, ::2, ::2]),
        ([1, 1], [END, 6], [-2, -1], [2, 3], np.s_[:, :, 1::2, 1:6:3]),
        ([-1], [-END], [3], [-1], None),
        ([5], [0], [3], [-2], None),
    ],
)
def test_slice(starts, ends, axes, steps, index, mode):
    parameters = {
        name: np.array(array) for name, array in (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps))
    }
    x = normal(2, 4, 6, 7)

    def function(x, *_):
        if index is not None:
            return x[index]
        picked = np.arange(7)[slice(starts[0], ends[0] if ends[0] > -END else None, steps[0])]
        return x[..., torch.tensor(picked.copy())]

    computed = {n: parameters.pop(n) for n in ("starts", "ends")} if mode == "computed" else {}
    inputs, shapes = {"x": x, **computed}, {"x": ["N", "C", "H", "W"]}
    nodes = [("Slice", "x starts ends axes steps", "y", {})]
    if index is None and mode != "static":
        model = build(nodes, inputs, constants=parameters, shapes=shapes)
        (reason,) = differentiate(model, ["x"]).blocked.values()
        assert "negative step" in reason
        return
    assert_gradients(nodes, inputs, function, constants=parameters, shapes=None if mode == "static" else shapes)


def test_slice_of_nothing():
    constants = {"starts": np.array([10]), "ends": np.array([20]), "axes": np.array([0])}
    x = {"x": normal(4, 3)}
    assert_gradients([("Slice", "x starts ends axes", "y", {})], x, lambda x: x[10:], constants=constants)


@pytest.mark.parametrize("mode", ["static", "dynamic", "computed"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [0, -1, [2], [1, 0], [2, 0, 1], [-1, -3], [1, 1, 0], [[0, 1], [2, 0]]])
def test_gather(indices, axis, mode):
    array = {"i": np.array(indices)}
    computed = mode == "computed"

    def function(x, *_):
        picked = torch.tensor(indices) % 3
        moved = x.movedim(axis, 0)[picked]
        return moved.movedim(list(range(picked.ndim)), list(range(axis % 3, axis % 3 + picked.ndim)))

    assert_gradients(
        [("Gather", "x i", "y", {"axis": axis})],
        {"x": normal(3, 3, 3), **(array if computed else {})},
        function,
        constants={} if computed else array,
        shapes=None if mode == "static" else {"x": ["N", "C", "T"]},
    )


def test_gather_of_a_permutation_is_a_gather():
    model = build([("Gather", "x i", "y", {"axis": 1})], {"x": normal(2, 3)}, constants={"i": np.array([2, 0, 1])})
    differentiate(model, ["x"])
    assert operators(model) == ["Gather"]


def test_gather_elements():
    indices = np.array([[0, 1, 1], [2, 0, 0]])
    assert_gradients(
        [("GatherElements", "x i", "y", {"axis": 0})],
        {"x": normal(3, 3)},
        lambda x: x.gather(0, torch.tensor(indices)),
        constants={"i": indices},
    )


def test_gather_nd():
    indices = np.array([[0, 1], [2, 2], [0, 1]])
    assert_gradients(
        [("GatherND", "x i", "y", {})],
        {"x": normal(3, 3, 2)},
        lambda x: x[torch.tensor(indices[:, 0]), torch.tensor(indices[:, 1])],
        constants={"i": indices},
    )


def test_top_k():
    assert_gradients(
        [("TopK", "x k", "y i", {"axis": 1})],
        {"x": normal(2, 6)},
        lambda x: x.topk(3, 1).values,
        constants={"k": np.array([3])},
    )
