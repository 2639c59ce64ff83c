"""A small BERT as torch exports it: ``ids``, ``segments`` and ``mask`` [N, 6] to ``logits`` [N, 5]."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onnx_kfe.exporting._torch import quiet

WIDTH, HEADS, LENGTH, TOKENS = 16, 2, 6, 30
INPUTS = ("ids", "segments", "mask")


class Block(nn.Module):
    """Attention and two linear layers, each added to what it reads and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.merge = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self.heads(part(x)) for part in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.size(-1)) + mask
        mixed = torch.matmul(scores.softmax(-1), value).permute(0, 2, 1, 3).contiguous()
        x = self.norms[0](self.merge(mixed.view(x.size(0), x.size(1), WIDTH)) + x)
        return self.norms[1](self.down(F.gelu(self.up(x))) + x)


class Transformer(nn.Module):
    """Embeddings, a block, and a layer over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(count, WIDTH) for count in (TOKENS, LENGTH, 2))
        self.norm, self.block, self.head = nn.LayerNorm(WIDTH), Block(), nn.Linear(WIDTH, 5)
        self.register_buffer("positions", torch.arange(LENGTH)[None])

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        addend = (1.0 - mask[:, None, None, :].to(torch.float32)) * -10000.0
        total = self.words(ids) + self.places(self.positions[:, : ids.size(1)]) + self.kinds(segments)
        return self.head(self.block(self.norm(total), addend).mean(1))


def transformer(opset: int = 13) -> bytes:
    """The model, serialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Transformer().eval()
    buffer = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module, tuple(torch.ones(2, LENGTH, dtype=torch.int64) for _ in INPUTS), buffer, dynamo=False,
            opset_version=opset, input_names=list(INPUTS), output_names=["logits"],
            dynamic_axes={name: {0: "batch"} for name in (*INPUTS, "logits")},
        )  # fmt: skip
    return buffer.getvalue()


def sentences(count: int) -> dict[str, np.ndarray]:
    """Inputs: random tokens, of which a random number count."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, LENGTH + 1, (count, 1))
    return {
        "ids": random.integers(0, TOKENS, (count, LENGTH)),
        "segments": random.integers(0, 2, (count, LENGTH)),
        "mask": (np.arange(LENGTH) < lengths).astype(np.int64),
    }
