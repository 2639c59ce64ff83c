"""The training loop: steps on augmented batches, held-back loss after each epoch, the best weights kept."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from onnx_kfe.calibration import Batch, batches, fixed_batch
from onnx_kfe.errors import KfeError
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.training._augment import augmented, image_input
from onnx_kfe.recovery.training._average import Average, tensors
from onnx_kfe.recovery.training._checkpoint import Checkpoint, finishing_steps
from onnx_kfe.recovery.training._hook import Hook
from onnx_kfe.recovery.training._lesson import Lesson
from onnx_kfe.recovery.training._onnx_module import OnnxModule
from onnx_kfe.recovery.training._optimizer import load_moments, make_optimizer, moments
from onnx_kfe.recovery.training._ranks import Ranks
from onnx_kfe.recovery.training._samples import Samples
from onnx_kfe.recovery.training._schedule import SCHEDULES
from onnx_kfe.recovery.training._settings import Epoch, Settings

__all__ = ["Trainer"]

_LARGEST_NORM = 1.0  # of a gradient
_EXPLODED = 10.0  # times the loss before training, or T^2 nats if that is more
_PATIENCE = 5  # epochs in a row that end with a higher loss on held-back samples, at a falling learning rate


@dataclass
class Trainer:
    """One run.

    Attributes:
        module: What is trained; in the end it has the best weights.
        lesson: What it is taught.
        samples: To train on.
        held_back: To measure on.
        settings: How to train.
        ranks: The processes that train together.
        checkpoint: Where the state is kept.
        progress: Shows what is going on.
        hook: Intervenes in the steps; the module then has its last weights in the end, not its best.
        history: The epochs so far.
        stopped: Why training ended before the last epoch; None where it did not.

    Raises:
        KfeError: The samples do not fill a batch.
    """

    module: OnnxModule
    lesson: Lesson
    samples: Samples
    held_back: Samples
    settings: Settings
    ranks: Ranks
    checkpoint: Checkpoint
    progress: Progress
    hook: Hook | None = None
    history: list[Epoch] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        unit = (fixed_batch(self.lesson.inputs) or 1) * self.ranks.size
        self._batch = max(min(self.settings.batch, len(self.samples)) // unit, 1) * unit
        self._per_epoch = len(self.samples) // self._batch  # the others of a shuffle have their turn in the next
        if not self._per_epoch:
            raise KfeError(f"{len(self.samples)} samples do not fill a batch of {self._batch}: give more")
        self._steps = self.settings.epochs * self._per_epoch
        self._image = image_input(self.lesson.inputs) if self.settings.augment else None
        self._parameters = list(self.module.parameters())
        self._optimizer = make_optimizer(self.module, self.settings.optimizer)
        self._average = Average(self.module)
        self._best = tensors(self.module)
        self._step, self._lost = 0, 0.0

    def run(self) -> None:
        """Train until the last epoch, or until it is no use.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the state is kept.
            KfeError: The model's outputs are not finite.
        """
        with finishing_steps() as interrupted, torch.random.fork_rng(devices=[]):
            if not self._resumed():
                self._judge(None)
                if self.stopped is not None:
                    raise KfeError("the loss before training is not finite: check the model and the data")
            started, first = time.monotonic(), self._step
            while self._step < self._steps and self.stopped is None:
                self._finish_epoch(interrupted)
                if self.stopped is None:
                    self._judge(self._lost / self._per_epoch)
                    self._lost = 0.0
                    self._save(interrupted)
                    self._say((time.monotonic() - started) / (self._step - first) * (self._steps - self._step))
        if self.hook is None:
            self.module.load_state_dict(self._best)
        else:
            self.hook.finish()

    @property
    def best(self) -> Epoch:
        """The epoch with the lowest loss on held-back samples."""
        return min(self.history, key=lambda epoch: epoch.held_back)

    def _finish_epoch(self, interrupted: threading.Event) -> None:
        """The steps that are left of an epoch."""
        number, done = divmod(self._step, self._per_epoch)
        order = np.random.default_rng((self.settings.seed, number)).permutation(len(self.samples))
        limit = _EXPLODED * max(self.history[0].held_back, self.settings.temperature**2)
        if self.hook is not None:
            limit = sys.float_info.max  # what is taken away may cost any finite loss
        title = f"epoch {number + 1}/{self.settings.epochs}"
        with self.progress.stage(title, (self._per_epoch - done) * self._batch) as advance:
            for place in range(done, self._per_epoch):
                loss = self._train(order[place * self._batch : (place + 1) * self._batch], number)
                if not loss <= limit:
                    self.stopped = f"diverged in epoch {number + 1} at step {place + 1}: loss {loss:.3g}"
                    return
                self._lost += loss
                self._step += 1
                advance(self._batch)
                if interrupted.is_set() and place + 1 < self._per_epoch:
                    self._save(interrupted)

    def _train(self, places: np.ndarray, epoch: int) -> float:
        """One step on the samples at these places; the loss before it."""
        torch.manual_seed((self.settings.seed + self._step) * self.ranks.size + self.ranks.rank)  # of Dropout
        self._optimizer.zero_grad()
        total = 0.0
        for batch in self._batches(self.ranks.share(places), epoch):
            self.module.train(len(batch) > 1)  # one sample has no variance that batch normalisation could use
            loss = self.lesson.loss(self.module, batch) * (len(batch) / len(places))
            loss.backward()
            total += loss.item()
        total = self.ranks.add_up(self._parameters, total)
        if math.isfinite(total):
            nn.utils.clip_grad_norm_(self._parameters, _LARGEST_NORM)
            if self.hook is not None:
                self.hook.after_backward(self._step, self._steps)
            factor = SCHEDULES[self.settings.schedule](self._step, self._steps)
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * factor
            self._optimizer.step()
            if self.hook is not None:
                self.hook.after_step(self._step, self._steps)
            self._average.update(self._step)
        return total

    def _batches(self, places: np.ndarray, epoch: int) -> Iterator[Batch]:
        """The samples at these places, augmented, as many at once as the model takes."""
        items = [self.samples[int(place)] for place in places]
        if (name := self._image) is not None:
            items = [
                dataclasses.replace(
                    item, sample={name: augmented(item.sample[name], self.settings.seed, epoch, int(place))}
                )
                for place, item in zip(places, items, strict=True)
            ]
        return batches(items, len(items), self.lesson.inputs)

    def _judge(self, loss: float | None) -> None:
        """Measure the averaged weights on the held-back samples, and keep them if they are the best so far."""
        held_back, agreement = self.lesson.measure(self._average.module, self.held_back)
        epoch = Epoch(len(self.history), loss, self.ranks.agreed(held_back), agreement)
        if not math.isfinite(epoch.held_back):
            self.stopped = f"diverged in epoch {epoch.number}: loss on held-back samples {epoch.held_back:.3g}"
            return
        self.history.append(epoch)
        if self.best is epoch:
            self._best = tensors(self._average.module)
        elif self.hook is None and self._losing():
            self.stopped = f"the loss on held-back samples has risen for {_PATIENCE} epochs"

    def _losing(self) -> bool:
        """Whether the loss rises though the learning rate falls: else it may rise, and falls below where it was."""
        factor = SCHEDULES[self.settings.schedule]
        recent = self.history[-_PATIENCE - 1 :]
        factors = [factor(epoch.number * self._per_epoch, self._steps) for epoch in recent]
        losses = [epoch.held_back for epoch in recent]
        return len(recent) > _PATIENCE and factors == sorted(factors, reverse=True) and losses == sorted(losses)

    def _say(self, left: float) -> None:
        epoch = self.history[-1]
        same = "" if epoch.agreement is None else f", same decision {epoch.agreement:.2%}"
        self.progress.note(
            f"epoch {epoch.number}/{self.settings.epochs}: loss {epoch.loss:.4g}, on held-back samples "
            f"{epoch.held_back:.4g}{same}; {time.strftime('%H:%M:%S', time.gmtime(left))} left"
        )

    def _save(self, interrupted: threading.Event) -> None:
        """Keep the state, and stop here where Ctrl-C was pressed."""
        if self.ranks.first:
            parts = {
                "module": tensors(self.module), "average": tensors(self._average.module), "best": self._best,
                "moments": moments(self._optimizer), "hook": {} if self.hook is None else self.hook.state(),
            }  # fmt: skip
            epochs = [dataclasses.astuple(epoch) for epoch in self.history]
            state = {"step": self._step, "lost": self._lost, "history": epochs, "stopped": self.stopped}
            self.checkpoint.save(parts, state)
        if interrupted.is_set():
            kept = ": the same command goes on from here" if self.checkpoint.kept else ""
            self.progress.note(f"interrupted after {self._step} of {self._steps} steps{kept}")
            raise KeyboardInterrupt

    def _resumed(self) -> bool:
        """Go on where the checkpoint is, if there is one."""
        if self.checkpoint.foreign:
            self.progress.note("the checkpoint is of another model, other data or other options: starting anew")
        if (found := self.checkpoint.load()) is None:
            return False
        parts, state = found
        self.module.load_state_dict(parts["module"])
        self._average.module.load_state_dict(parts["average"])
        self._best = parts["best"]
        load_moments(self._optimizer, parts.get("moments", {}))
        if self.hook is not None:
            self.hook.load(parts["hook"])
        self._step, self._lost, self.stopped = state["step"], state["lost"], state["stopped"]
        self.history = [Epoch(*values) for values in state["history"]]
        self.progress.note(f"going on after {self._step} of {self._steps} steps")
        return True
