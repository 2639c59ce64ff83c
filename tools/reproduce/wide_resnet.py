"""Train a CIFAR-10 ResNet of any width and export it: the wide ResNet-32 that EigenDamage prunes, or a smaller one.

    python -m tools.reproduce.wide_resnet wide.onnx --widths 64 128 256 --epochs 120
    python -m tools.reproduce.wide_resnet small.onnx --widths 16 32 64 --epochs 30 --depth 20

It trains on a GPU where there is one, in bfloat16 with channels last. ``python -m tools.reproduce.schedules wide.onnx``
prunes the result. Needs torch and the assets, with all 50,000 training images (``prepare.py cifar10`` there).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onnx_kfe.exporting import export
from tools.assets import cifar10
from tools.reproduce.resnet32_one_shot import top1

BATCH = 128


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv_bn(c_in, c_out, 3, stride), conv_bn(c_out, c_out, 3, 1)
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, c_in, h, w]`` to ``[n, c_out, h / stride, w / stride]``."""
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class ResNet(nn.Module):
    """ResNet for 32 x 32 images (He et al. 2016): three stages of ``(depth - 2) / 6`` blocks."""

    def __init__(self, depth: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = conv_bn(3, widths[0], 3, 1)
        blocks: list[nn.Module] = []
        c_in = widths[0]
        for stage, width in enumerate(widths):
            for place in range((depth - 2) // 6):
                blocks.append(Block(c_in, width, 2 if stage and not place else 1))
                c_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c_in, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        """From images ``[n, 3, 32, 32]`` to logits ``[n, 10]``."""
        return self.classifier(self.blocks(F.relu(self.stem(image))).mean((2, 3)))


def shifted_and_flipped(images: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels over a border of zeros, and half of them flipped."""
    count, device = len(images), images.device
    rows, columns = (torch.randint(0, 9, (count, 1), device=device) + torch.arange(32, device=device) for _ in "yx")
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    each = torch.arange(count, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    """SGD with Nesterov's momentum on cross-entropy, one cycle of the learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, 0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        started = time.monotonic()
        order = torch.randperm(len(images), device=images.device)
        for batch in order[: steps * BATCH].split(BATCH):
            with torch.autocast(images.device.type, torch.bfloat16):
                logits = model(shifted_and_flipped(images[batch]).to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the ONNX file to write")
    parser.add_argument("--depth", type=int, default=32, help="6 n + 2")
    parser.add_argument("--widths", type=int, nargs=3, default=(64, 128, 256), help="channels of the stages")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="its peak")
    parser.add_argument("--samples", type=int, default=50_000, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (torch.from_numpy(array).to(device) for array in cifar10("train", 0, arguments.samples))
    model = ResNet(arguments.depth, tuple(arguments.widths)).to(device, memory_format=torch.channels_last)
    started = time.monotonic()
    train(model, images, labels, arguments.epochs, arguments.learning_rate)
    seconds = time.monotonic() - started
    model = model.to("cpu", memory_format=torch.contiguous_format)
    export(model, {"image": images[:2].cpu()}, arguments.output, output_names=["logits"])
    score = top1(arguments.output.read_bytes(), *cifar10("test", 0, 10_000))
    print(f"{arguments.output}: top-1 {score:.2f} % of 10,000 test images, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
