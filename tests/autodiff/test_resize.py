import numpy as np
import pytest
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
ALIGNED = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
CUBIC = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}
CASES = [
    (NEAREST, {"mode": "nearest"}),
    (LINEAR, {"mode": "bilinear", "align_corners": False}),
    (ALIGNED, {"mode": "bilinear", "align_corners": True}),
    (CUBIC, {"mode": "bicubic", "align_corners": False}),
]


@pytest.mark.parametrize("sizes", [(8, 10), (12, 5), (7, 13), (2, 3)])
@pytest.mark.parametrize(("attributes", "arguments"), CASES)
def test_to_sizes(attributes, arguments, sizes):
    assert_gradients(
        [("Resize", "x _ _ sizes", "y", attributes)],
        {"x": normal(2, 3, 4, 5)},
        lambda x: F.interpolate(x, sizes, **arguments),
        constants={"sizes": np.array([2, 3, *sizes])},
    )


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(("attributes", "arguments"), CASES)
def test_by_scales(attributes, arguments, factor):
    assert_gradients(
        [("Resize", "x _ scales", "y", attributes)],
        {"x": normal(2, 3, 4, 5)},
        lambda x: F.interpolate(x, scale_factor=factor, **arguments),
        constants={"scales": np.array([1, 1, factor, factor], np.float32)},
        shapes={"x": ["N", 3, 4, 5]},
    )


@pytest.mark.parametrize("mode", ["asymmetric floor", "half_pixel round_prefer_floor"])
def test_repetition_of_unknown_size_is_summed_by_pooling(mode):
    transformation, rounding = mode.split()
    attributes = {"coordinate_transformation_mode": transformation, "nearest_mode": rounding}
    model = assert_gradients(
        [("Resize", "x _ scales", "y", attributes)],
        {"x": normal(2, 3, 4, 5)},
        lambda x: F.interpolate(x, scale_factor=(2, 3)),
        constants={"scales": np.array([1, 1, 2, 3], np.float32)},
        shapes={"x": ["N", 3, "H", "W"]},
    )
    assert "AveragePool" in operators(model)


def test_along_axes_with_channels_last():
    assert_gradients(
        [("Resize", "x _ scales", "y", {**LINEAR, "axes": [1, 2]})],
        {"x": normal(2, 4, 5, 3)},
        lambda x: F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1),
        constants={"scales": np.array([2, 2], np.float32)},
    )


def test_interpolation_of_unknown_size_is_blocked():
    model = build(
        [("Resize", "x _ scales", "y", LINEAR)],
        {"x": normal(2, 3, 4, 5)},
        constants={"scales": np.array([1, 1, 2, 2], np.float32)},
        shapes={"x": ["N", 3, "H", "W"]},
    )
    (reason,) = differentiate(model, ["x"]).blocked.values()
    assert reason == "no gradient rule for Resize of an input of unknown size (node 'Resize0')"
