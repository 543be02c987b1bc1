"""Realistic workdirs and a reader of pages, for every test of this folder."""

import importlib.util
from pathlib import Path

import pytest


def load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_run():
    return load("fake_run")


@pytest.fixture(scope="session")
def parse():
    return load("parsed").Page


@pytest.fixture(scope="session")
def report(parse):
    """Writes the report of a workdir and takes it apart."""
    from sparse_pretrain.report import write_report

    def made(path):
        out = write_report(path)
        assert out == path / "report.html"
        return parse(out.read_text(encoding="utf-8"))

    return made
