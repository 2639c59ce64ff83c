"""A detector whose only outputs are what non-maximum suppression leaves, through `prune` and `evaluate`."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_kfe as kfe
from onnx_kfe.calibration import find_heads, input_specs, open_dataset
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import load, open_network, with_outputs
from onnx_kfe.progress import Progress
from tests.tiny import node, run, weights

X = np.random.default_rng(1).standard_normal((30, 3, 8, 8)).astype(np.float32)


def detector() -> onnx.ModelProto:
    """Boxes ``[1, 64, 4]`` and probabilities of three classes ``[1, 3, 64]``, suppressed; outputs of any length."""
    constants = {
        "w0": weights(8, 3, 3, 3) / np.float32(4), "w1": weights(12, 8, 3, 3, seed=1) / np.float32(6),
        "wb": weights(4, 12, 1, 1, seed=2), "ws": weights(3, 12, 1, 1, seed=3),
        "as boxes": np.array([0, 4, -1]), "as scores": np.array([0, 3, -1]), "overlap": np.float32([0.5]),
        "threshold": np.float32([0.3]), "most": np.array([20]),
        "box": np.array([2]), "0": np.array([0]), "1": np.array([1]),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, name="conv0"),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4, name="conv1"),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "wb"], ["box map"], name="boxes"),
        node("Reshape", ["box map", "as boxes"], ["boxes by row"]),
        node("Transpose", ["boxes by row"], ["boxes"], perm=[0, 2, 1]),
        node("Conv", ["r1", "ws"], ["score map"], name="scores"),
        node("Reshape", ["score map", "as scores"], ["logits"]),
        node("Sigmoid", ["logits"], ["scores"]),
        node("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "threshold"], ["selected"]),
        node("Gather", ["selected", "box"], ["which"], axis=1),
        node("Squeeze", ["which", "1"], ["rows"]),
        node("Squeeze", ["boxes", "0"], ["all boxes"]),
        node("Gather", ["all boxes", "rows"], ["picked"]),
    ]
    graph = helper.make_graph(
        nodes, "detector", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [
            helper.make_tensor_value_info("selected", TensorProto.INT64, ["K", 3]),
            helper.make_tensor_value_info("picked", TensorProto.FLOAT, ["K", 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Notes(Progress):
    """Remembers what was noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("quick_benchmark")
def test_boxes_and_scores_that_suppression_reads_are_the_heads():
    notes = Notes()
    result = kfe.prune(detector(), {"x": X}, kfe.Macs(0.6), round_to=2, progress=notes)
    assert any("boxes by row gaussian (read by NonMaxSuppression), scores bernoulli (read by" in n for n in notes.notes)
    assert not result.statistics.skipped
    assert set(result.statistics.layers) == {"conv0", "conv1", "boxes", "scores"}
    assert result.plan.changed
    given, made = detector(), result.model
    assert [value.name for value in made.graph.output] == [value.name for value in given.graph.output]
    # Quality is that of the values inside, on which nothing was suppressed.
    inside = [head.name for head in result.quality.heads]
    assert inside == ["boxes by row", "scores"]
    errors, scatter = 0.0, []
    split = open_dataset({"x": X}, input_specs(load(given))).split(0.2)[1]
    for item in split:
        before, after = (run(with_outputs(load(model), inside), item.sample)["boxes by row"] for model in (given, made))
        errors += float(np.square(after - before).sum())
        scatter.append(before)
    rows = np.concatenate(scatter).astype(float)
    spread = np.square(rows - rows.mean((0, 1))).sum()
    assert result.quality.heads[0].relative_error == pytest.approx(np.sqrt(errors / spread), rel=1e-4)


def test_evaluate_measures_the_values_inside():
    quality = kfe.evaluate(detector(), {"x": X[:4]}, reference=detector())
    assert quality.samples == 4
    assert [(head.name, head.relative_error, head.kl) for head in quality.heads] == [
        ("boxes by row", 0.0, None), ("scores", None, pytest.approx(0.0, abs=1e-6)),
    ]  # fmt: skip


def test_training_needs_outputs():
    with pytest.raises(UsageError, match="boxes by row, scores are inside the model"):
        kfe.prune(detector(), {"x": X}, kfe.Macs(0.6), epochs=1)
    assert [head.read_by for head in find_heads(open_network(detector()))] == ["NonMaxSuppression"] * 2
