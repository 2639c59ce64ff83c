"""The teacher: the outputs of a model that stays as it is, on whatever the student is shown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from onnx_kfe.calibration import Batch
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.graph import serialize
from onnx_kfe.recovery.training._backend import Backend, Outputs
from onnx_kfe.recovery.training._module import to_torch
from onnx_kfe.runtime import create_session, reason

__all__ = ["Teacher", "make_teacher", "with_scales"]

Teacher = Callable[[Batch], Outputs]

_SCALED_ON = 8  # batches


def make_teacher(model: ir.Model, heads: Sequence[HeadSpec], backend: Backend, threads: int | None) -> Teacher:
    """What gives the teacher's outputs of these heads for a batch, on the device of the backend.

    On CPUs that is ONNX Runtime, which took two thirds (ResNet-32) to a third (MobileNetV2) of torch's time there; on
    others torch, so that nothing has to be copied.
    """
    names = [head.name for head in heads]
    if backend.device.type != "cpu":
        module = to_torch(model).eval().requires_grad_(False)
        backend.place(module)
        return lambda batch: {name: value for name, value in backend.run(module, batch).items() if name in names}
    session = create_session(serialize(model), threads=threads, spin=False)

    def teacher(batch: Batch) -> Outputs:
        try:
            values = session.run(names, {value.name: batch.feeds[value.name] for value in session.get_inputs()})
        except Exception as error:
            raise KfeError(f"the teacher fails in ONNX Runtime: {reason(error)}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return teacher


def with_scales(heads: Sequence[HeadSpec], teacher: Teacher, batches: Iterable[Batch]) -> list[HeadSpec]:
    """Give quantities the teacher's own standard deviation about the mean of each channel as their scale."""
    if not any(head.quantity for head in heads):
        return list(heads)
    seen = [teacher(batch) for batch in itertools.islice(batches, _SCALED_ON)]
    return [_scaled(head, seen) if head.quantity else head for head in heads]


def _scaled(head: HeadSpec, seen: Sequence[Mapping[str, Tensor]]) -> HeadSpec:
    outputs = [outputs[head.name].double().cpu().numpy() for outputs in seen]
    rows = torch.cat([torch.from_numpy(head.rows(output)).flatten(0, 1) for output in outputs])
    deviation = float(rows.var(0, unbiased=False).mean().sqrt())
    return dataclasses.replace(head, scale=deviation or 1.0)
