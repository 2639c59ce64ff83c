"""Compare the predicted loss of single-layer compressions with the divergence that they are measured to cause.

    python -m tools.loss_against_kl --json loss.json --plot loss.png

Each layer of ResNet-32 is compressed alone, in every form and at several ranks. What is predicted from the statistics
of 1,000 unlabelled images is compared with the mean Kullback-Leibler divergence KL(original || compressed), in nats per
sample, over 500 further training images and over 500 test images. Needs the assets, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

import onnx_kfe as kfe
from onnx_kfe.graph import Layer, Network, serialize
from onnx_kfe.planning import FORMS, Candidate, Plan, dense_cost, network_cost
from onnx_kfe.rewrite import apply_plan
from onnx_kfe.runtime import create_session
from tools.assets import MODELS, cifar10

CALIBRATION = 1_000
EVALUATION = 500
FRACTIONS = (0.15, 0.4, 0.65, 0.9)  # of the largest rank
BATCH = 100
TARGET = 0.9

Row = dict[str, Any]


def log_probabilities(model: bytes, images: np.ndarray) -> np.ndarray:
    """Log-probabilities of the classes in float64."""
    session = create_session(model)
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)]
    return scipy.special.log_softmax(np.concatenate(logits).astype(np.float64), axis=1)


def divergence(original: np.ndarray, compressed: np.ndarray) -> float:
    """KL(original || compressed), averaged over samples."""
    return float((np.exp(original) * (original - compressed)).sum(1).mean())


def compressions(layer: Layer) -> Iterator[Candidate]:
    """Every form of a layer at several ranks, cheaper than the layer or not."""
    assert layer.geometry is not None
    for form in FORMS.values():
        limits = form.limits(layer.geometry)
        ranks = {tuple(max(1, round(fraction * limit)) for limit in limits) for fraction in FRACTIONS if limits}
        for chosen in sorted(ranks):
            yield Candidate(form.name, chosen, form.cost(layer.geometry, chosen), 0.0)


def single(network: Network, layer: Layer, choice: Candidate) -> Plan:
    """A plan that changes one layer."""
    return Plan(network.fingerprint, {layer.name: choice}, network_cost(network))


def measure(network: Network, statistics: kfe.Statistics, images: dict[str, np.ndarray]) -> list[Row]:
    """Predicted loss and measured divergences of every single-layer compression."""
    originals = {split: log_probabilities(serialize(network.original), x) for split, x in images.items()}
    rows: list[Row] = []
    for layer in network.prunable:
        for choice in compressions(layer):
            model, losses = apply_plan(network, single(network, layer, choice), statistics)
            compressed = serialize(model)
            row: Row = {"layer": layer.name, "form": choice.form, "ranks": choice.ranks, "macs": choice.cost.macs}
            assert layer.geometry is not None
            row["share"] = choice.cost.macs / dense_cost(layer.geometry).macs
            row["predicted"] = losses[layer.name]
            for split, x in images.items():
                row[split] = divergence(originals[split], log_probabilities(compressed, x))
            rows.append(row)
        print(f"{layer.name}: {sum(row['layer'] == layer.name for row in rows)} compressions", flush=True)
    return rows


def spearman(rows: Sequence[Row], split: str) -> float:
    """Rank correlation of predicted loss and measured divergence."""
    return float(scipy.stats.spearmanr([r["predicted"] for r in rows], [r[split] for r in rows]).statistic)


def summary(rows: Sequence[Row], split: str) -> dict[str, float]:
    """Rank correlations overall, within layers and by form; and how far predictions are off where losses are small."""
    by_layer, by_form = defaultdict(list), defaultdict(list)
    for row in rows:
        by_layer[row["layer"]].append(row)
        by_form[row["form"]].append(row)
    within = [spearman(own, split) for own in by_layer.values() if len(own) > 2]
    small = [row["predicted"] / row[split] for row in rows if 1e-4 < row[split] < 0.1]
    return {
        "overall": spearman(rows, split),
        "within a layer, median": float(np.median(within)),
        "within a layer, least": float(np.min(within)),
        **{f"form {form}": spearman(own, split) for form, own in by_form.items() if len(own) > 2},
        "predicted / measured below 0.1 nats, median": float(np.median(small)),
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Scatter plot of predicted loss and measured divergence, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [row for row in rows if row["form"] == form]
        axes.scatter([r["predicted"] for r in own], [r["train"] for r in own], s=12, alpha=0.7, label=form)
    low, high = min(r["train"] for r in rows), max(r["predicted"] for r in rows)
    axes.plot([low, high], [low, high], color="grey", linewidth=0.8, label="equal")
    axes.set(
        xscale="log", yscale="log", xlabel="predicted loss (nats per sample)", ylabel="measured KL (nats per sample)"
    )
    axes.set_title(f"Single-layer compressions of ResNet-32, Spearman {spearman(rows, 'train'):.3f}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, help="statistics of 1,000 images, collected when not given")
    parser.add_argument("--json", type=Path, help="file for every compression")
    parser.add_argument("--plot", type=Path, help="PNG file for the scatter plot")
    arguments = parser.parse_args()

    network = kfe.inspect(MODELS["resnet32"].path)
    if arguments.statistics:
        statistics = kfe.Statistics.load(arguments.statistics)
    else:
        statistics = kfe.collect(network, cifar10("train", 0, CALIBRATION)[0])
    train, _ = cifar10("train", CALIBRATION, CALIBRATION + EVALUATION)
    test, _ = cifar10("test", 0, EVALUATION)
    rows = measure(network, statistics, {"train": train, "test": test})
    print(f"\n{len(rows)} compressions of {len({row['layer'] for row in rows})} layers\n")
    results = {split: summary(rows, split) for split in ("train", "test")}
    print(f"{'Spearman':<45}{'train':>10}{'test':>10}")
    for key, value in results["train"].items():
        print(f"{key:<45}{value:>10.3f}{results['test'][key]:>10.3f}")
    print(f"target {TARGET} overall: {'reached' if results['train']['overall'] >= TARGET else 'missed'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"spearman": results, "compressions": rows}, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
