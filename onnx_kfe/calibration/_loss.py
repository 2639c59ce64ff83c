"""A loss of the user's own, an ONNX graph behind the outputs: what its gradients give is the empirical Fisher.

Its inputs are outputs and inputs of the model, by name; any other is read from the data, ``labels`` from the labels.
Its output is a negative log-likelihood in nats, one value a sample or the sum of these. A mean over the batch would
make the gradient of a sample depend on how samples are batched, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._batches import Batch, batches
from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._inputs import InputSpec, fixed_batch
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session, reason

__all__ = ["Loss"]

_TRIED = 16
_TOLERANCE = 1e-3  # of a sum computed in single precision


@dataclass(frozen=True)
class Loss:
    """A loss that fits a model, see `open_loss`.

    Attributes:
        name: What to call it in messages.
        graph: Its graph, without functions, at the opset of `differentiable_copy`.
        fingerprint: Hash of the loss as it was given.
        targets: What it reads of the data beside the model's inputs and the labels.
        labels: What it takes as labels; None where it does not read them.
    """

    name: str
    graph: ir.Graph
    fingerprint: str
    targets: tuple[InputSpec, ...]
    labels: InputSpec | None

    @property
    def reads(self) -> list[str]:
        """Names of its inputs."""
        return [value.name or "" for value in self.graph.inputs]

    def append(self, emit: Emitter) -> ir.Value:
        """Append the loss to the graph of the model; the value of the loss."""
        model = emit.graph
        values = {
            value.name: emit.constant(value.const_value.numpy())
            for value in self.graph.initializers.values()
            if value.const_value is not None
        }
        known = {value.name: value for value in (*model.inputs, *model.outputs)}
        for value in self.graph.inputs:
            if value.name not in known:
                model.inputs.append(ir.Value(name=_fed(value.name), type=value.type, shape=value.shape))
            values[value.name] = known.get(value.name) or model.inputs[-1]
        for node in self.graph:
            copy = emit.again(node, [None if value is None else values[value.name] for value in node.inputs])
            values |= {own.name: output for own, output in zip(node.outputs, copy.outputs, strict=True)}
        return values[self.graph.outputs[0].name]

    def seeds(self, emit: Emitter) -> dict[ir.Value, ir.Value]:
        """Append the loss, and the derivative of its sum over the samples by it: ones."""
        value = self.append(emit)
        return {value: emit.expand_like(emit.number(1.0, value), value)}

    def feeds(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the model with the loss takes beside the model's inputs.

        Raises:
            KfeError: The loss reads labels and there are none, or other ones.
        """
        fed = {_fed(spec.name): batch.feeds[spec.name] for spec in self.targets}
        wanted, labels = self.labels, batch.labels
        if wanted is None:
            return fed
        if labels is None:
            raise KfeError(f"--loss {self.name} reads '{wanted.name}', and the data have no labels")
        if labels.dtype.kind not in "iufb" or labels.ndim != len(wanted.shape):
            found = f"{labels.dtype} {list(labels.shape)}"
            raise KfeError(f"--loss {self.name} takes '{wanted.name}' as {wanted}, the labels are {found}")
        return {**fed, _fed(wanted.name): labels.astype(wanted.dtype)}

    def check(
        self,
        model: ir.Model,
        data: Dataset,
        specs: Sequence[InputSpec],
        *,
        providers: Sequence[str],
        threads: int | None,
    ) -> None:
        """Compare the loss of two samples together with the loss of each by itself.

        Args:
            model: As of `differentiable_copy`; it is not changed.
            data: The samples, of which the first few are looked at.
            specs: What is read of them.
            providers: Execution providers, CPU when empty.
            threads: Threads, all cores when None.

        Raises:
            UsageError: The loss is neither one value a sample nor the sum of these.
            KfeError: It fails, or is not finite.
        """
        exact = fixed_batch(specs)
        items = [item for item, _ in zip(data, range(max(_TRIED, exact or 1)), strict=False)]
        together = max(batches(items, 2, specs), key=len, default=None)
        if together is None:
            return  # too few samples for a batch: the collection says so
        run = _Trial(self, model, providers, threads)
        found, count = run(together), len(together)
        if found.shape not in ((), (count,)):
            raise self._unfit(f"has shape {list(found.shape)} for {count} samples")
        if exact and count > 1 and not found.shape:
            raise self._unfit(f"is a scalar for the {count} samples that the model takes together")
        if exact or count == 1:
            return
        single = [next(batches([item for item in items if item.index == i], 1, specs)) for i in together.indices]
        parts = [float(run(batch).sum()) for batch in single]
        if abs(found.sum() - sum(parts)) > _TOLERANCE * sum(map(abs, parts)):
            each = " and ".join(f"{part:.4g}" for part in parts)
            raise self._unfit(f"is {found.sum():.4g} for two samples, and {each} for each by itself")

    def _unfit(self, what: str) -> UsageError:
        return UsageError(
            f"--loss {self.name}: its output {what}; it must be one value a sample, [N], or their sum, not their mean"
        )


class _Trial:
    """Runs a model up to the loss."""

    def __init__(self, loss: Loss, model: ir.Model, providers: Sequence[str], threads: int | None) -> None:
        copy = model.clone()
        value = loss.append(Emitter(copy.graph, prefix="kfe/"))
        copy.graph.outputs.clear()
        copy.graph.outputs.append(value)
        self._loss = loss
        self._session = create_session(serialize(copy), providers=providers, threads=threads)

    def __call__(self, batch: Batch) -> np.ndarray:
        """The loss of a batch."""
        feeds = {**batch.feeds, **self._loss.feeds(batch)}
        try:
            (found,) = self._session.run(None, {value.name: feeds[value.name] for value in self._session.get_inputs()})
        except Exception as error:
            raise KfeError(f"--loss {self._loss.name} fails in ONNX Runtime: {reason(error)}") from error
        if not np.isfinite(found).all():
            raise KfeError(f"--loss {self._loss.name}: NaN or infinity on a sample")
        return np.asarray(found, np.float64)


def _fed(name: str | None) -> str:
    """Name of the graph input that carries what the loss reads of the data."""
    return f"kfe/target/{name}"
