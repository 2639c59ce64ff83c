from __future__ import annotations

import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnx_kfe.calibration._data import Dataset, open_dataset
from onnx_kfe.calibration._images import (
    IMAGE_PRESETS,
    ImageOptions,
    default_image_options,
    image_preset,
    preprocess_for,
)
from onnx_kfe.calibration._inputs import InputSpec
from onnx_kfe.errors import KfeError, UsageError

F32 = np.dtype(np.float32)
COLOUR = InputSpec("x", F32, ("N", 3, 16, 16))
RAW = IMAGE_PRESETS["raw"]


def picture(seed: int, width: int = 30, height: int = 20) -> Image.Image:
    """Smooth colours with some noise, so that a wrong filter, crop or channel order shows."""
    rng = np.random.default_rng(seed)
    waves = [np.add.outer(np.linspace(0, rng.uniform(50, 120), height), np.linspace(0, 120, width)) for _ in range(3)]
    pixels = np.stack(waves, -1) + rng.uniform(0, 15, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def save(path: Path, seed: int = 0, **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(path)
    return path


def only(dataset: Dataset) -> np.ndarray:
    (item,) = dataset
    return item.sample["x"]


def reference(
    image: Image.Image,
    size: int,
    resample: int,
    mean: list[float],
    std: list[float],
    scale: float = 255.0,
    bgr: bool = False,
) -> np.ndarray:
    """The usual evaluation of ImageNet classifiers, written down on its own."""
    short = round(size / 0.875)
    ratio = short / min(image.size)
    image = image.resize((max(short, round(image.width * ratio)), max(short, round(image.height * ratio))), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / scale
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray((pixels[:, :, ::-1] if bgr else pixels).transpose(2, 0, 1), np.float32)


CLASSIFIERS = {
    "imagenet": (224, Image.BILINEAR, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "efficientnet-lite": (230, Image.BICUBIC, [127 / 255] * 3, [128 / 255] * 3),
    "caffe": (227, Image.BICUBIC, [123.68, 116.779, 103.939], [1, 1, 1], 1.0, True),
}


@pytest.mark.parametrize("preset", CLASSIFIERS)
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (341, 257), (57, 501)])
def test_classifier_presets_bit_for_bit(preset: str, size: tuple[int, int]) -> None:
    pixels = CLASSIFIERS[preset][0]
    image = picture(1, *size)
    found = preprocess_for(InputSpec("x", F32, (None, 3, pixels, pixels)), image_preset(preset))(image)
    assert found.dtype == np.float32
    assert np.array_equal(found[0], reference(image, *CLASSIFIERS[preset]))


def test_classifier_presets_bit_for_bit_on_photographs(tmp_path: Path, assets: Path) -> None:
    with zipfile.ZipFile(assets / "data" / "imagenet_sample1000_s256_q90.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::125]
        images = [Image.open(io.BytesIO(archive.extract(name, tmp_path) and archive.read(name))) for name in names]
    for preset, arguments in CLASSIFIERS.items():
        inputs = [InputSpec("x", F32, (None, 3, arguments[0], arguments[0]))]
        found = [item.sample["x"][0] for item in open_dataset(tmp_path, inputs, images=image_preset(preset))]
        assert len(found) == len(images) == 8
        for image, array in zip(images, found, strict=True):
            assert np.array_equal(array, reference(image.convert("RGB"), *arguments)), preset


@pytest.mark.parametrize(("preset", "low", "high"), [("unit", 0, 1), ("symmetric", -1, 1), ("raw", 0, 255)])
def test_plain_presets(preset: str, low: float, high: float) -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    found = preprocess_for(InputSpec("x", F32, (None, 3, None, None)), image_preset(preset))(image)
    np.testing.assert_array_equal(found[0], np.broadcast_to(np.array([[[low, high]]], np.float32), (3, 1, 2)))


def test_layouts_hold_the_same_pixels() -> None:
    image = picture(0)
    first = preprocess_for(COLOUR, RAW)(image)
    last = preprocess_for(InputSpec("x", F32, (None, 16, 16, 3)), RAW)(image)
    open_layout = InputSpec("x", F32, (None, None, 16, 16))
    given = preprocess_for(open_layout, replace(RAW, layout="NCHW"))(image)
    single = preprocess_for(InputSpec("x", F32, (3, 16, 16)), RAW)(image)
    assert last.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)
    np.testing.assert_array_equal(given, first)
    np.testing.assert_array_equal(single, first[0])


def test_channel_order() -> None:
    image = Image.new("RGB", (16, 16), (10, 20, 30))
    options = replace(RAW, mean=(1.0, 2.0, 3.0))
    assert preprocess_for(COLOUR, options)(image)[0, :, 0, 0].tolist() == [9, 18, 27]
    assert preprocess_for(COLOUR, replace(options, bgr=True))(image)[0, :, 0, 0].tolist() == [27, 18, 9]


@pytest.mark.parametrize("shape", [(None, 1, 16, 16), (None, 16, 16, 1)])
def test_one_channel_is_grey(tmp_path: Path, shape: tuple) -> None:
    path = save(tmp_path / "a.png")
    found = only(open_dataset(tmp_path, [InputSpec("x", F32, shape)]))
    expected = np.asarray(Image.open(path).convert("L").resize((16, 16), Image.BILINEAR), np.float32) / 255
    np.testing.assert_array_equal(found.reshape(16, 16), expected)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((None, 3, None, None), ImageOptions(), (20, 30)),  # a fully convolutional model: the image's own size
        ((None, 3, None, None), ImageOptions(size=(8, 12)), (8, 12)),
        ((None, 3, 10, None), ImageOptions(), (10, 15)),  # a free width keeps the aspect ratio
        ((None, 3, None, 15), ImageOptions(), (10, 15)),
        ((None, 3, None, None), IMAGE_PRESETS["imagenet"], (224, 224)),
        ((None, 3, 8, 12), IMAGE_PRESETS["imagenet"], (8, 12)),
        ((None, 3, 12, 8), ImageOptions(), (12, 8)),
    ],
)
def test_sizes(shape: tuple, options: ImageOptions, expected: tuple[int, int]) -> None:
    assert preprocess_for(InputSpec("x", F32, shape), options)(picture(0)).shape == (1, 3, *expected)


def test_crop_takes_the_centre_and_keeps_the_aspect_ratio() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 30:50] = 255  # the centre half of the short side, square
    found = preprocess_for(InputSpec("x", F32, (None, 3, 20, 20)), replace(RAW, crop=0.5))(Image.fromarray(pixels))
    assert found.min() == 255


def test_integer_inputs_take_pixels_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", width=16, height=16)
    spec = InputSpec("x", np.dtype(np.uint8), (None, 16, 16, 3))
    found = only(open_dataset(tmp_path, [spec]))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], np.asarray(Image.open(path)))
    with pytest.raises(UsageError, match="x is uint8 and takes pixels as they are: use the image preset raw"):
        open_dataset(tmp_path, [spec], images=image_preset("unit"))


# What is read, and in which order


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    names = ["b.PNG", "a/z.jpg", "a/c/y.jpeg", "d.bmp", "e.webp", "f.gif", "g.tif"]
    for name in names:
        save(tmp_path / name)
    for hidden in (".cache/x.png", "__MACOSX/x.png", "._b.png", "readme.txt"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"no image")
    dataset = open_dataset(tmp_path, [COLOUR])
    assert dataset.count() == len(names)
    assert [item.index for item in dataset] == list(range(len(names)))
    assert dataset.skipped == []
    # Sorted by path: a/c/y.jpeg first, then a/z.jpg.
    inside = [item.sample["x"] for item in open_dataset(tmp_path / "a", [COLOUR])]
    np.testing.assert_array_equal(np.concatenate(inside), np.concatenate([i.sample["x"] for i in dataset.take(7)][:2]))


def test_images_are_decoded_only_when_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        save(tmp_path / f"{number:02}.png", number)
    opened: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or original(path))
    dataset = open_dataset(tmp_path, [COLOUR])
    statistics, held_back = dataset.split(0.1)
    assert dataset.count() == statistics.count() + held_back.count() == 20
    assert opened == []
    iterator = iter(dataset.shard(1, 4))
    next(iterator)
    assert opened == ["01.png"]
    list(iterator)
    assert opened == ["01.png", "05.png", "09.png", "13.png", "17.png"]
    opened.clear()
    list(dataset.take(4))
    assert opened == ["00.png", "05.png", "10.png", "15.png"]


def test_several_inputs_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    inputs = [COLOUR, InputSpec("mask", F32, ("N", 1))]
    with pytest.raises(UsageError, match=r"has 2 \(x, mask\); give an \.npz.*or a package\.module:function"):
        open_dataset(tmp_path, inputs)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (InputSpec("x", F32, (None, 10)), None, r"images do not fit input x, which is float32 \[\?, 10\]"),
        (InputSpec("x", F32, (None, 4, 8, 8)), None, "give the image layout"),
        (InputSpec("x", F32, (None, 4, 8, 8)), ImageOptions(layout="NCHW"), "1 or 3 channels; input x.*has 4"),
        (InputSpec("x", F32, (None, 8, 8, 3)), ImageOptions(layout="NCHW"), "1 or 3 channels; input x.*has 8"),
        (InputSpec("x", F32, (None, 1, 8, 8)), image_preset("imagenet"), "3 values, but input x.*takes grey"),
        (COLOUR, ImageOptions(size=(8, 8)), r"image size \(8, 8\) does not fit input x"),
    ],
)
def test_inputs_and_options_that_do_not_fit(spec: InputSpec, options: ImageOptions | None, message: str) -> None:
    with pytest.raises(KfeError, match=message):
        preprocess_for(spec, options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 4)}, "image size is height and width"),
        ({"mean": (1.0, 2.0)}, "mean and std take 1 or 3 values"),
        ({"std": (0.0,)}, "cannot be 0"),
        ({"scale": 0.0}, "cannot be 0"),
        ({"layout": "CHWN"}, "image layout is NCHW or NHWC, found CHWN"),
        ({"resample": "magic"}, "nearest, bilinear, bicubic, lanczos, found magic"),
        ({"crop": 1.5}, "image crop is a fraction"),
    ],
)
def test_options_that_cannot_be(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageOptions(**wrong)


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="image preset cifar is unknown; there are: imagenet, "):
        image_preset("cifar")


def test_description_states_the_preprocessing(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    described = open_dataset(tmp_path, [COLOUR]).describe()
    assert default_image_options(COLOUR) == image_preset("imagenet")
    for part in ("1 images", "16 x 16", "bilinear", "centre crop", "0.875", "RGB", "NCHW", "/ 255", "0.485, 0.456"):
        assert part in described
    assert "no labels" in described


# Labels


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for number, name in enumerate(["dog/0.png", "cat/0.png", "cat/1.png", "emu/0.png"]):
        save(tmp_path / name, number)
    dataset = open_dataset(tmp_path, [COLOUR])
    assert [int(item.label) for item in dataset] == [0, 0, 1, 2]
    assert [int(label) for label in dataset.labels.values()] == [0, 0, 1, 2]
    assert "3 class folders (cat = 0, dog = 1, ...)" in dataset.describe()


@pytest.mark.parametrize(
    "names",
    [["a/0.png", "a/1.png"], ["a/0.png", "b/0.png", "0.png"], ["train/a/0.png", "val/a/0.png"], ["0.png", "1.png"]],
    ids=["one folder", "image beside the folders", "train and val", "flat"],
)
def test_folders_that_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save(tmp_path / name)
    dataset = open_dataset(tmp_path, [COLOUR])
    assert dataset.labels is None
    assert all(item.label is None for item in dataset)


@pytest.mark.parametrize("rows", ["a.png,7\nb/c.png,5\n", "file,label\n./a.png, 7\n\nb\\c.png,5\nother.png,1\n"])
def test_labels_csv_in_the_folder(tmp_path: Path, rows: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b" / "c.png")
    (tmp_path / "labels.csv").write_text(rows)
    assert [int(item.label) for item in open_dataset(tmp_path, [COLOUR])] == [7, 5]


def test_labels_option_overrules_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a" / "0.png")
    save(tmp_path / "images" / "b" / "0.png")
    (tmp_path / "mine.csv").write_text("images/a/0.png,8\nb/0.png,9\n")  # relative to the CSV, or to the folder
    dataset = open_dataset(tmp_path / "images", [COLOUR], labels=tmp_path / "mine.csv")
    assert [int(item.label) for item in dataset] == [8, 9]
    assert "mine.csv" in dataset.describe()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,1\n", r"labels\.csv: 1 of 2 images have no label, the first is b\.png"),
        ("a.png,1\nb.png,dog\n", r"labels\.csv, line 2: expected file,label with an integer label"),
        ("a.png,1\nb.png\n", r"labels\.csv, line 2"),
    ],
)
def test_labels_csv_that_is_wrong(tmp_path: Path, rows: str, message: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(KfeError, match=message):
        open_dataset(tmp_path, [COLOUR])
    with pytest.raises(UsageError, match="no such file of labels"):
        open_dataset(tmp_path, [COLOUR], labels=tmp_path / "absent.csv")


# Corrupt images


def folder_of(tmp_path: Path, count: int) -> Path:
    first = save(tmp_path / "images" / "000.png")
    for number in range(1, count):
        os.link(first, first.with_name(f"{number:03}.png"))
    return tmp_path / "images"


def damage(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"{number:03}.png"
        path.unlink()
        path.write_bytes(b"no image")


def test_corrupt_image_is_named_skipped_and_counted_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 100)
    damage(folder, 42)
    dataset = open_dataset(folder, [COLOUR])
    for _ in range(2):
        assert [item.index for item in dataset] == [i for i in range(100) if i != 42]
        assert dataset.skipped == [f"{folder / '042.png'}: not an image"]
    # One of the hundred there are is not too many, even for a subset of fifty.
    assert len(list(dataset.shard(0, 2))) == 49
    assert len(list(dataset.shard(1, 2))) == 50
    assert len(list(dataset.take(50))) == 49
    assert sum(len(list(part)) for part in dataset.split(0.25)) == 99


def test_more_than_one_in_a_hundred_corrupt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 200)
    damage(folder, 3, 70, 90, 199)
    with pytest.raises(KfeError, match=r"3 of 200 samples are corrupt.*003\.png.*070\.png.*090\.png: not an image"):
        list(open_dataset(folder, [COLOUR]))


def test_corrupt_images_are_an_error_as_soon_as_that_is_certain(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 200)
    damage(folder, 3, 70, 90)
    read: list[int] = []
    with pytest.raises(KfeError):
        read.extend(item.index for item in open_dataset(folder, [COLOUR]))
    assert read[-1] == 89


def test_corrupt_images_beside_a_stream_are_judged_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "kfe_stream_under_test.py"
    module.write_text("import numpy as np\ndef f():\n    yield {'x': np.zeros((1, 3, 16, 16), np.float32)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = folder_of(tmp_path, 10)
    damage(folder, 4)
    with pytest.raises(KfeError, match="1 of 11 samples are corrupt"):
        list(open_dataset([folder, "kfe_stream_under_test:f"], [COLOUR]))


def test_corruption_is_judged_against_max_samples(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 200)
    damage(folder, 0)
    assert len(list(open_dataset(folder, [COLOUR]))) == 199
    with pytest.raises(KfeError, match="1 of 50 samples are corrupt"):
        list(open_dataset(folder, [COLOUR], max_samples=50))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_truncated_images(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", width=200, height=200)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(KfeError, match=rf"1 of 1 samples are corrupt.*a\.{suffix}: \S"):
        list(open_dataset(tmp_path, [COLOUR]))


def test_deep_pixels_are_not_clipped_silently(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(KfeError, match=r"a\.png: pixels of mode I;16 do not fit 8 bits"):
        list(open_dataset(tmp_path, [COLOUR]))
