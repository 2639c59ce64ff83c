"""All methods side by side: one model pruned by each to the same shares of its MACs, without labels or training.

    python -m tools.reproduce.methods_one_shot resnet20 --statistics resnet20.safetensors --json methods.json

Importances in channel coordinates and in the Kronecker-factored eigenbasis (KFE), EigenDamage, our channels and forms,
and what onnxsim offers. Statistics come from 1,000 unlabelled calibration samples, once for all methods. CIFAR-10
ResNets are scored on the first 5,000 test images, other models on samples that were not calibrated on. Channels,
directions and ranks are not rounded to a grid (``round_to=1``), so that every method comes as near to its budget as it
can; onnxsim is given the sparsity that brings it nearest. MACs and parameters are counted on the written graphs. Speeds
are of single samples on two threads, all models of a row in one race with the original. Needs the assets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim

import onnx_kfe as kfe
from onnx_kfe.calibration import input_specs
from onnx_kfe.evaluation import race
from onnx_kfe.graph import Network, count_macs, count_parameters, serialize
from onnx_kfe.kfe import IMPORTANCES
from tools.assets import MODELS
from tools.quality_table import logits_of, samples_of

SAMPLES = 1_000
SHARES = (0.8, 0.6, 0.5, 0.4)
THREADS = 2
PEER_BATCHES, PEER_BATCH = 8, 32  # as many batches as onnxsim would make up by itself
PEER_STEPS = 12


@dataclass(frozen=True)
class Subject:
    """The model that all methods prune, what they may look at, and what they are scored on.

    Attributes:
        path: The file.
        network: The model.
        samples: Calibration inputs ``[n, ...]``.
        test: Inputs to score on.
        labels: Their labels.
        statistics: With variances measured in the eigenbases.
    """

    path: Path
    network: Network
    samples: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    statistics: kfe.Statistics

    @staticmethod
    def of(name: str, kept: Path | None) -> Subject:
        """An asset with labels, its statistics from a file where they were kept."""
        network = kfe.inspect(MODELS[name].path)
        samples, test, labels = samples_of(name, SAMPLES)
        if kept is not None and kept.exists():
            statistics = kfe.Statistics.load(kept)
        else:
            statistics = kfe.collect(network, samples, max_samples=None, curvature="ekfac")
            if kept is not None:
                statistics.save(kept)
        return Subject(MODELS[name].path, network, samples, test, labels, statistics)

    @property
    def input(self) -> str:
        """Name of the only input."""
        (spec,) = input_specs(self.network.model)
        return spec.name

    def costs(self, model: ir.Model) -> tuple[int, int]:
        """MACs and parameters of a model of this kind."""
        return count_macs(model, self.network.input_shapes), count_parameters(model)

    def top1(self, model: bytes) -> float:
        """Accuracy in per cent."""
        return 100 * float((logits_of(model, self.test).argmax(-1).reshape(-1) == self.labels).mean())


class Made(NamedTuple):
    """A smaller model, and what is to be said about it."""

    model: ir.Model
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A method by name, and what makes the model that keeps a share of the MACs by it."""

    name: str
    make: Callable[[Subject, float], Made]


@dataclass(frozen=True)
class Cell:
    """One smaller model.

    Attributes:
        share: How much of the original's MACs it could keep.
        macs: How much of them it keeps; None where no model was made.
        parameters: How much of the parameters it keeps.
        top1: Per cent.
        note: What is to be said about it, or why there is none.
        speed: Quartiles of the original's latency over its own; empty where not measured.
    """

    share: float
    macs: float | None = None
    parameters: float | None = None
    top1: float | None = None
    note: str = ""
    speed: tuple[float, ...] = ()


def by_method(
    subject: Subject,
    share: float,
    *,
    method: str = "forms",
    basis: str | None = None,
    curvature: str = "kfac",
    refit: bool = False,
) -> Made:
    """A method of ours, the options as of `kfe.prune`."""
    network, statistics = subject.network, subject.statistics
    if curvature == "kfac":
        layers = {name: replace(sums, eigen=None) for name, sums in statistics.layers.items()}
        statistics = replace(statistics, layers=layers)
    plan = kfe.plan(network, statistics, kfe.Macs(share), method=method, basis=basis, round_to=1)
    if not refit:
        return Made(kfe.prune(network, statistics, plan, measure=False).ir_model)
    samples = {subject.input: subject.samples}
    result = kfe.prune(
        network, samples, plan, statistics=statistics, max_samples=None, measure=False,
        evaluation_data={subject.input: subject.samples[:1]},
    )  # fmt: skip
    return Made(result.ir_model)


def by_onnxsim(subject: Subject, share: float, *, everywhere: bool, calibrated: bool) -> Made:
    """Structured pruning by onnxsim, of the file as it is or, where that fails, of the normalised model.

    Args:
        subject: What is pruned.
        share: How much of the MACs is kept.
        everywhere: One ranking for the whole model, not one for each layer.
        calibrated: By the activations on some of the samples too (Wanda), not by the norms of weights alone.
    """
    prune = partial(onnxsim.apply_structured_pruning, global_sparsity=everywhere)
    if calibrated:
        batches = np.array_split(subject.samples[: PEER_BATCHES * PEER_BATCH], PEER_BATCHES)
        data = [{subject.input: batch} for batch in batches]
        prune = partial(onnxsim.apply_structured_wanda_pruning, calibration_data=data, global_sparsity=everywhere)
    failures = []
    for source, model in (("as given", onnx.load(subject.path)), ("normalised", ir.to_proto(subject.network.model))):
        try:
            return Made(largest(prune, model, subject, share), "; ".join([*failures, source]))
        except kfe.BudgetError:
            raise
        except Exception as error:  # it fails in many ways
            failures.append(f"{source}: {type(error).__name__}: {error}")
    raise kfe.KfeError("; ".join(failures))


def largest(prune: Callable[..., onnx.ModelProto], model: onnx.ModelProto, subject: Subject, share: float) -> ir.Model:
    """The largest model within a share of the MACs, by bisection of the sparsity.

    Raises:
        BudgetError: No sparsity leads there.
        Exception: Whatever onnxsim and ONNX Runtime raise.
    """
    limit = share * subject.costs(subject.network.original)[0]
    dense, sparse, best = 0.0, 1.0, None
    for _ in range(PEER_STEPS):
        copy, sparsity = onnx.ModelProto(), (dense + sparse) / 2
        copy.CopyFrom(model)
        found = ir.from_proto(prune(copy, sparsity=sparsity))
        if subject.costs(found)[0] > limit:
            dense = sparsity
        else:
            sparse, best = sparsity, found
    if best is None:
        raise kfe.BudgetError("no sparsity leads there")
    logits_of(serialize(best), subject.samples[:1])  # not all that it makes can be run
    return best


CHANNELS = [Row(f"{name}, channels", partial(by_method, method=name, basis="channel")) for name in IMPORTANCES]
KFE = [
    Row(f"{name}, KFE", partial(by_method, method=name, basis="kfe"))
    for name, importance in IMPORTANCES.items()
    if "kfe" in importance.bases
]
ROWS = (
    *CHANNELS,
    Row("kron-obs, channels, refitted", partial(by_method, method="kron-obs", refit=True)),
    *KFE,
    Row("eigendamage", partial(by_method, method="eigendamage")),
    Row("eigendamage, EKFAC", partial(by_method, method="eigendamage", curvature="ekfac")),
    Row("eigendamage-depthwise", partial(by_method, method="eigendamage-depthwise")),
    Row("channels", partial(by_method, method="channels")),
    Row("channels, refitted", partial(by_method, method="channels", refit=True)),
    Row("forms", by_method),
    Row("forms, refitted", partial(by_method, refit=True)),
    Row("onnxsim L2, by layer", partial(by_onnxsim, everywhere=False, calibrated=False)),
    Row("onnxsim L2, global", partial(by_onnxsim, everywhere=True, calibrated=False)),
    Row("onnxsim Wanda, by layer", partial(by_onnxsim, everywhere=False, calibrated=True)),
    Row("onnxsim Wanda, global", partial(by_onnxsim, everywhere=True, calibrated=True)),
)


def measure(subject: Subject, row: Row, share: float) -> tuple[Cell, bytes]:
    """One cell, and its model; empty where there is none."""
    try:
        made = row.make(subject, share)
    except kfe.KfeError as error:
        return Cell(share, note=str(error)), b""
    model = serialize(made.model)
    sizes = zip(subject.costs(made.model), subject.costs(subject.network.original), strict=True)
    macs, parameters = (after / before for after, before in sizes)
    return Cell(share, macs, parameters, subject.top1(model), made.note), model


def timed(subject: Subject, cells: Sequence[tuple[Cell, bytes]]) -> list[Cell]:
    """The cells of a row with their speeds."""
    models = {"original": serialize(subject.network.original)}
    models |= {f"{cell.share}": model for cell, model in cells if model}
    latencies = race(models, {subject.input: subject.test[:1]}, threads=THREADS)
    quartiles = np.quantile(latencies[:, :1] / latencies, [0.25, 0.5, 0.75], axis=0)
    speeds = {name: tuple(map(float, column)) for name, column in zip(models, quartiles.T, strict=True)}
    return [replace(cell, speed=speeds.get(f"{cell.share}", ())) for cell, _ in cells]


def shown(cell: Cell) -> str:
    """A cell as it is printed: top-1, MACs and parameters in per cent, speed."""
    if cell.macs is None or cell.parameters is None:
        return f"{'none':>28}"
    speed = f"{cell.speed[1]:.2f}x" if cell.speed else ""
    return f"{cell.top1:>10.2f}{100 * cell.macs:>6.1f}{100 * cell.parameters:>6.1f}{speed:>6}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}, with labels")
    parser.add_argument("--statistics", type=Path, help="file where the statistics are kept from run to run")
    parser.add_argument("--no-latency", action="store_true", help="leave the speeds out")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    subject = Subject.of(arguments.model, arguments.statistics)
    original = subject.top1(serialize(subject.network.original))
    print(f"{arguments.model}: top-1 {original:.2f} % of {len(subject.labels)}; top-1, MACs, parameters, speed\n")
    print(f"{'method':<29}" + "".join(f"{share:>28.0%}" for share in SHARES), flush=True)
    rows: list[dict[str, Any]] = []
    over = 0
    for row in ROWS:
        found = [measure(subject, row, share) for share in SHARES]
        cells = [cell for cell, _ in found] if arguments.no_latency else timed(subject, found)
        over += sum(cell.macs is not None and cell.macs > cell.share for cell in cells)
        notes = "; ".join(dict.fromkeys(cell.note for cell in cells if cell.note))
        print(f"{row.name:<29}{''.join(map(shown, cells))}  {notes}".rstrip(), flush=True)
        rows.append({"name": row.name, "cells": [asdict(cell) for cell in cells]})
        if arguments.json:
            table = {"model": arguments.model, "samples": len(subject.samples), "original": original, "rows": rows}
            arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    print(f"\nmodels with more MACs than their share: {over}")


if __name__ == "__main__":
    main()
