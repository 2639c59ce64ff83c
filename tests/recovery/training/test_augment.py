"""Augmented images are flips and crops of the reflected image, each a function of seed, epoch and sample."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kfe.calibration import InputSpec
from onnx_kfe.recovery.training._augment import augmented, image_input

IMAGE = np.random.default_rng(0).standard_normal((1, 3, 16, 24)).astype(np.float32)


def crops() -> dict[bytes, tuple[int, int, bool]]:
    """Every image that may come out, by its bytes."""
    found = {}
    padded = np.pad(IMAGE, ((0, 0), (0, 0), (2, 2), (3, 3)), mode="reflect")
    for down in range(5):
        for right in range(7):
            crop = padded[:, :, down : down + 16, right : right + 24]
            found[crop.tobytes()] = (down, right, False)
            found[crop[..., ::-1].tobytes()] = (down, right, True)
    return found


def test_every_crop_and_flip_comes_out_and_nothing_else() -> None:
    expected = crops()
    seen = {expected[augmented(IMAGE, 0, 0, sample).tobytes()] for sample in range(1000)}
    assert len(expected) == 70
    assert seen == set(expected.values())


def test_it_depends_on_seed_epoch_and_sample_alone() -> None:
    expected = crops()
    keys = [(seed, epoch, sample) for seed in range(3) for epoch in range(3) for sample in range(3)]
    drawn = [expected[augmented(IMAGE, *key).tobytes()] for key in keys]
    assert drawn == [expected[augmented(IMAGE, *key).tobytes()] for key in keys]
    assert len(set(drawn)) > 15


@pytest.mark.parametrize(
    ("shape", "dtype", "is_image"),
    [
        (("N", 3, 32, 32), np.float32, True),
        ((4, 1, "H", "W"), np.float32, True),
        (("N", 3, 32, 32), np.uint8, False),
        (("N", 32, 32, 3), np.float32, False),
        (("N", 64, 32, 32), np.float32, False),
        (("N", 3, 4, 4), np.float32, False),
        (("N", 3, 32), np.float32, False),
    ],
)
def test_what_is_taken_for_an_image(shape: tuple[int | str, ...], dtype: type, is_image: bool) -> None:
    spec = InputSpec("x", np.dtype(dtype), shape)
    assert image_input([spec]) == ("x" if is_image else None)
    assert image_input([spec, spec]) is None
