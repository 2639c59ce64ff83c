import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators

GEOMETRIES = [
    pytest.param({"k": (3, 3)}, id="plain"),
    pytest.param({"k": (1, 1)}, id="pointwise"),
    pytest.param({"k": (3, 3), "pads": (1, 1, 1, 1)}, id="same"),
    pytest.param({"k": (3, 3), "pads": (0, 2, 1, 0)}, id="asymmetric"),
    pytest.param({"k": (3, 2), "pads": (4, 3, 3, 2)}, id="more padding than kernel"),
    pytest.param({"k": (3, 3), "pads": (2, 2, 2, 2), "dilations": (2, 2)}, id="dilated"),
    pytest.param({"k": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}, id="strided"),
    pytest.param({"k": (3, 3), "strides": (2, 3), "pads": (0, 1, 2, 0)}, id="strided asymmetric"),
    pytest.param({"k": (1, 1), "strides": (2, 2)}, id="strided pointwise"),
    pytest.param({"k": (3, 3), "strides": (2, 1), "dilations": (1, 2)}, id="strided dilated"),
    pytest.param({"k": (5, 3), "strides": (4, 4), "pads": (2, 1, 2, 1)}, id="strided far"),
]


def padded(x, pads):
    half = len(pads) // 2
    flat = [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[axis + half])]
    return F.pad(x, flat)


@pytest.mark.parametrize("sizes", [(8, 9), (11, 7)])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("mode", ["static", "dynamic", "computed weight"])
def test_conv_2d(geometry, group, sizes, mode):
    taps, pads = geometry["k"], geometry.get("pads", (0, 0, 0, 0))
    strides, dilations = geometry.get("strides", (1, 1)), geometry.get("dilations", (1, 1))
    weight = normal(8, 4 // group, *taps, seed=1)
    attributes = {"pads": pads, "strides": strides, "dilations": dilations, "group": group}
    inputs = {"x": normal(2, 4, *sizes)}
    if mode == "computed weight":
        inputs["w"] = weight
    assert_gradients(
        [("Conv", "x w", "y", attributes)],
        inputs,
        lambda x, *w: F.conv2d(padded(x, pads), torch.tensor(weight), None, strides, 0, dilations, group),
        constants={} if mode == "computed weight" else {"w": weight},
        shapes={"x": ["N", 4, "H", "W"]} if mode == "dynamic" else None,
        wanted=["x"],
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_conv_1d_and_3d(stride):
    for rank in (1, 3):
        weight = normal(3, 2, *[3] * rank, seed=1)
        function = {1: F.conv1d, 3: F.conv3d}[rank]
        assert_gradients(
            [("Conv", "x w", "y", {"strides": [stride] * rank, "pads": [1] * 2 * rank})],
            {"x": normal(2, 2, *[8, 7, 6][:rank])},
            lambda x, f=function, w=weight: f(x, torch.tensor(w), None, stride, 1),
            constants={"w": weight},
        )


@pytest.mark.parametrize("group", [1, 4])
def test_conv_of_the_bias(group):
    weight = normal(4, 4 // group, 3, 3, seed=1)
    assert_gradients(
        [("Conv", "x w b", "y", {"group": group})],
        {"x": normal(2, 4, 6, 6), "b": normal(4)},
        lambda x, b: F.conv2d(x, torch.tensor(weight), b, groups=group),
        constants={"w": weight},
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_conv_auto_pad(auto_pad, size, stride):
    weight = normal(4, 3, 4, 4, seed=1)
    out = -(-size // stride)
    total = max((out - 1) * stride + 4 - size, 0) if auto_pad != "VALID" else 0
    small, large = total // 2, total - total // 2
    begin, end = (large, small) if auto_pad == "SAME_LOWER" else (small, large)
    assert_gradients(
        [("Conv", "x w", "y", {"auto_pad": auto_pad, "strides": [stride] * 2})],
        {"x": normal(2, 3, size, size)},
        lambda x: F.conv2d(padded(x, (begin, begin, end, end)), torch.tensor(weight), None, stride),
        constants={"w": weight},
    )


def test_conv_auto_pad_of_unknown_size_is_blocked_only_when_strided():
    for stride, blocked in ((1, False), (2, True)):
        model = build(
            [("Conv", "x w", "y", {"auto_pad": "SAME_UPPER", "strides": [stride] * 2})],
            {"x": normal(1, 3, 8, 8)},
            constants={"w": normal(4, 3, 3, 3)},
            shapes={"x": [1, 3, "H", "W"]},
        )
        gradients = differentiate(model, ["x"])
        assert bool(gradients.blocked) == blocked
        if blocked:
            (reason,) = gradients.blocked.values()
            assert "auto_pad SAME_UPPER" in reason
            assert "'Conv0'" in reason


def test_conv_of_the_weight_is_blocked():
    model = build([("Conv", "x w", "y", {})], {"x": normal(1, 3, 8, 8), "w": normal(4, 3, 3, 3)})
    gradients = differentiate(model, ["x", "w"])
    assert [value.name for value in gradients.cotangents] == ["x"]
    assert list(gradients.blocked.values()) == ["no gradient rule for input 1 of Conv (node 'Conv0')"]


def test_stride_one_stays_a_convolution():
    model = build(
        [("Conv", "x w", "y", {"pads": [1] * 4})], {"x": normal(1, 3, 8, 8)}, constants={"w": normal(4, 3, 3, 3)}
    )
    differentiate(model, ["x"])
    assert operators(model) == ["Conv"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("taps", "attributes"),
    [
        ((3, 3), {}),
        ((3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((2, 2), {"strides": [2, 2]}),
        ((3, 2), {"strides": [2, 3], "dilations": [2, 1], "pads": [1, 0, 1, 0]}),
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(taps, attributes, group, dynamic):
    weight = normal(4, 6 // group, *taps, seed=1)
    pads = attributes.get("pads", [0] * 4)
    assert_gradients(
        [("ConvTranspose", "x w", "y", {**attributes, "group": group})],
        {"x": normal(2, 4, 5, 6)},
        lambda x: F.conv_transpose2d(
            x,
            torch.tensor(weight),
            None,
            attributes.get("strides", 1),
            pads[:2],
            attributes.get("output_padding", 0),
            group,
            attributes.get("dilations", 1),
        ),
        constants={"w": weight},
        shapes={"x": ["N", 4, "H", "W"]} if dynamic else None,
    )


def test_double():
    weight = normal(4, 3, 3, 3, dtype=np.float64)
    model = build([("Conv", "x w", "y", {})], {"x": normal(1, 3, 8, 8, dtype=np.float64)}, constants={"w": weight})
    differentiate(model, ["x"])
    assert all(value.const_value.dtype.name != "FLOAT" for value in model.graph.initializers.values())
