"""Training as a part of pruning: the smaller model learns from the original, on the samples that it is pruned with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnx_kfe._finetune import DEFAULT_BATCH, DEFAULT_OPTIMIZER
from onnx_kfe.calibration import Dataset, Statistics, input_specs
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.graph import Network
from onnx_kfe.planning import DirectionChain, Plan
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.schedules import find_schedule, of_channels, of_directions
from onnx_kfe.recovery.training import Settings, image_input, learning_rate_of, to_torch

if TYPE_CHECKING:
    from onnx_kfe.recovery.training._hook import Hook
    from onnx_kfe.recovery.training._onnx_module import OnnxModule

__all__ = ["Course"]

_HELD_BACK = 0.1
_MOST_HELD_BACK = 512
_TEMPERATURE = 4.0
_STEEP = 3e-4  # learning rate for models that lose much at once: the usual one mends too little in as many steps


@dataclass
class Course:
    """The epochs of one call of `prune`, divided over what is trained in turn.

    Attributes:
        teacher: The original.
        heads: Its outputs that count.
        samples: To train on; a tenth is held back to choose the best weights on.
        seed: Of order, augmentation and masks.
        memory: Bytes of samples to keep in memory.
        threads: Threads, as many as torch takes by itself when None.
        checkpoint: Folder from which an interrupted run goes on; None keeps nothing.
        progress: Shows what is going on.
        parts: How many models were trained so far.
    """

    teacher: ir.Model
    heads: Sequence[HeadSpec]
    samples: Dataset
    seed: int
    memory: int
    threads: int | None
    checkpoint: Path | None
    progress: Progress
    parts: int = field(default=0)

    def train(
        self,
        model: ir.Model,
        epochs: int,
        learning_rate: float | None = None,
        make_hook: Callable[[OnnxModule], Hook] | None = None,
    ) -> ir.Model:
        """A model with trained weights.

        Args:
            model: The model; it is not modified.
            epochs: Passes over the samples.
            learning_rate: Its peak; that of the optimizer when None.
            make_hook: Gives what intervenes in the steps, at a constant learning rate; the weights are then the last,
                not the best.
        """
        module = to_torch(model)

        from onnx_kfe.recovery.training._ranks import joined
        from onnx_kfe.recovery.training._run import train

        specs = input_specs(model)
        settings = Settings(
            epochs, DEFAULT_BATCH, learning_rate_of(DEFAULT_OPTIMIZER, learning_rate), DEFAULT_OPTIMIZER,
            "one-cycle" if make_hook is None else "constant", _TEMPERATURE, 0.0, image_input(specs) is not None,
            self.seed,
        )  # fmt: skip
        count = self.samples.count()
        used, held_back = self.samples.split(_HELD_BACK if count is None else min(_HELD_BACK, _MOST_HELD_BACK / count))
        with joined(None) as ranks:
            trained = train(
                model, module, self.teacher, self.heads, specs, used, held_back, settings, ranks, memory=self.memory,
                threads=self.threads, checkpoint=self._folder(), progress=self.progress,
                hook=None if make_hook is None else make_hook(module),
            )  # fmt: skip
        return trained.model

    def pruned(
        self,
        network: Network,
        statistics: Statistics,
        plan: Plan,
        form: DirectionChain | None,
        schedule: str,
        epochs: int,
    ) -> tuple[ir.Model, Plan]:
        """Prune on a schedule in the first half of the epochs, and train what is left in the second.

        Args:
            network: The model.
            statistics: Of the model.
            plan: How many channels or directions go where; the schedule decides which.
            form: The form of the plan where directions go; None where channels do.
            schedule: Name of the schedule.
            epochs: Epochs in all.

        Returns:
            The smaller model, and the plan with the channels that are left.
        """
        kind = find_schedule(schedule)
        subject = of_channels(network, plan) if form is None else of_directions(network, statistics, plan, form)
        hooks = []

        def make_hook(module: OnnxModule) -> Hook:
            from onnx_kfe.recovery.schedules._units import find_units

            hooks.append(kind(find_units(subject.network, module, subject.targets, subject.cores), self.seed))
            return hooks[0]

        trained = self.train(subject.network.model, (epochs + 1) // 2, _STEEP, make_hook)
        model, plan = subject.without(trained, hooks[0].kept())
        return self.train(model, epochs // 2, _STEEP), plan

    def done(self) -> None:
        """Remove the checkpoints, when all is done."""
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)

    def _folder(self) -> Path | None:
        """Where the state of the next training is kept: each has a folder of its own, to go through again quickly."""
        self.parts += 1
        if self.checkpoint is None:
            return None
        self.checkpoint.mkdir(exist_ok=True)
        return self.checkpoint / f"training_{self.parts}"
