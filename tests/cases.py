"""The model zoo of the tests: small torch networks, each as the ONNX models that the two exporters make of it.

    for name in CASES: case = load_case(name)      # "residual-dynamo", "residual-11", ...

A name is an architecture and how it was exported: by the current exporter (``dynamo``), or by the legacy one for an
opset. Models are exported when first asked for, once in a test session. Weights, biases and running statistics are
random, seeded, and of the size that a trained network has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onnx_kfe.exporting import export
from onnx_kfe.exporting._torch import quiet

__all__ = ["ARCHITECTURES", "CASES", "Case", "load_case"]

LOGITS = {"logits": "categorical"}
INPUT = "x"
_BATCH_NORMALISATIONS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class Architecture:
    """How a network is built and exported."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    heads: Mapping[str, str]  # output -> categorical, bernoulli or gaussian
    opset: int  # of the legacy export
    dynamo: bool
    fold: bool  # whether the legacy exporter folds batch normalisation


@dataclass(frozen=True)
class Case:
    """One exported network."""

    name: str
    module: nn.Module
    heads: Mapping[str, str]
    shape: tuple[int, ...]
    serialized: bytes = field(repr=False)

    @property
    def model(self) -> onnx.ModelProto:
        """The model, a fresh copy that a test may change."""
        return onnx.ModelProto.FromString(self.serialized)

    def inputs(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs: noise around a level of each channel, so that samples differ after pooling too."""
        random = np.random.default_rng(seed)
        level = random.standard_normal((batch, self.shape[0], *(1 for _ in self.shape[1:])))
        noise = random.standard_normal((batch, *self.shape))
        return {INPUT: (level + noise).astype(np.float32)}

    def torch_outputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the torch network makes of the inputs."""
        with torch.no_grad():
            result = self.module(torch.from_numpy(inputs[INPUT]))
        tensors = result if isinstance(result, tuple) else (result,)
        return {name: tensor.numpy() for name, tensor in zip(self.heads, tensors, strict=True)}


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(
    *shape: int, opset: int = 13, dynamo: bool = False, fold: bool = True, heads: Mapping[str, str] = LOGITS
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a network under the name of the function that builds it."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ARCHITECTURES[build.__name__] = Architecture(build, shape, heads, opset, dynamo, fold)
        return build

    return register


@cache
def load_case(name: str) -> Case:
    """Export a case: ``<architecture>-dynamo`` or ``<architecture>-<opset>``, any opset that the exporter knows."""
    key, _, exporter = name.rpartition("-")
    made = ARCHITECTURES[key]
    module = build_module(key)
    example = torch.randn(2, *made.shape, generator=torch.Generator().manual_seed(0))
    if exporter == "dynamo":
        model = export(module, (example,), input_names=[INPUT], output_names=list(made.heads))
        return Case(name, module, made.heads, made.shape, model.SerializeToString())
    buffer = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module,
            (example,),
            buffer,
            dynamo=False,
            opset_version=int(exporter),
            input_names=[INPUT],
            output_names=list(made.heads),
            dynamic_axes={value: {0: "batch"} for value in (INPUT, *made.heads)},
            training=torch.onnx.TrainingMode.EVAL if made.fold else torch.onnx.TrainingMode.PRESERVE,
        )
    return Case(name, module, made.heads, made.shape, buffer.getvalue())


def build_module(key: str) -> nn.Module:
    """Build an architecture with its random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, key)))
        module = ARCHITECTURES[key].build().eval()
        for part in module.modules():
            _randomise(part)
    return module.requires_grad_(False)


def _randomise(part: nn.Module) -> None:
    """Give a layer weights that keep the size of what passes through, and a bias, scale and statistics that matter."""
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_normal_(part.weight, nonlinearity="leaky_relu", a=0.5)
    elif isinstance(part, _BATCH_NORMALISATIONS | nn.LayerNorm):
        nn.init.uniform_(part.weight, 0.5, 1.5)
    elif isinstance(part, nn.PReLU):
        nn.init.uniform_(part.weight, 0.1, 0.4)
    if isinstance(getattr(part, "bias", None), nn.Parameter):
        nn.init.normal_(part.bias, std=0.2)
    if isinstance(part, _BATCH_NORMALISATIONS):
        nn.init.normal_(part.running_mean, std=0.3)
        nn.init.uniform_(part.running_var, 0.5, 2.0)


class Apply(nn.Module):
    """A function of other modules' outputs, so that networks with branches stay as short as sequential ones."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def conv(
    c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch normalisation, activation."""
    layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), act())


def classifier(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@architecture(3, 12, 12, dynamo=True, fold=False)
def plain() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 16), conv(16, 12), classifier(12))


def residual_block(channels: int) -> nn.Module:
    body = nn.Sequential(conv(channels, channels), conv(channels, channels, act=nn.Identity))
    return Apply(lambda m, x: F.relu(x + m.body(x)), body=body)


@architecture(3, 12, 12, opset=11, dynamo=True)
def residual() -> nn.Module:
    return nn.Sequential(conv(3, 8), residual_block(8), residual_block(8), classifier(8))


@architecture(3, 12, 12, opset=17)
def strided_shortcut() -> nn.Module:
    body = nn.Sequential(conv(8, 16, stride=2), conv(16, 16, act=nn.Identity))
    shortcut = conv(8, 16, size=1, stride=2, act=nn.Identity)
    down = Apply(lambda m, x: F.relu(m.body(x) + m.shortcut(x)), body=body, shortcut=shortcut)
    return nn.Sequential(conv(3, 8), down, residual_block(16), classifier(16))


@architecture(3, 8, 8, dynamo=True)
def dense() -> nn.Module:
    """Batch normalisation comes first, so no exporter folds it."""

    def block(channels: int) -> nn.Module:
        body = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1, bias=False))
        return Apply(lambda m, x: torch.cat([x, m.body(x)], 1), body=body)

    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block(8), block(16), nn.AvgPool2d(2), block(24), classifier(32))


@architecture(3, 16, 16, opset=17, dynamo=True)
def inverted_residual() -> nn.Module:
    def squeeze(channels: int, gate: nn.Module) -> nn.Module:
        scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1), gate
        )
        return Apply(lambda m, x: x * m.scale(x), scale=scale)

    def block(act: type[nn.Module], gate: nn.Module) -> nn.Module:
        expand, depthwise = conv(8, 16, size=1, act=act), conv(16, 16, groups=16, act=act)
        body = nn.Sequential(expand, depthwise, squeeze(16, gate), conv(16, 8, size=1, act=nn.Identity))
        return Apply(lambda m, x: x + m.body(x), body=body)

    first, second = block(nn.ReLU6, nn.Sigmoid()), block(nn.Hardswish, nn.Hardsigmoid())
    return nn.Sequential(conv(3, 8, stride=2, act=nn.Hardswish), first, second, classifier(8))


@architecture(3, 8, 8, fold=False)
def depthwise_separable() -> nn.Module:
    def block(c_in: int, c_out: int, stride: int) -> nn.Module:
        return nn.Sequential(conv(c_in, c_in, stride=stride, groups=c_in), conv(c_in, c_out, size=1))

    return nn.Sequential(conv(3, 8), block(8, 16, 2), block(16, 12, 1), classifier(12))


@architecture(3, 8, 8, opset=11)
def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 16, groups=2), conv(16, 16, groups=4), classifier(16))


@architecture(3, 8, 8)
def shuffle() -> nn.Module:
    def unit(m: Apply, x: Tensor) -> Tensor:
        kept, passed = x.chunk(2, 1)
        y = torch.cat([kept, m.branch(passed)], 1)
        return y.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)

    def block() -> nn.Module:
        depthwise = conv(8, 8, groups=8, act=nn.Identity)
        return Apply(unit, branch=nn.Sequential(conv(8, 8, size=1), depthwise, conv(8, 8, size=1)))

    return nn.Sequential(conv(3, 16), block(), block(), classifier(16))


@architecture(3, 8, 8, opset=17)
def inception() -> nn.Module:
    def block(channels: int) -> nn.Module:
        branches = [
            conv(channels, 8, size=1),
            nn.Sequential(conv(channels, 8, size=1), conv(8, 8)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(channels, 4, size=1)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, 4, size=1)),
        ]
        return Apply(lambda m, x: torch.cat([branch(x) for branch in m.branches], 1), branches=nn.ModuleList(branches))

    return nn.Sequential(conv(3, 8), block(8), block(24), classifier(24))


@architecture(3, 16, 16, dynamo=True, heads={"mask": "bernoulli"})
def unet() -> nn.Module:
    def forward(m: Apply, x: Tensor) -> Tensor:
        high = m.enter(x)
        low = m.down(high)
        lower = m.middle(low)
        up = F.interpolate(lower, scale_factor=2, mode="nearest")
        up = F.interpolate(m.up(torch.cat([low, up], 1)), scale_factor=2, mode="bilinear")
        return torch.sigmoid(m.leave(torch.cat([high, up], 1)))

    down, middle = nn.Sequential(nn.MaxPool2d(2), conv(8, 16)), nn.Sequential(nn.MaxPool2d(2), conv(16, 16))
    leave = nn.Sequential(conv(16, 8), nn.Conv2d(8, 2, 1))
    return Apply(forward, enter=conv(3, 8), down=down, middle=middle, up=conv(32, 8), leave=leave)


@architecture(3, 16, 16, opset=11, heads={"fine": "gaussian", "coarse": "gaussian"})
def pyramid() -> nn.Module:
    def forward(m: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = m.fine(x)
        coarse = m.coarse(fine)
        top = m.lateral_coarse(coarse)
        merged = m.lateral_fine(fine) + F.interpolate(top, scale_factor=2, mode="nearest")
        return m.smooth(merged), m.smooth(top)

    laterals = {"lateral_fine": nn.Conv2d(8, 8, 1), "lateral_coarse": nn.Conv2d(16, 8, 1)}
    return Apply(
        forward, fine=conv(3, 8), coarse=conv(8, 16, stride=2), smooth=nn.Conv2d(8, 8, 3, padding=1), **laterals
    )


@architecture(3, 16, 16, heads={"image": "gaussian"})
def autoencoder() -> nn.Module:
    up = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3, 2, 1, output_padding=1)
    return nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2), *up)


@architecture(4, 32)
def conv1d() -> nn.Module:
    def block(c_in: int, c_out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(c_in, c_out, 5, stride, 2), nn.BatchNorm1d(c_out), nn.ReLU())

    pool = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 5)
    return nn.Sequential(block(4, 8, 1), block(8, 16, 2), nn.MaxPool1d(2), block(16, 12, 1), *pool)


@architecture(2, 5, 7, 6, opset=17)
def video() -> nn.Module:
    """Convolutions over time, height and width."""

    def block(c_in: int, c_out: int, size: int | tuple[int, ...], **options: Any) -> nn.Module:
        return nn.Sequential(nn.Conv3d(c_in, c_out, size, bias=False, **options), nn.BatchNorm3d(c_out), nn.ReLU())

    body = nn.Sequential(block(8, 6, 1), block(6, 8, 3, padding=(2, 1, 1), dilation=(2, 1, 1)))
    grouped = block(8, 8, (2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), groups=2)
    pool = nn.MaxPool3d((1, 2, 2)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(block(2, 8, 3, padding=1), Apply(lambda m, x: x + m.body(x), body=body), grouped, *pool)


@architecture(3, 12, 12, opset=11)
def dilated() -> nn.Module:
    """Dilation, padding that differs by axis and by side, kernels that are not square."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 2, 1)),
        nn.Conv2d(8, 12, (3, 2), stride=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(12, 12, (1, 5), padding=(0, 2), dilation=(1, 1)),
        nn.ReLU(),
        nn.Conv2d(12, 8, (3, 1), padding=(3, 0), dilation=(3, 1)),
        classifier(8),
    )


@architecture(16, opset=11, heads={"probabilities": "categorical"})
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5), nn.Softmax(-1))


@architecture(6, 16, opset=17)
def gelu_mlp() -> nn.Module:
    """Linear layers over a sequence: MatMul and Add."""
    norm = nn.LayerNorm(16)
    body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return Apply(lambda m, x: m.head((x + m.body(m.norm(x))).mean(1)), norm=norm, body=body, head=nn.Linear(16, 5))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.merge = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.merge((weights @ v).transpose(1, 2).flatten(2))


def transformer_block(channels: int) -> nn.Module:
    attend = nn.Sequential(nn.LayerNorm(channels), Attention(channels, 2))
    mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))
    return nn.Sequential(
        Apply(lambda m, x: x + m.attend(x), attend=attend),
        Apply(lambda m, x: x + m.mlp(x), mlp=mlp),
    )


@architecture(6, 16, dynamo=True)
def attention() -> nn.Module:
    return Apply(lambda m, x: m.head(m.block(x)[:, 0]), block=transformer_block(16), head=nn.Linear(16, 5))


@architecture(3, 16, 16, opset=17, dynamo=True)
def tokenizer_transformer() -> nn.Module:
    """Convolutions make the tokens, and a learned softmax pools them."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        tokens = m.block(m.tokens(x).flatten(2).transpose(1, 2))
        return m.head((m.pool(tokens).softmax(1).transpose(1, 2) @ tokens).squeeze(1))

    tokens = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return Apply(forward, tokens=tokens, block=transformer_block(16), pool=nn.Linear(16, 1), head=nn.Linear(16, 5))


@architecture(3, 16, 16, dynamo=True, heads={"scores": "categorical", "boxes": "gaussian"})
def two_heads() -> nn.Module:
    """A detector: classes and boxes for each place, the places of both in one list."""

    def places(x: Tensor, values: int) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (-1, values)).flatten(1, 2)

    def forward(m: Apply, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.body(x)
        return places(m.scores(features), 3).softmax(-1), places(m.boxes(features), 4)

    body = nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2))
    return Apply(forward, body=body, scores=nn.Conv2d(16, 6, 3, padding=1), boxes=nn.Conv2d(16, 8, 3, padding=1))


@architecture(3, 8, 8)
def activations() -> nn.Module:
    layers = [conv(3, 8, act=nn.SiLU)]
    for act in (nn.LeakyReLU(0.1), nn.PReLU(8), nn.PReLU(), nn.ELU(), nn.Softplus()):
        layers.append(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act))
    return nn.Sequential(*layers, classifier(8))


@architecture(3, 8, 8, opset=11)
def shared() -> nn.Module:
    """One convolution is used twice."""
    twice = nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(conv(3, 8), twice, nn.ReLU(), conv(8, 8), twice, nn.ReLU(), classifier(8))


@architecture(1, 16, 16, opset=17, heads={"image": "gaussian"})
def denoiser() -> nn.Module:
    """Regression without normalisation: the network estimates the noise that is taken away."""
    widths = (1, 12, 12, 12)
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
    return Apply(lambda m, x: x - m.noise(x), noise=nn.Sequential(*layers, nn.Conv2d(12, 1, 3, padding=1)))


CASES: tuple[str, ...] = (
    *(f"{key}-{made.opset}" for key, made in ARCHITECTURES.items()),
    *(f"{key}-dynamo" for key, made in ARCHITECTURES.items() if made.dynamo),
)
"""Every architecture as the legacy exporter writes it, in one of three opsets, and some from the current one."""
