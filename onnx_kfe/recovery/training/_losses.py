"""What is minimised: divergence of the student's outputs from the teacher's, and cross-entropy on labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec

__all__ = ["Objective", "cross_entropy", "distillation"]


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Attributes:
        heads: The outputs that count; quantities with the teacher's standard deviation as their scale.
        temperature: By which logits are divided before they are compared.
        label_share: Share of the cross-entropy on labels, of the first categorical head; the rest is distillation.
        intermediate: Values within the models that are to be met as well, Gaussian; their mean counts as one head.
    """

    heads: Sequence[HeadSpec]
    temperature: float
    label_share: float
    intermediate: Sequence[HeadSpec] = ()

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None, labels: Tensor | None
    ) -> Tensor:
        """The loss, a mean over samples and positions, summed over heads.

        Args:
            student: By name, the outputs of the model that learns.
            teacher: Those of its teacher; None where `label_share` is 1.
            labels: Classes ``[n]``, or ``[n, positions...]``; None where `label_share` is 0.
        """
        loss = torch.zeros((), device=next(iter(student.values())).device)
        if teacher is not None and self.label_share < 1:
            outputs, within = (
                [distillation(head, student[head.name], teacher[head.name], self.temperature) for head in heads]
                for heads in (self.heads, self.intermediate)
            )
            loss = loss + (1 - self.label_share) * (sum(outputs) + sum(within) / max(len(within), 1))
        if labels is not None and self.label_share > 0:
            head = next(head for head in self.heads if head.kind == "categorical")
            loss = loss + self.label_share * cross_entropy(head, student[head.name], labels)
        return loss


def distillation(head: HeadSpec, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of one output from the teacher's (Hinton, Vinyals and Dean, 2015).

    Categorical: ``T^2 KL(teacher || student)`` of the softened distributions. Bernoulli: ``T^2`` times the
    cross-entropy against the teacher's softened probability. Quantities: half the squared error in units of the scale,
    of an embedding at every position.

    Args:
        head: What the output is.
        student: Output of the model that learns.
        teacher: That of the teacher, of the same shape.
        temperature: T.

    Returns:
        The mean over samples and positions, of a Bernoulli head or a quantity over channels as well.

    Raises:
        KfeError: The shapes differ.
    """
    if student.shape != teacher.shape:
        shapes = f"{list(student.shape)} in the model, {list(teacher.shape)} in its teacher"
        raise KfeError(f"'{head.name}' is {shapes}: it cannot be compared")
    old, new = _rows(head, teacher), _rows(head, student)
    if head.quantity:
        return ((new - old) / (head.scale or 1.0)).square().mean() / 2
    if head.kind == "bernoulli":
        target = torch.sigmoid(_log_odds(head, old) / temperature)
        return temperature**2 * F.binary_cross_entropy_with_logits(_log_odds(head, new) / temperature, target)
    target, log_q = (F.log_softmax(_logits(head, rows) / temperature, -1) for rows in (old, new))
    p = target.exp()
    # A class that the teacher masks with minus infinity counts for nothing.
    terms = p * (target - log_q).masked_fill(p == 0, 0.0)
    return temperature**2 * terms.sum(-1).mean()


def cross_entropy(head: HeadSpec, student: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a categorical output on labels ``[n]`` or ``[n, positions...]``."""
    rows = _logits(head, _rows(head, student))
    return F.cross_entropy(rows.reshape(-1, rows.shape[-1]), labels.reshape(-1))


def _rows(head: HeadSpec, output: Tensor) -> Tensor:
    """``[samples, positions, classes]`` in single precision, as `HeadSpec.rows`."""
    output = output.float()
    if output.ndim < 2:
        return output.reshape((1, 1, -1) if head.kind == "categorical" else (-1, 1, 1))
    axis = head.axis if head.axis is not None else (1 if output.ndim >= 4 else -1)
    moved = output.movedim(axis, -1)
    return moved.reshape(len(moved), math.prod(moved.shape[1:-1]), moved.shape[-1])


def _logits(head: HeadSpec, rows: Tensor) -> Tensor:
    return rows.clamp_min(torch.finfo(rows.dtype).tiny).log() if head.probabilities else rows


def _log_odds(head: HeadSpec, rows: Tensor) -> Tensor:
    return torch.logit(rows, eps=torch.finfo(rows.dtype).eps) if head.probabilities else rows
