"""The demonstration: a small classifier of handwritten digits, with the images it is calibrated and tested on.

The images are the test part of *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn's ``load_digits`` has them:
1,797 images of 8x8 pixels with 17 grey levels, kept as they are and split at random into training, calibration and
test images. The model takes them scaled up to 32x32; ``tools/train_demo.py`` makes both files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["SIZE", "load_digits_split", "model_path", "upscale"]

SIZE = 32
"""Height and width of the model's input image, in pixels."""

_FOLDER = Path(__file__).parent
_GREY_LEVELS = 16.0


def model_path() -> Path:
    """Path of the bundled model: input ``image`` [batch, 1, 32, 32] in [0, 1], output ``logits`` [batch, 10]."""
    return _FOLDER / "digits.onnx"


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load one part of the digits, ready for the model.

    Args:
        split: ``"calibration"``, ``"test"``, or ``"train"`` (what the model learned from).

    Returns:
        Images, float32 [n, 1, 32, 32] in [0, 1], and their labels, int64 [n].

    Raises:
        ValueError: There is no such split.
    """
    with np.load(_FOLDER / "digits.npz", allow_pickle=False) as archive:
        if f"{split}_images" not in archive:
            raise ValueError(f"no split {split!r}: it can be 'calibration', 'test' or 'train'")
        return upscale(archive[f"{split}_images"]), archive[f"{split}_labels"].astype(np.int64)


def upscale(images: np.ndarray) -> np.ndarray:
    """Scale 8x8 images up to the model's input, bilinearly, with pixel centres aligned and edges repeated.

    Args:
        images: uint8 [n, 8, 8] with grey levels 0 to 16.

    Returns:
        float32 [n, 1, 32, 32] in [0, 1].
    """
    rows, columns = (_interpolation(length, SIZE) for length in images.shape[1:])
    scaled = rows @ (images / _GREY_LEVELS) @ columns.T
    return scaled[:, None].astype(np.float32)


def _interpolation(source: int, target: int) -> np.ndarray:
    """Matrix [target, source] that interpolates a signal linearly at ``target`` evenly spaced pixel centres."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(source)))
