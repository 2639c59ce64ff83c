"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of the real models and data.

    They are no part of the repository: ``$ONNX_KFE_TEST_ASSETS`` says where they are, by default ``shared/assets`` beside
    the checkout. Without them the tests that need one are skipped, but in CI that is an error.
    """
    folder = Path(os.environ.get("ONNX_KFE_TEST_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not (folder / "models").is_dir():
        message = f"no test assets in {folder}: set ONNX_KFE_TEST_ASSETS"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
