"""The losses against their formulas in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import special

from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.recovery.training._losses import Objective, cross_entropy, distillation
from onnx_kfe.recovery.training._teacher import with_scales

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.standard_normal((2, 6, 4, 3, 2)).astype(np.float32) * 2
CLASSES = HeadSpec("y", "categorical", axis=1)


def value(head: HeadSpec, student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> float:
    return float(distillation(head, torch.tensor(student), torch.tensor(teacher), temperature))


def divergence(student: np.ndarray, teacher: np.ndarray, axis: int, temperature: float) -> float:
    p, q = (special.softmax(logits.astype(np.float64) / temperature, axis) for logits in (teacher, student))
    return temperature**2 * special.rel_entr(p, q).sum(axis).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("axis", "own"), [(1, 1), (-1, -1), (None, 1)])
def test_categorical(temperature: float, axis: int | None, own: int) -> None:
    head = HeadSpec("y", "categorical", axis=axis)
    expected = divergence(STUDENT, TEACHER, own, temperature)
    assert expected > 0.1
    assert value(head, STUDENT, TEACHER, temperature) == pytest.approx(expected, rel=1e-5)
    assert value(head, TEACHER, TEACHER, temperature) == pytest.approx(0, abs=1e-6)


def test_probabilities_are_softened_as_the_logits_that_they_came_from() -> None:
    head = dataclasses.replace(CLASSES, probabilities=True)
    student, teacher = (special.softmax(logits, 1) for logits in (STUDENT, TEACHER))
    assert value(head, student, teacher, 3.0) == pytest.approx(divergence(STUDENT, TEACHER, 1, 3.0), rel=1e-4)


def test_a_class_without_probability_counts_for_nothing() -> None:
    masked = [np.concatenate([logits, np.full((6, 1, 3, 2), -np.inf, np.float32)], 1) for logits in (STUDENT, TEACHER)]
    student = torch.tensor(masked[0], requires_grad=True)
    loss = distillation(CLASSES, student, torch.tensor(masked[1]), 2.0)
    assert loss.item() == pytest.approx(divergence(STUDENT, TEACHER, 1, 2.0), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("probabilities", [False, True])
def test_bernoulli(temperature: float, probabilities: bool) -> None:
    target, guess = (special.expit(logits.astype(np.float64) / temperature) for logits in (TEACHER, STUDENT))
    expected = -(target * np.log(guess) + (1 - target) * np.log(1 - guess)).mean() * temperature**2
    head = HeadSpec("y", "bernoulli", probabilities)
    given = [special.expit(logits) if probabilities else logits for logits in (STUDENT, TEACHER)]
    assert value(head, *given, temperature) == pytest.approx(expected, rel=1e-4)


def test_gaussian_is_in_units_of_the_scale_whatever_the_temperature() -> None:
    expected = (((STUDENT - TEACHER) / 3) ** 2).mean() / 2
    assert value(HeadSpec("y", "gaussian", scale=3.0), STUDENT, TEACHER, 2.0) == pytest.approx(expected, rel=1e-5)
    assert value(HeadSpec("y", "gaussian"), STUDENT, TEACHER) == pytest.approx(9 * expected, rel=1e-5)


def test_an_embedding_is_met_at_every_position() -> None:
    student, teacher = STUDENT[..., 0], TEACHER[..., 0]
    expected = (((student - teacher) / 3) ** 2).mean() / 2
    assert value(HeadSpec("y", "embedding", axis=-1, scale=3.0), student, teacher) == pytest.approx(expected, rel=1e-5)
    teaches = lambda batch: {"y": torch.tensor(teacher)}  # noqa: E731
    (scaled,) = with_scales([HeadSpec("y", "embedding", axis=-1)], teaches, [None])
    assert scaled.scale == pytest.approx(teacher.reshape(-1, 3).var(0).mean() ** 0.5, rel=1e-5)


@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_on_labels_of_every_position(probabilities: bool) -> None:
    labels = RANDOM.integers(4, size=(6, 3, 2))
    expected = -np.take_along_axis(special.log_softmax(STUDENT, 1), labels[:, None], 1).mean()
    output = special.softmax(STUDENT, 1) if probabilities else STUDENT
    head = dataclasses.replace(CLASSES, probabilities=probabilities)
    assert float(cross_entropy(head, torch.tensor(output), torch.tensor(labels))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_objective_mixes_and_adds_up_heads(share: float) -> None:
    heads = [HeadSpec("z", "gaussian", scale=2.0), HeadSpec("y", "categorical")]
    student, teacher = ({"y": torch.tensor(a[..., 0, 0]), "z": torch.tensor(a)} for a in (STUDENT, TEACHER))
    labels = torch.arange(6) % 4
    taught = sum(distillation(head, student[head.name], teacher[head.name], 2.0) for head in heads)
    labelled = torch.nn.functional.cross_entropy(student["y"], labels)
    found = Objective(heads, 2.0, share)(student, teacher, labels)
    assert float(found) == pytest.approx(float((1 - share) * taught + share * labelled), rel=1e-6)
    if share == 1:
        assert float(Objective(heads, 2.0, share)(student, None, labels)) == pytest.approx(float(labelled))
