from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

import onnx_kfe as kfe
from onnx_kfe.progress import Progress
from tests.networks import CLASSES, classifier, samples
from tests.tiny import node, run, tiny, weights

pytestmark = pytest.mark.usefixtures("quick_benchmark")


class Reader:
    """A calibration reader that cannot be rewound."""

    def __init__(self, arrays: np.ndarray) -> None:
        self.arrays = iter(arrays)

    def get_next(self) -> dict[str, np.ndarray] | None:
        array = next(self.arrays, None)
        return None if array is None else {"x": array[None]}


class Recorded(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int | None]] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator:
        done = self.stages.setdefault(title, [total, 0])
        yield lambda steps: done.__setitem__(1, done[1] + steps)

    def note(self, text: str) -> None:
        self.notes.append(text)


def macs_by_hand(model: onnx.ModelProto, side: int = 8) -> int:
    """Every convolution of these networks keeps the extent, and the Gemm runs once."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    total = 0
    for each in model.graph.node:
        if each.op_type == "Conv":
            total += side * side * int(np.prod(shapes[each.input[1]]))
        elif each.op_type in ("Gemm", "MatMul"):
            total += int(np.prod(shapes[each.input[1]]))
    return total


def parameters_by_hand(model: onnx.ModelProto) -> int:
    floats = (onnx.TensorProto.FLOAT,)
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in floats)


def equal(first: kfe.Statistics, second: kfe.Statistics, rtol: float) -> None:
    assert first.samples == second.samples
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        other = second.layers[name]
        for key in ("input_second_moment", "input_sum", "cotangent_second_moment", "positions", "samples"):
            a, b = np.asarray(getattr(layer, key)), np.asarray(getattr(other, key))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=f"{name} {key}")


@pytest.fixture(scope="module")
def statistics() -> kfe.Statistics:
    return kfe.collect(classifier(), samples(64))


# The whole way


def test_collect_plan_prune_save(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=samples(64))
    before = (tmp_path / "net.onnx").read_bytes()
    statistics = kfe.collect(tmp_path / "net.onnx", tmp_path / "data.npz")
    plan = kfe.plan(tmp_path / "net.onnx", statistics, kfe.Macs(0.6))
    result = kfe.prune(tmp_path / "net.onnx", statistics, plan)
    result.save(tmp_path / "small.onnx")

    written = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert isinstance(result.model, onnx.ModelProto)
    assert result.report["macs"] == {"before": macs_by_hand(classifier()), "after": macs_by_hand(written)}
    assert result.report["parameters"] == {
        "before": parameters_by_hand(classifier()), "after": parameters_by_hand(written)
    }  # fmt: skip
    assert macs_by_hand(written) <= 0.6 * macs_by_hand(classifier())
    assert [value.name for value in (*written.graph.input, *written.graph.output)] == ["x", "logits"]
    assert (tmp_path / "net.onnx").read_bytes() == before
    x = {"x": samples(5, seed=1)}
    np.testing.assert_allclose(run(str(tmp_path / "small.onnx"), x)["logits"], run(written, x)["logits"])


def test_same_kind_comes_back_and_inputs_stay_as_they_are(statistics: kfe.Statistics, tmp_path: Path) -> None:
    proto = classifier()
    model = ir.from_proto(classifier())
    kept, kept_statistics = copy.deepcopy(proto), copy.deepcopy(statistics)
    from_proto = kfe.prune(proto, statistics, kfe.Macs(0.6), measure=False).model
    from_ir = kfe.prune(model, statistics, kfe.Macs(0.6), measure=False).model
    assert isinstance(from_proto, onnx.ModelProto)
    assert isinstance(from_ir, ir.Model)
    assert proto == kept
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(kept))
    equal(statistics, kept_statistics, rtol=0)
    x = {"x": samples(4)}
    np.testing.assert_array_equal(run(from_proto, x)["logits"], run(from_ir, x)["logits"])
    onnx.save(proto, tmp_path / "m.onnx")
    result = kfe.prune(tmp_path / "m.onnx", statistics, kfe.Macs(0.6), measure=False)
    with pytest.raises(kfe.UsageError, match="would overwrite its input"):
        result.save(tmp_path / "m.onnx")


def test_statistics_and_plan_reproduce_a_single_prune() -> None:
    at_once = kfe.prune(classifier(), samples(64), kfe.Macs(0.6), measure=False)
    assert at_once.statistics is not None
    plan = kfe.plan(classifier(), at_once.statistics, kfe.Macs(0.6))
    in_steps = kfe.prune(classifier(), samples(64), plan, statistics=at_once.statistics, measure=False)
    assert at_once.plan.choices == in_steps.plan.choices
    assert at_once.statistics.samples == pytest.approx(0.8 * 64, abs=1)
    x = {"x": samples(4)}
    np.testing.assert_array_equal(run(at_once.model, x)["logits"], run(in_steps.model, x)["logits"])


def test_default_budget_is_three_quarters_of_the_macs(statistics: kfe.Statistics) -> None:
    macs = kfe.prune(classifier(), statistics, measure=False).report["macs"]
    assert 0.5 * macs["before"] < macs["after"] <= 0.75 * macs["before"]


def test_both_budgets_hold(statistics: kfe.Statistics) -> None:
    report = kfe.prune(classifier(), statistics, [kfe.Macs(0.9), kfe.Params(0.6)], measure=False).report
    assert report["macs"]["after"] <= 0.9 * report["macs"]["before"]
    assert report["parameters"]["after"] <= 0.6 * report["parameters"]["before"]
    assert report["budget"] == "--macs 0.9 --params 0.6"


# Statistics in parts and in files


def image_folder(folder: Path, count: int, corrupt: int | None) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number:03}.png")
    if corrupt is not None:
        (folder / f"{corrupt:03}.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(("count", "corrupt"), [(150, None), (150, 70)])
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_merge_to_the_single_run(tmp_path: Path, count: int, corrupt: int | None, shards: int) -> None:
    data = image_folder(tmp_path / "images", count, corrupt)
    whole = kfe.collect(classifier(), data, seed=3)
    parts = [kfe.collect(classifier(), data, seed=3, shard=(index, shards)) for index in range(shards)]
    assert whole.samples == count - (corrupt is not None)
    assert all(part.samples < whole.samples for part in parts)
    equal(kfe.merge(parts), whole, rtol=1e-6)
    equal(kfe.merge(parts[::-1]), whole, rtol=1e-6)


def test_statistics_saved_and_loaded_are_identical(statistics: kfe.Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "s.safetensors")
    loaded = kfe.Statistics.load(tmp_path / "s.safetensors")
    equal(loaded, statistics, rtol=0)
    for key in ("model_hash", "seed", "samples", "heads", "input_shapes", "skipped", "shards", "versions"):
        assert getattr(loaded, key) == getattr(statistics, key), key


# Data that come only once


@pytest.mark.parametrize("kind", ["reader", "generator"])
def test_data_that_come_only_once(kind: str, statistics: kfe.Statistics) -> None:
    def data() -> object:
        arrays = samples(64)
        return Reader(arrays) if kind == "reader" else ({"x": array[None]} for array in arrays)

    equal(kfe.collect(classifier(), data()), statistics, rtol=1e-9)
    result = kfe.prune(classifier(), data(), kfe.Macs(0.6))
    again = kfe.prune(classifier(), samples(64), kfe.Macs(0.6))
    assert result.plan.choices == again.plan.choices
    assert result.quality is not None
    assert result.quality == again.quality


def test_no_more_is_read_of_a_stream_than_is_used() -> None:
    asked = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            asked.append(len(asked))
            yield {"x": samples(1, seed=len(asked))}

    result = kfe.prune(classifier(), endless(), kfe.Macs(0.6), max_samples=20)
    assert len(asked) == 20
    assert result.quality is not None
    assert result.statistics is not None
    assert result.statistics.samples + result.quality.samples == 20


# Quality


def test_quality_without_labels_is_measured_on_held_back_samples() -> None:
    result = kfe.prune(classifier(), samples(64), kfe.Macs(0.6))
    assert result.quality is not None
    assert result.statistics is not None
    (head,) = result.quality.heads
    assert (head.name, head.kind) == ("logits", "categorical")
    assert head.kl is not None
    assert head.kl > 0
    assert result.quality.accuracy is None
    assert result.proven
    assert result.quality.samples == 64 - result.statistics.samples
    assert result.measured_on == f"{result.quality.samples} held-back samples"
    assert [timing.name for timing in result.timings] == ["original", "pruned"]


def test_accuracy_equals_a_direct_computation(tmp_path: Path) -> None:
    x = samples(50)
    labels = np.random.default_rng(0).integers(0, CLASSES, 50)
    labels[:30] = run(classifier(), {"x": x[:30]})["logits"].argmax(1)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    smaller = kfe.prune(classifier(), samples(64, seed=1), kfe.Macs(0.6), measure=False).model
    quality = kfe.evaluate(smaller, tmp_path / "data.npz", reference=classifier())
    new, old = (run(model, {"x": x})["logits"] for model in (smaller, classifier()))
    assert quality.samples == 50
    assert quality.accuracy is not None
    assert quality.reference_accuracy is not None
    assert quality.accuracy.top1.value == pytest.approx((new.argmax(1) == labels).mean())
    assert quality.reference_accuracy.top1.value == pytest.approx((old.argmax(1) == labels).mean())
    assert quality.heads[0].agreement is not None
    assert quality.heads[0].agreement.value == pytest.approx((new.argmax(1) == old.argmax(1)).mean())
    log_p, log_q = (logits - np.logaddexp.reduce(logits, 1, keepdims=True) for logits in (old, new))
    assert quality.heads[0].kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rel=1e-4)


def test_evaluation_data_leave_all_other_samples_to_the_statistics() -> None:
    test = {"x": samples(30, seed=1), "labels": np.arange(30) % CLASSES}
    result = kfe.prune(classifier(), samples(40), kfe.Macs(0.6), evaluation_data=test)
    assert result.statistics is not None
    assert result.quality is not None
    assert (result.statistics.samples, result.quality.samples) == (40, 30)
    assert result.quality.accuracy is not None
    assert result.quality.reference_accuracy is not None
    assert result.measured_on == "30 given samples"


def test_labels_that_happen_to_lie_beside_a_detector_are_left_out() -> None:
    """Labels of whole images are no labels of the places of a dense prediction."""
    model = classifier()
    del model.graph.node[-3:]  # what is left predicts 16 channels at 8 x 8 places
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("r2", 1, ["N", 16, 8, 8]))
    progress = Recorded()
    data = {"x": samples(40), "labels": np.zeros(40, np.int64)}
    result = kfe.prune(model, data, kfe.Macs(0.8), heads={"r2": "categorical"}, progress=progress)
    assert result.quality is not None
    assert result.quality.accuracy is None
    assert any("labels are left out" in note for note in progress.notes)


# Without data


def test_without_data_an_exactly_low_rank_layer_is_found() -> None:
    model = classifier(low_rank=4)
    result = kfe.prune(model)
    assert list(result.plan.changed) == ["conv2"]
    assert not result.proven
    assert result.measured_on == "16 synthetic inputs"
    x = {"x": samples(8)}
    np.testing.assert_allclose(run(result.model, x)["logits"], run(model, x)["logits"], rtol=1e-3, atol=1e-4)
    assert result.report["macs"]["after"] < result.report["macs"]["before"]


def test_without_data_an_ordinary_model_stays_as_it_is() -> None:
    progress = Recorded()
    result = kfe.prune(classifier(), progress=progress)
    assert not result.plan.changed
    assert result.report["macs"]["after"] == result.report["macs"]["before"]
    assert any("quality will be unproven" in note for note in progress.notes)
    with pytest.raises(kfe.BudgetError, match=r"without data, --macs 0.5 cannot be met: .*give --data"):
        kfe.prune(classifier(), None, kfe.Macs(0.5))


# Shapes, batches, progress


def test_costs_are_counted_at_the_shapes_of_the_data() -> None:
    model = classifier()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "HW"[axis - 2]
    result = kfe.prune(model, {"x": samples(40)[:, :, :6, :6]}, kfe.Macs(0.7), measure=False)
    assert result.report["macs"]["before"] == macs_by_hand(classifier(), side=6)
    assert result.report["input_shapes"] == {"x": [1, 3, 6, 6]}


def test_shapes_of_the_data_where_no_others_fit() -> None:
    """Positions are added, of which there are as many as the data has."""
    constants = {"p": weights(5, 8), "w": weights(8, 8), "v": weights(8, 4, seed=1)}
    nodes = [
        node("Add", ["x", "p"], ["h"]), node("MatMul", ["h", "w"], ["a"], "first"), node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "v"], ["y"], "second"),
    ]  # fmt: skip
    nodes.insert(0, node("Relu", ["z"], ["x"]))
    model = tiny(nodes, {"z": ["n", "t", 8]}, {"y": ["n", "t", 4]}, constants)
    assert {layer.reason for layer in kfe.inspect(model).layers} == {"shapes unknown: give --input-shape"}
    data = weights(40, 5, 8, seed=2)
    collected = kfe.collect(model, data)
    assert list(collected.layers) == ["first", "second"]
    for given in (data, collected):
        macs = kfe.prune(model, given, kfe.Macs(0.9), round_to=2, measure=False).report["macs"]
        assert macs["before"] == 5 * (64 + 32)
        assert macs["after"] <= 0.9 * macs["before"]
    with pytest.raises(kfe.BudgetError, match="no layer can be pruned"):
        kfe.prune(model)


def fixed_batches() -> onnx.ModelProto:
    model = classifier(low_rank=4)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    return model


def test_a_model_of_fixed_batches_without_data() -> None:
    result = kfe.prune(fixed_batches())
    assert list(result.plan.changed) == ["conv2"]
    assert result.report["macs"]["before"] == macs_by_hand(classifier())
    assert result.quality is not None
    assert result.quality.samples == 4
    with pytest.raises(kfe.KfeError, match="too few samples for one batch"):
        kfe.evaluate(result.model, samples(3), reference=fixed_batches())


def test_a_model_of_fixed_batches() -> None:
    result = kfe.prune(fixed_batches(), samples(64), kfe.Macs(0.7))
    assert result.report["macs"]["before"] == macs_by_hand(classifier())
    assert result.quality is not None
    assert result.quality.samples % 4 == 0


def test_data_that_never_vary_leave_a_model_that_works() -> None:
    result = kfe.prune(classifier(), np.ones((40, 3, 8, 8), np.float32), kfe.Macs(0.6))
    assert result.report["macs"]["after"] <= 0.6 * result.report["macs"]["before"]


def test_progress_is_told_every_sample_and_layer() -> None:
    progress = Recorded()
    result = kfe.prune(classifier(), samples(64), kfe.Macs(0.6), progress=progress)
    assert result.statistics is not None
    assert progress.stages["collecting"] == [result.statistics.samples] * 2
    assert progress.stages["rewriting"] == [len(result.plan.changed)] * 2
    assert progress.stages["measuring quality"] == [64 - result.statistics.samples] * 2
    assert {"planning", "measuring latency"} < set(progress.stages)
    assert any("heads: logits categorical (assumed; change with --head)" in note for note in progress.notes)


@pytest.mark.parametrize(("count", "said"), [(10, True), (200, False)])
def test_too_few_samples_for_a_covariance_are_said_with_how_many_it_takes(count: int, said: bool) -> None:
    """The Gemm has 16 inputs and one position a sample; a fifth of the samples is held back."""
    progress = Recorded()
    kfe.prune(classifier(), samples(count), kfe.Macs(0.8), measure=False, progress=progress)
    notes = [note for note in progress.notes if "few samples" in note]
    assert len(notes) == said
    assert not said or "'fc' takes 16 at least, of which there are 8" in notes[0]


# The quality floor


@pytest.mark.parametrize(("metric", "floor"), [("agreement", 0.08), ("kl", 0.02), ("accuracy", 0.08)])
def test_the_smallest_model_above_a_floor(metric: str, floor: float) -> None:
    x = samples(200)
    labels = run(classifier(), {"x": x})["logits"].argmax(1)
    progress = Recorded()
    result = kfe.prune(classifier(), {"x": x, "labels": labels}, max_drop=floor, metric=metric, round_to=2,
                       refit=False, progress=progress)  # fmt: skip
    assert result.floor is not None
    assert result.quality is not None
    assert result.statistics is not None
    chosen = result.floor.chosen
    assert chosen.drop <= floor * (1 + 1e-6)
    assert chosen.low <= chosen.drop <= chosen.high
    assert chosen == min((t for t in result.curve if t.drop <= floor * (1 + 1e-6)), key=lambda t: t.fraction)
    assert chosen.fraction == result.report["macs"]["after"] / result.report["macs"]["before"] < 1
    measured = {
        "agreement": 1 - result.quality.heads[0].agreement.value,  # type: ignore[union-attr]
        "kl": result.quality.divergence,
        "accuracy": 1 - result.quality.accuracy.top1.value,  # type: ignore[union-attr]
    }
    assert chosen.drop == pytest.approx(measured[metric])  # the floor was measured on the samples held back
    assert result.quality.samples == 200 - result.statistics.samples
    assert len(result.curve) <= 8
    assert [trial.fraction for trial in result.curve] == sorted(trial.fraction for trial in result.curve)
    assert sum(note.startswith("attempt ") for note in progress.notes) == len(result.curve)
    report = result.report["floor"]
    assert [trial["met"] for trial in report["curve"]] == [t.drop <= floor * (1 + 1e-6) for t in result.curve]
    assert result.report["budget"] == f"--max-drop {floor} --metric {metric}"


def closeness(outputs: dict[str, np.ndarray], original: dict[str, np.ndarray], labels: object) -> float:
    return -float(np.abs(outputs["logits"] - original["logits"]).mean())


@pytest.mark.parametrize(
    ("metric", "floor"), [("cosine", 0.05), ("psnr", 80.0), (f"{__name__}:closeness", 0.5), ("spearman", 0.2)]
)
def test_floors_in_other_metrics(metric: str, floor: float) -> None:
    result = kfe.prune(classifier(), samples(100), max_drop=floor, metric=metric, heads={"logits": "gaussian"},
                       round_to=2, refit=False, measure=False)  # fmt: skip
    assert result.floor is not None
    chosen = result.floor.chosen
    assert 0 < chosen.drop <= floor
    assert chosen.low <= chosen.drop <= chosen.high
    assert chosen.fraction < 1


def test_a_metric_that_does_not_fit_is_refused_before_any_work() -> None:
    progress = Recorded()
    with pytest.raises(
        kfe.UsageError, match=r"--metric top-5: the model has no categorical output of 6 classes or more"
    ):
        kfe.prune(classifier(), samples(100), max_drop=0.1, metric="top-5", progress=progress)
    assert not any(note.startswith("heads:") for note in progress.notes)


def test_a_floor_is_measured_on_held_back_samples_beside_evaluation_data() -> None:
    result = kfe.prune(classifier(), samples(100), max_drop=0.1, evaluation_data=samples(30, seed=1), measure=False)
    assert result.statistics is not None
    assert result.floor is not None
    assert result.statistics.samples == pytest.approx(80, abs=1)
    assert result.floor.samples == f"{100 - result.statistics.samples} held-back samples"


def test_a_floor_beside_statistics(statistics: kfe.Statistics) -> None:
    progress = Recorded()
    result = kfe.prune(
        classifier(), statistics, max_drop=0.1, evaluation_data=samples(40, seed=1), measure=False, progress=progress
    )
    assert result.floor is not None
    assert result.floor.samples == "40 given samples"
    assert any("sound only if the statistics" in note for note in progress.notes)
    with pytest.raises(kfe.UsageError, match="give --data beside the statistics"):
        kfe.prune(classifier(), statistics, max_drop=0.1)


def test_a_floor_on_one_sample_is_still_json() -> None:
    given = samples(1, seed=1)
    result = kfe.prune(classifier(), samples(20), max_drop=0.5, metric="kl", max_samples=5, evaluation_data=given,
                       measure=False)  # fmt: skip
    assert result.floor is not None
    assert result.floor.samples == "1 held-back samples"
    assert result.floor.chosen.high == np.inf
    assert json.loads(json.dumps(result.report, allow_nan=False))["floor"]["chosen"]["high"] is None


def test_measured_beside_predicted_loss(statistics: kfe.Statistics) -> None:
    result = kfe.prune(classifier(), statistics, kfe.Macs(0.6), evaluation_data=samples(40, seed=1))
    assert result.quality is not None
    assert result.report["measured_loss"] == result.quality.heads[0].kl
    assert result.loss_ratio == pytest.approx(result.quality.heads[0].kl / result.predicted_loss)  # type: ignore[operator]
    assert kfe.prune(classifier()).loss_ratio is None
