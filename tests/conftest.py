"""Fixtures shared by all tests."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest

from onnx_kfe import evaluation
from onnx_kfe.cli import main
from onnx_kfe.evaluation import _benchmark, _race
from onnx_kfe.graph import count_macs, load
from onnx_kfe.planning import _latency
from tests.planning.clocks import Clock

_numbers = itertools.count()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of the real models and data.

    They are no part of the repository: ``$ONNX_KFE_TEST_ASSETS`` says where they are, by default ``shared/assets``
    beside the checkout. Without them the tests that need one are skipped, but in CI that is an error.
    """
    folder = Path(os.environ.get("ONNX_KFE_TEST_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not (folder / "models").is_dir():
        message = f"no test assets in {folder}: set ONNX_KFE_TEST_ASSETS"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder in place of the user's cache, which no test may see or change, in other processes neither."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(platformdirs, "user_cache_dir", lambda *arguments, **options: str(folder))
        yield folder


@pytest.fixture(autouse=True)
def cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test, empty: made-up latencies of one are no other's."""
    folder = caches / str(next(_numbers))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *arguments, **options: str(folder))
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command line in this process, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def quick_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency from two runs in this process, and load time and memory made up: tests/evaluation has the real ones."""
    quick = functools.partial(evaluation.benchmark, seconds=0.0, min_runs=2, warmup=1)
    monkeypatch.setattr(evaluation, "benchmark", quick)
    monkeypatch.setattr(_benchmark, "race", _race.alternate)
    monkeypatch.setattr(_benchmark, "_measure_alone", lambda *arguments: (0.01, 2**20))


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A machine where a layer takes what `clocks.work` says, and a whole model 0.1 ns a MAC and 20 us beside these."""

    def race(models: dict[str, bytes], feeds: dict[str, np.ndarray], **options: object) -> np.ndarray:
        macs = [count_macs(load(onnx.load_from_string(model))) for model in models.values()]
        return np.tile([2e-5 + 1e-10 * count * len(next(iter(feeds.values()))) for count in macs], (5, 1))

    clock = Clock()
    monkeypatch.setattr(_latency, "Stopwatch", clock)
    monkeypatch.setattr(evaluation, "race", race)
    return clock
