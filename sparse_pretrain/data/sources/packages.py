"""The standard library and the text of the packages installed beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sparse_pretrain.data.sources import base, stdlib

MOST = 200_000_000  # bytes of packages, shared out so that only the largest packages are cut
FILE = 400_000  # characters of one file
TABLE = 16_000  # characters of a file that is mostly digits and punctuation

SUFFIXES = (".py", ".md", ".rst", ".txt")
# Of .txt files only prose: most others are lists of labels, checksums or requirements.
_PROSE = re.compile(r"(read|change|news|history|note|guide|doc|tutorial|intro|faq|usage)", re.I)
_LEGAL = re.compile(r"^(licen[cs]e|copying|notice|authors|third.?party)", re.I)
_SKIP = frozenset({"__pycache__", "..", "node_modules"})
# This package's own code would change the corpus with every edit of it.
_OWN = frozenset({"sparse-pretrain"})

# Distribution names; `libraries` has what is not listed.
_AREAS = {
    "numerics": """
        numpy scipy jax jaxlib ml-dtypes opt-einsum pandas pyarrow sympy mpmath networkx numba
        tensorstore array-record polars xarray dask cupy statsmodels shapely scikit-image""",
    "learning": """
        flax optax orbax-checkpoint grain tensorflow-datasets tensorflow chex torch torchvision
        transformers tokenizers safetensors huggingface-hub dm-haiku ml-collections tensorboard
        tensorboardx datasets scikit-learn keras einops treescope equinox jaxtyping accelerate
        triton wandb mlflow-skinny trackio lightning timm tensorflow-metadata dm-tree etils""",
    "graphics": """
        matplotlib pillow fonttools kiwisolver contourpy cycler plotly seaborn bokeh imageio
        pygments rich""",
    "development": """
        pip setuptools wheel mypy ruff pytest pytest-xdist hypothesis beartype pre-commit
        virtualenv packaging coverage black isort pylint sphinx jedi ipython jupyter notebook
        nbformat tox poetry execnet pluggy typing-extensions libcst cython pathspec""",
    "web": """
        requests urllib3 httpx httpx2 httpcore httpcore2 aiohttp anyio h11 fsspec protobuf flask
        werkzeug django starlette fastapi uvicorn tornado gradio boto3 botocore s3fs grpcio
        googleapis-common-protos prometheus-client pydantic sqlalchemy aiofiles certifi idna""",
}
_AREA = {name: area for area, names in _AREAS.items() for name in names.split()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Packages(base.Source):
    """The standard library and the installed distributions, tests, licences and tables left out.

    The areas of packages come beside the library's own domains. A distribution counts as changed
    when its version or its RECORD file does; an edit of an installed file goes unseen.
    """

    fold = ("libraries", 0.002)

    def __init__(self, spec: str = "python_packages") -> None:
        super().__init__(spec, "python_packages")
        self._stdlib = stdlib.Stdlib()

    def _distributions(self) -> list[tuple[str, importlib.metadata.Distribution]]:
        found: dict[str, importlib.metadata.Distribution] = {}
        for distribution in importlib.metadata.distributions():
            name = _normal(distribution.metadata["Name"] or "")
            if name and name not in _OWN:
                found.setdefault(name, distribution)  # the first on the path is what imports get
        return sorted(found.items())

    def fingerprint(self) -> str:
        stats: list[tuple[str, str, int, int]] = []
        for name, distribution in self._distributions():
            size = stamp = 0
            record = getattr(distribution, "_path", None)
            if record is not None and (Path(record) / "RECORD").is_file():
                stat = (Path(record) / "RECORD").stat()
                size, stamp = stat.st_size, stat.st_mtime_ns
            stats.append((name, distribution.version, size, stamp))
        limits = [MOST, FILE, TABLE]
        return base.digest([self._stdlib.fingerprint(), limits, stats])

    def _files(self, name: str, distribution: importlib.metadata.Distribution) -> dict[str, Path]:
        files = {}
        for file in distribution.files or []:
            parts = file.parts
            if (
                file.suffix in SUFFIXES
                and not _SKIP.intersection(parts)
                and not parts[0].endswith((".dist-info", ".egg-info", ".data"))
                and not file.is_absolute()
                and not base.is_test(parts)
                and not _LEGAL.match(parts[-1])
                and (file.suffix != ".txt" or _PROSE.search("/".join(parts[1:])))
            ):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    files[f"{name}/{file.as_posix()}"] = path
        return files

    def read(self) -> Iterator[base.Raw]:
        yield from self._stdlib.read()
        dropped: Counter[str] = Counter()
        plan = {name: (d, self._files(name, d)) for name, d in self._distributions()}
        sizes = {
            name: {file: path.stat().st_size for file, path in files.items()}
            for name, (_, files) in plan.items()
        }
        level = share_out([sum(files.values()) for files in sizes.values()], MOST)
        for name, (distribution, files) in plan.items():
            area = _AREA.get(name, "libraries")
            about = _description(distribution).strip()
            if len(about) > 500:
                yield base.Raw(base.head(about + "\n", FILE), area, f"{name}/description")
            keep = _within(sizes[name], level)
            dropped["files of the largest distributions"] += len(files) - len(keep)
            for file in sorted(keep):
                text = base.read_python(files[file])
                if text is None:
                    dropped["undecodable files"] += 1
                    continue
                limit = TABLE if len(text) > TABLE and base.is_table(text) else FILE
                kept = base.head(text, limit)
                dropped["characters over a file's cap"] += len(text) - len(kept)
                yield base.Raw(kept, area, file)
        self.notes = {
            "stdlib": self._stdlib.notes,
            "rule": "packages: area by distribution name",
            "distributions": {name: d.version for name, (d, _) in plan.items()},
            "caps": {"all packages, bytes": MOST, "file, characters": FILE, "table": TABLE},
            "dropped": dict(sorted(dropped.items())),
        }


def _description(distribution: importlib.metadata.Distribution) -> str:
    """The long description, most often the README: the body of METADATA after its headers."""
    return (distribution.read_text("METADATA") or "").partition("\n\n")[2]


def share_out(sizes: list[int], most: int) -> int:
    """The largest level such that the sizes, each cut to it, sum to at most `most`."""
    left = most
    ordered = sorted(sizes)
    for i, size in enumerate(ordered):
        if size * (len(ordered) - i) > left:
            return left // (len(ordered) - i)
        left -= size
    return max(ordered, default=0)


def _within(sizes: dict[str, int], level: int) -> set[str]:
    """Files whose sizes sum to at most `level`: all, or a sample in the order of a hash."""
    if sum(sizes.values()) <= level:
        return set(sizes)
    kept: set[str] = set()
    for file in sorted(sizes, key=lambda file: hashlib.sha256(file.encode()).digest()):
        if sizes[file] <= level:
            level -= sizes[file]
            kept.add(file)
    return kept
