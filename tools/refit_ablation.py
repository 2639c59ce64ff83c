"""What each part of the refit brings: the table of quality with one part left out at a time.

    python -m tools.refit_ablation resnet32 --samples 1000 --kept 0.5 0.3

Top-1 and the Kullback-Leibler divergence from the original, in nats, on images that the refit did not see. Needs the
assets.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
from scipy.special import log_softmax

import onnx_kfe as kfe
from onnx_kfe import recovery
from onnx_kfe.calibration import input_specs
from onnx_kfe.graph import serialize
from onnx_kfe.recovery import _lockstep, _refit, _samples, _solve
from tools.assets import MODELS
from tools.quality_table import logits_of, samples_of

Part = contextlib.AbstractContextManager[object]


@contextlib.contextmanager
def changed_layers_only() -> Iterator[None]:
    """Leave the layers alone that keep their form."""
    whole = recovery.refit

    def refit(network: object, plan: kfe.Plan, *arguments: object, **options: object) -> object:
        changed = dataclasses.replace(plan, choices=plan.changed)
        return whole(network, changed, *arguments, **options)  # type: ignore[arg-type]

    with mock.patch.object(recovery, "refit", refit):
        yield


def without_sums() -> Part:
    """Every layer is to give its own output, not what makes the sum that it goes into."""
    return mock.patch.object(
        _lockstep.Lockstep, "_wanted", lambda models, layer: (models._original.value(layer.output), None)
    )


VARIANTS: dict[str, Callable[[], Part]] = {
    "refit": contextlib.nullcontext,
    "without residual sums": without_sums,
    "without activations": lambda: mock.patch.object(_lockstep, "_activation_of", return_value=_samples.Activation()),
    "last factors as compressed": lambda: mock.patch.object(_refit, "_CODE_STEPS", 0),
    "old weights, last factors solved": lambda: mock.patch.object(_refit, "_DENSE_STEPS", 0),
    "changed layers only": changed_layers_only,
    "ridge 0.001 everywhere": lambda: mock.patch.object(_solve, "RIDGES", (1e-3,)),
    "ridge 1 everywhere": lambda: mock.patch.object(_solve, "RIDGES", (1.0,)),
    "a quarter of the columns": lambda: mock.patch.multiple(_lockstep, _COLUMNS_PER_SAMPLE=8, _COLUMNS_PER_INPUT=4),
    "four times the columns": lambda: mock.patch.multiple(_lockstep, _COLUMNS_PER_SAMPLE=128, _COLUMNS_PER_INPUT=64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--samples", type=int, default=1_000, help="calibration samples, at most")
    parser.add_argument("--kept", type=float, nargs="+", default=(0.5, 0.3), help="shares of the MACs")
    arguments = parser.parse_args()
    network = kfe.inspect(MODELS[arguments.model].path)
    calibration, test, labels = samples_of(arguments.model, arguments.samples)
    (spec,) = input_specs(network.model)
    statistics = kfe.collect(network, {spec.name: calibration}, max_samples=None)
    plans = [kfe.plan(network, statistics, kfe.Macs(share)) for share in arguments.kept]
    original = log_softmax(logits_of(serialize(network.original), test), -1)

    def row(name: str, results: Iterator[kfe.Result]) -> None:
        cells = []
        for result in results:
            found = log_softmax(logits_of(serialize(result.ir_model), test), -1)
            divergence = float((np.exp(original) * (original - found)).sum(-1).mean())
            cells.append(f"{100 * float((found.argmax(-1) == labels).mean()):>9.2f}{divergence:>8.3f}")
        print(f"{name:<34}{''.join(cells)}", flush=True)

    print(f"{'':<34}{''.join(f'{share:>9.0%}    nats' for share in arguments.kept)}")
    row("one shot", (kfe.prune(network, statistics, plan, measure=False) for plan in plans))
    for name, part in VARIANTS.items():
        with part():
            row(
                name,
                (
                    kfe.prune(
                        network, {spec.name: calibration}, plan, statistics=statistics,
                        evaluation_data={spec.name: test[:1]}, max_samples=None, measure=False,
                    )
                    for plan in plans
                ),
            )  # fmt: skip


if __name__ == "__main__":
    main()
