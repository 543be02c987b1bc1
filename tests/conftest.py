"""Strictness for every test: promotion and rank mistakes raise, warnings are errors.

Every function of the package checks its annotations, shapes among them, at each call. The import
hook stands here and not in pytest's options, because xdist's workers never read `addopts`.
"""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile for minutes what runs for seconds: code that LLVM does not optimise (XLA's own
# passes all run), and programs kept for the other worker, child processes and the next time.
# XLA_FLAGS="" tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

from tests import annotations

annotations.check("sparse_pretrain")
# Tracing makes millions of objects that live on in caches; walking them again and again took a
# twelfth of the tests' time.
gc.set_threshold(50_000, 50, 100)

jax.config.update("jax_num_cpu_devices", 8)  # for what shards; everything else runs on the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """--smoke, for the oldest Python and JAX."""
    parser.addoption("--smoke", action="store_true",
                     help="one case, the first, of each of the first two tests of every file")


def pytest_collection_modifyitems(config, items):
    """Keep the first case of the first two tests of every file under --smoke."""
    if not config.getoption("smoke"):
        return
    files: dict[str, dict] = {}
    for item in items:
        file, _, test = item.nodeid.partition("[")[0].partition("::")
        files.setdefault(file, {}).setdefault(test, item)
    first = {id(item) for tests in files.values() for item in list(tests.values())[:2]}
    kept = [item for item in items if id(item) in first]
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in first])
    items[:] = kept


@pytest.fixture
def rng():
    """A seeded numpy generator."""
    import numpy as np

    return np.random.default_rng(0)
