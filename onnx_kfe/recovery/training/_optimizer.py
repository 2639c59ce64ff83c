"""Optimizers, and what they remember as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn, optim

from onnx_kfe.recovery.training._soap import Soap

__all__ = ["load_moments", "make_optimizer", "moments"]

_WEIGHT_DECAY = {"soap": 1e-2, "adamw": 1e-2, "sgd": 1e-4}


def make_optimizer(module: nn.Module, kind: str) -> optim.Optimizer:
    """SOAP, AdamW, or SGD with Nesterov's momentum of 0.9; weights decay in matrices and kernels alone.

    Args:
        module: Whose parameters are to be trained.
        kind: ``soap``, ``adamw`` or ``sgd``.
    """
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY[kind]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "soap":
        return Soap(groups)
    if kind == "adamw":
        return optim.AdamW(groups)
    return optim.SGD(groups, momentum=0.9, nesterov=True)


def moments(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by ``<number of the parameter>/<name>``."""
    return {
        f"{number}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_moments(optimizer: optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Give an optimizer what `moments` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
