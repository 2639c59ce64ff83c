"""What a user can get wrong: one line that says what to do, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from tests.conftest import Outcome
from tests.networks import classifier, samples
from tests.planning.clocks import Clock
from tests.tiny import add_external_data, node, tiny, weights

Fails = Callable[..., str]

FACTORIES = """
import torch

class Wrong(torch.nn.Module):
    def forward(self, x):
        return x * (2.0 if torch.compiler.is_exporting() else 3.0)

def broken():
    raise OSError("no weights here")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, statistics and a plan that are all right."""
    import onnx_kfe as kfe

    folder = tmp_path_factory.mktemp("prepared")
    onnx.save(classifier(), folder / "net.onnx")
    np.savez(folder / "data.npz", x=samples(24))
    statistics = kfe.collect(folder / "net.onnx", folder / "data.npz")
    statistics.save(folder / "stats.safetensors")
    kfe.plan(folder / "net.onnx", statistics, kfe.Macs(0.8)).save(folder / "plan.json")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the current folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("factories_of_bad_input", "generators_of_bad_input"):
        sys.modules.pop(name, None)


@pytest.fixture
def fails(cli: Callable[..., Outcome], folder: Path) -> Fails:
    """Checks that a command fails as it should, and returns the error."""

    def check(code: int, message: str, *arguments: object) -> str:
        before = contents(folder)
        outcome = cli(*arguments)
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert outcome.code == code, outcome.err
        assert len(errors) == 1, outcome.err
        assert re.search(message, errors[0]), errors[0]
        assert "Traceback" not in outcome.err
        assert outcome.out == ""
        after = contents(folder)
        assert {name: data for name, data in after.items() if "__pycache__" not in name} == before
        return errors[0]

    return check


def prune(*arguments: object) -> tuple[object, ...]:
    return ("prune", "net.onnx", "-o", "small.onnx", *arguments)


# The model


def cyclic() -> onnx.ModelProto:
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])]
    return tiny(nodes, {"x": ["N", 3]}, {"b": ["N", 3]})


def undefined() -> onnx.ModelProto:
    return tiny([node("Add", ["x", "nowhere"], ["y"], name="sum")], {"x": ["N", 3]}, {"y": ["N", 3]})


def unknown(domain: str = "") -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="fc"),
        node("Frobnicate", ["h"], ["y"], name="strange", domain=domain),
    ]
    opsets = [helper.make_opsetid(domain, 1)] if domain else []
    return tiny(nodes, {"x": ["N", 8]}, {"y": ["N", 8]}, {"w": weights(8, 8)}, opsets=opsets)


BAD_MODELS = {
    "cyclic": (cyclic, "net.onnx: the graph has a cycle"),
    "undefined value": (undefined, "node 'sum' reads 'nowhere', which nothing computes"),
    "unknown operator": (unknown, "operator Frobnicate .*'strange'"),
    "no layer": (
        lambda: tiny([node("Relu", ["x"], ["y"])], {"x": ["N", 8]}, {"y": ["N", 8]}),
        "no layer can be pruned; onnx-kfe inspect says why",
    ),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_graph(fails: Fails, folder: Path, what: str) -> None:
    make, message = BAD_MODELS[what]
    onnx.save(make(), folder / "net.onnx")
    np.savez(folder / "data.npz", x=weights(20, 8))
    fails(3 if what == "no layer" else 1, message, *prune("--data", "data.npz"))


def test_a_model_without_layers_has_nothing_to_prune_without_data_either(fails: Fails, folder: Path) -> None:
    onnx.save(BAD_MODELS["no layer"][0](), folder / "net.onnx")
    fails(3, "no layer can be pruned", *prune())


def test_an_operator_that_only_the_runtime_knows_to_be_unknown(fails: Fails, folder: Path) -> None:
    onnx.save(unknown("com.example"), folder / "net.onnx")
    np.savez(folder / "data.npz", x=weights(20, 8))
    fails(1, "cannot load the model.*Frobnicate|com.example", *prune("--data", "data.npz"))


def test_files_that_are_no_models(fails: Fails, folder: Path) -> None:
    good = (folder / "net.onnx").read_bytes()
    fails(1, "none.onnx: no such file", "inspect", "none.onnx")
    for text in (b"hello, I am no model", b""):
        (folder / "net.onnx").write_bytes(text)
        fails(1, "net.onnx: not an ONNX", "inspect", "net.onnx")
    (folder / "net.onnx").write_bytes(good[: len(good) // 2])
    fails(1, "not an ONNX file, or a truncated one", *prune("--data", "data.npz"))


def test_missing_external_data(fails: Fails, folder: Path) -> None:
    add_external_data(classifier(), str(folder / "net.onnx"))
    (folder / "weights.bin").unlink()
    fails(1, "external data .* is missing.*weights.bin", *prune("--data", "data.npz"))


def test_opset_that_cannot_be_converted(fails: Fails, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no adapter from 11 to 12 for Gadget\nand a second line")

    onnx.save(classifier(opset=11), folder / "net.onnx")
    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    fails(1, "opset 11 cannot be converted.*no adapter", *prune("--data", "data.npz"))


# Data

BAD_DATA = {
    "name": ({"y": samples(8)}, "input x is missing; found y"),
    "another name": ({"x": samples(8), "z": samples(8)}, "no input is called z; the model takes x"),
    "shape": ({"x": samples(8)[:, :, :4]}, r"x has shape \[8, 3, 4, 8\], the model takes float32 \[N, 3, 8, 8\]"),
    "type": ({"x": samples(8).astype(np.int64)}, "x is int64, the model takes float32"),
    "objects": ({"x": np.array([{}] * 8)}, "pickle|object"),
    "nan": ({"x": np.full((8, 3, 8, 8), np.nan, np.float32)}, "NaN"),
    "empty": ({"x": samples(0)}, "no samples"),
    "one": ({"x": samples(1)}, "at least two"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_does_not_fit(fails: Fails, folder: Path, what: str) -> None:
    arrays, message = BAD_DATA[what]
    np.savez(folder / "bad.npz", **arrays)
    fails(2 if what == "one" else 1, message, *prune("--data", "bad.npz"))


def test_data_that_is_none(fails: Fails, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no data")
    (folder / "generators_of_bad_input.py").write_text("def nothing():\n    yield from ()\nnumber = 3\n")
    fails(1, "empty: the folder holds no images", *prune("--data", "empty"))
    fails(2, "nowhere: no such file or folder", *prune("--data", "nowhere"))
    fails(2, "notes.txt: not a kind of data this program reads", *prune("--data", "notes.txt"))
    fails(1, "no samples", *prune("--data", "generators_of_bad_input:nothing"))
    fails(2, "expected a function", *prune("--data", "generators_of_bad_input:number"))
    fails(2, "cannot be imported: ModuleNotFoundError", *prune("--data", "nowhere:samples"))
    fails(2, "give --data", "collect", "net.onnx", "-o", "s.safetensors")


def images(folder: Path, count: int, corrupt: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    for number in range(corrupt):
        (folder / f"{7 + number:03}.png").write_bytes(b"no image")


def test_corrupt_images(fails: Fails, cli: Callable[..., Outcome], folder: Path) -> None:
    images(folder / "few", 100, 1)
    outcome = cli("collect", "net.onnx", "--data", "few", "-o", "few.safetensors")
    assert outcome.code == 0
    assert "skipped 1 corrupt sample(s): few/007.png: not an image" in outcome.err
    assert "over 99 samples" in outcome.out
    images(folder / "many", 100, 2)
    fails(
        1,
        "2 of 100 samples are corrupt, more than 1 %.*many/008.png",
        "collect",
        "net.onnx",
        "--data",
        "many",
        "-o",
        "s",
    )


@pytest.mark.parametrize("option", ["--mean", "--std", "--size"])
def test_bad_image_options(fails: Fails, folder: Path, option: str) -> None:
    images(folder / "images", 4, 0)
    fails(2, f"{option} a,b: write numbers", *prune("--data", "images", option, "a,b"))


def test_more_bad_image_options(fails: Fails, folder: Path) -> None:
    images(folder / "images", 4, 0)
    fails(2, "2 .*values|1 or 3 values", *prune("--data", "images", "--mean", "1,2"))
    fails(2, "layout is NCHW or NHWC", *prune("--data", "images", "--layout", "HCNW"))
    fails(2, "preset nonsense is unknown; there are: imagenet", *prune("--data", "images", "--preset", "nonsense"))
    fails(2, "apply to folders of images", *prune("--data", "data.npz", "--mean", "0.5"))
    fails(2, "none.csv: no such file", *prune("--data", "images", "--labels", "none.csv"))


@pytest.mark.parametrize(("scale", "what"), [(3e38, "input"), (1e20, "gradient|input")])
def test_infinity_names_the_layer(fails: Fails, folder: Path, scale: float, what: str) -> None:
    model = classifier()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w0")
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(scale)).astype(np.float32).tobytes()
    onnx.save(model, folder / "net.onnx")
    fails(1, f"layer 'conv[012]|fc': NaN or infinity in its ({what})", *prune("--data", "data.npz"))


# Statistics and plans


def test_bad_statistics(fails: Fails, folder: Path) -> None:
    onnx.save(classifier(seed=1), folder / "other.onnx")
    command = ("plan", "other.onnx", "--stats", "stats.safetensors", "--macs", "0.8", "-o", "p.json")
    fails(1, "the statistics belong to another model than other.onnx", *command)
    fails(1, "another model", "prune", "other.onnx", "--stats", "stats.safetensors", "-o", "small.onnx")
    whole = (folder / "stats.safetensors").read_bytes()
    for data in (whole[:-50], whole[:100], b"", b"nonsense"):
        (folder / "stats.safetensors").write_bytes(data)
        fails(1, "stats.safetensors: not a statistics file, or a truncated one", *prune("--stats", "stats.safetensors"))
    fails(1, "none.safetensors: no such file", *prune("--stats", "none.safetensors"))


def test_statistics_that_do_not_merge(fails: Fails, cli: Callable[..., Outcome], folder: Path) -> None:
    np.savez(folder / "many.npz", x=samples(130))
    for name, *options in (("a", "--shard", "0/2"), ("b", "--shard", "1/3"), ("c", "--shard", "1/2", "--seed", "1")):
        assert cli("collect", "net.onnx", "--data", "many.npz", "-o", name, *options).code == 0
    fails(1, "merge", "merge", "a", "a", "-o", "m")
    fails(1, "merge", "merge", "a", "b", "-o", "m")
    fails(1, "cannot merge statistics with different seed", "merge", "a", "c", "-o", "m")
    fails(2, "would overwrite its input", "merge", "a", "-o", "a")


EDITS = {
    "rank": (
        lambda layers: layers["conv1"].update(form="tucker", ranks=[99, 8]),
        2,
        "layer 'conv1': rank 99 .* 1 to 8",
    ),
    "ranks": (lambda layers: layers["conv1"].update(form="tucker", ranks=[4]), 2, "layer 'conv1': .*2"),
    "text": (lambda layers: layers["conv1"].update(form="tucker", ranks=["a", "b"]), 2, "layer 'conv1'"),
    "form": (lambda layers: layers["conv1"].update(form="magic"), 2, "unknown form 'magic'; it can be dense"),
    "unfit": (lambda layers: layers["fc"].update(form="tucker", ranks=[2, 2]), 2, "'tucker' does not apply"),
    "layer": (lambda layers: layers.update(none=layers["fc"]), 2, "layer 'none' is not in the model"),
}


@pytest.mark.parametrize("what", EDITS)
def test_edited_plans_that_cannot_be(fails: Fails, folder: Path, what: str) -> None:
    edit, code, message = EDITS[what]
    plan = json.loads((folder / "plan.json").read_text())
    edit(plan["layers"])
    (folder / "plan.json").write_text(json.dumps(plan))
    fails(code, message, *prune("--stats", "stats.safetensors", "--plan", "plan.json"))


def test_files_that_are_no_plans(fails: Fails, folder: Path) -> None:
    stats = ("--stats", "stats.safetensors")
    fails(1, "none.json: no such file", *prune(*stats, "--plan", "none.json"))
    for text in ("{", "[]", "{}", '{"format": "else"}'):
        (folder / "plan.json").write_text(text)
        fails(1, "plan.json: not a plan", *prune(*stats, "--plan", "plan.json"))


# Options


def test_budgets(fails: Fails) -> None:
    stats = ("--stats", "stats.safetensors")
    for amount in ("0", "-1", "nan"):
        fails(2, "give a fraction of the original", *prune(*stats, "--macs", amount))
        fails(2, "give a fraction of the original", *prune(*stats, "--params", amount))
    fails(2, "--macs.*valid", *prune(*stats, "--macs", "half"))
    error = fails(3, r"--macs 0.01 cannot be met: .* can become is --macs 0\.\d+", *prune(*stats, "--macs", "0.01"))
    least = error.rpartition(" ")[2]
    assert 0.01 < float(least) < 1
    fails(3, r"--params 10 cannot be met", *prune(*stats, "--params", "10"))
    fails(3, "without data, --macs 0.5 cannot be met", *prune("--macs", "0.5"))
    fails(2, "--plan already says what to do", *prune(*stats, "--plan", "plan.json", "--macs", "0.5"))
    fails(2, "give a budget", "plan", "net.onnx", *stats, "-o", "p.json")


def test_goals_of_latency(fails: Fails, known_machine: Clock) -> None:
    stats = ("--stats", "stats.safetensors", "--round-to", "2")
    for amount in ("1.5", "0", "-1", "nan"):
        fails(
            2, f"--latency {amount}: give a fraction of the original, or use --latency-ms", *prune("--latency", amount)
        )
    for amount in ("0", "-1", "nan", "inf"):
        fails(2, f"--latency-ms {amount}: give milliseconds above 0", *prune("--latency-ms", amount))
    fails(2, "--latency.*valid", *prune("--latency", "half"))
    fails(2, "--batch.*(range|greater)", *prune("--latency", "0.5", "--batch", "0"))
    drop = ("--data", "data.npz", "--max-drop", "0.3", "--latency", "0.5")
    fails(2, "--max-drop finds the budget by itself: drop", *prune(*drop))
    fails(2, "--plan already says what to do", *prune("--plan", "plan.json", "--latency", "0.5"))
    assert known_machine.asked == []
    for goal in ("--latency 0.1", "--latency-ms 0.001"):
        floor = r"of the 0\.0\d+ ms that the model takes, \d\d% are in layers that can be pruned; cannot be met: "
        error = fails(3, f"{goal}: {floor}", *prune(*stats, *goal.split()))
        assert re.search(r"the fastest of [1-6] models timed took [4-9]\d\.\d% of the original's latency$", error)
    fails(3, "--macs 0.01 cannot be met: the smallest", *prune(*stats, "--latency", "0.8", "--macs", "0.01"))
    fails(3, "can be pruned; give --data so that more can be justified; cannot be met", *prune("--latency", "0.5"))


def test_a_provider_that_is_not_available(fails: Fails) -> None:
    """Said before anything is measured, by the process that would have."""
    stats = ("--stats", "stats.safetensors", "--providers", "NoExecutionProvider")
    message = "execution provider NoExecutionProvider is not available; --providers can be: .*CPUExecutionProvider"
    fails(2, message, *prune(*stats, "--latency", "0.8"))
    fails(2, message, "plan", "net.onnx", *stats, "--latency", "0.8", "-o", "p.json")


def test_floors(fails: Fails) -> None:
    data, drop = ("--data", "data.npz"), ("--max-drop", "0.3")
    for budget in (("--macs", "0.5"), ("--params", "0.5"), ("--stats", "stats.safetensors", "--plan", "plan.json")):
        fails(2, "--max-drop finds the budget by itself: drop --macs", *prune(*data, *drop, *budget))
    fails(2, "--max-drop needs samples .*give --data", *prune(*drop))
    fails(2, "--max-drop needs samples .*give --data", *prune(*drop, "--stats", "stats.safetensors"))
    fails(2, "give --max-drop too", *prune(*data, "--metric", "kl"))
    for amount in ("0", "-0.1", "nan", "inf"):
        fails(2, f"--max-drop {amount}: give a number above 0", *prune(*data, "--max-drop", amount))
    fails(2, "is a share, give less than 1", *prune(*data, "--max-drop", "1"))
    fails(2, "--metric f1: it can be agreement, kl", *prune(*data, *drop, "--metric", "f1"))
    fails(2, "--metric accuracy: the data have no labels", *prune(*data, *drop, "--metric", "accuracy"))
    fails(2, "--metric relative-error: the model has no gaussian", *prune(*data, *drop, "--metric", "relative-error"))
    error = fails(2, "--max-drop 0.01 is finer than", *prune(*data, "--max-drop", "0.01"))
    assert re.search(r"than [45] held-back samples can show, which is 2[05].00%: give about 500 samples", error)
    error = fails(3, "--max-drop 1e-09 cannot be met on", *prune(*data, "--max-drop", "1e-9", "--metric", "kl"))
    assert re.search(r"the best found is \d+\.\d% of the MACs, predicted loss .*, kl drop ", error)


METHODS = {
    "unknown": (("--method", "magic"), "--method magic: it can be forms, channels, eigendamage"),
    "basis": (("--method", "c-obd", "--basis", "fourier"), "--basis fourier: it can be channel, kfe"),
    "basis of forms": (("--basis", "kfe"), "--basis kfe: it goes with --method magnitude-l1"),
    "taylor in the kfe": (("--method", "taylor", "--basis", "kfe"), "--basis kfe: taylor is defined in channel only"),
    "channels": (("--channels", "0"), "--channels 0.0: give a fraction of the original"),
    "channels by directions": (("--channels", "0.5", "--method", "eigendamage"), "--channels: they go by .*, not by"),
    "rounds": (("--iterations", "2"), "--iterations: forms are chosen at once; it goes with other methods"),
    "rounds of both": (("--iterations", "2", "--channels", "0.5"), "--iterations: .*without --channels"),
    "no round": (("--method", "kron-obs", "--iterations", "0"), "--iterations.*(range|greater)"),
    "rounds of milliseconds": (
        ("--method", "kron-obs", "--iterations", "2", "--latency-ms", "1"),
        "--latency-ms cannot be divided over --iterations: give --latency",
    ),
    "curvature": (("--curvature", "exact"), "--curvature exact: it can be kfac, ekfac"),
    "variances of nothing": (("--method", "kron-obs", "--curvature", "ekfac"), "--curvature ekfac: of the methods"),
    "a plan": (("--plan", "plan.json", "--method", "taylor"), "--plan already says what to do: drop --method"),
    "a plan and channels": (("--plan", "plan.json", "--channels", "0.5"), "--plan already says .*: drop .*--channels"),
    "search": (("--search", "bandit", "--method", "taylor"), "--search refines the forms .*no .*other --method"),
    "a floor and channels": (("--max-drop", "0.3", "--channels", "0.5"), "--max-drop .*: drop --channels"),
    "a floor and rounds": (
        ("--max-drop", "0.3", "--method", "taylor", "--iterations", "2"), "--max-drop .*: drop .*--iterations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", METHODS)
def test_methods_that_do_not_go_with_other_options(fails: Fails, what: str) -> None:
    options, message = METHODS[what]
    fails(2, message, *prune("--data", "data.npz", *options))


def test_methods_that_need_more_than_there_is(fails: Fails, folder: Path) -> None:
    for method in ("kron-obs", "taylor", "eigendamage"):
        fails(
            2,
            f"--method {method} needs statistics: give --data or --stats",
            *prune("--method", method, "--macs", "0.5"),
        )
    fails(2, "needs statistics: give --data or --stats", *prune("--channels", "0.5", "--macs", "0.4"))
    stats = ("--stats", "stats.safetensors")
    fails(2, "--iterations collects .*: give --data", *prune(*stats, "--method", "kron-obs", "--iterations", "2"))
    error = "the statistics have no variances in the eigenbases: collect with --curvature ekfac"
    fails(1, error, *prune(*stats, "--method", "eigendamage", "--curvature", "ekfac"))
    fails(
        2, "--frontier sweeps plans of forms: drop --method", *PLAN, "--method", "taylor", "--frontier", "-o", "f.png"
    )
    fails(2, "give a budget: --macs, --params or --latency", *PLAN, "--method", "taylor", "-o", "p.json")


PLAN = ("plan", "net.onnx", "--stats", "stats.safetensors")


def test_of_each_group_the_best_channel_stays(fails: Fails) -> None:
    for options in (("--method", "kron-obs"), ("--method", "magnitude-l1")):
        error = fails(
            3, r"--macs 0.01 cannot be met \(of each group the best", *PLAN, *options, "--macs", "0.01", "-o", "p"
        )
        assert 0.01 < float(error.rpartition(" ")[2]) < 0.5
    error = fails(3, "--channels 0.01 cannot be met", *PLAN, "--channels", "0.01", "--macs", "0.01", "-o", "p.json")
    assert re.search(r"the smallest this model can become is --channels 0\.\d+$", error)
    error = fails(
        3, "of each layer the best directions", *PLAN, "--method", "eigendamage", "--macs", "0.001", "-o", "p"
    )
    assert 0.001 < float(error.rpartition(" ")[2]) < 0.5


def test_layers_that_no_gradient_reaches(fails: Fails, folder: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["h"], "conv"), node("Det", ["h"], ["y"], "det")]
    onnx.save(tiny(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 8]}, {"w": weights(8, 3, 1, 1)}), folder / "net.onnx")
    for method in ("kron-obs", "taylor", "eigendamage"):
        message = r"no layer can be collected \(conv: no gradient rule for Det \(node 'det'\)\)"
        fails(1, message, *prune("--data", "data.npz", "--method", method))


CHANNELS = {
    "no group": ({"none": "0-3"}, "channels of 'none': no such group; see onnx-kfe inspect --groups"),
    "beyond": ({"conv1": "0-16"}, "channels of 'conv1': 16 is not one of 0 to 15"),
    "nothing": ({"conv1": ""}, "channels of 'conv1': '': write the channels kept as 0-3,7"),
    "garbage": ({"conv1": "most"}, "channels of 'conv1': 'most': write the channels kept as 0-3,7"),
    "an output": ({"fc": "0-3"}, "channel group 'fc' cannot be pruned: graph output 'logits'"),
}


@pytest.mark.parametrize("what", CHANNELS)
def test_edited_channels_that_cannot_be(fails: Fails, folder: Path, what: str) -> None:
    channels, message = CHANNELS[what]
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"channels": channels}))
    fails(2, f"plan.json: {message}", *prune("--stats", "stats.safetensors", "--plan", "plan.json"))


def test_options(fails: Fails) -> None:
    data = ("--data", "data.npz")
    fails(
        2, "'nonsense'.*no such output|nonsense=gaussian: no such output", *prune(*data, "--head", "nonsense=gaussian")
    )
    fails(2, "must be one of categorical", *prune(*data, "--head", "logits=quantum"))
    fails(2, r"--head logits=embedding: its shape is \[N, 5\]", *prune(*data, "--head", "logits=embedding"))
    fails(2, "--head logits: write NAME=KIND", *prune(*data, "--head", "logits"))
    fails(2, "provider Abacus is not available; .*CPUExecutionProvider", *prune(*data, "--providers", "Abacus"))
    fails(2, "--exclude nothing: no layer has such a name", *prune(*data, "--exclude", "nothing"))
    for shape in ("x", "x:1,a", "x:0,3", ":1,3", "x:"):
        fails(2, "write name:1,3,224,224", *prune(*data, "--input-shape", shape))
    fails(2, "--input-shape y: no such input", *prune(*data, "--input-shape", "y:1,3,8,8"))
    fails(2, "rank 4, not 2|expects rank 4", *prune(*data, "--input-shape", "x:1,3"))
    for shard in ("2/2", "1", "a/b", "-1/2", "0/0"):
        fails(2, "write i/n", "collect", "net.onnx", *data, "-o", "s", "--shard", shard)
    fails(2, "--max-samples", *prune(*data, "--max-samples", "1"))
    fails(2, "No such option: --nonsense", *prune("--nonsense"))
    fails(2, "Missing option", "prune", "net.onnx")


def test_outputs(fails: Fails, folder: Path) -> None:
    data = ("prune", "net.onnx", "--data", "data.npz", "-o")
    (folder / "link.onnx").symlink_to(folder / "net.onnx")
    fails(2, "would overwrite its input", *data, "net.onnx")
    fails(2, "would overwrite its input", *data, "./net.onnx")
    fails(2, "would overwrite its input", *data, "link.onnx")
    fails(2, "is a folder", *data, ".")
    fails(2, "its folder does not exist", *data, "none/small.onnx")
    fails(
        2, "would overwrite its input", "prune", "net.onnx", "--stats", "stats.safetensors", "-o", "stats.safetensors"
    )


def test_folder_that_cannot_be_written(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))  # root may write
    fails(2, "small.onnx: cannot be written", *prune("--data", "data.npz"))


@pytest.mark.usefixtures("quick_benchmark")
def test_full_disk(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    fails(1, r"small.onnx: cannot be written \(No space left on device\)", *prune("--stats", "stats.safetensors"))


def test_evaluation_without_anything_to_compare_with(fails: Fails) -> None:
    fails(2, "nothing to measure quality against", "evaluate", "net.onnx", "--data", "data.npz")


def test_models_that_cannot_be_compared(fails: Fails, folder: Path) -> None:
    onnx.save(unknown(), folder / "unknown.onnx")
    onnx.save(tiny([node("Relu", ["z"], ["y"])], {"z": ["N", 3]}, {"y": ["N", 3]}), folder / "relu.onnx")
    fails(1, "'relu.onnx' takes z", "benchmark", "net.onnx", "relu.onnx")
    fails(1, "unknown.onnx: .*Frobnicate", "benchmark", "net.onnx", "unknown.onnx")
    fails(2, "not an output of the model", "evaluate", "relu.onnx", "--data", "data.npz", "--reference", "net.onnx")


# Fine-tuning


def finetune(*arguments: object) -> tuple[object, ...]:
    return ("finetune", "net.onnx", "-o", "tuned.onnx", "--device", "cpu", *arguments)


def test_what_cannot_be_learnt_from(fails: Fails, folder: Path) -> None:
    onnx.save(tiny([node("Relu", ["x"], ["logits"])], {"x": ["N", 3]}, {"logits": ["N", 3]}), folder / "relu.onnx")
    np.savez(folder / "labelled.npz", x=samples(24), labels=np.arange(24))
    np.savez(folder / "empty.npz", x=samples(0))
    data, teacher = ("--data", "data.npz"), ("--teacher", "net.onnx")
    fails(2, "give --data", *finetune(*teacher))
    fails(
        1,
        "relu.onnx takes .* but net.onnx takes .*: a teacher has the same",
        *finetune(*data, "--teacher", "relu.onnx"),
    )
    fails(1, "none.onnx: no such file", *finetune(*data, "--teacher", "none.onnx"))
    fails(1, "--label-share needs labels: these samples have none", *finetune(*data))
    fails(1, "label .* is no class of output 'logits', which has 5", *finetune("--data", "labelled.npz"))
    fails(2, "without --teacher", *finetune(*data, "--label-share", "0.5"))
    fails(2, "--precision half: it can be", *finetune(*data, *teacher, "--precision", "half"))
    fails(2, "--intermediate 'nope' is none of the teacher's", *finetune(*data, *teacher, "--intermediate", "nope"))
    fails(1, "no samples", *finetune("--data", "empty.npz", *teacher))
    fails(2, "would overwrite its input", "finetune", "net.onnx", *teacher, *data, "-o", "net.onnx")
    fails(2, "--augment flips", "finetune", "relu.onnx", *data, "--teacher", "relu.onnx", "--augment", "-o", "t.onnx")


def test_operators_and_types_that_cannot_be_trained(fails: Fails, folder: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="fc"),
        node("Pad", ["h", "p"], ["logits"], name="border", mode="wrap"),
    ]
    constants = {"w": weights(3, 3), "p": np.array([0, 1, 0, 1])}
    onnx.save(tiny(nodes, {"x": ["N", 3]}, {"logits": ["N", 5]}, constants, opset=19), folder / "odd.onnx")
    odd = ("finetune", "odd.onnx", "--teacher", "odd.onnx", "--data", "none.npz", "-o", "t.onnx")
    fails(1, "operator Pad .*'border'", *odd)
    half = tiny(nodes[:1], {"x": ["N", 3]}, {"h": ["N", 3]}, {"w": weights(3, 3).astype(np.float16)}, dtype=10)
    onnx.save(half, folder / "half.onnx")
    odd = ("finetune", "half.onnx", "--teacher", "half.onnx", "--data", "none.npz", "-o", "t.onnx")
    fails(1, "'w' is torch.float16: train in single precision", *odd)


@pytest.mark.parametrize("missing", ["torch", "onnx2fx"])
def test_finetune_without_its_extra(fails: Fails, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("onnx_kfe.recovery.training._convert")]:
        monkeypatch.delitem(sys.modules, name)
    message = rf"{missing}, which is not installed: pip install 'onnx-kfe\[train\]'"
    fails(1, message, *finetune("--data", "data.npz", "--teacher", "net.onnx"))


def test_a_run_that_diverges(fails: Fails) -> None:
    options = ("--data", "data.npz", "--teacher", "net.onnx", "--learning-rate", "1e9", "--batch", "8")
    fails(1, "diverged in epoch 1 at step .* try a lower --learning-rate", *finetune(*options))


# Export


def test_bad_factories(fails: Fails, folder: Path) -> None:
    (folder / "factories_of_bad_input.py").write_text(FACTORIES)
    shape = ("-o", "m.onnx", "--input-shape", "x:2,4")
    fails(1, "cannot import none:f: ModuleNotFoundError", "export", "none:f", *shape)
    fails(2, "write it as package.module:factory", "export", "none", *shape)
    fails(1, "failed: OSError: no weights here", "export", "factories_of_bad_input:broken", *shape)
    fails(1, "differs from torch in output", "export", "factories_of_bad_input:Wrong", *shape)
    fails(2, "--input-shape 'x': write it as", "export", "torch.nn:ReLU", "-o", "m.onnx", "--input-shape", "x")
    fails(2, "--dynamic 'x': write it as", "export", "torch.nn:ReLU", *shape, "--dynamic", "x")


# The machine

WITHOUT_ONNXRUNTIME = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from onnx_kfe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_onnxruntime(folder: Path) -> None:
    before = contents(folder)
    command = [sys.executable, "-c", WITHOUT_ONNXRUNTIME, *map(str, prune("--data", "data.npz"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: ONNX Runtime is not installed: pip install 'onnx-kfe[cpu]' (or 'onnx-kfe[gpu]' for CUDA)"]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


ENDLESS = """
import itertools, time
import numpy as np

def slowly():
    for number in itertools.count():
        if number == 20:
            print("running", flush=True)
        time.sleep(0.05)
        yield {"x": np.full((1, 3, 8, 8), number % 7, np.float32)}
"""


def _heeding() -> None:
    """Heed interrupts even where the tests run in the background, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C as often as it takes: one that arrives in a callback of a C library is lost."""
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=5)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("it goes on")


def test_interrupt_is_quiet_and_leaves_nothing(folder: Path) -> None:
    (folder / "generators_of_bad_input.py").write_text(ENDLESS)
    before = contents(folder)
    command = [sys.executable, "-m", "onnx_kfe", *map(str, prune("--data", "generators_of_bad_input:slowly"))]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_heeding
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.2)
        err = interrupted(process)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "error" not in err
    assert contents(folder) == before
