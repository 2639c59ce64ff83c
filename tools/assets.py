"""The real models and data that the tools measure on, prepared as each model's reference evaluation prepares them.

They are no part of the repository: ``$ONNX_KFE_TEST_ASSETS`` says where they are, by default ``shared/assets`` beside
the checkout.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

__all__ = [
    "MODELS",
    "Asset",
    "assets_folder",
    "cifar10",
    "extract_images",
    "photos",
    "sentence_encoder",
    "sentences",
    "sts_spearman",
]

_IMAGENET_ARCHIVE = "imagenet_sample1000_s256_q90.zip"
_BUNDLED = 10_000  # CIFAR-10 training images among the assets


def assets_folder() -> Path:
    """Folder of the models and data; ends the program with what to do where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("ONNX_KFE_TEST_ASSETS", default))
    if not (folder / "models").is_dir():
        sys.exit(f"no assets in {folder}: set ONNX_KFE_TEST_ASSETS")
    return folder


@cache
def _reference() -> ModuleType:
    """The reference evaluation that lies with the assets."""
    spec = importlib.util.spec_from_file_location("score", assets_folder() / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar10(split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images ``[n, 3, 32, 32]`` and labels ``[n]`` of ``train`` or ``test``, in the official order.

    Of the training images the assets hold the first 10,000; for more, ``prepare.py cifar10`` makes a file of all.
    """
    if split == "train" and stop > _BUNDLED:
        images, labels = _all_of_cifar10()
    else:
        images, labels = _reference().cifar_images(split)
    batch = _reference().cifar_batch(images[start:stop], **_reference().IMAGENET)
    return batch, labels[start:stop].astype(np.int64)


def _all_of_cifar10() -> tuple[np.ndarray, np.ndarray]:
    folder = Path(os.environ.get("ONNX_KFE_ASSETS", Path.home() / ".cache" / "onnx-kfe-assets"))
    if not (file := folder / "cifar10.npz").exists():
        sys.exit(f"no {file}, with all of CIFAR-10: run prepare.py cifar10 of the assets, or use {_BUNDLED:,} samples")
    with np.load(file) as arrays:
        return arrays["x_train"], arrays["y_train"]


def _imagenet(preset: str) -> Iterator[tuple[np.ndarray, int]]:
    options = _reference().PRESETS[preset]
    for _, image, label in _reference().labelled(_IMAGENET_ARCHIVE):
        yield _reference().imagenet_tensor(image.convert("RGB"), **options), int(label)


def _mri() -> Iterator[tuple[np.ndarray, int]]:
    """The Training split, shuffled as a seed says, for the files are sorted by class."""
    rows = [row for row in _reference().labelled("brain_mri_4class_224.zip") if row[0].startswith("Training")]
    for place in np.random.default_rng(0).permutation(len(rows)):
        _, image, label = rows[place]
        yield np.asarray(image.convert("RGB").resize((240, 240)), np.float32) / 255, int(label)


def _cifar_rows() -> Iterator[tuple[np.ndarray, int]]:
    return zip(*cifar10("train", 0, 10_000), strict=True)


def _cifar_top1(session: Any, count: int = 5_000, preset: str = "") -> float:
    """Top-1 of the first `count` test images, in percent."""
    return float(_reference().cifar10(session, count, preset)["top1"])


def _cct_rows() -> Iterator[tuple[np.ndarray, int]]:
    images, labels = _reference().cifar_images("train")
    return zip(_reference().cifar_batch(images, **_reference().CIFAR_CCT), labels.astype(int), strict=True)


def _noisy_crops() -> Iterator[tuple[np.ndarray, int]]:
    """A crop of each training image with the noise that the model is to predict; labels mean nothing."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(assets_folder() / "data" / "denoise_set12_set68_train400.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.startswith("train/") and name.endswith(".png")):
            with archive.open(name) as file:
                clean = np.asarray(Image.open(file).convert("L"), np.float32)[None, 32:96, 32:96] / 255
            yield clean + random.standard_normal(clean.shape, np.float32) * 25 / 255, 0


def _receipt_lines() -> Iterator[tuple[np.ndarray, int]]:
    """The lines that are not scored, cut or padded to one width; labels mean nothing."""
    lines = _reference().labelled("sroie_lines3000.zip", "labels.tsv", "\t")
    for _, image, _ in itertools.islice(lines, 1_000, None):
        pixels = np.asarray(image.convert("L").convert("RGB"), np.float32)[:, :320].transpose(2, 0, 1)
        padded = np.zeros((3, 48, 320), np.float32)
        padded[:, :, : pixels.shape[2]] = (pixels / 255 - 0.5) / 0.5
        yield padded, 0


@dataclass(frozen=True)
class Asset:
    """A model with the data that it is calibrated on.

    Attributes:
        file: File name of the model.
        rows: Yields inputs (without a batch axis) and labels.
        preset: Name of the product's image preset, where the images are files.
        score: The reference evaluation of a session, where that is not the share of `rows` that it labels rightly.
    """

    file: str
    rows: Callable[[], Iterator[tuple[np.ndarray, int]]]
    preset: str | None = None
    score: Callable[[Any], float] | None = None

    @property
    def path(self) -> Path:
        """Where the model is."""
        return assets_folder() / "models" / self.file

    def images(self, count: int) -> np.ndarray:
        """The first `count` calibration inputs, ``[count, ...]``."""
        return self.labelled(count)[0]

    def labelled(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` calibration inputs with their labels ``[count]``."""
        images, labels = zip(*itertools.islice(self.rows(), count), strict=True)
        return np.stack(images), np.array(labels)


MODELS: dict[str, Asset] = {
    "resnet20": Asset("cifar10_resnet20.onnx", _cifar_rows, score=_cifar_top1),
    "resnet32": Asset("cifar10_resnet32.onnx", _cifar_rows, score=_cifar_top1),
    "mobilenet": Asset("mobilenet_v2_tv.onnx", lambda: _imagenet("mobilenet"), "imagenet"),
    "lite0": Asset("efficientnet_lite0.onnx", lambda: _imagenet("lite0"), "efficientnet-lite"),
    "squeezenet": Asset("squeezenet1_1_ndf.onnx", lambda: _imagenet("squeezenet"), "caffe"),
    "resnet20_bn": Asset("cifar10_resnet20_bn.onnx", _cifar_rows, score=_cifar_top1),
    "cct": Asset("cifar10_cct_vit.onnx", _cct_rows, score=lambda run: _cifar_top1(run, 2_000, "cct")),
    "dncnn": Asset("dncnn_b.onnx", _noisy_crops, score=lambda run: _reference().denoise(run, None, "")["psnr"]),
    "ocr": Asset(
        "ch_PP-OCRv4_rec_infer.onnx",
        _receipt_lines,
        score=lambda run: 100 * (1 - _reference().ocr(run, 400, "")["cer"]),
    ),
    "vgg16": Asset("vgg16_brain_tumor.onnx", _mri, score=lambda run: _reference().mri(run, 200, "")["top1"]),
}
"""By the short names that the tools take."""


def photos(count: int, size: int, mean: list[float], std: list[float]) -> np.ndarray:
    """The first `count` images of the ImageNet sample, cut to squares and normalised: ``[count, 3, size, size]``."""
    images = (image for _, image, _ in _reference().labelled(_IMAGENET_ARCHIVE))
    options = {"size": size, "resample": Image.Resampling.BILINEAR, "mean": mean, "std": std}
    cut = (_reference().imagenet_tensor(image.convert("RGB"), **options) for image in itertools.islice(images, count))
    return np.stack(list(cut))


def extract_images(folder: Path, count: int) -> Path:
    """Write the first `count` files of the ImageNet sample into a folder, as a user's calibration images."""
    with zipfile.ZipFile(assets_folder() / "data" / _IMAGENET_ARCHIVE) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".csv", "/"))]
        for name in sorted(names)[:count]:
            (folder / Path(name).name).write_bytes(archive.read(name))
    return folder


_ENCODERS = {"minilm-l6": "all_minilm_l6_v2.onnx", "minilm-l3": "paraphrase_minilm_l3.onnx"}


def sentence_encoder(name: str) -> Path:
    """Where ``prepare.py`` of the assets put a sentence encoder, by its name there; ends the program where it did not.

    Inputs are ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 ``[N, T]``.
    """
    path = Path(_reference().CACHE / _ENCODERS[name])
    if not path.is_file():
        sys.exit(f"no {path}: run prepare.py {name} of the assets")
    return path


def sentences(count: int) -> list[dict[str, np.ndarray]]:
    """Inputs of `count` sentences of the STS-B training split, drawn by a seed: each ``[1, T]`` with a T of its own.

    The shortest come first, so that those of one length, which alone can be run together, are neighbours.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_reference().CACHE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    lines = (assets_folder() / "data" / "sts" / "sts-train.csv").read_text(encoding="utf8").splitlines()
    texts = sorted({text for line in lines for text in line.split("\t")[5:7]})
    drawn = np.random.default_rng(0).choice(texts, count, replace=False)
    ids = [np.array([encoded.ids], np.int64) for encoded in tokenizer.encode_batch(drawn.tolist())]
    return [
        {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        for row in sorted(ids, key=lambda row: row.shape[1])
    ]


def sts_spearman(session: Any) -> float:
    """Spearman's rho of the cosine similarities of the STS-B test pairs with what people said, by the reference."""
    return float(_reference().sts(session, None, "")["spearman"])
