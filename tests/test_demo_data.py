from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_kfe import demo
from onnx_kfe.runtime import create_session


def test_splits_have_the_shape_of_the_model_input() -> None:
    sizes = {"train": 1000, "calibration": 297, "test": 500}
    for split, size in sizes.items():
        images, labels = demo.load_digits_split(split)
        assert images.shape == (size, 1, 32, 32)
        assert images.dtype == np.float32
        assert labels.shape == (size,)
        assert labels.dtype == np.int64
        assert images.min() == 0.0
        assert images.max() == 1.0
        assert set(labels) == set(range(10))
    with pytest.raises(ValueError, match="'calibration', 'test' or 'train'"):
        demo.load_digits_split("validation")


def test_splits_are_the_bundled_digits_of_scikit_learn_each_in_one() -> None:
    from sklearn.datasets import load_digits

    with np.load(demo.model_path().parent / "digits.npz", allow_pickle=False) as archive:
        images = np.concatenate([archive[f"{split}_images"] for split in ("train", "calibration", "test")])
        labels = np.concatenate([archive[f"{split}_labels"] for split in ("train", "calibration", "test")])

    digits = load_digits()
    found = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    wanted = sorted((i.astype(np.uint8).tobytes(), int(t)) for i, t in zip(digits.images, digits.target, strict=True))
    assert found == wanted
    assert len(set(found)) == len(found)  # no image is there twice, so no two splits share one


def test_upscaling_is_bilinear() -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 17, (8, 8)).astype(np.uint8)
    wanted = Image.fromarray(image.astype(np.float32) / 16).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(demo.upscale(image[None])[0, 0], np.asarray(wanted), atol=1e-6)


def test_model_is_as_accurate_as_claimed() -> None:
    session = create_session(demo.model_path())
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("image", ["batch", 1, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 10])]
    for split in ("calibration", "test"):
        images, labels = demo.load_digits_split(split)
        (logits,) = session.run(["logits"], {"image": images})
        assert (logits.argmax(1) == labels).mean() >= 0.985


def test_bundle_is_small_and_names_no_folder_of_its_maker() -> None:
    files = [path for path in demo.model_path().parent.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    model = onnx.load(demo.model_path())
    assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
    assert sum(int(np.prod(weight.dims)) for weight in model.graph.initializer) < 600_000


def test_data_files_are_packaged() -> None:
    """The wheel holds whatever git does not ignore in the package."""
    folder = demo.model_path().parent
    if not (Path(__file__).parents[1] / ".git").exists():
        pytest.skip("not a git checkout")
    for name in ("digits.onnx", "digits.npz"):
        assert subprocess.run(["git", "-C", folder, "check-ignore", "-q", name], check=False).returncode == 1
