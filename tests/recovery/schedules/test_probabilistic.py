"""Masks that are drawn anew, and units that return."""

from __future__ import annotations

import numpy as np
import torch

from onnx_kfe.recovery.schedules._probabilistic import Probabilistic
from tests.recovery.schedules.models import drive, make, subject


def schedule(seed: int = 0) -> tuple[torch.nn.Module, Probabilistic]:
    module, made = make("probabilistic", subject("channel"), seed)
    assert isinstance(made, Probabilistic)
    return module, made


def test_masks_are_drawn_anew_with_the_probabilities() -> None:
    _, made = schedule()
    made.levels[1] = np.linspace(0, 0.9, 16)
    drawn = np.stack([made.factors(1, step) for step in range(4000)])
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(1 - drawn.mean(0), made.levels[1], atol=0.03)
    np.testing.assert_array_equal(drawn[7], made.factors(1, 7))
    _, other = schedule(seed=1)
    other.levels[1] = made.levels[1]
    assert any(not np.array_equal(drawn[step], other.factors(1, step)) for step in range(10))


def test_a_unit_that_is_left_out_returns_with_its_weights() -> None:
    module, made = schedule()
    weight = dict(module.named_parameters())["w1"]
    before = weight.detach().clone()
    made.levels[1][:] = 1 - 1e-9  # nearly all are left out
    made.advance = lambda step, steps: None  # type: ignore[method-assign]
    made.after_step(0, 10)
    out = (weight.detach().flatten(1) == 0).all(1)
    assert out.sum() == 15  # one is always left
    made.after_backward(1, 10)
    torch.testing.assert_close(weight.detach(), before)
    made.levels[1][:] = 0.0  # the probability may fall again
    made.after_step(1, 10)
    torch.testing.assert_close(weight.detach(), before)


def test_probabilities_fall_for_units_that_become_important() -> None:
    _, made = schedule()
    norms = np.arange(16, dtype=float)
    for _ in range(5):
        made._update(1, norms, 0.05)
    risen = made.levels[1].copy()
    assert risen[0] > 0
    for _ in range(30):
        made._update(1, np.where(np.arange(16) == 0, 99.0, norms), 0.01)
    assert made.levels[1][0] < risen[0]
    assert not made.gone[1][0]


def test_all_probabilities_are_one_or_zero_in_the_end() -> None:
    module, made = schedule()
    drive(module, made, 60)
    made.finish()
    for gone, levels in zip(made.gone, made.levels, strict=True):
        np.testing.assert_array_equal(levels, gone.astype(float))
