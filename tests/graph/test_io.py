"""Loading what is sound, refusing what is not, and writing whole files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import _serialize, check_output, fingerprint, load, replace_whole, save, serialize, source_name
from tests.cases import load_case
from tests.tiny import add_external_data, node, run, serialized, tiny, weights


def small(weight: np.ndarray | None = None, **attributes: object) -> onnx.ModelProto:
    array = weights(3, 2, 3, 3) if weight is None else weight
    nodes = [node("Conv", ["x", "w"], ["h"], "conv", **attributes), node("Relu", ["h"], ["y"], "relu")]
    return tiny(nodes, {"x": ["n", 2, 6, 6]}, {"y": ["n", 3, "h", "w"]}, {"w": array})


FEEDS = {"x": weights(2, 2, 6, 6, seed=1)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(small(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_every_kind_of_source_is_loaded(path):
    wanted = run(small(), FEEDS)["y"]
    for source in (path, str(path), small(), ir.from_proto(small())):
        np.testing.assert_array_equal(run(load(source), FEEDS)["y"], wanted)


def test_the_given_model_is_never_modified():
    proto, given = small(), ir.from_proto(small())
    before = proto.SerializeToString(), serialized(given)
    for source in (proto, given):
        model = load(source)
        model.graph[0].name = "changed"
        model.graph[0].attributes.add(ir.AttrInt64s("pads", [1, 1, 1, 1]))
        model.graph.initializers.pop("w")
        model.metadata_props["changed"] = "yes"
        model.graph.inputs[0].name = "changed"
    assert (proto.SerializeToString(), serialized(given)) == before


def test_constants_that_are_renamed_keep_their_names_in_the_given_model():
    proto = small()
    proto.graph.node.insert(0, node("Constant", [], ["c"], value=numpy_helper.from_array(weights(1), "c")))
    before = proto.SerializeToString()
    for given in (proto, ir.from_proto(proto)):
        model = load(given)
        model.graph.initializers["w"].name = "changed"
        model.graph[0].attributes["value"].as_tensor().name = "changed"
        assert proto.SerializeToString() == before
        names = [tensor.name for tensor in ir.to_proto(model).graph.initializer]
        assert names == ["changed"]


def test_sparse_constants_are_refused_with_the_reason():
    values, places = numpy_helper.from_array(weights(1), "w"), numpy_helper.from_array(np.array([2]), "places")
    sparse = onnx.helper.make_sparse_tensor(values, places, [3])
    constant = tiny([node("Constant", [], ["y"], sparse_value=sparse)], {}, {"y": [3]})
    with pytest.raises(
        KfeError, match=r"the model: cannot be read as an ONNX model .*Sparse tensors are not supported"
    ):
        load(constant)
    initializer = tiny([node("Relu", ["w"], ["y"])], {}, {"y": [3]})
    initializer.graph.sparse_initializer.append(sparse)
    with pytest.raises(KfeError, match="the model: sparse initializers are not supported; make them dense"):
        load(initializer)


def test_external_data_are_found_beside_the_model(tmp_path, monkeypatch):
    path = add_external_data(small(), str(tmp_path / "m.onnx"))
    model = load(path)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(
        run(onnx.ModelProto.FromString(serialize(model)), FEEDS)["y"], run(small(), FEEDS)["y"]
    )
    save(model, tmp_path / "copy.onnx")
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(run(str(tmp_path / "copy.onnx"), FEEDS)["y"], run(small(), FEEDS)["y"])


def test_external_data_are_found_from_a_relative_path(tmp_path, monkeypatch):
    add_external_data(small(), str(tmp_path / "m.onnx"))
    monkeypatch.chdir(tmp_path)
    model = load("m.onnx")
    monkeypatch.chdir("/")
    assert fingerprint(model) == fingerprint(load(small()))


def test_missing_or_truncated_external_data_are_reported(tmp_path):
    path = add_external_data(small(), str(tmp_path / "m.onnx"))
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(KfeError, match=r"m\.onnx: external data of 'w' is missing, too short.*weights\.bin"):
        load(path)
    data.write_bytes(b"")
    with pytest.raises(KfeError, match="external data of 'w'"):
        load(path)
    data.unlink()
    with pytest.raises(KfeError, match="external data of 'w'"):
        load(path)
    with pytest.raises(KfeError, match="the model: external data of 'w'"):
        load(onnx.load(path, load_external_data=False))


def test_external_data_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "models").mkdir()
    path = add_external_data(small(), str(tmp_path / "models" / "m.onnx"))
    (tmp_path / "models" / "weights.bin").rename(tmp_path / "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (e for e in proto.graph.initializer[0].external_data if e.key == "location")
    entry.value = "../weights.bin"
    Path(path).write_bytes(proto.SerializeToString())
    with pytest.raises(KfeError, match="outside the model's folder"):
        load(path)


def test_what_is_no_model_is_refused(tmp_path, path):
    content = path.read_bytes()
    for name, data in {
        "text": b"this is no model\n" * 40,
        "empty": b"",
        "truncated": content[:-20],
        "half": content[: len(content) // 2],
        "head": content[:3],
    }.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(data)
        with pytest.raises(KfeError, match=f"{name}.onnx: not an ONNX") as caught:
            load(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(KfeError, match=r"nowhere\.onnx: no such file"):
        load(tmp_path / "nowhere.onnx")
    with pytest.raises(KfeError, match="no such file"):
        load(tmp_path)
    with pytest.raises(KfeError, match="the model: not an ONNX model"):
        load(onnx.ModelProto())


X, Y = {"x": [1, 2]}, {"y": [1, 2]}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny([node("Relu", ["x"], ["h"])], X, {}), "the graph has no outputs"),
        (tiny([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])], X, {"b": [1, 2]}), "has a cycle"),
        (tiny([node("Add", ["x", "ghost"], ["y"], "sum")], X, Y), "node 'sum' reads 'ghost', which nothing computes"),
        (tiny([node("Frobnicate", ["x"], ["y"], "f")], X, Y), r"operator Frobnicate \(node 'f'\) does not exist"),
        (tiny([node("Frobnicate", ["x"], ["y"])], X, Y), "operator Frobnicate"),
        (tiny([node("HardSwish", ["x"], ["y"])], X, Y, opset=11), "operator HardSwish .* in opset 11"),
    ],
)
def test_graphs_that_no_runtime_would_load_are_refused(model, message):
    with pytest.raises(KfeError, match=message) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_bodies_of_control_flow_are_checked_too():
    def branch(source: str) -> onnx.GraphProto:
        return tiny([node("Relu", [source], ["b"], "inner")], {}, {"b": [1, 2]}).graph

    def conditional(source: str) -> onnx.ModelProto:
        chosen = node("If", ["c"], ["y"], then_branch=branch("x"), else_branch=branch(source))
        return tiny([chosen], X, Y, {"c": np.array(True)})

    np.testing.assert_array_equal(run(load(conditional("x")), {"x": weights(1, 2)})["y"], weights(1, 2).clip(0))
    with pytest.raises(KfeError, match="node 'inner' reads 'ghost'"):
        load(conditional("ghost"))


def test_unsorted_graphs_are_sorted():
    model = small()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    loaded = load(model)
    assert [n.op_type for n in loaded.graph] == ["Conv", "Relu"]
    np.testing.assert_array_equal(run(loaded, FEEDS)["y"], run(small(), FEEDS)["y"])


def test_models_of_other_domains_and_with_functions_load():
    function = onnx.helper.make_function(
        "local", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [onnx.helper.make_opsetid("", 17)]
    )
    opsets = [onnx.helper.make_opsetid("local", 1), onnx.helper.make_opsetid("com.microsoft", 1)]
    nodes = [node("Twice", ["x"], ["h"], domain="local"), node("Gelu", ["h"], ["y"], domain="com.microsoft")]
    load(tiny(nodes, X, Y, opsets=opsets, functions=[function]))


def test_fingerprint_is_the_same_however_the_model_comes(path, tmp_path):
    external = add_external_data(small(), str(tmp_path / "e.onnx"))
    sources = (path, small(), ir.from_proto(small()), external, ir.load(external), onnx.load(external))
    assert len({fingerprint(load(source)) for source in sources}) == 1
    floats = small()
    tensor = floats.graph.initializer[0]
    tensor.CopyFrom(onnx.helper.make_tensor("w", 1, tensor.dims, numpy_helper.to_array(tensor).ravel()))  # float_data
    assert fingerprint(load(floats)) == fingerprint(load(small()))


def test_fingerprint_changes_with_weights_attributes_and_wiring():
    one_bit = weights(3, 2, 3, 3)
    one_bit[2, 1, 0, 0] = np.nextafter(one_bit[2, 1, 0, 0], 9)
    padded = small(pads=[1, 1, 1, 1])
    rewired = small()
    rewired.graph.node[1].input[0] = "x"
    other = small()
    other.graph.node[1].op_type = "Elu"
    opset = small()
    opset.opset_import[0].version = 18
    variants = [small(), small(one_bit), padded, rewired, other, opset]
    assert len({fingerprint(load(model)) for model in variants}) == len(variants)


def test_fingerprint_reads_constants_and_bodies_in_full():
    def constant(array: np.ndarray) -> onnx.ModelProto:
        value = node("Constant", [], ["c"], value=numpy_helper.from_array(array))
        body = tiny([value, node("Identity", ["c"], ["b"])], {}, {"b": [5000]}).graph
        nodes = [value, node("If", ["t"], ["d"], then_branch=body, else_branch=body), node("Add", ["c", "d"], ["y"])]
        return tiny(nodes, {"t0": [1]}, {"y": [5000]}, {"t": np.array(True)})

    array = weights(5000)
    changed = array.copy()
    changed[2500] += 1e-3
    assert fingerprint(load(constant(array))) == fingerprint(load(constant(array)))
    assert fingerprint(load(constant(array))) != fingerprint(load(constant(changed)))


def test_fingerprint_reads_texts():
    def model(text: str) -> onnx.ModelProto:
        made = tiny([node("Identity", ["t"], ["y"])], {}, {"y": [2]}, {"t": np.array(["ä", text], object)})
        made.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
        return made

    assert fingerprint(load(model("b"))) == fingerprint(load(model("b"))) != fingerprint(load(model("c")))


def test_the_output_must_not_be_an_input(path, tmp_path, monkeypatch):
    (tmp_path / "link.onnx").symlink_to(path)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for output in (path, str(path), "m.onnx", "sub/../m.onnx", tmp_path / "link.onnx"):
        with pytest.raises(UsageError, match="would overwrite its input"):
            check_output(output, path)
    assert check_output("other.onnx", path, small()) == Path("other.onnx")


def test_outputs_that_cannot_be_written_are_refused_early(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="folder does not exist"):
        check_output(tmp_path / "nowhere" / "m.onnx")


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(tmp_path / "m.onnx")


def test_saving_is_whole_or_not_at_all(tmp_path, path, monkeypatch):
    before = path.read_bytes()
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*args: object, error: BaseException = failure) -> None:
            raise error

        monkeypatch.setattr(os, "replace", fail)
        expected = KfeError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if expected is KfeError else None):
            save(load(small(pads=[1, 1, 1, 1])), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["m.onnx"]


def test_saved_files_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    replace_whole(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.fixture
def tiny_limit(monkeypatch):
    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 100)


def test_models_over_the_limit_are_saved_with_external_data(tmp_path, path, tiny_limit):
    model = load(load_case("plain-13").model)
    inputs = load_case("plain-13").inputs(2)
    wanted = run(model, inputs)["logits"]
    for _ in range(2):  # the second time over the pair of the first
        save(model, tmp_path / "big.onnx")
        assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data", "m.onnx"]
        np.testing.assert_array_equal(run(str(tmp_path / "big.onnx"), inputs)["logits"], wanted)
        model = load(tmp_path / "big.onnx")  # now itself mapped from the file that is overwritten
    assert fingerprint(model) == fingerprint(load(load_case("plain-13").model))


@pytest.mark.parametrize(("existing", "failing"), [(False, 1), (False, 2), (True, 1), (True, 2), (True, 3)])
def test_a_pair_that_cannot_be_written_leaves_what_was_there(tmp_path, tiny_limit, monkeypatch, existing, failing):
    target = tmp_path / "big.onnx"
    if existing:
        save(load(small()), target)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls, replace = [], os.replace

    def fail(*args: str) -> None:
        calls.append(args)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KfeError, match="cannot be written"):
        save(load(small(2 * weights(3, 2, 3, 3))), target)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_source_name(path):
    assert source_name(path) == str(path)
    assert source_name(small()) == "the model"
