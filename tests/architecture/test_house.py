"""The repository keeps the rules of the house, and each rule finds a tree that breaks it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import house

ROOT = Path(__file__).resolve().parents[2]

# A tree that keeps every rule; each case below changes one file of it.
GOOD = {
    "kernels_pallas/__init__.py": '"""Ops."""\nimport jax\nimport numpy\n',
    "kernels_pallas/flash/xla.py": '"""Body."""\nfrom jax.experimental import pallas\n',
    "sparse_pretrain/__init__.py": '"""Package."""\n',
    "sparse_pretrain/nn.py": '"""Modules."""\nfrom flax import nnx\n',
    "sparse_pretrain/games/prices.py": (
        '"""Prices."""\n\n\nclass Rule:\n    """A rule."""\n\n'
        '    def move(self):\n        """Moves."""\n\n\n'
        'class Sign(Rule):\n    """Another."""\n\n    def move(self):\n        return 1\n'
    ),
    "sparse_pretrain/sharding/ops.py": '"""Ops."""\nfrom kernels_pallas.flash import xla\n',
    "sparse_pretrain/sharding/mesh.py": '"""Meshes."""\nfrom jax.sharding import Mesh\n',
    "sparse_pretrain/attention/__init__.py": (
        '"""Table."""\nfrom sparse_pretrain.attention.full import Full\n'
        "from sparse_pretrain.attention.mla import MLA\n"
        "from sparse_pretrain.attention.dsa import DSA\n"
    ),
    "sparse_pretrain/attention/base.py": '"""Shared."""\n',
    "sparse_pretrain/attention/full.py": (
        '"""Full."""\nfrom sparse_pretrain.attention import base\n'
        "from sparse_pretrain.sharding import ops\n"
    ),
    "sparse_pretrain/attention/mla.py": '"""Latent."""\nfrom sparse_pretrain import nn\n',
    "sparse_pretrain/attention/dsa.py": (
        '"""May build on MLA."""\nfrom sparse_pretrain.attention.mla import MLA\n'
    ),
    "sparse_pretrain/routing/__init__.py": '"""Table."""\nfrom . import topk, hash\n',
    "sparse_pretrain/routing/topk.py": '"""Top k."""\n',
    "sparse_pretrain/routing/hash.py": '"""Hash."""\n',
    "sparse_pretrain/model/lm.py": '"""Model."""\nfrom sparse_pretrain import attention\n',
    "sparse_pretrain/data/__init__.py": '"""Data."""\nimport grain\nimport tensorflow_datasets\n',
    "sparse_pretrain/optim/__init__.py": '"""Optimizers."""\nimport optax\n',
    "sparse_pretrain/checkpoint.py": '"""Checkpoints."""\nimport orbax.checkpoint\n',
    "sparse_pretrain/training/loop.py": (
        '"""Loop."""\nfrom sparse_pretrain import checkpoint, data, optim\n\n\n'
        'def train():\n    """Trains.\n\n    Shapes: none.\n    Errors: none.\n    """\n'
    ),
    "sparse_pretrain/cli.py": '"""Commands."""\nimport ml_collections\n',
    "experiments/quickstart.py": '"""Record."""\nfrom ml_collections import ConfigDict\n',
}


def add(path, text):
    """The good tree with `text` at the end of one file."""
    return {**GOOD, path: GOOD.get(path, '"""New."""\n') + text}


BAD = [
    ("whole", {**GOOD, "sparse_pretrain/games/__init__.py": None}),
    ("floors", add("sparse_pretrain/attention/full.py", "from sparse_pretrain.model import lm\n")),
    ("floors", add("sparse_pretrain/nn.py", "import sparse_pretrain.training.loop\n")),
    ("floors", add("sparse_pretrain/nn.py", "def f():\n    from . import data\n")),
    ("floors", add("sparse_pretrain/sharding/ops.py", "from ..model.lm import LM\n")),
    ("floors", add("sparse_pretrain/newcomer.py", "")),
    ("strangers", add("sparse_pretrain/data/__init__.py", "from sparse_pretrain import optim\n")),
    ("strangers", add("sparse_pretrain/checkpoint.py", "from sparse_pretrain.data import x\n")),
    ("kernels_alone", add("kernels_pallas/__init__.py", "import ml_collections\n")),
    ("kernels_alone", add("kernels_pallas/flash/xla.py", "from sparse_pretrain import nn\n")),
    ("kernels_alone", add("kernels_pallas/flash/xla.py", "import jaxtyping\n")),
    ("kernels_alone", add("kernels_pallas/flash/xla.py", "import tokamax\n")),
    ("experiments_apart", add("sparse_pretrain/cli.py", "import experiments.quickstart\n")),
    ("homes", add("sparse_pretrain/model/lm.py", "from flax import nnx\n")),
    ("homes", add("sparse_pretrain/model/lm.py", "from jax.experimental import pallas as pl\n")),
    ("homes", add("sparse_pretrain/cli.py", "import jax.experimental.pallas.mosaic_gpu\n")),
    ("homes", add("sparse_pretrain/training/loop.py", "import ml_collections\n")),
    ("homes", add("sparse_pretrain/training/loop.py", "from grain import python\n")),
    ("homes", add("sparse_pretrain/cli.py", "import tensorflow_datasets as tfds\n")),
    ("homes", add("sparse_pretrain/training/loop.py", "from orbax import checkpoint\n")),
    ("homes", add("sparse_pretrain/cli.py", "import torch\n")),
    ("homes", add("sparse_pretrain/data/__init__.py", "import tensorflow\n")),
    ("variants_apart", add("sparse_pretrain/attention/full.py", "from . import mla\n")),
    (
        "variants_apart",
        add("sparse_pretrain/attention/mla.py", "from sparse_pretrain.attention.dsa import DSA\n"),
    ),
    (
        "variants_apart",
        add("sparse_pretrain/attention/mla.py", "from sparse_pretrain.attention import TABLE\n"),
    ),
    ("variants_apart", add("sparse_pretrain/routing/hash.py", "from .topk import TopK\n")),
    ("variants_apart", add("sparse_pretrain/attention/forgotten.py", "")),
    ("placeless", add("sparse_pretrain/model/lm.py", "import jax\njax.devices()\n")),
    ("placeless", add("sparse_pretrain/model/lm.py", "from jax import device_count\n")),
    ("placeless", add("sparse_pretrain/attention/full.py", "from jax.sharding import Mesh\n")),
    (
        "placeless",
        add("sparse_pretrain/routing/topk.py", "def _f(x):\n    return x.sharding.mesh\n"),
    ),
    (
        "placeless",
        add("sparse_pretrain/model/lm.py", "from sparse_pretrain.sharding import mesh\n"),
    ),
    ("lengths", add("sparse_pretrain/model/lm.py", "\n" * 399)),
    ("lengths", add("kernels_pallas/flash/xla.py", "\n" * 599)),
    ("lengths", add("kernels_pallas/__init__.py", "\n" * 398)),
    ("lengths", {**GOOD, "tests/test_long.py": "\n" * 401}),
    ("docstrings", add("sparse_pretrain/nn.py", "def define():\n    return 1\n")),
    ("docstrings", add("sparse_pretrain/nn.py", "class A:\n    'A.'\n    def f(self): ...\n")),
    (
        "docstrings",
        add("sparse_pretrain/games/prices.py", "class B(Sign):\n    'B.'\n    def f(self): ...\n"),
    ),
    ("docstrings", {**GOOD, "kernels_pallas/flash/xla.py": "import jax\n"}),
    (
        "docstrings",
        add("sparse_pretrain/nn.py", 'def f():\n    """F.\n\n    Errors: a.\n    Shapes: b."""\n'),
    ),
    ("no_machine", {**GOOD, "README.md": "See https://" + "pyp" + "i.org/project/x\n"}),
    ("no_machine", {**GOOD, ".ci/run": "cd /" + "work/main\n"}),
    ("no_machine", {**GOOD, "tests/a.py": "X = '/" + "home/me/data'\n"}),
]


def plant(root, tree):
    """Writes the tree; folders of the packages get an `__init__.py` unless it is None."""
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    for name in tree:
        init = (Path(name).parent / "__init__.py").as_posix()
        if name.startswith(house.PACKAGES) and init not in tree:
            (root / init).write_text('"""A package."""\n')


@pytest.mark.parametrize("rule", house.RULES)
def test_the_repository_keeps(rule):
    broken = list(house.RULES[rule](ROOT))
    assert not broken, f"{house.RULES[rule].__doc__}\n" + "\n".join(broken)


def test_a_good_tree_breaks_nothing(tmp_path):
    plant(tmp_path, GOOD)
    assert {name: list(rule(tmp_path)) for name, rule in house.RULES.items()} == {
        name: [] for name in house.RULES
    }


@pytest.mark.parametrize(("rule", "tree"), BAD)
def test_a_tree_that_breaks_one_rule_is_found(rule, tree, tmp_path):
    plant(tmp_path, tree)
    broken = list(house.RULES[rule](tmp_path))
    assert len(broken) == 1, broken
    changed = next(path for path, text in tree.items() if path not in GOOD or GOOD[path] != text)
    stem = changed.removesuffix(".py").removesuffix("/__init__")
    assert broken[0].startswith((stem.replace("/", "."), stem)), broken


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in BAD} == set(house.RULES)


# Imports each module in turn and says which one started a backend or made an array.
PROBE = """
import importlib, pkgutil, sys
from jax._src import xla_bridge
for top in sys.argv[1:]:
    package = importlib.import_module(top)
    names = [m.name for m in pkgutil.walk_packages(package.__path__, top + ".")]
    for name in [top, *names]:
        if not name.endswith("__main__"):
            importlib.import_module(name)
        assert not xla_bridge._backends, f"{name} started a backend when imported"
    print(top, len(names))
"""


def probe(*argv, cwd):
    return subprocess.run(
        [sys.executable, "-c", PROBE, *argv], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_importing_the_packages_does_no_device_work():
    done = probe(*house.PACKAGES, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    for top in house.PACKAGES:  # all of them were imported, not a part
        files = [m for m in house.modules(ROOT) if house.within(m.name, top)]
        assert int(counts[top]) + 1 == len(files)


@pytest.mark.parametrize("line", ["X = jnp.zeros(3)", "X = jax.devices()", "X = jax.random.key(0)"])
def test_device_work_at_import_is_found(line, tmp_path):
    text = f"import jax, jax.numpy as jnp\n{line}\n"
    plant(tmp_path, {"eager/__init__.py": "", "eager/a.py": text})
    done = probe("eager", cwd=tmp_path)
    assert done.returncode != 0
    assert "eager.a started a backend" in done.stderr
