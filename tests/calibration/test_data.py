from __future__ import annotations

import itertools
import sys
import weakref
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_kfe.calibration._batches import batches
from onnx_kfe.calibration._data import Dataset, open_dataset
from onnx_kfe.calibration._inputs import InputSpec, batched_inputs, fixed_batch
from onnx_kfe.calibration._synthetic import synthetic_dataset
from onnx_kfe.errors import KfeError, UsageError

X = InputSpec("x", np.dtype(np.float32), ("N", 3, None))
IDS = InputSpec("ids", np.dtype(np.int64), ("M", "seq"))
ONE = (X,)
TWO = (X, IDS)


def vectors(count: int, width: int = 4) -> np.ndarray:
    return np.arange(count * 3 * width, dtype=np.float32).reshape(count, 3, width)


def stacked(dataset: Dataset, name: str = "x") -> np.ndarray:
    return np.concatenate([item.sample[name] for item in dataset])


def indices(dataset: Dataset) -> list[int]:
    return [item.index for item in dataset]


class Reader:
    """A calibration reader as ONNX Runtime knows them."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        self.next = iter(arrays)

    def get_next(self) -> dict[str, np.ndarray] | None:
        array = next(self.next, None)
        return None if array is None else {"x": array}


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.next = iter(self.arrays)


# Readers


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_labels(tmp_path: Path, save) -> None:
    path = tmp_path / "calib.npz"
    ids = np.arange(10).reshape(5, 2)
    save(path, x=vectors(5), ids=ids, labels=[4, 3, 2, 1, 0])
    dataset = open_dataset(path, TWO)
    items = list(dataset)
    assert [int(item.label) for item in items] == [4, 3, 2, 1, 0]
    assert {index: int(label) for index, label in dataset.labels.items()} == {0: 4, 1: 3, 2: 2, 3: 1, 4: 0}
    assert all(item.sample["x"].shape == (1, 3, 4) for item in items)
    np.testing.assert_array_equal(stacked(dataset), vectors(5))
    np.testing.assert_array_equal(stacked(dataset, "ids"), ids)
    assert dataset.count() == 5
    assert "with labels" in dataset.describe()


def test_npz_key_that_is_an_input_is_no_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", y=vectors(2))
    dataset = open_dataset(tmp_path / "a.npz", [InputSpec("y", np.dtype(np.float32), (None, 3, 4))])
    assert dataset.labels is None
    assert next(iter(dataset)).label is None


@pytest.mark.parametrize("order", ["C", "F"])
def test_stored_npz_and_npy_are_mapped_not_loaded(tmp_path: Path, order: str) -> None:
    array = np.array(vectors(6), order=order)
    np.savez(tmp_path / "a.npz", x=array)
    np.save(tmp_path / "a.npy", array)
    for path in tmp_path.iterdir():
        dataset = open_dataset(path, ONE)
        np.testing.assert_array_equal(stacked(dataset), array)
        sample = next(iter(dataset)).sample["x"]
        while isinstance(sample.base, np.ndarray) and not isinstance(sample, np.memmap):
            sample = sample.base
        assert isinstance(sample, np.memmap), path


def test_lists_of_paths_are_concatenated(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(2))
    np.savez(tmp_path / "b.npz", x=vectors(3) + 100)
    dataset = open_dataset([tmp_path / "a.npy", str(tmp_path / "b.npz")], ONE)
    assert dataset.count() == 5
    assert indices(dataset) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(stacked(dataset), np.concatenate([vectors(2), vectors(3) + 100]))


@pytest.mark.parametrize("single", [False, True])
def test_test_data_sets(tmp_path: Path, single: bool) -> None:
    numbers = [3] if single else [10, 2, 0]  # the order of the numbers, not of the names
    for number in numbers:
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for position, array in enumerate([vectors(2) + number, np.full((2, 5), number)]):
            tensor = onnx.numpy_helper.from_array(array)
            (folder / f"input_{position}.pb").write_bytes(tensor.SerializeToString())
    dataset = open_dataset(folder if single else tmp_path, TWO)
    expected = np.concatenate([vectors(2) + number for number in sorted(numbers)])
    assert dataset.count() == len(expected)
    np.testing.assert_array_equal(stacked(dataset), expected)
    assert stacked(dataset, "ids")[:, 0].tolist() == [n for n in sorted(numbers) for _ in range(2)]


FUNCTIONS = """
import numpy as np
def good():
    for value in range(3):
        yield {"x": np.full((1, 3, 2), value, np.float32), "label": value}
def tuples():
    return [(1, 2)]
def mapping():
    return {"x": np.zeros((1, 3, 2), np.float32)}
def fails():
    yield {"x": np.zeros((1, 3, 2), np.float32)}
    raise RuntimeError("disk is\\ngone")
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kfe_reader_under_test.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "kfe_reader_under_test"
    sys.modules.pop("kfe_reader_under_test", None)


def test_function_is_called_anew_each_time(module: str) -> None:
    dataset = open_dataset(f"{module}:good", ONE)
    for _ in range(2):
        assert [int(item.label) for item in dataset] == [0, 1, 2]
        assert stacked(dataset)[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "message"),
    [("tuples", "expected a dict.*found tuple"), ("mapping", "returned dict"), ("fails", "RuntimeError: disk is gone")],
)
def test_function_that_yields_something_else(module: str, function: str, message: str) -> None:
    with pytest.raises(KfeError, match=message):
        list(open_dataset(f"{module}:{function}", ONE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kfe_no_such_module:f", "ModuleNotFoundError"),
        ("kfe_reader_under_test:nothing", "no attribute 'nothing'"),
        ("kfe_reader_under_test:number", "is int, expected a function"),
    ],
)
def test_function_that_cannot_be_imported(module: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(name, ONE)


def test_arrays_in_memory() -> None:
    for source in (vectors(3), {"x": vectors(3)}, [{"x": vectors(1)}, {"x": vectors(3)[1:]}]):
        dataset = open_dataset(source, ONE)
        assert dataset.count() == 3
        np.testing.assert_array_equal(stacked(dataset), vectors(3))


def test_dict_of_several_samples_is_taken_apart() -> None:
    feeds = [{"x": vectors(2), "label": [5, 6]}, {"x": vectors(1), "label": 7}]
    dataset = open_dataset(iter(feeds), ONE)
    items = list(dataset)
    assert [(item.index, int(item.label)) for item in items] == [(0, 5), (1, 6), (2, 7)]
    assert all(item.sample["x"].shape == (1, 3, 4) for item in items)


def test_rewound_calibration_reader() -> None:
    again = open_dataset(RewindingReader([vectors(1), vectors(1) + 1]), ONE)
    next(iter(again))  # abandoned half-way
    for _ in range(2):
        np.testing.assert_array_equal(stacked(again), np.concatenate([vectors(1), vectors(1) + 1]))


def test_callable_starts_afresh() -> None:
    dataset = open_dataset(lambda: ({"x": vectors(1)} for _ in range(3)), ONE)
    assert indices(dataset) == indices(dataset) == [0, 1, 2]


def test_dataset_is_taken_as_it_is() -> None:
    dataset = open_dataset(vectors(4), ONE)
    assert open_dataset(dataset, ONE) is dataset
    assert open_dataset(dataset, ONE, max_samples=2).count() == 2


# Errors: each one line that names what was expected and what was found

BAD_ARRAYS = {
    "unknown name": ({"x": vectors(2), "z": vectors(2)}, "no input is called z; the model takes x"),
    "missing name": ({}, "input x is missing; found nothing"),
    "rank": ({"x": vectors(2)[0]}, r"x has shape \[3, 4\], the model takes float32 \[N, 3, \?\]"),
    "fixed dimension": ({"x": vectors(2).transpose(0, 2, 1)}, r"x has shape \[2, 4, 3\], the model takes"),
    "dtype": ({"x": vectors(2).astype(np.uint8)}, "x is uint8, the model takes float32; convert it first"),
    "text": ({"x": np.full((2, 3, 4), "a")}, "x is <U1, the model takes float32"),
    "objects": ({"x": np.full((2, 3, 4), {}, object)}, "array of Python objects"),
    "labels": ({"x": vectors(2), "y": [1, 2, 3]}, r"y has shape \[3\], expected one label for each of 2 samples"),
    "no samples": ({"x": vectors(0)}, "no samples"),
    "ragged": ({"x": [[1], [2, 3]]}, "x is no array"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit(case: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    with pytest.raises(KfeError, match=message) as caught:
        open_dataset(arrays, ONE)
    assert "\n" not in str(caught.value)


def test_first_axes_that_differ(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=vectors(2), ids=np.zeros((3, 2), np.int64))
    with pytest.raises(KfeError, match=r"first axes differ.*x 2, ids 3"):
        open_dataset(tmp_path / "a.npz", TWO)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (np.float64, np.float32),
        (np.float32, np.float16),
        (np.float16, np.float32),
        (np.int32, np.int64),
        (np.uint8, np.int32),
        (np.int64, np.uint8),
        (np.bool_, np.int64),
        (np.int64, np.bool_),
    ],
)
def test_safe_casts(found: type, wanted: type) -> None:
    array = np.array([[0, 1], [1, 0]], found)
    sample = next(iter(open_dataset(array, [InputSpec("x", np.dtype(wanted), (None, 2))]))).sample["x"]
    assert sample.dtype == wanted
    assert sample.tolist() == [[0, 1]]


@pytest.mark.parametrize(("found", "wanted"), [(np.float32, np.int64), (np.int64, np.float32), (np.float32, np.bool_)])
def test_refused_casts(found: type, wanted: type) -> None:
    with pytest.raises(KfeError, match=f"x is {np.dtype(found)}, the model takes {np.dtype(wanted)}"):
        open_dataset(np.zeros((2, 2), found), [InputSpec("x", np.dtype(wanted), (None, 2))])


@pytest.mark.parametrize(
    ("value", "wanted", "message"),
    [
        (np.float32("nan"), np.float32, "sample 1: x holds NaN or infinity"),
        (-np.float32("inf"), np.float32, "sample 1: x holds NaN or infinity"),
        (np.float32(1e6), np.float16, "sample 1: x holds values beyond the range of float16"),
        (np.int64(2**40), np.int32, "sample 1: x holds values that do not fit int32"),
        (np.int64(-1), np.uint64, "sample 1: x holds values that do not fit uint64"),
    ],
)
def test_bad_values_name_the_sample(value: np.generic, wanted: type, message: str) -> None:
    array = np.zeros((3, 2), value.dtype)
    array[1, 1] = value
    items = iter(open_dataset(array, [InputSpec("x", np.dtype(wanted), (None, 2))]))
    assert next(items).index == 0
    with pytest.raises(KfeError, match=message):
        next(items)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object), allow_pickle=True)
    np.savez_compressed(tmp_path / "packed.npz", x=np.array([{}], object), allow_pickle=True)
    (tmp_path / "garbage.npy").write_bytes(b"\x80\x04\x95 pickle")
    (tmp_path / "garbage.npz").write_bytes(b"no zip")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "whole.npy", vectors(4))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    with zipfile.ZipFile(tmp_path / "strange.npz", "w") as archive:
        archive.writestr("x.txt", "hello")
    for path in sorted(tmp_path.iterdir()):
        if path.stem == "whole":
            continue
        with pytest.raises(KfeError, match=f"{path.name}: cannot be read as an? .np[yz]"):
            open_dataset(path, ONE)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_dataset(tmp_path / "absent", ONE)
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(UsageError, match=r"a\.txt: not a kind of data.*\.npz, \.npy"):
        open_dataset(tmp_path / "a.txt", ONE)
    with pytest.raises(KfeError, match="holds no images"):
        open_dataset(tmp_path, ONE)
    with pytest.raises(UsageError, match="data of type int"):
        open_dataset(3, ONE)  # type: ignore[arg-type]


def test_one_array_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(2))
    for source in (vectors(2), tmp_path / "a.npy"):
        with pytest.raises(UsageError, match=r"feeds one input and the model has 2 \(x, ids\); give an .npz"):
            open_dataset(source, TWO)


def test_test_data_sets_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "input_0.pb").write_bytes(b"garbage")
    with pytest.raises(KfeError, match=r"input_0\.pb: cannot be read as a TensorProto"):
        open_dataset(tmp_path, ONE)
    with pytest.raises(KfeError, match=r"1 input_.*the model takes 2 inputs"):
        open_dataset(tmp_path, TWO)


def test_streams_without_samples_or_dicts() -> None:
    with pytest.raises(KfeError, match="no samples"):
        list(open_dataset(iter([]), ONE))
    with pytest.raises(KfeError, match="no samples"):
        open_dataset([], ONE)
    with pytest.raises(KfeError, match="generator, item 1: expected a dict of input name to array, found ndarray"):
        list(open_dataset((value for value in [{"x": vectors(1)}, vectors(1)]), ONE))


def test_image_options_need_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="apply to folders of images"):
        open_dataset(vectors(2), ONE, labels=tmp_path / "labels.csv")


# Subsets


def test_take_spreads_over_a_known_number_and_takes_the_first_of_a_stream() -> None:
    taken = open_dataset(vectors(10), ONE).take(5)
    np.testing.assert_array_equal(stacked(taken), vectors(10)[::2])
    assert indices(taken) == list(range(5))
    for count, wanted in itertools.product(range(1, 30), range(1, 30)):
        taken = indices(open_dataset(vectors(count, 1), ONE).take(wanted))
        assert taken == list(range(min(count, wanted)))
    stream = open_dataset(lambda: ({"x": vectors(1)} for _ in range(10)), ONE, max_samples=4)
    assert indices(stream) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="at least 1"):
        stream.take(0)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("known", [True, False])
def test_split_is_disjoint_complete_interleaved_and_deterministic(fraction: float, known: bool) -> None:
    source = vectors(400) if known else (lambda: ({"x": vectors(1)} for _ in range(400)))
    statistics, held_back = open_dataset(source, ONE).split(fraction)
    kept, held = indices(statistics), indices(held_back)
    assert sorted(kept + held) == list(range(400))
    assert len(held) == pytest.approx(400 * fraction, abs=2)
    assert np.diff(held).max() <= 2 / fraction
    assert (kept, held) == (indices(statistics), indices(held_back))
    # Data that goes through its ten classes in turn has all of them held back.
    if fraction >= 0.1:
        assert len({index % 10 for index in held}) == 10


def test_split_of_few() -> None:
    for count in range(2, 12):
        statistics, held_back = open_dataset(vectors(count), ONE).split(0.1)
        assert statistics.count() >= 1 <= held_back.count()
    with pytest.raises(UsageError, match="one sample cannot be split"):
        open_dataset(vectors(1), ONE).split(0.1)
    with pytest.raises(UsageError, match="and at most 0"):
        open_dataset(vectors(5), ONE).split(0.7)


def test_shards_are_disjoint_and_complete_and_keep_the_index() -> None:
    statistics, _ = open_dataset(vectors(20), ONE).split(0.1)
    shards = [statistics.shard(number, 3) for number in range(3)]
    assert sorted(itertools.chain(*map(indices, shards))) == indices(statistics)
    assert {len(indices(shard)) for shard in shards} <= {5, 6}
    for item in shards[1]:
        np.testing.assert_array_equal(item.sample["x"], vectors(20)[item.index : item.index + 1])
    with pytest.raises(UsageError, match="numbered from 0 to 2"):
        statistics.shard(3, 3)


def test_subsets_carry_labels_and_describe_themselves() -> None:
    dataset = open_dataset({"x": vectors(10), "label": np.arange(10) * 2}, ONE)
    odd = dataset.where(lambda index: index % 2 == 1)
    assert {index: int(label) for index, label in odd.labels.items()} == {1: 2, 3: 6, 5: 10, 7: 14, 9: 18}
    assert "5 of 10 samples used" in odd.describe()
    assert "used" not in dataset.describe()


def test_subsets_do_not_read_what_they_leave_out() -> None:
    bad = vectors(10)
    bad[3] = np.nan
    assert len(indices(open_dataset(bad, ONE).where(lambda index: index != 3))) == 9
    with pytest.raises(KfeError, match="sample 3"):
        indices(open_dataset(bad, ONE))


# Laziness


class Counted:
    """A stream that counts the dicts asked for and those alive."""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self.alive, self.most_alive = count, 0, 0, 0

    def __iter__(self):
        for value in range(self.count):
            array = np.full((1, 3, 4), value, np.float32)
            self.asked += 1
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(array, self._died)
            yield {"x": array}
            del array

    def _died(self) -> None:
        self.alive -= 1


def test_stream_is_consumed_no_further_than_needed() -> None:
    stream = Counted(100)
    for _ in batches(open_dataset(stream, ONE, max_samples=10), 4, ONE):
        pass
    assert stream.asked == 10


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    size, most_alive = 8, []
    for count in (100, 400):
        stream = Counted(count)
        for batch in batches(open_dataset(stream, ONE).split(0.1)[0], size, ONE):
            del batch
        assert stream.asked == count
        most_alive.append(stream.most_alive)
    assert most_alive[0] == most_alive[1] <= size + 3


def test_batches_are_made_when_asked_for() -> None:
    stream = Counted(100)
    made = batches(open_dataset(stream, ONE), 4, ONE)
    assert stream.asked == 0
    assert len(next(made)) == 4
    assert stream.asked == 4


# Batches


def test_batches_of_equal_shapes() -> None:
    widths = [4, 4, 4, 4, 4, 7, 7, 4]
    dataset = open_dataset([{"x": vectors(1, width), "y": index} for index, width in enumerate(widths)], ONE)
    made = list(batches(dataset, 2, ONE))
    assert [batch.indices.tolist() for batch in made] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert [batch.feeds["x"].shape for batch in made] == [(2, 3, 4), (2, 3, 4), (1, 3, 4), (2, 3, 7), (1, 3, 4)]
    assert [batch.labels.tolist() for batch in made] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert [batch.start for batch in made] == [0, 2, 4, 5, 7]


@pytest.mark.parametrize(("fixed", "dropped"), [(1, 0), (3, 1), (4, 2), (12, 10)])
def test_fixed_batch_axis_gets_exactly_that(fixed: int, dropped: int) -> None:
    inputs = [InputSpec("x", np.dtype(np.float32), (fixed, 12))]
    made = batches(open_dataset(vectors(10).reshape(10, 12), inputs), 5, inputs)
    sizes = [batch.feeds["x"].shape for batch in made]
    assert sizes == [(fixed, 12)] * (10 // fixed)
    assert made.dropped == dropped


def test_inputs_without_a_batch_axis() -> None:
    state = InputSpec("state", np.dtype(np.float32), (2, None, 5))
    rate = InputSpec("rate", np.dtype(np.int64), ())
    inputs = [X, state, rate]
    assert batched_inputs(inputs) == {"x"}
    arrays = {"x": vectors(3), "state": np.zeros((3, 2, 1, 5), np.float32), "rate": [8, 8, 16]}
    made = list(batches(open_dataset(arrays, inputs), 8, inputs))
    assert [{name: array.shape for name, array in batch.feeds.items()} for batch in made] == [
        {"x": (1, 3, 4), "state": (2, 1, 5), "rate": ()}
    ] * 3
    assert [int(batch.feeds["rate"]) for batch in made] == [8, 8, 16]
    streamed = [batch.feeds for batch in made]
    assert [int(item.sample["rate"]) for item in open_dataset(streamed, inputs)] == [8, 8, 16]


def test_fixed_batch_joins_only_equal_values_where_there_is_no_batch_axis() -> None:
    inputs = [InputSpec("x", np.dtype(np.float32), (2, 12)), InputSpec("rate", np.dtype(np.int64), ())]
    made = batches(open_dataset({"x": np.zeros((5, 12), np.float32), "rate": [8, 16, 16, 8, 8]}, inputs), 1, inputs)
    assert [(batch.indices.tolist(), int(batch.feeds["rate"])) for batch in made] == [([1, 2], 16), ([3, 4], 8)]
    assert made.dropped == 1


def test_which_axis_is_the_batch() -> None:
    f32 = np.dtype(np.float32)
    assert fixed_batch([X]) is None
    assert fixed_batch([InputSpec("x", f32, (8, 3))]) == 8
    assert batched_inputs([InputSpec("x", f32, (3, 32, 32))]) == frozenset()  # one image
    assert batched_inputs([InputSpec("a", f32, (1, 3)), InputSpec("b", f32, (2, 1, 4))]) == {"a"}
    assert batched_inputs([IDS, X]) == {"ids", "x"}  # each its own symbol


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="batch size must be at least 1"):
        batches(open_dataset(vectors(2), ONE), 0, ONE)


# Synthetic samples


def test_synthetic_samples() -> None:
    image = InputSpec("image", np.dtype(np.float16), ("batch", 3, "h", "w"))
    inputs = [image, IDS, InputSpec("mask", np.dtype(np.bool_), ("batch", "seq")), X]
    dataset = synthetic_dataset(inputs, 5, 7, {"ids": (1, 9)})
    first = next(iter(dataset)).sample
    shapes = {name: array.shape for name, array in first.items()}
    assert shapes == {"image": (1, 3, 224, 224), "ids": (1, 9), "mask": (1, 9), "x": (1, 3, 16)}
    assert {name: array.dtype for name, array in first.items()} == {spec.name: spec.dtype for spec in inputs}
    assert abs(float(first["image"].mean(dtype=np.float64))) < 0.02
    assert abs(float(first["image"].std(dtype=np.float64)) - 1) < 0.02
    assert set(first["ids"].ravel().tolist()) <= {0, 1}
    assert dataset.count() == 5


def test_synthetic_samples_depend_on_seed_and_index_alone() -> None:
    dataset = synthetic_dataset(ONE, 6, 7)
    np.testing.assert_array_equal(stacked(dataset), stacked(synthetic_dataset(ONE, 6, 7)))
    np.testing.assert_array_equal(stacked(dataset)[3:4], stacked(dataset.where(lambda index: index == 3)))
    assert not np.array_equal(stacked(dataset), stacked(synthetic_dataset(ONE, 6, 8)))
    assert len(np.unique(stacked(dataset)[:, 0, 0])) == 6


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((None, 3, None, None), (1, 3, 224, 224)),
        ((None, None, None, 3), (1, 224, 224, 3)),
        (("N", "C", "H", "W"), (1, 3, 224, 224)),
        ((8, 1, 48, None), (1, 1, 48, 224)),
        ((None, 80, None), (1, 80, 16)),
        ((), ()),
    ],
)
def test_synthetic_shapes(shape: tuple, expected: tuple) -> None:
    inputs = [InputSpec("x", np.dtype(np.float32), shape)]
    assert next(iter(synthetic_dataset(inputs, 1, 0))).sample["x"].shape == expected


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 2)}, "input shape for z: the model takes x"),
        ({"x": (1, 3)}, r"input shape \[1, 3\] does not fit x, which is float32 \[N, 3, \?\]"),
        ({"x": (1, 4, 2)}, "does not fit x"),
    ],
)
def test_synthetic_shapes_that_do_not_fit(shapes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synthetic_dataset(ONE, 1, 0, shapes)
