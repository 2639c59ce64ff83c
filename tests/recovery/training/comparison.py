"""Running a module like a model, and comparing the two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

Arrays = Mapping[str, np.ndarray]


def outputs(module: nn.Module, feeds: Arrays) -> dict[str, np.ndarray]:
    """What a module makes of the inputs, which go by name."""
    with torch.no_grad():
        result = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    tensors = result if isinstance(result, tuple) else (result,)
    return {name: tensor.numpy() for name, tensor in zip(module.output_names, tensors, strict=True)}


def assert_close(found: Arrays, wanted: Arrays, rtol: float = 1e-4) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.ptp(array.astype(float)) > 0
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * float(np.abs(array).max()), err_msg=name)


def step(module: nn.Module, feeds: Arrays, rate: float = 0.1) -> None:
    """A step of gradient descent on the mean square of the outputs."""
    optimizer = torch.optim.SGD(module.parameters(), rate)
    result = module(*(torch.from_numpy(array) for array in feeds.values()))
    sum(each.square().mean() for each in (result if isinstance(result, tuple) else (result,))).backward()
    optimizer.step()


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers and tensors of Constant nodes by name."""
    nodes = {each.output[0]: each.attribute[0].t for each in model.graph.node if each.op_type == "Constant"}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer} | nodes
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items() if tensor.dims is not None}
