"""A layer solved anew: the change of its weight that makes up for what its outputs lack on the inputs it now gets."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe import Array, above_rounding, symmetrize
from onnx_kfe.recovery._samples import Activation, Block, Samples

__all__ = ["InputMoments", "fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, in units of the mean variance of the inputs."""


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs over blocks.

    Attributes:
        mean: Mean of x, ``[i]``.
        covariance: Covariance of x, ``[i, i]``.
        columns: How many x.
    """

    mean: Array
    covariance: Array
    columns: int

    @staticmethod
    def of(blocks: Sequence[Block]) -> InputMoments:
        """Moments of the inputs of blocks."""
        product, total, columns = _sums((block.inputs, block.inputs) for block in blocks)
        second, mean = symmetrize(product / columns), total / columns
        return InputMoments(mean, above_rounding(second - np.outer(mean, mean), second), columns)


def fit(
    weight: Array,
    bias: Array,
    samples: Samples,
    moments: tuple[InputMoments, InputMoments],
    output_factor: Array,
    steps: int,
) -> tuple[Array, Array]:
    """Weight and bias that give the wanted outputs behind the activation, on the inputs that there are now.

    Each step is least squares towards the reachable values of `Activation`, as they are with the last step's outputs.
    What the outputs lack with the old weight is regressed on the inputs, ``dW = C_ex (C_xx + l I)^-1``, with the l that
    predicts the samples held out best in the metric of the output factor, or not at all where nothing does.

    Args:
        weight: Old weight, ``[o, i]``.
        bias: Old bias, ``[o]``.
        samples: What is fitted to.
        moments: Of the inputs fitted to and held out.
        output_factor: G, ``[o, o]``.
        steps: How many.

    Returns:
        New weight and bias.
    """
    inputs, held_out = moments
    change, bias_change = np.zeros_like(weight), np.zeros_like(bias)
    strength: float | None = None
    for _ in range(steps):
        cross, lack = _lack(samples.fitted, samples.activation, weight + change, bias + bias_change, inputs)
        cross += change @ inputs.covariance
        lack += bias_change + change @ inputs.mean
        if strength is None:
            test, _ = _lack(samples.held_out, samples.activation, weight, bias, held_out)
            strength = _choose(cross, inputs.covariance, test, held_out.covariance, output_factor)
        change = _ridge(cross, inputs.covariance, strength)
        bias_change = lack - change @ inputs.mean
    return weight + change, bias + bias_change


def _lack(
    blocks: Sequence[Block], activation: Activation, weight: Array, bias: Array, moments: InputMoments
) -> tuple[Array, Array]:
    """Covariance of what the outputs lack with the inputs, ``[o, i]``, and its mean ``[o]``."""
    single, offset = weight.astype(np.float32), bias.astype(np.float32)[:, None]

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in blocks:
            given = single @ block.inputs + offset
            if block.beside is not None:
                given += block.beside
            yield activation.reachable(block.wanted, given) - given, block.inputs

    product, total, columns = _sums(pairs())
    mean = total / columns
    return product / columns - np.outer(mean, moments.mean), mean


def _sums(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[Array, Array, int]:
    """Sum of ``a b^T``, sum of a, and count of columns."""
    product, total, columns = np.zeros(()), np.zeros(()), 0
    for a, b in pairs:
        product = product + a @ b.T
        total = total + a.sum(1, dtype=np.float64)
        columns += a.shape[1]
    return product, total, columns


def _choose(cross: Array, covariance: Array, test_cross: Array, test_covariance: Array, output_factor: Array) -> float:
    """The strength with which the samples held out are predicted best, found downhill; infinity for none at all."""

    @functools.cache
    def error(place: int) -> float:
        """``E ||e - dW x||_G^2`` less its value at dW = 0."""
        change = _ridge(cross, covariance, RIDGES[place])
        return float(np.vdot(output_factor @ change, change @ test_covariance - 2 * test_cross))

    best = len(RIDGES) // 2
    while better := [p for p in (best - 1, best + 1) if 0 <= p < len(RIDGES) and error(p) < error(best)]:
        best = better[0]
    return RIDGES[best] if error(best) < 0 else np.inf


def _ridge(cross: Array, covariance: Array, strength: float) -> Array:
    if np.isinf(strength):
        return np.zeros_like(cross)
    size = len(covariance)
    ridge = strength * max(float(np.trace(covariance)) / size, np.finfo(np.float64).tiny)
    factor = scipy.linalg.cho_factor(covariance + ridge * np.eye(size), lower=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, cross.T, check_finite=False).T
