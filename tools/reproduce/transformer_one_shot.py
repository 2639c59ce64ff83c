"""Low-rank compression of a Transformer encoder in one shot: what the metric brings, and what the allocation.

    python -m tools.reproduce.transformer_one_shot --json transformer.json

Every MatMul with a constant weight (query, key, value, attention output, both feed-forward layers) becomes two factors,
without labels or training. A method is a metric, the pair (A, G) for which the truncated SVD of ``G^(1/2) W A^(1/2)``
is taken, W being ``[out, in]``:

- ``svd``: A = G = I.
- ``fwsvd``: G = I and A diagonal, ``A_ii = sum_o F_oi`` with F the mean over sentences of the squared gradient of the
  weight, the diagonal of the Fisher information. So the weights of one input feature share one importance, as those of
  a row of an ``[in, out]`` weight do in Hsu et al., "Language model compression with weighted low-rank factorization"
  (ICLR 2022). The gradients are of targets sampled from the model, for there are no labels.
- ``svd-llm``: G = I and A the second moment of the inputs, not centred (Wang et al., "SVD-LLM", ICLR 2025).
- ``k-fac``: both factors of the Fisher information, A centred, and the bias takes up the mean: the product's own.

Each is tried at uniform ranks, the same share of its MACs for every layer, and at the ranks that the planner chooses
under K-FAC, where a layer may also stay whole; ``k-fac`` there with refit as well. The score is 100 times Spearman's
rho on the STS-B test pairs. MACs and latency are of a sentence of 32 tokens, each share of the whole model's, and
embeddings count as parameters. Needs the assets with ``prepare.py minilm-l6``, and tokenizers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import onnx_kfe as kfe
from onnx_kfe.calibration import LayerStatistics, input_specs, synthetic_dataset
from onnx_kfe.evaluation import race
from onnx_kfe.graph import Network, serialize
from onnx_kfe.kfe import Array
from onnx_kfe.planning import FORMS, Candidate, Plan, Planner, network_cost
from onnx_kfe.runtime import create_session
from tools.assets import sentence_encoder, sentences, sts_spearman
from tools.fisher import input_fisher

KEPT = (0.8, 0.6, 0.5, 0.4)
SHAPES = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, 32))
GRID = 4  # of ranks
FORM = FORMS["two_factor"]

Row = dict[str, Any]


def with_factors(seen: LayerStatistics, input_factor: Array, output_factor: Array) -> LayerStatistics:
    """Statistics with other factors ``[i, i]`` and ``[o, o]`` and no mean, so that the bias stays as it is."""
    return LayerStatistics(
        seen.samples * input_factor[None], np.zeros_like(seen.input_sum), seen.positions * output_factor[None],
        seen.positions, seen.samples,
    )  # fmt: skip


def identity(factor: Array) -> Array:
    """``[n, n]`` for a factor ``[1, n, n]``."""
    return np.eye(factor.shape[-1])


METRICS: dict[str, Callable[[LayerStatistics, Array], LayerStatistics]] = {
    "svd": lambda seen, fisher: with_factors(seen, identity(seen.input_factor), identity(seen.output_factor)),
    "fwsvd": lambda seen, fisher: with_factors(seen, np.diag(fisher), identity(seen.output_factor)),
    "svd-llm": lambda seen, fisher: with_factors(seen, seen.input_factor[0], identity(seen.output_factor)),
    "k-fac": lambda seen, fisher: seen,
}
"""The statistics of a layer under each metric, from those collected and from `input_fisher`."""


def uniform_plan(network: Network, kept: float) -> Plan:
    """Two factors for every layer: the largest ranks within a share of the MACs that keep as much of each layer."""
    original = network_cost(network)
    rest = original.macs - sum(layer.macs for layer in network.prunable)

    def choices(share: float) -> dict[str, Candidate]:
        found = {}
        for layer in network.prunable:
            assert layer.geometry is not None
            full = share * layer.macs / FORM.cost(layer.geometry, (1,)).macs
            ranks = (max(GRID, int(full / GRID) * GRID),)
            found[layer.name] = Candidate(FORM.name, ranks, FORM.cost(layer.geometry, ranks), 0.0)
        return found

    plans = (choices(share) for share in np.linspace(1, 0, 1001))
    fitting = (plan for plan in plans if rest + sum(c.cost.macs for c in plan.values()) <= kept * original.macs)
    return Plan(network.fingerprint, next(fitting), original)


class Trial:
    """The model with its samples, and what is known of it.

    Args:
        network: The model.
        count: Calibration sentences.
    """

    def __init__(self, network: Network, count: int) -> None:
        self.network, self.data = network, sentences(count)
        self.statistics = kfe.collect(network, self.data, max_samples=None)
        (head,) = self.statistics.heads
        self.fisher = input_fisher(network, head, self.data)
        specs = input_specs(network.model)
        self.feeds = next(iter(synthetic_dataset(specs, 1, 0, SHAPES))).sample

    def models(self, kept: float, planned: Plan) -> Iterator[tuple[str, str, kfe.Result]]:
        """Metric and ranks of each row with its model, the ranks being uniform or those of the plan."""
        for ranks, plan in (("uniform", uniform_plan(self.network, kept)), ("planned", planned)):
            for metric in METRICS:
                yield metric, ranks, kfe.prune(self.network, self.under(metric), plan, measure=False)
        refitted = kfe.prune(
            self.network, self.data, planned, statistics=self.statistics, max_samples=None, measure=False,
            evaluation_data=self.data[:1],
        )  # fmt: skip
        yield "k-fac", "refitted", refitted

    def under(self, metric: str) -> kfe.Statistics:
        """The statistics of a metric."""
        layers = {name: METRICS[metric](seen, self.fisher[name]) for name, seen in self.statistics.layers.items()}
        return dataclasses.replace(self.statistics, layers=layers)

    def measured(self, model: ir.Model) -> Row:
        """Score of a model, and latency as a share of the original's."""
        models = {"original": serialize(self.network.original), "smaller": serialize(model)}
        latencies = race(models, self.feeds)
        score = 100 * sts_spearman(create_session(models["smaller"]))
        return {"score": score, "latency": float(np.median(latencies[:, 1] / latencies[:, 0]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_024, help="calibration sentences")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    network = kfe.inspect(sentence_encoder("minilm-l6"), input_shapes=SHAPES)
    trial = Trial(network, arguments.samples)
    planner = Planner(network, trial.statistics, round_to=GRID)
    original = trial.measured(network.original)
    print(f"original: {original['score']:.2f}, {arguments.samples} calibration sentences\n")
    print(
        f"{'budget':>8}  {'metric':<9}{'ranks':<9}{'score':>8}{'MACs':>8}{'parameters':>12}{'latency':>9}", flush=True
    )
    rows: list[Row] = []
    for kept in KEPT:
        for metric, ranks, result in trial.models(kept, planner.plan(kfe.Macs(kept))):
            costs = {
                cost: result.report[cost]["after"] / result.report[cost]["before"] for cost in ("macs", "parameters")
            }
            row = {"budget": kept, "metric": metric, "ranks": ranks, **costs, **trial.measured(result.ir_model)}
            rows.append(row)
            print(
                f"{kept:>8.0%}  {metric:<9}{ranks:<9}{row['score']:>8.2f}{row['macs']:>8.1%}"
                f"{row['parameters']:>12.1%}{row['latency']:>9.1%}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"original": original, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
