"""What modules are run on: device, precision and the layout of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onnx_kfe.calibration import Batch
from onnx_kfe.recovery.training._onnx_module import OnnxModule

__all__ = ["Backend", "Outputs"]

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Backend:
    """A device and how it computes.

    Attributes:
        device: The device.
        rounded: Whether steps compute products in bfloat16. Weights and losses are in single precision always.
    """

    device: torch.device
    rounded: bool

    @classmethod
    def of(cls, device: torch.device, precision: str | None) -> Backend:
        """The backend of a precision; when None bfloat16 where the device has instructions for it."""
        return cls(device, _multiplies_bfloat16(device) if precision is None else precision == "bfloat16")

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, kernels of images with their channels last, as convolutions are faster."""
        module.to(self.device)
        for parameter in module.parameters():
            parameter.data = _channels_last(parameter.data)
        return module

    def run(self, module: OnnxModule, batch: Batch, *, exact: bool = False) -> Outputs:
        """Outputs by name of a module for a batch, in single precision throughout where it is to be exact."""
        feeds = [
            _channels_last(torch.tensor(batch.feeds[name]).to(self.device, non_blocking=True))
            for name in module.input_names
        ]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.rounded and not exact):
            result = module(*feeds)
        return dict(zip(module.output_names, result if isinstance(result, tuple) else (result,), strict=True))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return device.type == "cpu" and any(has for name, has in known.items() if name.endswith("_bf16"))


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
