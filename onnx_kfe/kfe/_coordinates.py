"""A weight with its curvature in some basis: channel by channel, or in the Kronecker-factored eigenbasis (KFE).

A row or column of the weight is an output or input channel in the one, and a direction of channel space in the other
(George et al. 2018; Wang et al. 2019). Kernels keep their taps: every tap is rotated alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_kfe.kfe._covariance import Array, channel_covariance, symmetrize

__all__ = ["BASES", "Coordinates", "EigenMoments", "channel_coordinates", "eigen_bases", "eigen_coordinates"]


@dataclass(frozen=True)
class EigenMoments:
    """Second moments of the gradient in an eigenbasis (EKFAC, George et al. 2018), ``[...]`` for groups if any.

    Attributes:
        input_basis: Q_a, ``[..., c, c]``.
        output_basis: Q_g, ``[..., o, o]``.
        second_moment: ``[..., o, c, taps]`` mean over samples of the squared entries of ``Q_g^T dW_k Q_a``.
    """

    input_basis: Array
    output_basis: Array
    second_moment: Array


@dataclass(frozen=True)
class Coordinates:
    """A weight and its Fisher information in one basis, ``W_k = output_basis @ weight_k @ input_basis^T`` for a tap k.

    Attributes:
        weight: ``[o, c, taps]``.
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``; diagonal in the KFE.
        input_basis: Q_a, ``[c, c]``, orthonormal directions as columns.
        output_basis: Q_g, ``[o, o]``.
        variances: ``[o, c, taps]``, the diagonal of the Fisher in nats per squared weight, as well as it is known.
        saliency: ``[o]`` mean over samples of the squared derivative of the loss by a gate on the channel; None where
            it was not collected or rows are no channels.
    """

    weight: Array
    input_factor: Array
    output_factor: Array
    input_basis: Array
    output_basis: Array
    variances: Array
    saliency: Array | None = None


def channel_coordinates(
    weight: Array,
    input_factor: Array,
    output_factor: Array,
    *,
    saliency: Array | None = None,
    eigen: EigenMoments | None = None,
) -> Coordinates:
    """The weight as it is: rows and columns are channels.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
        saliency: See `Coordinates`.
        eigen: Of no use here: another basis.
    """
    outputs, channels = weight.shape[:2]
    by_tap = weight.reshape(outputs, channels, -1)
    inputs = np.diag(input_factor).reshape(by_tap.shape[1:])
    variances = np.diag(output_factor)[:, None, None] * inputs
    return Coordinates(by_tap, input_factor, output_factor, np.eye(channels), np.eye(outputs), variances, saliency)


def eigen_coordinates(
    weight: Array,
    input_factor: Array,
    output_factor: Array,
    *,
    saliency: Array | None = None,
    eigen: EigenMoments | None = None,
) -> Coordinates:
    """The weight in the eigenbases of the channel covariance and of G, eigenvalues in decreasing order.

    Variances are products of the eigenvalues, the same for every tap (EigenDamage, Wang et al. 2019, section 4),
    unless they were measured.

    Args:
        weight: ``[o, c, *kernel]``.
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
        saliency: Of no use here: rows are no channels.
        eigen: Bases to take in place of those of the factors, with the variances measured in them.
    """
    by_tap = weight.reshape(*weight.shape[:2], -1)
    _, channels, taps = by_tap.shape
    if eigen is None:
        input_basis, output_basis = eigen_bases(input_factor, output_factor, taps)
    else:
        input_basis, output_basis = eigen.input_basis, eigen.output_basis
    blocks = input_factor.reshape(channels, taps, channels, taps)
    half = np.tensordot(input_basis, blocks, axes=(0, 0))  # [c*, taps, c, taps]
    inputs = np.tensordot(half, input_basis, axes=(2, 0)).transpose(0, 1, 3, 2).reshape(input_factor.shape)
    outputs = symmetrize(output_basis.T @ output_factor @ output_basis)
    rotated = np.tensordot(np.tensordot(output_basis, by_tap, axes=(0, 0)), input_basis, axes=(1, 0))
    if eigen is None:
        products = np.outer(np.diag(outputs), np.diag(channel_covariance(inputs, taps)))
        variances = np.repeat(products[:, :, None], taps, axis=2)
    else:
        variances = eigen.second_moment
    return Coordinates(
        np.ascontiguousarray(rotated.transpose(0, 2, 1)), symmetrize(inputs), outputs,
        input_basis, output_basis, variances,
    )  # fmt: skip


def eigen_bases(input_factor: Array, output_factor: Array, taps: int) -> tuple[Array, Array]:
    """Eigenvectors of the channel covariance ``[c, c]`` and of G ``[o, o]`` as columns, largest eigenvalue first.

    Args:
        input_factor: A, ``[i, i]``.
        output_factor: G, ``[o, o]``.
        taps: Taps of the kernel.
    """
    _, inputs = scipy.linalg.eigh(symmetrize(channel_covariance(input_factor, taps)))
    _, outputs = scipy.linalg.eigh(symmetrize(output_factor))
    return np.ascontiguousarray(inputs[:, ::-1]), np.ascontiguousarray(outputs[:, ::-1])


BASES: dict[str, Callable[..., Coordinates]] = {"channel": channel_coordinates, "kfe": eigen_coordinates}
"""By name: a weight ``[o, c, *kernel]`` with A and G, ``saliency=`` and ``eigen=`` where known, in that basis."""
