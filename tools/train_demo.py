"""Train the demonstration model on scikit-learn's handwritten digits and write the two files of ``onnx_kfe/demo``.

    python tools/train_demo.py

It takes a minute or two on two cores. Needs ``pip install 'onnx-kfe[cpu,train]' scikit-learn``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from onnx_kfe import demo
from onnx_kfe.exporting import export

SEED = 0
SPLITS = {"train": 1000, "calibration": 297, "test": 500}
BATCH = 50


def conv_bn(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv_bn(channels, channels), conv_bn(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class DigitNet(nn.Module):
    """537 k parameters and 109 M multiply-adds an image, most of them in 128-channel convolutions at 16x16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(1, 32), nn.ReLU(), conv_bn(32, 64, stride=2), nn.ReLU())
        self.body = nn.Sequential(conv_bn(64, 128), nn.ReLU(), Residual(128), nn.MaxPool2d(2))
        self.top = nn.Sequential(conv_bn(128, 128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """From images [n, 1, 32, 32] to logits [n, 10]."""
        return self.classifier(self.top(self.body(self.stem(image))))


def split_digits() -> dict[str, np.ndarray]:
    """Shuffle the digits with a fixed seed and cut them into splits: ``<split>_images`` and ``<split>_labels``."""
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    parts = np.split(order, np.cumsum(list(SPLITS.values())))
    arrays = {}
    for split, indices in zip(SPLITS, parts, strict=False):
        arrays[f"{split}_images"] = digits.images[indices].astype(np.uint8)
        arrays[f"{split}_labels"] = digits.target[indices].astype(np.uint8)
    return arrays


def augment(images: Tensor) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to 10 % and shift by up to 3 pixels, each image on its own."""
    n = len(images)
    angle, scale = torch.empty(n).uniform_(-0.21, 0.21), torch.empty(n).uniform_(0.9, 1.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = torch.empty(n, 2).uniform_(-6 / demo.SIZE, 6 / demo.SIZE)
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(augment(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}", flush=True)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--folder", type=Path, default=demo.model_path().parent, help="where the two files go")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    arrays = split_digits()
    images = {split: torch.from_numpy(demo.upscale(arrays[f"{split}_images"])) for split in SPLITS}
    labels = {split: torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)) for split in SPLITS}

    model = DigitNet().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    train(model, images["train"], labels["train"], arguments.epochs)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    for split in SPLITS:
        print(f"{split}: accuracy {accuracy(model, images[split], labels[split]):.4f}")

    np.savez_compressed(arguments.folder / "digits.npz", **arrays)
    model = model.to(memory_format=torch.contiguous_format)
    export(model, {"image": images["test"][:2]}, arguments.folder / "digits.onnx", output_names=["logits"])


if __name__ == "__main__":
    main()
