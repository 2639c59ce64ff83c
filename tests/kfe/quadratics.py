"""Problems small enough that the quadratic is an explicit matrix over all entries of the weight."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """A weight ``[o, c, taps]`` with its factors."""

    weight: np.ndarray
    input_factor: np.ndarray
    output_factor: np.ndarray


def problem(out: int, channels: int, taps: int, seed: int = 0) -> Problem:
    """Random factors that are far from diagonal, and well conditioned."""
    rng = np.random.default_rng(seed)

    def covariance(size: int) -> np.ndarray:
        root = rng.normal(size=(size, 3 * size)) * np.geomspace(2, 0.5, size)[:, None]
        return root @ root.T / (3 * size)

    return Problem(rng.normal(size=(out, channels, taps)), covariance(channels * taps), covariance(out))


def constrained_minimum(weight: np.ndarray, a: np.ndarray, g: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The weight of least ``1/2 vec(D)^T (G (x) A) vec(D)`` that is zero wherever `kept` is not, by its KKT system."""
    hessian, gone = np.kron(g, a), ~kept.reshape(-1)  # of rows one after the other
    size, bounds = len(hessian), int(gone.sum())
    chosen = np.eye(size)[gone]
    system = np.block([[hessian, chosen.T], [chosen, np.zeros((bounds, bounds))]])
    wanted = np.concatenate([np.zeros(size), -weight.reshape(-1)[gone]])
    return weight + np.linalg.solve(system, wanted)[:size].reshape(weight.shape)
