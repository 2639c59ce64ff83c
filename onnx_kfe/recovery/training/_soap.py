"""Adam in the Kronecker-factored eigenbasis: SOAP (Vyas et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, optim

__all__ = ["Soap"]

_DECAY = 0.95  # of all running averages
_EPSILON = 1e-8
_EVERY = 20  # steps between refreshments of the bases
_LARGEST_SIDE = 2048  # a longer side of a matrix keeps its own coordinates


class Soap(optim.Optimizer):
    """Adam on gradients in the eigenbases of their own Kronecker factors.

    The gradient G of a weight, a matrix ``[out, in * kernel]``, has the factors ``L = E[G G^T]`` and ``R = E[G^T G]``
    (Shampoo; Gupta, Koren and Singer, 2018). Adam runs on ``Q_L^T G Q_R``, with Q the eigenvectors of the factors:
    where weights are nearly independent, the second moments of single coordinates are the curvature. So one learning
    rate serves directions of very different curvature, which is what the factors of a compressed layer have. The bases
    follow the factors by a step of subspace iteration every 20 steps, the largest eigenvalues first. Vectors are
    Adam's.

    Args:
        parameters: Parameters, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled, as AdamW's.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change all parameters that have a gradient; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(parameter, parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The step of one parameter, as a matrix."""
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient.reshape(1, -1)
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(matrix), "square": torch.zeros_like(matrix)}
            state |= {f"{side}_factor": torch.zeros_like(_factor(matrix, side)) for side in _sides(matrix)}
            state |= {f"{side}_basis": _eigenvectors(_factor(matrix, side)) for side in _sides(matrix)}
        state["step"] += 1
        state["mean"].lerp_(matrix, 1 - _DECAY)
        state["square"].lerp_(_rotated(state, matrix).square(), 1 - _DECAY)
        correction = 1 - _DECAY ** float(state["step"])
        scale = (state["square"] / correction).sqrt() + _EPSILON
        update = _rotated(state, state["mean"] / correction) / scale
        update = _rotated(state, update, back=True)
        for side in _sides(matrix):
            state[f"{side}_factor"].lerp_(_factor(matrix, side), 1 - _DECAY)
            if state["step"] % _EVERY == 0:
                moved = _unit(state[f"{side}_factor"]) @ state[f"{side}_basis"]
                state[f"{side}_basis"] = torch.linalg.qr(moved)[0].contiguous()
        return update


def _sides(matrix: Tensor) -> list[str]:
    """The sides that have a basis: none of a vector."""
    if min(matrix.shape) == 1:
        return []
    return [side for side, size in zip(("left", "right"), matrix.shape, strict=True) if size <= _LARGEST_SIDE]


def _factor(matrix: Tensor, side: str) -> Tensor:
    return matrix @ matrix.T if side == "left" else matrix.T @ matrix


def _eigenvectors(factor: Tensor) -> Tensor:
    return torch.linalg.eigh(_unit(factor).double())[1].flip(1).to(factor).contiguous()


def _unit(factor: Tensor) -> Tensor:
    """A factor of trace 1, for numbers next to zero are lost in decompositions."""
    return factor / factor.trace().clamp_min(torch.finfo(factor.dtype).tiny)


def _rotated(state: dict[str, Tensor], matrix: Tensor, *, back: bool = False) -> Tensor:
    """A matrix in the eigenbases, or from there back."""
    left, right = state.get("left_basis"), state.get("right_basis")
    if left is not None:
        matrix = (left if back else left.T) @ matrix
    return matrix if right is None else matrix @ (right.T if back else right)
