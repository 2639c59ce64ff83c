"""The arithmetic of the stopwatch on profiles that are made up, and a few real nodes, one far larger than the other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import open_network
from onnx_kfe.planning import _stopwatch
from onnx_kfe.planning._stopwatch import Refusal, Stopwatch
from onnx_kfe.planning._workload import Workload
from tests.networks import classifier, samples

CPU = ("CPUExecutionProvider",)


def conv(channels: int, side: int = 8, kernel: int = 3, operator: str = "Conv") -> Workload:
    kernel = 1 if operator == "Gather" else kernel
    return Workload(operator, channels, channels, 1, (1,), (side, side), (kernel, kernel), (), "", "FLOAT")


IMPOSSIBLE = conv(4, side=2, kernel=3)  # a kernel that is larger than the image


# On this machine


@pytest.mark.parametrize("alone", [False, True])
def test_sixty_four_times_the_work_is_slower(monkeypatch, alone):
    monkeypatch.setattr(_stopwatch, "_ROUNDS", 10)
    stopwatch = Stopwatch(CPU, 1)
    if alone:
        monkeypatch.setattr(stopwatch, "_profiles", False)
    small, large = conv(8, 16), conv(64, 16)
    found = dict(stopwatch.measure([large, IMPOSSIBLE, small]))
    assert isinstance(found[IMPOSSIBLE], Refusal)
    assert 0 < 2 * found[small] < found[large]
    assert 0 < stopwatch.step < 1e-3


def test_products_and_reorderings_take_time_too(monkeypatch):
    monkeypatch.setattr(_stopwatch, "_ROUNDS", 10)
    half = {"operator": "Conv", "groups": 1, "leading": (1,), "activation": "", "dtype": "FLOAT16"}
    given = [
        Workload("Gemm", 8, 4, 1, (2,), (), (), (), "", "FLOAT"),
        Workload("MatMul", 8, 4, 1, (2, 3), (), (), (), "", "FLOAT"),
        conv(4, operator="Gather"),
        Workload("Conv", 4, 4, 4, (1,), (8,), (3,), (("strides", (2,)),), "Relu", "FLOAT"),
        Workload(inputs=16, outputs=16, size=(8, 8), kernel=(3, 3), attributes=(), **half),
        Workload(inputs=4, outputs=6, size=(8,), kernel=(3,), attributes=(), **half),
    ]
    found = dict(Stopwatch((), 1).measure(given))
    assert set(found) == set(given)
    assert all(isinstance(value, float) and 0 < value < 1 for value in found.values()), found


def test_the_linear_share_of_a_model(monkeypatch):
    monkeypatch.setattr(_stopwatch, "_ROUNDS", 10)
    network = open_network(classifier())
    share = Stopwatch((), 1).linear_share(network.model, {"x": samples(1)})
    assert share is not None
    assert 0 < share <= 1


def test_a_provider_that_is_not_available():
    with pytest.raises(UsageError, match=r"NoneExecutionProvider is not available; --providers can be: .*CPUExecution"):
        list(Stopwatch(["NoneExecutionProvider"], 1).measure([conv(4), conv(5)]))
    assert Stopwatch(["NoneExecutionProvider"], 1).linear_share(onnx.ModelProto(), {}) is None


def test_nothing_to_measure():
    assert list(Stopwatch((), 1).measure([])) == []


# On a machine that is made up

STEP, FLOOR = 2e-6, 5e-6


class Made(Stopwatch):
    """Profiles as given, plain runs that take one second."""

    step = STEP  # type: ignore[assignment]

    def __init__(self, seconds: dict[str, float], operators: dict[str, str] | None = None) -> None:
        super().__init__((), 1)
        self.seconds, self.operators = seconds, operators or {}
        self._session = lambda *arguments, **options: None  # type: ignore[assignment]

    def _profile(self, model, feeds):
        return self.seconds, self.operators


def test_what_the_profile_adds_is_taken_off_and_the_step_to_the_next_put_on():
    first, second, third = conv(4, 5), conv(4, 6, operator="Gather"), conv(4, 7)
    profile = {
        "w0/_kernel_time": 30e-6,
        "w0/activation_kernel_time": 9e-6,  # one that was not fused
        "InsertedPrecisionFreeCast_w1/y_nchwc_kernel_time": 25e-6,
        "w2/_kernel_time": 1e-6,  # less than nodes that do nothing
        "source0_kernel_time": 1.0,
        "meanw0/_kernel_time": 1.0,
        "InsertedPrecisionFreeCast_meanw0/y_kernel_time": 1.0,
        "InsertedPrecisionFreeCast_w1/y_kernel_time": 1.0,
        **{f"floor{n}/_kernel_time": value for n, value in enumerate([FLOOR, FLOOR, 0.5])},
    }
    operators = {name: "Cast" if name.endswith("Cast_w1/y_kernel_time") else "Conv" for name in profile}
    found = dict(Made(profile, operators).measure([third, second, first]))
    assert found[first] == pytest.approx(30e-6 - FLOOR + STEP + 9e-6 - FLOOR + STEP)
    assert found[second] == pytest.approx(3 * (25e-6 - FLOOR + STEP)), "and out of the blocked layout and back"
    assert found[third] == pytest.approx(STEP)


def test_the_linear_share_by_hand(monkeypatch):
    """10 s in the profile against 6 s plain: each of the four nodes was lengthened by 1 s."""
    monkeypatch.setattr(_stopwatch, "_run", lambda session, feeds: [6.0])
    seconds = {"a": 4.0, "b": 3.0, "c": 2.5, "d": 0.5}
    operators = {"a": "FusedConv", "b": "Relu", "c": "FusedMatMul", "d": "Gemm"}
    model = open_network(classifier()).model
    assert Made(seconds, operators).linear_share(model, {}) == pytest.approx((3 + 1.5 + 0) / 6.5)
    monkeypatch.setattr(_stopwatch, "_run", lambda session, feeds: [20.0])
    assert Made(seconds, operators).linear_share(model, {}) == pytest.approx(7 / 20), "what no node took is of none"


def test_one_refusal_spoils_no_other(monkeypatch):
    asked = []

    class Picky(Stopwatch):
        def _profiled(self, part):
            asked.append(len(part))
            if refused := [workload for workload in part if workload.inputs in (3, 11)]:
                raise KfeError(f"{refused[0].inputs} channels are too many")
            yield from (1e-6 * workload.inputs for workload in part)

    given = [conv(channels) for channels in range(1, 17)]
    found = dict(Picky((), 1).measure(given))
    for workload in given:
        expected = 1e-6 * workload.inputs
        if workload.inputs in (3, 11):
            expected = f"{workload.inputs} channels are too many"
            assert isinstance(found[workload], Refusal)
        assert found[workload] == expected
    assert asked[0] == 16
    assert len(asked) <= 1 + 2 * 2 * 4, "bisected, not tried one by one"


def test_sessions_hold_no_more_than_memory_allows(monkeypatch):
    monkeypatch.setattr(_stopwatch, "_ELEMENTS", 4 * conv(8).elements)
    monkeypatch.setattr(_stopwatch, "_MOST_WORKLOADS", 6)
    given = [conv(8, 16), *(conv(channels, side) for channels in (8, 4, 2) for side in (8, 6) for _ in range(5))]
    given += [conv(100)]
    parts = list(_stopwatch._parts(given))
    assert sorted(w.key for part in parts for w in part) == sorted(w.key for w in given)
    for part in parts:
        assert len(part) == 1 or sum(workload.elements for workload in part) <= 4 * conv(8).elements
        assert len(part) <= 6
    assert [conv(100)] in parts, "too large for any, alone"
    assert max(map(len, parts)) == 6
    shapes = [workload.input_shape for part in parts for workload in part]
    assert shapes == sorted(shapes), "what reads the same is side by side"


def test_what_else_the_machine_does_only_lengthens():
    random = np.random.default_rng(0)
    clean = random.permutation(np.linspace(1.0, 1.1, 10))
    disturbed = np.concatenate([clean, random.uniform(5, 500, 9)])
    assert _stopwatch._steady(disturbed) == pytest.approx(clean.mean())
    assert _stopwatch._steady([3.0]) == 3.0
