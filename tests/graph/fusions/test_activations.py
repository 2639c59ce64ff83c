import numpy as np
import pytest

from tests.graph.fusions.fused import assert_expands
from tests.tiny import weights

X = {"x": np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)}
BIAS = {"b": weights(8)}


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_gelu(opset):
    assert_expands("Gelu", "x", X, opset=opset)
    assert_expands("BiasGelu", "x b", X, constants=BIAS, opset=opset)


@pytest.mark.parametrize("opset", [11, 17])
def test_fast_gelu(opset):
    assert_expands("FastGelu", "x", X, opset=opset)
    assert_expands("FastGelu", "x b", X, constants=BIAS, opset=opset)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"alpha": -0.7}])
def test_quick_gelu(options):
    assert_expands("QuickGelu", "x", X, **options)


def test_half_precision_stays():
    half = {name: array.astype(np.float16) for name, array in X.items()}
    assert_expands("FastGelu", "x", half, tolerance=1e-2)
