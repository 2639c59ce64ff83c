"""Reader of folders of images, with labels from a folder per class or a CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnx_kfe.calibration._images import preprocess_for
from onnx_kfe.calibration._inputs import Label, Sample, make_table, one_line
from onnx_kfe.calibration._readers_arrays import only_input
from onnx_kfe.calibration._source import CorruptSample, Loader, PathReader, Request, Source
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["IMAGES", "IMAGE_SUFFIXES", "ImageSource"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_LABELS_FILE = "labels.csv"
_DEEP_MODES = ("I", "F")  # more than 8 bits a pixel: Pillow would clip these at 255 without a word


class ImageSource(Source):
    """The images below a folder, in the order of their paths, decoded one at a time when asked for."""

    def __init__(self, folder: Path, files: Sequence[PurePosixPath], request: Request) -> None:
        self._folder = folder
        self._files = files
        self._inputs = request.inputs
        self._spec = only_input(request.inputs, str(folder), "a folder of images")
        self._preprocess = preprocess_for(self._spec, request.images)
        self._labels, self._labels_from = _find_labels(folder, files, request.labels)

    def loaders(self) -> Iterator[Loader]:
        """Yield the loaders of the images."""
        return (partial(self._load, number) for number in range(len(self._files)))

    def _load(self, number: int) -> tuple[Sample, Label | None]:
        path = self._folder / self._files[number]
        array = self._preprocess(_decode(path, self._preprocess.mode))
        table = make_table({self._spec.name: array}, self._inputs, str(path), stacked=False)
        sample, _ = table.load(0)
        return sample, None if self._labels is None else self._labels[number]

    def describe(self) -> str:
        """Say how many images there are and exactly how they are prepared."""
        return f"{self._folder}: {len(self._files)} images, {self._preprocess.describe()}; {self._labels_from}"

    def count(self) -> int:
        """Return the number of image files, readable or not."""
        return len(self._files)

    def labels(self) -> Sequence[Label] | None:
        """Return the class indices of the images."""
        return None if self._labels is None else list(self._labels)


def _image_files(folder: Path) -> Iterator[PurePosixPath]:
    """Paths relative to the folder, in no particular order. Hidden files are what archives of a Mac are full of."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        yield from (
            relative / name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )


def _open_images(path: Path, request: Request) -> Source:
    """Read all images below a folder."""
    files = sorted(_image_files(path))
    if not files:
        suffixes = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise KfeError(f"{path}: the folder holds no images ({suffixes}) and no test_data_set_*/input_*.pb")
    return ImageSource(path, files, request)


def _decode(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise CorruptSample(f"{path}: pixels of mode {image.mode} do not fit 8 bits; convert it or use an .npz")
            return image.convert(mode)
    except CorruptSample:
        raise
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError and struct.error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise CorruptSample(f"{path}: {reason}") from error


def _find_labels(folder: Path, files: Sequence[PurePosixPath], csv_path: Path | None) -> tuple[np.ndarray | None, str]:
    """The class index of each file, shape ``[files]``, and where it comes from."""
    if csv_path is None and (folder / _LABELS_FILE).is_file():
        csv_path = folder / _LABELS_FILE
    if csv_path is not None:
        return _labels_from_csv(csv_path, folder, files), f"labels from {csv_path}"
    classes = sorted({file.parts[0] for file in files})
    # Only images directly in the class folders count: otherwise train/ and val/ would pass for two classes.
    if len(classes) < 2 or any(len(file.parts) != 2 for file in files):
        return None, "no labels"
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[file.parts[0]] for file in files], np.int64)
    return labels, f"labels from {len(classes)} class folders ({classes[0]} = 0, {classes[1]} = 1, ...)"


def _labels_from_csv(path: Path, folder: Path, files: Sequence[PurePosixPath]) -> np.ndarray:
    """Rows ``file,label`` with paths relative to the image folder or to the CSV."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file of labels")
    known: dict[PurePosixPath, int] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        for line, row in enumerate(csv.reader(stream), 1):
            if not row:
                continue
            try:
                known[PurePosixPath(row[0].strip().replace("\\", "/"))] = int(row[1])
            except (ValueError, IndexError) as error:
                if line > 1:  # the first may be a header
                    raise KfeError(f"{path}, line {line}: expected file,label with an integer label") from error
    prefix = PurePosixPath(Path(os.path.relpath(folder, path.parent)).as_posix())
    labels = [known.get(file, known.get(prefix / file)) for file in files]
    if missing := [str(file) for file, label in zip(files, labels, strict=True) if label is None]:
        raise KfeError(f"{path}: {len(missing)} of {len(files)} images have no label, the first is {missing[0]}")
    return np.array(labels, np.int64)


IMAGES = PathReader("a folder of images", lambda path: path.is_dir(), _open_images)
