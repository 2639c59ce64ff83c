"""What pruning gave: the model, what was done to it and what it cost."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from onnx_kfe._floor import Floor, Trial
from onnx_kfe._latency_goal import Lap
from onnx_kfe.calibration import Statistics
from onnx_kfe.evaluation import Quality, Timing
from onnx_kfe.graph import ModelSource, Network, check_output, count_macs, count_parameters, save
from onnx_kfe.planning import Plan, network_cost

__all__ = ["Result"]


@dataclass
class Result:
    """The smaller model and its report.

    Attributes:
        network: The original.
        ir_model: The smaller model.
        plan: What was planned.
        losses: Predicted loss by changed layer, of the weights as written, in nats per sample.
        statistics: What it was planned from; None when from the weights alone.
        source: The model as it was given.
        quality: Measured quality; None when not measured.
        proven: Whether quality was measured on real samples.
        measured_on: What quality was measured on, in words.
        timings: Measured latency of original and result; empty when not measured.
        laps: The models that were timed for a budget of latency.
        floor: The quality floor and the curve of what was tried; None without one.
        skipped_samples: The corrupt samples, each named and with what is wrong with it.
    """

    network: Network
    ir_model: ir.Model
    plan: Plan
    losses: dict[str, float]
    statistics: Statistics | None
    source: ModelSource | Network = field(repr=False)
    quality: Quality | None = None
    proven: bool = False
    measured_on: str = ""
    timings: list[Timing] = field(default_factory=list)
    laps: list[Lap] = field(default_factory=list)
    floor: Floor | None = None
    skipped_samples: list[str] = field(default_factory=list)

    @property
    def model(self) -> ir.Model | onnx.ModelProto:
        """The smaller model: an ``ir.Model`` where one was given, else a ``ModelProto``."""
        return self.ir_model if isinstance(self.source, ir.Model | Network) else ir.to_proto(self.ir_model)

    @property
    def predicted_loss(self) -> float:
        """Summed predicted loss in nats per sample."""
        return sum(self.losses.values())

    @property
    def loss_ratio(self) -> float | None:
        """Measured over predicted loss; None where the one was not measured or the other is not known, or 0."""
        measured = self.quality.divergence if self.quality is not None else None
        if measured is None or self.statistics is None or not self.predicted_loss > 0:
            return None
        return measured / self.predicted_loss

    @property
    def curve(self) -> tuple[Trial, ...]:
        """The models that were measured on the way to the floor, the smallest first."""
        return self.floor.curve if self.floor else ()

    @property
    def report(self) -> dict[str, Any]:
        """Everything measured and decided, as plain values; costs are counted on the written graph."""
        before = network_cost(self.network)
        return {
            "model": self.network.name,
            "budget": self.plan.budget,
            "macs": {"before": before.macs, "after": count_macs(self.ir_model, self.network.input_shapes)},
            "parameters": {"before": before.parameters, "after": count_parameters(self.ir_model)},
            "calibration_samples": self.statistics.samples if self.statistics else 0,
            "predicted_loss": self.predicted_loss,
            "measured_loss": self.quality.divergence if self.quality else None,
            "heads": {head.output: head.kind for head in self.statistics.heads} if self.statistics else {},
            "input_shapes": {name: list(shape) for name, shape in self.network.input_shapes.items()},
            "floor": self.floor.as_dict() if self.floor else None,
            "quality_proven": self.proven,
            "quality_on": self.measured_on,
            "quality": self.quality.as_dict() if self.quality else None,
            "laps": [lap.as_dict() for lap in self.laps],
            "timings": [timing.as_dict() for timing in self.timings],
            "layers": {
                name: {"form": choice.form, "ranks": list(choice.ranks), "predicted_loss": self.losses.get(name, 0.0)}
                for name, choice in self.plan.choices.items()
            },
            "skipped": self.plan.skipped,
            "skipped_samples": self.skipped_samples,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the smaller model, whole or not at all, never over the original.

        Raises:
            UsageError: The path cannot be written, or is the original's.
        """
        sources = [] if isinstance(self.source, Network) else [self.source]
        check_output(path, self.network.name, *sources)
        save(self.ir_model, path)
