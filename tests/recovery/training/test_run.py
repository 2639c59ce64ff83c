"""Whole runs on a tiny pruned classifier: it nears its teacher, goes on where it was, and keeps what was best."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from scipy import special

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.training import _trainer
from onnx_kfe.recovery.training._lesson import Lesson
from tests.cases import load_case
from tests.networks import CLASSES, classifier, samples
from tests.tiny import run

DATA = {"x": samples(160)}
QUICK: dict[str, Any] = {
    "epochs": 3, "batch": 32, "optimizer": "sgd", "learning_rate": 0.02, "precision": "float32", "threads": 1,
    "device": "cpu",
}  # fmt: skip
SOAP = {"optimizer": "soap", "learning_rate": 0.003, "precision": "bfloat16"}


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    return classifier()


@pytest.fixture(scope="module")
def student(teacher: onnx.ModelProto) -> onnx.ModelProto:
    """What is left of the teacher at two fifths of its MACs."""
    statistics = kfe.collect(teacher, DATA, threads=1)
    plan = kfe.plan(teacher, statistics, kfe.Macs(0.4), round_to=1)
    return kfe.prune(teacher, statistics, plan, measure=False).model


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_equal(first: onnx.ModelProto, second: onnx.ModelProto, atol: float = 0.0) -> None:
    found, expected = weights(first), weights(second)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


def changed(first: onnx.ModelProto, second: onnx.ModelProto) -> bool:
    return any(not np.array_equal(array, weights(second)[name]) for name, array in weights(first).items())


@pytest.mark.parametrize("options", [{}, SOAP, {**SOAP, "optimizer": "adamw"}], ids=["sgd", "soap", "adamw"])
def test_it_nears_its_teacher_without_labels(
    teacher: onnx.ModelProto, student: onnx.ModelProto, options: dict[str, Any]
) -> None:
    tuned = kfe.finetune(student, DATA, teacher=teacher, **{**QUICK, "epochs": 8, **options})
    assert tuned.before is not None
    assert tuned.after is not None
    assert tuned.after.samples == tuned.before.samples == 17
    assert tuned.after.divergence < 0.5 * tuned.before.divergence
    assert tuned.history[-1].loss < 0.5 * tuned.history[1].loss
    assert tuned.history[tuned.best].held_back == min(epoch.held_back for epoch in tuned.history)
    assert tuned.history[tuned.best].held_back < 0.5 * tuned.history[0].held_back
    assert list(map(str, student.graph.node)) == list(map(str, tuned.model.graph.node))
    others = {"x": samples(200, seed=5)}
    original, before, after = (special.softmax(run(m, others)["logits"], 1) for m in (teacher, student, tuned.model))
    divergences = [special.rel_entr(original, other).sum(1).mean() for other in (before, after)]
    assert divergences[1] < 0.5 * divergences[0]


def test_a_seed_gives_one_result(teacher: onnx.ModelProto, student: onnx.ModelProto) -> None:
    first, second, third = (
        kfe.finetune(student, DATA, teacher=teacher, seed=seed, measure=False, **QUICK) for seed in (0, 0, 1)
    )
    assert_equal(first.model, second.model)
    assert first.history == second.history
    assert changed(first.model, third.model)


def test_labels_alone(student: onnx.ModelProto, teacher: onnx.ModelProto) -> None:
    labels = run(teacher, DATA)["logits"].argmax(1)
    assert len(np.unique(labels)) > 2
    data = {**DATA, "labels": labels}
    tuned = kfe.finetune(student, data, evaluation_data=data, **{**QUICK, "epochs": 8, "learning_rate": 0.05})
    assert tuned.before is not None
    assert tuned.after is not None
    assert tuned.after.heads == ()
    assert tuned.after.accuracy.top1.value > max(0.9, tuned.before.accuracy.top1.value)
    assert tuned.measured_on == "160 given samples"


def test_labels_beside_a_teacher_have_their_share(student: onnx.ModelProto, teacher: onnx.ModelProto) -> None:
    data = {**DATA, "labels": np.zeros(160, np.int64)}
    shares = [
        kfe.finetune(student, data, teacher=teacher, label_share=share, measure=False, **QUICK).model
        for share in (None, 0.0, 0.5)
    ]
    assert_equal(shares[0], shares[1])
    first = [(run(model, DATA)["logits"].argmax(1) == 0).mean() for model in shares]
    assert first[2] > first[1] + 0.1


class Interrupting(Progress):
    """Presses Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.notes = steps, []

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        def advance(samples: int) -> None:
            self.left -= title.startswith("epoch")
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def heeding() -> Iterator[None]:
    """Interrupts are heeded even where the tests run in the background."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_interrupted_it_goes_on_to_the_same_end(
    teacher: onnx.ModelProto, student: onnx.ModelProto, tmp_path: Path, steps: int, optimizer: str
) -> None:
    options: dict[str, Any] = {**QUICK, "teacher": teacher, "optimizer": optimizer, "measure": False}
    whole = kfe.finetune(student, DATA, **options)
    folder = tmp_path / "state"
    shown = Interrupting(steps)
    with pytest.raises(KeyboardInterrupt):
        kfe.finetune(student, DATA, checkpoint=folder, progress=shown, **options)
    assert f"interrupted after {steps} of 12 steps: the same command goes on from here" in shown.notes
    again = Interrupting(-1)
    resumed = kfe.finetune(student, DATA, checkpoint=folder, progress=again, **options)
    assert f"going on after {steps} of 12 steps" in again.notes
    assert_equal(resumed.model, whole.model)
    assert resumed.history == whole.history
    assert folder.exists()
    resumed.save(tmp_path / "tuned.onnx")
    assert not folder.exists()
    assert_equal(onnx.load(tmp_path / "tuned.onnx"), whole.model)


@pytest.mark.usefixtures("heeding")
def test_a_checkpoint_of_another_run_is_ignored(
    teacher: onnx.ModelProto, student: onnx.ModelProto, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**QUICK, "teacher": teacher, "measure": False}
    with pytest.raises(KeyboardInterrupt):
        kfe.finetune(student, DATA, checkpoint=tmp_path, progress=Interrupting(5), **options)
    state = (tmp_path / "state.safetensors").read_bytes()
    for data, other in ((DATA, {"temperature": 1.0}), ({"x": samples(160, seed=9)}, {}), (DATA, {})):
        if data is DATA and not other:
            (tmp_path / "state.safetensors").write_bytes(state[:-100])
        shown = Interrupting(-1)
        tuned = kfe.finetune(student, data, checkpoint=tmp_path, progress=shown, **{**options, **other})
        assert any("starting anew" in note for note in shown.notes)
        assert_equal(tuned.model, kfe.finetune(student, data, **{**options, **other}).model)
        (tmp_path / "state.safetensors").write_bytes(state)


def test_its_own_teacher_cannot_be_bettered(teacher: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Interrupting(-1)
    options = {**QUICK, "schedule": "cosine", "learning_rate": 0.5}
    monkeypatch.setattr(_trainer, "_EXPLODED", float("inf"))
    tuned = kfe.finetune(teacher, DATA, teacher=teacher, progress=shown, measure=False, **options)
    assert tuned.best == 0
    assert min(epoch.held_back for epoch in tuned.history) == pytest.approx(0, abs=1e-6)
    assert any("it stays as it was" in note for note in shown.notes)
    assert_equal(tuned.model, teacher)


@pytest.mark.parametrize(
    ("losses", "best", "stopped"),
    [
        ([1.0, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 0.1], 1, "the loss on held-back samples has risen for 5 epochs"),
        ([1.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 0.9], 7, None),  # up at a high rate, and down again
    ],
)
def test_it_stops_where_the_loss_goes_on_rising(
    teacher: onnx.ModelProto, student: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch,
    losses: list[float], best: int, stopped: str | None,
) -> None:  # fmt: skip
    left = iter(losses)
    monkeypatch.setattr(Lesson, "measure", lambda *arguments: (next(left), None))
    options = {**QUICK, "epochs": 7, "schedule": "cosine", "measure": False}
    tuned = kfe.finetune(student, DATA, teacher=teacher, **options)
    assert (tuned.best, tuned.stopped) == (best, stopped)
    assert [epoch.held_back for epoch in tuned.history] == losses[: 7 if stopped else 8]


def test_what_diverges_at_once_is_an_error(teacher: onnx.ModelProto, student: onnx.ModelProto) -> None:
    with pytest.raises(KfeError, match=r"diverged in epoch 1.*try a lower --learning-rate"):
        kfe.finetune(student, DATA, teacher=teacher, measure=False, **{**QUICK, "learning_rate": 1e6})


def test_what_diverges_later_keeps_what_was_gained(
    teacher: onnx.ModelProto, student: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kfe.finetune(student, DATA, teacher=teacher, measure=False, seed=3, **QUICK)
    loss, calls = Lesson.loss, []

    def exploding(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        return loss(*arguments) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(Lesson, "loss", exploding)
    shown = Interrupting(-1)
    tuned = kfe.finetune(student, DATA, teacher=teacher, measure=False, seed=3, progress=shown, **QUICK)
    assert tuned.best == 1
    assert tuned.history == one.history[:2]
    assert tuned.stopped == "diverged in epoch 2 at step 3: loss nan"
    assert any(note.endswith("the weights are those of epoch 1") for note in shown.notes)
    assert all(np.isfinite(array).all() for array in weights(tuned.model).values())
    assert changed(tuned.model, student)


def test_a_batch_that_the_model_fixes_is_kept(teacher: onnx.ModelProto, student: onnx.ModelProto) -> None:
    """Gradients are summed over the model's batches: nearly the result of whole ones."""
    fixed = []
    for model in (teacher, student):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        for value in (*copy.graph.input, *copy.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 4
        fixed.append(copy)
    options = {**QUICK, "measure": False, "evaluation_data": {"x": samples(16, seed=2)}}
    whole = kfe.finetune(student, DATA, teacher=teacher, **options)
    parts = kfe.finetune(fixed[1], DATA, teacher=fixed[0], **options)
    assert_equal(parts.model, whole.model, atol=1e-5)
    assert changed(whole.model, student)


def test_quantities_and_batch_normalisation() -> None:
    """Of networks that give an image and that normalise batches, copies with other weights near theirs learn them."""
    for name in ("denoiser-17", "plain-dynamo"):
        case = load_case(name)
        model = case.model
        noisy = onnx.ModelProto.FromString(model.SerializeToString())
        random = np.random.default_rng(0)
        for tensor in noisy.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.ndim == 4:
                noise = 0.1 * array.std() * random.standard_normal(array.shape)
                tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
        tuned = kfe.finetune(noisy, case.inputs(64), teacher=model, **{**QUICK, "epochs": 4, "batch": 16})
        assert tuned.history[tuned.best].held_back < 0.8 * tuned.history[0].held_back, name


def test_two_processes_are_one(teacher: onnx.ModelProto, student: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(teacher, tmp_path / "net.onnx")
    onnx.save(student, tmp_path / "small.onnx")
    np.savez(tmp_path / "data.npz", **DATA)
    command = ["-m", "onnx_kfe", "finetune", "small.onnx", "--teacher", "net.onnx", "--data", "data.npz"]
    command += ["--epochs", "2", "--batch", "32", "--learning-rate", "0.02", "--optimizer", "sgd"]
    command += ["--precision", "float32", "--device", "cpu", "-o", "tuned.onnx"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: tuned.onnx") == 1
    assert len(re.findall("^epoch 2/2: loss", done.stderr, re.MULTILINE)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "net.onnx", "small.onnx", "tuned.onnx"]
    alone = kfe.finetune(student, DATA, teacher=teacher, measure=False, **{**QUICK, "epochs": 2})
    assert_equal(onnx.load(tmp_path / "tuned.onnx"), alone.model, atol=1e-5)
    assert changed(alone.model, student)


def test_an_ir_model_comes_back_as_one(teacher: onnx.ModelProto, student: onnx.ModelProto) -> None:
    given = ir.from_proto(student)
    tuned = kfe.finetune(given, DATA, teacher=ir.from_proto(teacher), measure=False, **{**QUICK, "epochs": 1})
    assert isinstance(tuned.model, ir.Model)
    assert_equal(ir.to_proto(given), student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: give a number above 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"optimizer": "lion"}, "--optimizer lion: it can be soap, adamw, sgd"),
        ({"precision": "int8"}, "--precision int8: it can be float32, bfloat16"),
        ({"schedule": "none"}, "--schedule none: it can be one-cycle, cosine"),
        ({"label_share": 2.0}, "--label-share 2: give a share from 0 to 1"),
        ({"label_share": 0.5, "teacher": None}, "without --teacher"),
        ({"device": "abacus"}, "--device abacus: torch has no such device"),
        ({"label_share": 0.5, "heads": {"logits": "gaussian"}}, "labels are of a categorical output"),
    ],
)
def test_arguments_that_cannot_be(
    teacher: onnx.ModelProto, student: onnx.ModelProto, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        kfe.finetune(student, DATA, **{"teacher": teacher, **options})


def test_augmentation_is_of_images() -> None:
    case = load_case("mlp-11")
    with pytest.raises(UsageError, match="--augment"):
        kfe.finetune(case.model, case.inputs(8), teacher=case.model, augment=True)
    assert CLASSES > 2
