"""SOAP against Adam of torch, in the eigenbases and without any, and on an ill-conditioned problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onnx_kfe.recovery.training import _soap
from onnx_kfe.recovery.training._optimizer import load_moments, moments
from onnx_kfe.recovery.training._soap import Soap

SHAPES = [(7,), (1, 5), (6, 1), (4, 3, 2, 1), (5, 8), ()]


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def trained(kind: type[torch.optim.Optimizer], start: Tensor, steps: list[Tensor], **options) -> Tensor:
    weight = torch.nn.Parameter(start.clone())
    optimizer = kind([weight], **options)
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_bases_it_is_adamw(shape: tuple[int, ...], decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_soap, "_LARGEST_SIDE", 0)
    start, steps = torch.ones(shape), gradients(shape, 50)
    found = trained(Soap, start, steps, lr=0.01, weight_decay=decay)
    adam = {"lr": 0.01, "weight_decay": decay, "betas": (0.95, 0.95), "eps": 1e-8}
    torch.testing.assert_close(found, trained(torch.optim.AdamW, start, steps, **adam))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 3, 2, 1)])
def test_in_fixed_bases_it_is_adam_in_these_coordinates(shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_soap, "_EVERY", 1000)
    monkeypatch.setattr(_soap, "_EPSILON", 0.01)  # above the rounding of zeros, which else become steps
    start, steps = torch.ones(shape), gradients(shape, 30)
    matrices = [step.reshape(len(step), -1).double() for step in steps]
    left, _, right = torch.linalg.svd(matrices[0])  # the eigenvectors of its factors
    turned = [(left.T @ matrix @ right.T).float() for matrix in matrices]
    origin = (left.T @ start.reshape(len(start), -1).double() @ right.T).float()
    adam = trained(torch.optim.Adam, origin, turned, lr=0.01, betas=(0.95, 0.95), eps=0.01)
    expected = (left @ adam.double() @ right).float().reshape(shape)
    found = trained(Soap, start, steps, lr=0.01)
    # Null vectors of the first gradient are any, so that only what lies across them can be compared.
    rank = min(matrices[0].shape)
    spans = (left[:, :rank].T, right[:rank].T)
    for one in (found, expected):
        one -= start
    found, expected = (spans[0] @ one.reshape(len(start), -1).double() @ spans[1] for one in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_bases_become_those_of_the_factors() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([8.0, 4.0, 2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = Soap([weight], lr=0.0)
    for _ in range(600):
        weight.grad = turn @ (scales[:, None] * torch.randn(4, 6))
        optimizer.step()
    overlap = (optimizer.state[weight]["left_basis"].T @ turn).abs()
    assert torch.all(overlap.diagonal() > 0.9)  # in the order of the eigenvalues


def test_ill_conditioned_products_are_solved_where_adam_is_not() -> None:
    """Least squares in rotated coordinates of very different curvature."""
    torch.manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(n, n))[0] for n in (12, 20)]
    left, right = (t * torch.logspace(0, -2, len(t)) for t in turns)
    target = torch.randn(12, 20)

    def loss(weight: Tensor) -> Tensor:
        return (left.T @ (weight - target) @ right).square().sum()

    found = {}
    for kind in (Soap, torch.optim.Adam):
        weight = torch.nn.Parameter(torch.zeros(12, 20))
        optimizer = kind([weight], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss(weight).backward()
            optimizer.step()
        found[kind] = float(loss(weight).detach())
    assert found[Soap] < 0.3 * found[torch.optim.Adam]


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_gradients_of_any_size(scale: float) -> None:
    steps = [scale * step for step in gradients((30, 40), 25)]
    steps[0][:20] = 0
    assert torch.isfinite(trained(Soap, torch.ones(30, 40), steps, lr=0.01)).all() == (scale < 1e19)


def test_it_goes_on_from_what_it_remembers() -> None:
    steps = gradients((6, 4), 45)
    whole = trained(Soap, torch.ones(6, 4), steps, lr=0.01)
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Soap([weight], lr=0.01)
    for place, gradient in enumerate(steps):
        if place == 23:
            again = Soap([weight], lr=0.01)
            load_moments(again, moments(optimizer))
            optimizer = again
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), whole, rtol=0, atol=0)
