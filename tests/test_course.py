"""Pruning and training in one call: budgets met, epochs counted, one result however often it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kfe as kfe
from onnx_kfe import _prune
from onnx_kfe.cli import main
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import load, save
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.schedules import SCHEDULES
from tests.networks import classifier, samples
from tests.tiny import run

X = samples(120)
BUDGET = kfe.Macs(0.45)


class Notes(Progress):
    """Keeps what is said; interrupts at a note that begins so, once."""

    def __init__(self, interrupt_at: str | None = None, times: int = 1) -> None:
        self.said: list[str] = []
        self._interrupt_at, self._left = interrupt_at, times

    def note(self, text: str) -> None:
        self.said.append(text)
        if self._interrupt_at is not None and text.startswith(self._interrupt_at):
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt

    @property
    def epochs(self) -> list[str]:
        return [text.split(":")[0] for text in self.said if text.startswith("epoch")]


def pruned(**options: Any) -> kfe.Result:
    options = {"measure": False, "threads": 1, "round_to": 1} | options
    return kfe.prune(classifier(), {"x": X}, BUDGET, **options)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("basis", ["channel", "kfe"])
def test_schedules_meet_the_budget_in_the_epochs_given(name: str, basis: str) -> None:
    notes = Notes()
    result = pruned(schedule=name, basis=basis, epochs=3, progress=notes)
    macs = result.report["macs"]
    assert 0.3 < macs["after"] / macs["before"] <= 0.45
    assert notes.epochs == ["epoch 1/2", "epoch 2/2", "epoch 1/1"]
    assert bool(result.plan.channels) == (basis == "channel")
    assert bool(result.plan.changed) == (basis == "kfe")
    logits = run(result.model, {"x": X})["logits"]
    assert np.isfinite(logits).all()
    agreed = logits.argmax(1) == run(classifier(), {"x": X})["logits"].argmax(1)
    assert agreed.mean() > 0.6  # of five classes


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"method": "magnitude-l1", "iterations": 3}, ["epoch 1/1", "epoch 1/1", "epoch 1/2", "epoch 2/2"]),
        ({"method": "c-obd", "basis": "kfe", "iterations": 2}, ["epoch 1/2", "epoch 2/2"] * 2),
        ({}, [f"epoch {n}/4" for n in (1, 2, 3, 4)]),
    ],
)
def test_epochs_are_divided_over_the_rounds(options: dict[str, Any], epochs: list[str]) -> None:
    notes = Notes()
    result = pruned(**options, epochs=4, progress=notes)
    assert notes.epochs == epochs
    assert result.report["macs"]["after"] <= 0.45 * result.report["macs"]["before"]


@pytest.mark.parametrize("at", ["epoch 1/2", "epoch 2/2"])
def test_an_interrupted_run_goes_on(at: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "incremental", "epochs": 4}
    whole = run(pruned(**options).model, {"x": X})["logits"]
    for times in (1, 2):  # while it prunes, and afterwards
        folder = tmp_path / f"{times}"
        with pytest.raises(KeyboardInterrupt):
            pruned(**options, checkpoint=folder, progress=Notes(at, times))
        notes = Notes()
        resumed = pruned(**options, checkpoint=folder, progress=notes)
        assert any(text.startswith("going on after") for text in notes.said)
        np.testing.assert_array_equal(run(resumed.model, {"x": X})["logits"], whole)
        assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "gradual", "epochs": 2}, "incremental"),
        ({"schedule": "incremental"}, "--finetune 2"),
        ({"schedule": "incremental", "epochs": 2, "method": "forms"}, "drop --method"),
        ({"schedule": "incremental", "epochs": 2, "method": "eigendamage-depthwise"}, "drop --method"),
        ({"schedule": "incremental", "epochs": 2, "iterations": 2}, "drop --channels and --iterations"),
        ({"method": "taylor", "iterations": 3, "epochs": 2}, "--iterations 3"),
        ({"epochs": 1, "max_drop": 0.1, "plan": None}, "drop --channels, --iterations and --finetune"),
        ({"epochs": 1, "data": None}, "give --data"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kfe.prune(classifier(), **({"data": {"x": X}, "plan": BUDGET} | options))


@pytest.mark.usefixtures("quick_benchmark")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(load(classifier()), tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    options = "--schedule probabilistic --finetune 2 --basis kfe --macs 0.5 --threads 1 --json"
    arguments = ["prune", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "x.npz"), *options.split()]
    assert main([*arguments, "-o", str(tmp_path / "small.onnx")]) == 0
    assert '"measured_loss"' in capsys.readouterr().out
    assert run(str(tmp_path / "small.onnx"), {"x": X})["logits"].shape == (120, 5)
    assert not (tmp_path / "small.onnx.refit").exists()


def test_statistics_take_no_more_samples_than_are_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prune, "_MOST_FITTED", 50)
    notes = Notes()
    result = pruned(epochs=1, refit=False, progress=notes)
    assert result.statistics is not None
    assert result.statistics.samples == 50
    assert notes.epochs == ["epoch 1/1"]
    plain = pruned(refit=False)
    assert plain.statistics is not None
    assert plain.statistics.samples == 96
