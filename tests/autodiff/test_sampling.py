import pytest
import torch.nn.functional as F

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_of_images(mode, padding, aligned, dynamic):
    """Positions lie inside and outside."""
    name = {"bilinear": "linear"}.get(mode, mode)
    assert_gradients(
        [("GridSample", "x g", "y", {"mode": name, "padding_mode": padding, "align_corners": aligned})],
        {"x": normal(2, 3, 4, 5), "g": normal(2, 6, 7, 2, seed=1)},
        lambda x, grid: F.grid_sample(x, grid, mode, padding, bool(aligned)),
        shapes={"x": ["N", "C", "H", "W"], "g": ["N", "T", 7, 2]} if dynamic else None,
    )


def test_of_volumes():
    assert_gradients(
        [("GridSample", "x g", "y", {})],
        {"x": normal(2, 3, 4, 5, 3), "g": normal(2, 2, 3, 4, 3, seed=1)},
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
    )


@pytest.mark.parametrize("attributes", [{"mode": "cubic"}, {"padding_mode": "reflection"}])
def test_others_are_blocked(attributes):
    inputs = {"x": normal(2, 3, 4, 5), "g": normal(2, 6, 7, 2)}
    model = build([("GridSample", "x g", "y", attributes)], inputs)
    assert "GridSample of mode" in differentiate(model, ["x"]).blocked.popitem()[1]
