"""Shared by all tests: where photographs lie, and a small dataset."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def test_data():
    """The folder of photographs (FFCV_SSL_TEST_DATA, default ../shared/data); the test is skipped where it is absent."""
    folder = Path(os.environ.get("FFCV_SSL_TEST_DATA", REPOSITORY / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no test photographs: {folder} is not a folder (set FFCV_SSL_TEST_DATA)")
    return folder
