"""How a model is trained, everything besides models and data that the result depends on; and how that went."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx_kfe.errors import UsageError
from onnx_kfe.recovery.training._schedule import SCHEDULES

__all__ = ["OPTIMIZERS", "PRECISIONS", "Epoch", "Settings", "learning_rate_of"]

OPTIMIZERS = {"soap": 2e-4, "adamw": 3e-5, "sgd": 1e-4}
"""The peak of the learning rate where none is given, by optimizer."""

PRECISIONS = ("float32", "bfloat16")
"""What products are computed in; weights, their average and the loss are in single precision always."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        batch: Samples of a step, over all processes together.
        learning_rate: Its peak.
        optimizer: A key of `OPTIMIZERS`.
        schedule: A key of `SCHEDULES`.
        temperature: By which logits are divided before teacher and student are compared.
        label_share: Share of the cross-entropy on labels in the loss; the rest is distillation.
        augment: Whether images are flipped and shifted.
        seed: Of order and augmentation.
        precision: One of `PRECISIONS`; when None bfloat16 where the device has instructions for it.

    Raises:
        UsageError: A value is out of range.
    """

    epochs: int
    batch: int
    learning_rate: float
    optimizer: str
    schedule: str
    temperature: float
    label_share: float
    augment: bool
    seed: int
    precision: str | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--optimizer", self.optimizer, OPTIMIZERS), ("--schedule", self.schedule, SCHEDULES),
            ("--precision", self.precision or PRECISIONS[0], PRECISIONS),
        ):  # fmt: skip
            if value not in known:
                raise UsageError(f"{option} {value}: it can be {', '.join(known)}")
        for name, count in (("--epochs", self.epochs), ("--batch", self.batch)):
            if count < 1:
                raise UsageError(f"{name} {count}: give at least 1")
        for name, number in (("--learning-rate", self.learning_rate), ("--temperature", self.temperature)):
            if not (number > 0 and math.isfinite(number)):
                raise UsageError(f"{name} {number:g}: give a number above 0")
        if not 0 <= self.label_share <= 1:
            raise UsageError(f"--label-share {self.label_share:g}: give a share from 0 to 1")


@dataclass(frozen=True)
class Epoch:
    """What came of an epoch; of number 0 before any.

    Attributes:
        number: How many epochs were done.
        loss: Mean loss over its steps; None before training.
        held_back: Loss of the averaged weights on held-back samples.
        agreement: Share of decisions there that are the teacher's; None without a teacher or decisions.
    """

    number: int
    loss: float | None
    held_back: float
    agreement: float | None


def learning_rate_of(optimizer: str, given: float | None) -> float:
    """The learning rate given, or else that of the optimizer."""
    return OPTIMIZERS.get(optimizer, 1.0) if given is None else given
