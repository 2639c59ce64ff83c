"""Fine-tuning: a smaller model learns from the original, or from labels, by gradients in torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx
import onnx_ir as ir

from onnx_kfe import calibration
from onnx_kfe._headed import head_specs, trainable
from onnx_kfe._measure import evaluate, note_skipped
from onnx_kfe.calibration import DEFAULT_MEMORY, Dataset, DataSource, ImageOptions, input_specs, open_dataset
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, Quality
from onnx_kfe.graph import ModelSource, check_output, load, open_network, save, source_name, with_outputs
from onnx_kfe.progress import Progress, StagesOnly
from onnx_kfe.recovery.training import (
    Epoch,
    Settings,
    find_intermediate,
    image_input,
    learning_rate_of,
    to_torch,
)

if TYPE_CHECKING:
    from onnx_kfe.recovery.training._checkpoint import Checkpoint

__all__ = ["DEFAULT_BATCH", "DEFAULT_EPOCHS", "DEFAULT_OPTIMIZER", "Tuned", "finetune"]

DEFAULT_EPOCHS = 10
DEFAULT_BATCH = 64
DEFAULT_OPTIMIZER = "soap"
_HELD_BACK = 0.1
_MOST_HELD_BACK = 256  # so that they are among those that `prune` holds back of the same data, and no refit saw them


@dataclass
class Tuned:
    """The fine-tuned model and its report.

    Attributes:
        ir_model: The model with the best weights, the same graph as before.
        source: The model as it was given.
        history: The epochs: loss, and loss and agreement on held-back samples.
        best: Number of the epoch whose weights these are; 0 where none was better than what was given.
        stopped: Why training ended before the last epoch; None where it did not.
        measured_on: What quality was measured on, in words.
        before: Quality of the model as it was given; None where it was not measured.
        after: Quality now.
        writes: Whether this is the process that writes, of several that trained together.
    """

    ir_model: ir.Model
    source: ModelSource
    history: list[Epoch]
    best: int
    stopped: str | None
    measured_on: str
    before: Quality | None
    after: Quality | None
    writes: bool
    _checkpoint: Checkpoint = field(repr=False)

    @property
    def model(self) -> ir.Model | onnx.ModelProto:
        """The model: an ``ir.Model`` where one was given, else a ``ModelProto``."""
        return self.ir_model if isinstance(self.source, ir.Model) else ir.to_proto(self.ir_model)

    @property
    def report(self) -> dict[str, Any]:
        """Everything measured, as plain values."""
        return {
            "model": source_name(self.source),
            "best_epoch": self.best,
            "stopped": self.stopped,
            "epochs": [
                {"epoch": e.number, "loss": e.loss, "held_back_loss": e.held_back, "agreement": e.agreement}
                for e in self.history
            ],
            "quality_on": self.measured_on,
            "before": None if self.before is None else self.before.as_dict(),
            "after": None if self.after is None else self.after.as_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all, never over the one given; then the checkpoint goes.

        Of several processes that trained together only the first writes.

        Raises:
            UsageError: The path cannot be written, or is that of the model given.
        """
        if self.writes:
            check_output(path, self.source)
            save(self.ir_model, path)
            self._checkpoint.remove()


def finetune(
    model: ModelSource,
    data: DataSource | Dataset,
    *,
    teacher: ModelSource | None = None,
    evaluation_data: DataSource | Dataset | None = None,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    label_share: float | None = None,
    heads: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    epochs: int = DEFAULT_EPOCHS,
    batch: int = DEFAULT_BATCH,
    optimizer: str = DEFAULT_OPTIMIZER,
    learning_rate: float | None = None,
    schedule: str = "one-cycle",
    temperature: float = 4.0,
    intermediate: Sequence[str] = (),
    augment: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    measure: bool = True,
    progress: Progress | None = None,
) -> Tuned:
    """Train all weights of a smaller model to give what the original gives, or what labels say; the graph stays.

    After every epoch an exponential moving average of the weights is measured on held-back samples; the best are
    kept. Started by ``torchrun``, all processes train one model, each on its share of every batch.

    Args:
        model: The smaller model.
        data: Samples, of which a tenth, 256 at most, is held back where there are no `evaluation_data`.
        teacher: The original, with the same inputs and outputs; None to learn from labels alone.
        evaluation_data: Samples to choose the best weights on and to measure quality on.
        images: How images become inputs.
        labels: CSV of ``file,label``.
        label_share: Share of the cross-entropy on labels in the loss, 0 to 1; when None 0 with a teacher, else 1.
        heads: Kind by output name where detection should be overruled.
        max_samples: At most this many samples.
        epochs: Passes over the data.
        batch: Samples of a step, over all processes.
        optimizer: ``soap`` (Adam in the Kronecker-factored eigenbasis), ``adamw`` or ``sgd``.
        learning_rate: Its peak; that of `OPTIMIZERS` when None.
        schedule: ``one-cycle`` or ``cosine``.
        temperature: By which logits are divided before student and teacher are compared.
        intermediate: Names of values within both models that the student is to compute as the teacher does, or
            ``["auto"]`` for what comes out of residual sums. Their mean squared error, in units of the teacher's
            standard deviation, is added to the loss.
        augment: Whether to flip and shift images at random; when None wherever the only input takes images.
        seed: Of order and augmentation; on a CPU one seed gives one result.
        device: ``cpu`` or ``cuda``; CUDA where there is some when None.
        precision: ``float32`` or ``bfloat16``, in which training rounds products; when None the latter where the
            device has instructions for it.
        threads: Threads, as many as torch takes by itself when None.
        memory: Bytes of samples to keep in memory; the rest goes to a temporary folder.
        checkpoint: Folder from which an interrupted run goes on, removed when the result is saved. That of another
            run is ignored.
        resume: Whether it is an error that there is no checkpoint of this run to go on from.
        measure: Whether to measure quality before and after.
        progress: Shows what is going on.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the checkpoint is kept.
        KfeError: torch is missing, an operator cannot be trained, teacher and model do not fit, or training diverged.
        UsageError: The arguments do not fit together.
    """
    share = label_share if label_share is not None else (1.0 if teacher is None else 0.0)
    student, original = load(model), None if teacher is None else load(teacher)
    specs = input_specs(student)
    if teacher is not None and original is not None:
        _check_teacher(student, source_name(model), original, source_name(teacher))
    settings = Settings(
        epochs, batch, learning_rate_of(optimizer, learning_rate), optimizer, schedule, temperature, share,
        image_input(specs) is not None if augment is None else augment, seed, precision,
    )  # fmt: skip
    if settings.augment and image_input(specs) is None:
        raise UsageError("--augment flips and shifts images [N, C, H, W], which are not what this model takes")
    network = open_network(student if original is None else original)
    found = head_specs(trainable(calibration.find_heads(network, heads)))
    _check_share(share, original is not None, found)
    shared: list[str] = []
    if intermediate:
        if original is None:
            raise UsageError("--intermediate compares with a teacher: give --teacher")
        shared = find_intermediate(student, original, intermediate)
    module = to_torch(with_outputs(student, shared))
    if odd := next((f"'{n}' is {p.dtype}" for n, p in module.named_parameters() if p.element_size() < 4), None):
        raise KfeError(f"{source_name(model)}: weight {odd}: train in single precision and convert afterwards")

    from onnx_kfe.recovery.training._ranks import joined
    from onnx_kfe.recovery.training._run import train

    with joined(device) as ranks:
        shown = progress if progress is not None and ranks.first else Progress()

        def opened(source: DataSource | Dataset) -> Dataset:
            dataset = open_dataset(
                cast(DataSource, source), specs, images=images, labels=labels, max_samples=max_samples
            )
            shown.note(dataset.describe())
            return dataset

        used, held_back = opened(data), None if evaluation_data is None else opened(evaluation_data)
        if held_back is None:
            count = used.count()
            used, held_back = used.split(_HELD_BACK if count is None else min(_HELD_BACK, _MOST_HELD_BACK / count))
        trained = train(
            student, module, None if original is None else with_outputs(original, shared), found, specs, used,
            held_back, settings, ranks, intermediate=[HeadSpec(name, "gaussian") for name in shared],
            memory=memory, threads=threads, checkpoint=None if checkpoint is None else Path(checkpoint), resume=resume,
            progress=shown,
        )  # fmt: skip
        note_skipped(used, shown)

    def quality(smaller: ir.Model) -> Quality:
        return evaluate(
            smaller, held_back, reference=original, heads=heads, threads=threads, progress=StagesOnly(shown)
        )

    measured = measure and ranks.first and (original is not None or share > 0)
    before, after = (quality(student), quality(trained.model)) if measured else (None, None)
    on = "" if after is None else f"{after.samples} {'held-back' if evaluation_data is None else 'given'} samples"
    return Tuned(
        trained.model, model, trained.history, trained.best.number, trained.stopped, on, before, after, ranks.first,
        trained.checkpoint,
    )  # fmt: skip


def _check_teacher(student: ir.Model, name: str, teacher: ir.Model, teacher_name: str) -> None:
    """Refuse a teacher that takes or gives something else.

    Raises:
        KfeError: What differs.
    """
    for what, own, other in (
        ("takes", student.graph.inputs, teacher.graph.inputs), ("gives", student.graph.outputs, teacher.graph.outputs)
    ):  # fmt: skip
        mine, theirs = ({value.name: value for value in values} for values in (own, other))
        if mine.keys() != theirs.keys() or not all(_alike(mine[key], theirs[key]) for key in mine):
            taken, given = (", ".join(map(str, values.values())) for values in (theirs, mine))
            raise KfeError(
                f"{teacher_name} {what} {taken} but {name} {what} {given}: a teacher has the same inputs and outputs"
            )


def _alike(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values can be the same, as far as types and shapes are known."""
    if first.dtype != second.dtype:
        return False
    if first.shape is None or second.shape is None:
        return True
    pairs = zip(first.shape, second.shape, strict=False)
    return len(first.shape) == len(second.shape) and all(
        a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int)
    )


def _check_share(share: float, taught: bool, heads: Sequence[HeadSpec]) -> None:
    """Refuse losses that there cannot be.

    Raises:
        UsageError: Why.
    """
    if not taught and share < 1:
        raise UsageError("without --teacher there are only labels to learn from: drop --label-share, or give --teacher")
    if share > 0 and not any(head.kind == "categorical" for head in heads):
        kinds = ", ".join(f"{head.name} {head.kind}" for head in heads)
        raise UsageError(f"labels are of a categorical output, and there is none ({kinds}): see --head, give --teacher")
