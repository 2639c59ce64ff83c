"""What is taught and how it is measured: teacher, student and loss on a batch, and over held-back samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnx_kfe.calibration import Batch, InputSpec, Item, batches
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import compare
from onnx_kfe.recovery.training._backend import Backend, Outputs
from onnx_kfe.recovery.training._losses import Objective
from onnx_kfe.recovery.training._onnx_module import OnnxModule
from onnx_kfe.recovery.training._teacher import Teacher

__all__ = ["Lesson"]

_TOGETHER = 64


@dataclass(frozen=True)
class Lesson:
    """How the student is compared.

    Attributes:
        objective: The loss.
        teacher: Gives the outputs to be met; None where only labels count.
        inputs: What the models take.
        backend: What torch computes on, and how.
    """

    objective: Objective
    teacher: Teacher | None
    inputs: Sequence[InputSpec]
    backend: Backend

    def loss(self, student: OnnxModule, batch: Batch) -> Tensor:
        """Loss on a batch."""
        return self._compared(self.objective, student, batch, exact=False)[0]

    @torch.no_grad()
    def measure(self, student: OnnxModule, samples: Iterable[Item]) -> tuple[float, float | None]:
        """Mean loss of the outputs over samples, and the share of decisions that are the teacher's.

        Args:
            student: A module in evaluation mode.
            samples: The samples.

        Returns:
            The loss; the share of the first head that decides, None without a teacher or such a head.

        Raises:
            KfeError: The samples do not fill one batch of the size that the model takes.
        """
        head = next((head for head in self.objective.heads if not head.quantity), None)
        comparison = None if head is None or self.teacher is None else compare(head)
        outputs_alone = dataclasses.replace(self.objective, intermediate=())
        total, count = 0.0, 0
        for batch in batches(samples, _TOGETHER, self.inputs):
            loss, learnt, taught = self._compared(outputs_alone, student, batch, exact=True)
            total, count = total + loss.item() * len(batch), count + len(batch)
            if comparison is not None and head is not None and taught is not None:
                comparison.update(*(outputs[head.name].float().cpu().numpy() for outputs in (taught, learnt)))
        if not count:
            raise KfeError("too few held-back samples for one batch of the size that the model takes")
        rate = None if comparison is None else comparison.result().agreement
        return total / count, None if rate is None else rate.value

    def _compared(
        self, objective: Objective, student: OnnxModule, batch: Batch, *, exact: bool
    ) -> tuple[Tensor, Outputs, Outputs | None]:
        taught = None if self.teacher is None else self.teacher(batch)
        learnt = self.backend.run(student, batch, exact=exact)
        labels = None
        if batch.labels is not None and objective.label_share > 0:
            labels = torch.tensor(batch.labels.astype(np.int64), device=self.backend.device)
        return objective(learnt, taught, labels), learnt, taught
