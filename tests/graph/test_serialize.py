"""Models too large for one message: their constants stay where they are, and sessions share them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import _serialize, in_one_message, load, serialize
from onnx_kfe.runtime import Mapped, create_session
from tests.cases import load_case
from tests.tiny import add_external_data, node, run, tiny, weights


@pytest.fixture
def tiny_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 100)


def test_a_model_within_the_limit_is_one_message():
    model = load_case("mlp-11").model
    assert isinstance(serialize(load(model)), bytes)
    assert serialize(load(model)) == in_one_message(load(model))


@pytest.mark.usefixtures("tiny_limit")
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", ["plain-13", "attention-dynamo"])
def test_a_model_over_the_limit_runs_without_its_constants_in_the_message(tmp_path: Path, name: str, external: bool):
    case = load_case(name)
    source = add_external_data(case.model, str(tmp_path / "m.onnx")) if external else case.model
    mapped = serialize(load(source))
    assert isinstance(mapped, Mapped)
    proto = onnx.ModelProto.FromString(mapped.message)
    inside = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    assert inside < 0.1 * len(mapped)
    inputs = case.inputs(2)
    found = create_session(mapped, threads=1).run(["logits"], inputs)[0]
    np.testing.assert_allclose(found, run(case.model, inputs)["logits"], rtol=1e-4, atol=1e-4)
    mapped.write(tmp_path / "written.onnx")
    np.testing.assert_allclose(run(str(tmp_path / "written.onnx"), inputs)["logits"], found, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("tiny_limit")
def test_external_constants_are_views_of_the_mapped_file(tmp_path: Path):
    model = tiny([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 64]}, {"y": ["n", 64]}, {"w": weights(64, 64)})
    mapped = serialize(load(add_external_data(model, str(tmp_path / "m.onnx"))))
    array = mapped.constants["w"]
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert not array.flags.owndata
    assert not mapped.constants["w"].flags.writeable
    assert len(mapped) == len(mapped.message) + 64 * 64 * 4


@pytest.mark.usefixtures("tiny_limit")
def test_small_constants_and_those_of_bodies_are_in_the_message(tmp_path: Path):
    body = tiny([node("Add", ["x", "inner"], ["b"])], {}, {"b": [64]}, {"inner": weights(64)}).graph
    nodes = [
        node("If", ["t"], ["h"], then_branch=body, else_branch=body),
        node("Mul", ["h", "two"], ["a"]),
        node("Add", ["a", "w"], ["y"]),
    ]
    constants = {"t": np.array(True), "two": np.float32([2]), "w": weights(64, seed=1)}
    model = tiny(nodes, {"x": [64]}, {"y": [64]}, constants)
    path = tmp_path / "m.onnx"
    onnx.save_model(model, path, save_as_external_data=True, size_threshold=0, convert_attribute=True)
    mapped = serialize(load(path))
    assert list(mapped.constants) == ["w"]
    path.unlink()
    x = weights(64, seed=2)
    (found,) = create_session(mapped, threads=1).run(None, {"x": x})
    np.testing.assert_allclose(found, 2 * (x + weights(64)) + weights(64, seed=1), rtol=1e-6)


@pytest.mark.usefixtures("tiny_limit")
def test_one_message_over_the_limit_is_refused():
    with pytest.raises(KfeError, match="GiB of weights, over the 2 GiB that one message can hold"):
        in_one_message(load(load_case("mlp-11").model))
