"""What is taught and how it is measured: teacher, student and loss on a batch, and over held-back samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from onnx_kfe.calibration import Batch, InputSpec, Item, batches
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import compare
from onnx_kfe.recovery.training._losses import Objective
from onnx_kfe.recovery.training._teacher import Outputs, Teacher, run_module

__all__ = ["Lesson"]

_TOGETHER = 64


@dataclass(frozen=True)
class Lesson:
    """How the student is compared.

    Attributes:
        objective: The loss.
        teacher: Gives the outputs to be met; None where only labels count.
        inputs: What the models take.
        device: What torch computes on.
    """

    objective: Objective
    teacher: Teacher | None
    inputs: Sequence[InputSpec]
    device: torch.device

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """Loss on a batch."""
        return self._compared(student, batch)[0]

    @torch.no_grad()
    def measure(self, student: nn.Module, samples: Iterable[Item]) -> tuple[float, float | None]:
        """Mean loss over samples, and the share of decisions that are the teacher's.

        Args:
            student: A module in evaluation mode.
            samples: The samples.

        Returns:
            The loss; the share of the first head that decides, None without a teacher or such a head.

        Raises:
            KfeError: The samples do not fill one batch of the size that the model takes.
        """
        head = next((head for head in self.objective.heads if head.kind != "gaussian"), None)
        comparison = None if head is None or self.teacher is None else compare(head)
        total, count = 0.0, 0
        for batch in batches(samples, _TOGETHER, self.inputs):
            loss, learnt, taught = self._compared(student, batch)
            total, count = total + loss.item() * len(batch), count + len(batch)
            if comparison is not None and head is not None and taught is not None:
                comparison.update(*(outputs[head.name].float().cpu().numpy() for outputs in (taught, learnt)))
        if not count:
            raise KfeError("too few held-back samples for one batch of the size that the model takes")
        rate = None if comparison is None else comparison.result().agreement
        return total / count, None if rate is None else rate.value

    def _compared(self, student: nn.Module, batch: Batch) -> tuple[Tensor, Outputs, Outputs | None]:
        taught = None if self.teacher is None else self.teacher(batch)
        learnt = run_module(student, batch, self.device)
        labels = None
        if batch.labels is not None and self.objective.label_share > 0:
            labels = torch.tensor(batch.labels.astype(np.int64), device=self.device)
        return self.objective(learnt, taught, labels), learnt, taught
