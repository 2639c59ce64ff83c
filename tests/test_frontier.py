"""The frontier of latency and loss: its points, what is written of them, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe._frontier import Point, check_plot, save_frontier
from onnx_kfe.errors import KfeError, UsageError
from tests.networks import classifier, samples

POINTS = [
    Point(0.9, 0.91, 0.8, 0.9, 1e-3, 2e-3, 0.99),
    Point(0.6, 0.58, 0.5, 0.7, 1e-2, 3e-2, 0.9),
    Point(0.3, 0.35, 0.2, 0.3, 1e-1, None, None),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(classifier(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=samples(64))
    np.savez(tmp_path / "unseen.npz", x=samples(40, seed=1))
    assert cli("collect", "net.onnx", "--data", "data.npz", "-o", "stats").code == 0
    return tmp_path


def test_models_of_falling_latency_and_rising_loss(known_machine):
    statistics = kfe.collect(classifier(), samples(64))
    points = kfe.frontier(classifier(), statistics, round_to=2)
    assert len(points) > 3
    budgets, latencies, losses = np.array([(p.budget, p.latency, p.predicted_loss) for p in points]).T
    assert (np.diff(budgets) < 0).all()
    assert (np.diff(losses) > 0).all()
    assert latencies[-1] < latencies[0] < 1
    assert all(point.measured_loss is None and point.agreement is None for point in points)
    assert all(0 < point.macs < 1 for point in points)


def test_fidelity_is_measured_where_there_are_samples(known_machine):
    statistics = kfe.collect(classifier(), samples(64))
    points = kfe.frontier(classifier(), statistics, {"x": samples(40, seed=1)}, round_to=2)
    measured = [point.measured_loss for point in points]
    assert all(loss is not None and loss >= 0 for loss in measured)
    assert measured[-1] > measured[0]
    assert all(0 <= point.agreement <= 1 for point in points)


def test_a_model_that_nothing_makes_faster_has_none(known_machine):
    known_machine.seconds = lambda workload: 1e-6
    with pytest.raises(KfeError, match="no form is faster than the layers as they are"):
        kfe.frontier(classifier(), kfe.collect(classifier(), samples(64)), round_to=2)


def test_plots_and_numbers(tmp_path):
    for points in (POINTS, POINTS[2:]):
        save_frontier(points, "net", tmp_path / "f.png")
        assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
        save_frontier(points, "net", tmp_path / "f.html")
        page = (tmp_path / "f.html").read_text()
        assert "predicted loss" in page
        assert ("measured loss" in page) == ("same decision" in page) == (len(points) > 1)
        save_frontier(points, "net", tmp_path / "f.json")
        written = json.loads((tmp_path / "f.json").read_text())
        assert written == {"model": "net", "points": [point.as_dict() for point in points]}


def test_what_cannot_be_plotted_is_refused_early(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"f.gif: a frontier is written as .png, .html, .json"):
        check_plot(tmp_path / "f.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'onnx-kfe\[report\]'"):
        check_plot(tmp_path / "f.png")
    check_plot(tmp_path / "f.json")


def test_the_command(cli, folder, known_machine):
    asked = ("plan", "net.onnx", "--stats", "stats", "--frontier", "--round-to", 2)
    outcome = cli(*asked, "--data", "unseen.npz", "-o", "f.png")
    assert outcome.code == 0, outcome.err
    assert "same decision" in outcome.out
    assert "written: f.png" in outcome.out
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    printed = json.loads(cli(*asked, "-o", "f.json", "--json").out)
    assert json.loads((folder / "f.json").read_text())["points"] == printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frontier", "--macs", 0.5, "-o", "f.png"), "--frontier sweeps the latency by itself: drop the budgets"),
        (("--frontier", "-o", "f.txt"), "a frontier is written as"),
        (("--macs", 0.5, "--data", "data.npz", "-o", "p.json"), "--data is what --frontier measures on"),
    ],
)
def test_options_that_do_not_go_together(cli, folder, options, message):
    outcome = cli("plan", "net.onnx", "--stats", "stats", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert not list(folder.glob("f.*"))
