"""From an image to the tensor a model takes: the options, the presets, and the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from onnx_kfe.calibration._inputs import InputSpec, batched_inputs
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["IMAGE_PRESETS", "ImageOptions", "Preprocess", "default_image_options", "image_preset", "preprocess_for"]

Layout = Literal["NCHW", "NHWC"]

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CLASSIFIER_SIZE = 224  # when neither the options nor the model say, and images are cropped


@dataclass(frozen=True)
class ImageOptions:
    """How an image becomes an input: ``(pixels / scale - mean) / std`` after resizing.

    Attributes:
        size: Height and width; the model's own where it fixes them. If nothing says, images keep their size.
        mean: One value, or one for each channel in the order red, green, blue, in units after scaling.
        std: The same for the divisor.
        scale: What the pixels 0..255 are divided by.
        layout: NCHW or NHWC; told from the input shape when None.
        bgr: Whether the channels are blue, green, red. The order of mean and std stays red, green, blue.
        resample: nearest, bilinear, bicubic or lanczos.
        crop: Resize so that the short side is ``size / crop``, then crop the centre; None resizes straight to size,
            whatever that does to the aspect ratio.

    Raises:
        UsageError: A value is none of these.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    layout: Layout | None = None
    bgr: bool = False
    resample: str = "bilinear"
    crop: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"image size is height and width in pixels, found {self.size}")
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3):
            raise UsageError(f"image mean and std take 1 or 3 values, found {len(self.mean)} and {len(self.std)}")
        if self.scale == 0 or 0 in self.std:
            raise UsageError("image scale and std divide the pixels and cannot be 0")
        if self.layout not in (None, "NCHW", "NHWC"):
            raise UsageError(f"image layout is NCHW or NHWC, found {self.layout}")
        if self.resample not in _RESAMPLE:
            raise UsageError(f"image resample is {', '.join(_RESAMPLE)}, found {self.resample}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise UsageError(f"image crop is a fraction of the short side in (0, 1], found {self.crop}")


IMAGE_PRESETS: dict[str, ImageOptions] = {
    "imagenet": ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=0.875),
    "efficientnet-lite": ImageOptions(mean=(127 / 255,), std=(128 / 255,), resample="bicubic", crop=0.875),
    "caffe": ImageOptions(mean=(123.68, 116.779, 103.939), scale=1.0, bgr=True, resample="bicubic", crop=0.875),
    "unit": ImageOptions(),
    "symmetric": ImageOptions(mean=(0.5,), std=(0.5,)),
    "raw": ImageOptions(scale=1.0),
}
"""Preprocessing by name: 0..1 is ``unit``, -1..1 ``symmetric``, 0..255 ``raw``."""


def image_preset(name: str) -> ImageOptions:
    """Return the preset of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in IMAGE_PRESETS:
        raise UsageError(f"image preset {name} is unknown; there are: {', '.join(IMAGE_PRESETS)}")
    return IMAGE_PRESETS[name]


@dataclass(frozen=True)
class Preprocess:
    """`ImageOptions` made definite for one input.

    Attributes:
        options: The options.
        channels: 1 for grey, 3 for colour.
        layout: NCHW or NHWC.
        size: Height and width, where None leaves a side free.
        dtype: Element type of the input.
        batch_axis: Whether the input has one.
    """

    options: ImageOptions
    channels: int
    layout: Layout
    size: tuple[int | None, int | None]
    dtype: np.dtype
    batch_axis: bool

    @property
    def mode(self) -> str:
        """Pillow's name of the colour space."""
        return "L" if self.channels == 1 else "RGB"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the input for an image of mode `mode`, with a batch axis of size 1 if the input has one."""
        options = self.options
        pixels: np.ndarray = np.asarray(self._resize(image), np.float32) / np.float32(options.scale)
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        pixels = (pixels - np.array(options.mean, np.float32)) / np.array(options.std, np.float32)
        if options.bgr:
            pixels = pixels[:, :, ::-1]
        if self.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[None] if self.batch_axis else pixels, self.dtype)

    def _resize(self, image: Image.Image) -> Image.Image:
        resample, (height, width) = _RESAMPLE[self.options.resample], self.size
        if self.options.crop is not None and height and width:
            # The rounded ratio may fall one pixel short of what is cropped.
            least_height, least_width = round(height / self.options.crop), round(width / self.options.crop)
            ratio = max(least_height / image.height, least_width / image.width)
            resized = (max(least_width, round(image.width * ratio)), max(least_height, round(image.height * ratio)))
            image = image.resize(resized, resample)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        if height is None and width is None:
            return image
        # One free side follows the other, so that the aspect ratio stays.
        height = height or max(1, round(image.height * (width or 0) / image.width))
        width = width or max(1, round(image.width * height / image.height))
        return image.resize((width, height), resample)

    def describe(self) -> str:
        """Say in full what is done to an image."""
        options, (height, width) = self.options, self.size
        if height is None and width is None:
            resized = "at their own size"
        else:
            goal = f"{height or 'free'} x {width or 'free'} (height x width)"
            if options.crop is not None:
                resized = f"short side to 1/{options.crop:g} of the size ({options.resample}), centre crop {goal}"
            else:
                resized = f"resized to {goal} ({options.resample})"
        colour = "grey" if self.channels == 1 else "BGR" if options.bgr else "RGB"
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (options.mean, options.std))
        order = " in order RGB" if options.bgr and len(options.mean + options.std) > 2 else ""
        return f"{resized}, {colour}, {self.layout}, (pixels / {options.scale:g} - mean [{mean}]) / std [{std}]{order}"


def default_image_options(spec: InputSpec) -> ImageOptions:
    """Return what is done to images when nobody says: ImageNet's normalisation for colour, 0..1 for grey.

    Inputs of integers take the pixels as they are.
    """
    if spec.dtype.kind in "iu":
        return IMAGE_PRESETS["raw"]
    grey = 1 in (spec.shape[-3:-2] + spec.shape[-1:])
    return IMAGE_PRESETS["unit" if grey else "imagenet"]


def preprocess_for(spec: InputSpec, options: ImageOptions | None = None) -> Preprocess:
    """Fill in from an input what the options leave open.

    Args:
        spec: The input: ``[N, C, H, W]`` or ``[N, H, W, C]``, or the same without ``N``, with 1 or 3 channels.
        options: What the user says; `default_image_options` when None.

    Raises:
        UsageError: The options contradict the input, or do not say the layout where the input does not either.
        KfeError: The input takes no images.
    """
    batch_axis = spec.name in batched_inputs([spec])
    shape = spec.shape[1:] if batch_axis else spec.shape
    if len(shape) != 3 or spec.dtype.kind not in "fiu":
        raise KfeError(
            f"images do not fit input {spec.name}, which is {spec}; give an .npz, or package.module:function"
        )
    layout = (options.layout if options else None) or _layout(spec, shape)
    channels, height, width = shape if layout == "NCHW" else (shape[2], shape[0], shape[1])
    if isinstance(channels, int) and channels not in (1, 3):
        raise UsageError(f"images have 1 or 3 channels; input {spec.name}, {spec}, has {channels} in layout {layout}")
    options = options or default_image_options(spec)
    count = channels if isinstance(channels, int) else 3
    if max(len(options.mean), len(options.std)) > count:
        raise UsageError(f"image mean and std have 3 values, but input {spec.name}, {spec}, takes grey images")
    if spec.dtype.kind in "iu" and (options.scale, set(options.mean), set(options.std)) != (1, {0}, {1}):
        raise UsageError(f"input {spec.name} is {spec.dtype} and takes pixels as they are: use the image preset raw")
    return Preprocess(options, count, layout, _size(spec, (height, width), options), spec.dtype, batch_axis)


def _layout(spec: InputSpec, shape: tuple[int | str | None, ...]) -> Layout:
    if shape[0] in (1, 3):
        return "NCHW"
    if shape[2] in (1, 3):
        return "NHWC"
    raise UsageError(f"input {spec.name}, {spec}, does not show where its 1 or 3 channels are: give the image layout")


def _size(spec: InputSpec, shape: tuple[int | str | None, ...], options: ImageOptions) -> tuple[int | None, int | None]:
    fixed = tuple(dim if isinstance(dim, int) else None for dim in shape)
    if options.size is not None:
        if any(has is not None and has != wanted for has, wanted in zip(fixed, options.size, strict=True)):
            raise UsageError(f"image size {options.size} does not fit input {spec.name}, {spec}")
        return options.size
    height, width = fixed
    if options.crop is not None:
        return height or width or _CLASSIFIER_SIZE, width or height or _CLASSIFIER_SIZE
    return height, width
