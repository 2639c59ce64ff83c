"""Random flips and shifts of images, a function of (seed, epoch, sample) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_kfe.calibration import InputSpec

__all__ = ["augmented", "image_input"]

_SHIFT = 8  # of a size this part, at most
_MOST_CHANNELS = 4
_SMALLEST_SIDE = 8


def image_input(inputs: Sequence[InputSpec]) -> str | None:
    """Name of the only input where that takes images: floats ``[N, C, H, W]`` with at most four channels; else None."""
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype.kind != "f":
        return None
    _, channels, *sides = inputs[0].shape
    few = isinstance(channels, int) and channels <= _MOST_CHANNELS
    return inputs[0].name if few and all(not isinstance(s, int) or s >= _SMALLEST_SIDE for s in sides) else None


def augmented(image: np.ndarray, seed: int, epoch: int, sample: int) -> np.ndarray:
    """Flip an image left to right half of the time, and shift it by up to an eighth, reflected at its borders.

    Args:
        image: Shape ``[1, C, H, W]``.
        seed: Seed of the run.
        epoch: Number of the epoch.
        sample: Number of the sample.

    Returns:
        An image of the same shape.
    """
    random = np.random.default_rng((seed, epoch, sample))
    rows, columns = (
        _shifted(size, int(random.integers(-(size // _SHIFT), size // _SHIFT + 1))) for size in image.shape[2:]
    )
    if random.random() < 0.5:
        columns = columns[::-1]
    return image[:, :, rows[:, None], columns]


def _shifted(size: int, shift: int) -> np.ndarray:
    """Places ``[size]`` read along an axis that is shifted, reflected at both ends."""
    last = size - 1
    return last - np.abs(last - np.abs(np.arange(size) + shift))
