"""A whole run of training: models, data and settings put together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from onnx_kfe.calibration import Dataset, InputSpec, batches
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.graph import fingerprint
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.training._backend import Backend
from onnx_kfe.recovery.training._checkpoint import Checkpoint
from onnx_kfe.recovery.training._hook import Hook
from onnx_kfe.recovery.training._lesson import Lesson
from onnx_kfe.recovery.training._losses import Objective
from onnx_kfe.recovery.training._module import write_back
from onnx_kfe.recovery.training._onnx_module import OnnxModule
from onnx_kfe.recovery.training._ranks import Ranks
from onnx_kfe.recovery.training._samples import Samples, check_labels
from onnx_kfe.recovery.training._settings import Epoch, Settings
from onnx_kfe.recovery.training._teacher import make_teacher, with_scales
from onnx_kfe.recovery.training._trainer import Trainer

__all__ = ["Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        model: The model with the best weights.
        history: The epochs.
        best: The one whose weights they are.
        stopped: Why it ended before the last epoch; None where it did not.
        checkpoint: The state, to be removed when the model is safe.
    """

    model: ir.Model
    history: list[Epoch]
    best: Epoch
    stopped: str | None
    checkpoint: Checkpoint


def train(
    model: ir.Model,
    module: OnnxModule,
    teacher: ir.Model | None,
    heads: Sequence[HeadSpec],
    inputs: Sequence[InputSpec],
    data: Dataset,
    held_back: Dataset,
    settings: Settings,
    ranks: Ranks,
    *,
    intermediate: Sequence[HeadSpec] = (),
    memory: int,
    threads: int | None,
    checkpoint: Path | None,
    resume: bool = False,
    progress: Progress,
    hook: Hook | None = None,
) -> Trained:
    """Train a model.

    Args:
        model: The model; it is not modified.
        module: It as a module.
        teacher: What it learns from; None where it learns from labels alone.
        heads: The outputs that count.
        inputs: What both take.
        data: To train on.
        held_back: To choose the best weights on.
        settings: How to train.
        ranks: The processes that train together.
        intermediate: What the module and the teacher give besides their outputs, to be met as well.
        memory: Bytes of samples to keep in memory.
        threads: Threads; those that torch uses by itself when None.
        checkpoint: Folder of the state.
        resume: Whether there has to be a state to go on from.
        progress: Shows what is going on.
        hook: Intervenes in the steps; the weights are then those of the last step.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the state is kept.
        KfeError: The data do not fit the model, training diverged before anything was gained, or there is no state
            to go on from.
    """
    backend = Backend.of(ranks.device, settings.precision)
    backend.place(module)
    with _threads(threads), Samples(data, memory * 9 // 10) as samples, Samples(held_back, memory // 10) as held:
        make = None
        if teacher is not None:
            make = make_teacher(teacher, [*heads, *intermediate], backend, torch.get_num_threads())
            scaled = with_scales([*heads, *intermediate], make, batches(held, settings.batch, inputs))
            heads, intermediate = scaled[: len(heads)], scaled[len(heads) :]
        if settings.label_share > 0:
            _check_labels(module, heads, inputs, samples, held, backend)
        key = _key(model, teacher, [*heads, *intermediate], settings, samples, held, ranks, hook)
        kept = Checkpoint(checkpoint, key)
        if resume:
            kept.check()
        objective = Objective(heads, settings.temperature, settings.label_share, intermediate)
        lesson = Lesson(objective, make, inputs, backend)
        trainer = Trainer(module, lesson, samples, held, settings, ranks, kept, progress, hook)
        trainer.run()
    if hook is not None and trainer.stopped is not None:
        raise KfeError(f"{trainer.stopped}, while it was pruned")
    if trainer.stopped is not None:
        if trainer.stopped.startswith("diverged") and trainer.best.number == 0:
            raise KfeError(f"{trainer.stopped}; nothing was gained before: try a lower --learning-rate")
        progress.note(f"{trainer.stopped}; the weights are those of epoch {trainer.best.number}")
    if hook is None and trainer.best.number == 0:
        progress.note("no epoch was better on held-back samples than the model as it was given: it stays as it was")
    return Trained(write_back(module, model), trainer.history, trainer.best, trainer.stopped, kept)


def _check_labels(
    module: OnnxModule,
    heads: Sequence[HeadSpec],
    inputs: Sequence[InputSpec],
    samples: Samples,
    held: Samples,
    backend: Backend,
) -> None:
    head = next(head for head in heads if head.kind == "categorical")
    module.eval()
    with torch.no_grad():
        first = next(batches(samples, 1, inputs), None)
        if first is None:
            raise KfeError(f"{len(samples)} samples do not fill a batch of the size that the model takes: give more")
        output = backend.run(module, first)[head.name].float().cpu().numpy()
    for part in (samples, held):
        check_labels(part, head, output)


def _key(
    model: ir.Model,
    teacher: ir.Model | None,
    heads: Sequence[HeadSpec],
    settings: Settings,
    samples: Samples,
    held: Samples,
    ranks: Ranks,
    hook: Hook | None,
) -> str:
    """What decides on the result."""
    identity = [
        fingerprint(model), None if teacher is None else fingerprint(teacher),
        [dataclasses.astuple(head) for head in heads], dataclasses.asdict(settings),
        samples.digest, held.digest, ranks.size, *(() if hook is None else (hook.identity,)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Have torch compute on so many threads, and afterwards on as many as before."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(threads or earlier)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)
