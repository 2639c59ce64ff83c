from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import onnx_kfe.exporting._export as export_module
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.exporting import ModuleInput, export, export_factory, parse_dynamic, parse_input_shape
from onnx_kfe.runtime import create_session

FACTORIES = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 3)
        self.linear = nn.Linear(4, 3)

    def forward(self, x, ids):
        return self.linear(x) - self.table(ids)

number = 3
instance = nn.ReLU()

def text():
    return "module"

def broken():
    raise OSError("no weights here")
"""


class Net(nn.Module):
    """A convolution, a normalisation with statistics of its own, and dropout: wrong unless in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x)).relu())


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, 4)


class ExportsWrong(nn.Module):
    """Does something else while it is exported, as a bug of the exporter would."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_exporting() else x * 3


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


class Subtract(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"difference": a - 2 * b, "product": a * b}


class Variadic(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tensors[0] - tensors[1], tensors[1]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return create_session(model.SerializeToString()).run(None, feeds)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module of factories, in the current folder."""
    (tmp_path / "factories_for_export.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield "factories_for_export"
    sys.modules.pop("factories_for_export", None)


def test_exports_in_evaluation_mode_for_any_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = Net().train()
    net.norm.eval()
    model = export(net, (torch.randn(1, 3, 8, 8),), tmp_path / "net.onnx")

    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert onnx.load(tmp_path / "net.onnx") == model
    assert [value.name for value in model.graph.input] == ["x"]
    assert shape(model.graph.input[0]) == ["batch", 3, 8, 8]
    assert str(Path(__file__).parent).encode() not in model.SerializeToString()
    image = torch.randn(5, 3, 8, 8)
    np.testing.assert_allclose(run(model, {"x": image.numpy()})[0], net.eval()(image).detach(), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_static_export_with_an_opset(tmp_path: Path) -> None:
    model = export(Net(), (torch.randn(1, 3, 8, 8),), dynamic={}, opset=19, input_names=["image"], output_names=["y"])
    assert shape(model.graph.input[0]) == [1, 3, 8, 8]
    assert model.graph.input[0].name == "image"
    assert model.graph.output[0].name == "y"
    assert model.opset_import[0].version == 19


def test_keyword_inputs_keep_their_order_and_mappings_name_the_outputs() -> None:
    model = export(Subtract(), {"b": torch.randn(2, 3), "a": torch.randn(2, 3)})
    assert [value.name for value in model.graph.input] == ["b", "a"]
    assert [value.name for value in model.graph.output] == ["difference", "product"]
    a, b = np.float32([[5, 6, 7]]), np.float32([[1, 2, 3]])
    np.testing.assert_array_equal(run(model, {"a": a, "b": b})[0], [[3, 2, 1]])


def test_variadic_forward_takes_names_by_position() -> None:
    model = export(Variadic(), (torch.randn(2, 3), torch.randn(2, 3)), input_names=["p", "q"])
    assert [shape(value) for value in model.graph.input] == [["batch", 3]] * 2
    assert [value.name for value in model.graph.output] == ["output_0", "output_1"]


def test_large_weights_go_to_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_EXTERNAL_ABOVE", 1000)
    model = export(nn.Linear(40, 30), (torch.randn(1, 40),), tmp_path / "big.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    x = np.ones((2, 40), np.float32)
    (wanted,) = run(model, {"input": x})
    np.testing.assert_array_equal(create_session(tmp_path / "big.onnx").run(None, {"input": x})[0], wanted)


def test_half_precision_agrees_to_its_own_rounding() -> None:
    torch.manual_seed(0)
    model = export(nn.Linear(64, 8).half(), (torch.randn(2, 64).half(),))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_fixed_batch_is_reported_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(KfeError, match=r"cannot export FixedBatch: .*static shape of 2.*--dynamic none\)$"):
        export(FixedBatch(), (torch.randn(2, 3, 4),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert shape(export(FixedBatch(), (torch.randn(2, 3, 4),), dynamic={}).graph.output[0]) == [2, 3, 4]


def test_unsupported_operators_are_named() -> None:
    with pytest.raises(KfeError, match=r"cannot export Unsupported: .*eigh") as caught:
        export(Unsupported(), (torch.randn(2, 3, 3),))
    assert "\n" not in str(caught.value)
    assert "--dynamic" not in str(caught.value)


def test_a_result_that_differs_from_torch_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("before")
    with pytest.raises(KfeError, match=r"differs from torch in output 'output'.* by 0.33 of the largest value"):
        export(ExportsWrong(), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"example_inputs": (torch.randn(2, 5, 8, 8),)},
            r"Net fails in torch on inputs x \[2, 5, 8, 8\]: Runt",
        ),
        ({"opset": 11}, "cannot write Net in opset 11: name one from 18 on"),
        ({"dynamic": {"y": {0: "n"}}}, "no input 'y' to make dynamic: the inputs are x"),
        ({"dynamic": {"x": {4: "n"}}}, r"input 'x' of shape \[2, 3, 8, 8\] has no axis 4"),
        ({"input_names": ["a", "b"]}, "1 inputs have 2 names: a, b"),
        ({"output_names": ["a", "b"]}, "returns 1 tensors, but has 2 output names"),
        ({"output": "missing/model.onnx"}, "cannot write missing/model.onnx: No such file"),
        ({"output": "."}, r"cannot write \.: it is a folder"),
    ],
)
def test_export_errors(change: dict, message: str) -> None:
    arguments = {"module": Net(), "example_inputs": (torch.randn(2, 3, 8, 8),), **change}
    with pytest.raises(KfeError, match=message):
        export(**arguments)


def test_torch_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(KfeError, match=r"pip install 'onnx-kfe\[train\]'"):
        export_factory("a:b", "m.onnx", [ModuleInput("x", "float32", (1, 4))])


def test_inputs_of_different_lengths_have_no_common_batch() -> None:
    with pytest.raises(UsageError, match="differ in axis 0"):
        export(Subtract(), (torch.randn(2, 3), torch.randn(1, 3)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_factory_with_checkpoint(factories: str, tmp_path: Path, suffix: str) -> None:
    state = {"table.weight": torch.ones(2, 3), "linear.weight": torch.zeros(3, 4), "linear.bias": torch.full((3,), 7.0)}
    checkpoint = tmp_path / f"weights{suffix}"
    save_file(state, checkpoint) if suffix == ".safetensors" else torch.save({"state_dict": state}, checkpoint)
    inputs = [ModuleInput("ids", "int64", (2,)), ModuleInput("x", "float32", (2, 4))]
    path = list(sys.path)
    model = export_factory(f"{factories}:Two", tmp_path / "two.onnx", inputs, checkpoint)
    assert sys.path == path
    assert [value.name for value in model.graph.input] == ["ids", "x"]
    (found,) = run(model, {"ids": np.array([1, 0, 1]), "x": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(found, np.full((3, 3), 6.0))


def test_factory_inputs_of_other_names_go_by_position(factories: str, tmp_path: Path) -> None:
    inputs = [ModuleInput("features", "float32", (1, 4)), ModuleInput("tokens", "int64", (1,))]
    model = export_factory(f"{factories}:Two", tmp_path / "two.onnx", inputs)
    assert [value.name for value in model.graph.input] == ["features", "tokens"]
    assert model.graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_factory_may_be_the_module_itself(factories: str, tmp_path: Path) -> None:
    model = export_factory(f"{factories}:instance", tmp_path / "m.onnx", [ModuleInput("x", "float32", (1, 4))])
    assert [node.op_type for node in model.graph.node] == ["Relu"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("factories_for_export", "write it as package.module:factory"),
        ("not_there:f", "cannot import not_there:f: ModuleNotFoundError"),
        ("factories_for_export:f", "cannot import factories_for_export:f: AttributeError"),
        ("factories_for_export:number", "is int, not callable"),
        ("factories_for_export:text", "returned str, not a torch.nn.Module"),
        ("factories_for_export:broken", "broken.. failed: OSError: no weights here"),
    ],
)
def test_factory_errors(factories: str, spec: str, message: str) -> None:
    with pytest.raises(KfeError, match=message):
        export_factory(spec, "m.onnx", [ModuleInput("x", "float32", (1, 4))])


def test_checkpoint_errors(factories: str, tmp_path: Path) -> None:
    def load(checkpoint: Path) -> None:
        export_factory(f"{factories}:Two", "m.onnx", [ModuleInput("x", "float32", (1, 4))], checkpoint)

    save_file({"linear.weight": torch.zeros(3, 5), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    expected = r"2 missing \(table.weight, linear.bias\); 1 unexpected \(extra\); 1 of another shape \(linear.weight\)$"
    with pytest.raises(KfeError, match=expected):
        load(tmp_path / "w.safetensors")
    with pytest.raises(KfeError, match=r"cannot read checkpoint .*none.pt: FileNotFoundError"):
        load(tmp_path / "none.pt")
    torch.save(nn.ReLU(), tmp_path / "module.pt")  # a pickled class, which could run anything
    with pytest.raises(KfeError, match=r"cannot read checkpoint .*module.pt: UnpicklingError"):
        load(tmp_path / "module.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(KfeError, match="does not hold a state dict"):
        load(tmp_path / "list.pt")


def test_parse_input_shape() -> None:
    assert parse_input_shape("x:1,3,224,224") == ("x", "float32", (1, 3, 224, 224))
    assert parse_input_shape("ids:int64:1,128") == ("ids", "int64", (1, 128))
    for text in ("x", "1,3", ":1,3", "x:", "x:1,a", "x:0,3", "x:int64:1:2", "x:complex64:1"):
        with pytest.raises(UsageError, match="--input-shape"):
            parse_input_shape(text)


def test_parse_dynamic() -> None:
    assert parse_dynamic([]) is None
    assert parse_dynamic(["none"]) == {}
    assert parse_dynamic(["x:0=batch", "x:2=height", "y:1=n"]) == {"x": {0: "batch", 2: "height"}, "y": {1: "n"}}
    for text in ("x", "x:0", "x:=n", "x:-1=n", ":0=n", "x:0=", "x:0=a b"):
        with pytest.raises(UsageError, match="--dynamic"):
            parse_dynamic([text])
    with pytest.raises(UsageError, match="--dynamic 'none'"):
        parse_dynamic(["none", "x:0=batch"])
