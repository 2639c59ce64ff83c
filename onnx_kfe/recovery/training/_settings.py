"""How a model is trained: everything besides the models and the data that the result depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx_kfe.errors import UsageError
from onnx_kfe.recovery.training._schedule import SCHEDULES

__all__ = ["LEARNING_RATES", "Settings"]

LEARNING_RATES = {"sgd": 0.02, "adamw": 5e-4}
"""By optimizer: the peak of the learning rate where none is given."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        batch: Samples of a step, over all processes together.
        learning_rate: Its peak.
        optimizer: A key of `LEARNING_RATES`.
        schedule: A key of `SCHEDULES`.
        temperature: By which logits are divided before teacher and student are compared.
        label_share: Share of the cross-entropy on labels in the loss; the rest is distillation.
        augment: Whether images are flipped and shifted.
        seed: Of order and augmentation.

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

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--optimizer", self.optimizer, LEARNING_RATES), ("--schedule", self.schedule, SCHEDULES)
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
