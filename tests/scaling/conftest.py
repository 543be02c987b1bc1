"""The maker of realistic workdirs, for every test of this folder."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake_run():
    path = Path(__file__).parents[1] / "report" / "fake_run.py"
    spec = importlib.util.spec_from_file_location("fake_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
