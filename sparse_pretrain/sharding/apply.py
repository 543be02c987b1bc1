"""A plan on a mesh: where parameters, optimizer state and batches lie, and what is traced there.

Model code never meets any of this. While a step is traced inside `Placed.active()`, `ops` and
`nn.read` ask `current()` and lay their arrays out; without it they leave them alone.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_pretrain.sharding import peers, plans, ticks

# What a run may ask for beside its plan, by field.
CHOICES = {
    "exchange": ("auto", "padded", "ragged"),
    "context": ("auto", "gather", "ring"),
    "pipeline": ticks.ASKED,
}
_CURRENT: contextvars.ContextVar["Placed | None"] = contextvars.ContextVar("placed", default=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A plan on a mesh. `microbatches` go through a pipeline per step, by the schedule `pipeline`;
    `exchange` is how tokens travel to experts and `context` how keys reach the parts of a row, each
    one of CHOICES; `manual` axes are those that a surrounding shard_map has already taken (only the
    pipeline's own code sets them).
    """

    plan: plans.Plan
    mesh: Mesh
    microbatches: int = 1
    exchange: str = "auto"
    context: str = "auto"
    pipeline: str = "auto"
    manual: frozenset[str] = frozenset()

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Axis -> size."""
        return dict(self.mesh.shape)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, 1 without one."""
        return self.sizes.get("pipe", 1)

    @property
    def schedule(self) -> str:
        """The schedule of the pipeline."""
        return ticks.chosen(self.pipeline, self.sizes.get("context", 1))

    @property
    def piped(self) -> bool:
        """Whether layers are to be sent through a pipeline, which is not at work yet."""
        return self.stages > 1 and "pipe" not in self.manual

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Traces what is inside for this mesh."""
        with jax.set_mesh(self.mesh), self.naming():
            yield

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Only the names: for inside a shard_map, which knows its mesh."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def inside(self, *axes: str) -> "Placed":
        """The same where a shard_map has taken these axes."""
        return dataclasses.replace(self, manual=self.manual | set(axes))

    # --- activations

    def axes(self, dim: str) -> tuple[str, ...]:
        """The axes that a dim of activations is dealt over, those of size 1 left out.

        Rows B are dealt over the pipeline too, wherever it is not at work; T are the tokens L of
        a row where the tensor axis, which has no use for itself there, may share in them.
        """
        names = self.plan.dims.get("L" if dim == "T" else dim, ())
        if dim == "B":
            names = (*(("pipe",) if "N" in self.plan.dims else ()), *self.plan.batch)
        elif dim == "T":
            names = (*names, "tensor")
        return tuple(a for a in names if self.sizes.get(a, 1) > 1 and a not in self.manual)

    def dealt(self, dim: str) -> int:
        """Over how many devices a dim is dealt."""
        return math.prod(self.sizes[a] for a in self.axes(dim))

    def cut(self, dim: str, size: int) -> tuple[str, ...]:
        """`axes` without the last ones that a dim of this size does not divide over."""
        axes = self.axes(dim)
        if size % math.prod(self.sizes[a] for a in axes):
            axes = tuple(a for a in axes if a != "pipe")
        while size % math.prod(self.sizes[a] for a in axes):
            axes = axes[:-1]
        return axes

    def spec(self, dims: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Where an activation lies; one letter a dim, '.' for one that is never cut."""
        assert len(dims) == len(shape), (dims, shape)
        return PartitionSpec(*(entry(self.cut(d, n)) for d, n in zip(dims, shape, strict=True)))

    # --- parameters and state

    def named(self, spec: PartitionSpec) -> NamedSharding:
        """On this mesh."""
        return NamedSharding(self.mesh, spec)

    @property
    def replicated(self) -> NamedSharding:
        """The same everywhere."""
        return self.named(PartitionSpec())

    def parameter(self, dims: tuple[str, ...], shape, use: str = "stored") -> PartitionSpec:
        """`plans.parameter` on this mesh."""
        sizes = {a: n for a, n in self.sizes.items() if a not in self.manual}
        return plans.parameter(self.plan, sizes, dims, tuple(shape), use=use)

    def lay(self, tree: Any, definition: Any, use: str = "stored") -> Any:
        """A NamedSharding for each leaf of a tree that holds trees like the parameters.

        A leaf is its parameter's where its path ends like the parameter's and it has that shape;
        any other (a count, a price, a key) is the same everywhere.
        """
        known = _by_path(definition)

        def one(path, leaf):
            keys = _keys(path)
            for i in range(len(keys)):
                dims, shape = known.get(keys[i:], (None, None))
                if dims is not None and shape == tuple(leaf.shape):
                    return self.named(self.parameter(dims, shape, use))
            return self.replicated

        return jax.tree_util.tree_map_with_path(one, tree)

    def hold(self, tree: Any, definition: Any, use: str = "stored") -> Any:
        """The tree inside a trace, laid as `lay` says."""
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.lay(tree, definition, use))

    # --- batches

    @property
    def rows(self) -> PartitionSpec:
        """Where a batch's fields [B, L] lie. The pipeline's stages all read all of it."""
        batch = tuple(a for a in self.axes("B") if a != "pipe")
        return PartitionSpec(entry(batch), entry(self.axes("L")))

    def share(self, rows: int) -> tuple[int, int]:
        """(index, count): of `count` equal runs of a batch's rows this process reads run `index`.

        Errors: ValueError when the rows do not divide over the mesh, or when it gives this process
        rows that are not one run.
        """
        self._check_rows(rows)
        index = self.named(PartitionSpec(self.rows[0])).addressable_devices_indices_map((rows,))
        runs = sorted({s[0].indices(rows)[:2] for s in index.values() if s is not None})
        first, last = runs[0][0], runs[-1][1]
        size = last - first
        if sum(b - a for a, b in runs) != size or rows % size or first % size:
            raise ValueError(
                f"mesh: process {jax.process_index()} would read the rows {runs}, which are not "
                "one run; order devices by process"
            )
        return first // size, rows // size

    @property
    def shares(self) -> int:
        """Into how many runs of rows a batch falls, each of which some process reads."""
        cut = tuple(a for a in self.axes("B") if a != "pipe")
        return self.share(math.prod(self.sizes[a] for a in cut))[1]

    def put(self, batch: Any, rows: int) -> Any:
        """This process's rows of a batch of `rows`, as arrays over all processes."""
        sharding = self.named(self.rows)
        index, count = self.share(rows)
        first = index * (rows // count)

        def one(local):
            local = np.asarray(local)

            def part(where):
                a, b, _ = where[0].indices(rows)
                return local[a - first : b - first, *where[1:]]

            shape = (rows, *local.shape[1:])
            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(one, batch)

    def whole(self, tree: Any) -> Any:
        """Every array of the tree on one device of this process. All processes must ask."""
        gathered = self.jit(lambda t: t, out_shardings=self.replicated)(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), gathered)

    def like_batch(self, batch: Any) -> Any:
        """Shapes of a batch's fields, [B, L] over all processes, with where they lie."""
        sharding = self.named(self.rows)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
        )

    # --- functions

    def jit(self, function: Callable, **options: Any) -> "Compiled":
        """`jax.jit` of a function that is traced under this plan."""
        return Compiled(self, jax.jit(function, **options))

    # --- what fits

    def check(self, definition: Any, *, rows: int, length: int) -> None:
        """Refuses a model or a batch that the mesh does not divide.

        Units: `rows` of a batch over all processes, `length` tokens of a row.
        Errors: ValueError of one line naming the axis, what it does not divide, and what fits.
        """
        n, name = self.sizes, self.plan.name
        if self.stages > 1:
            ticks.chosen(self.pipeline, n.get("context", 1))
            if any(dims[0] == "Row" for dims, _, _ in _listed(definition)):
                raise ValueError(
                    f"mesh: pipe={self.stages} of plan {name}: a pipeline carries no rows of "
                    "model.memory; take a plan without stages"
                )
        for dims, shape, path in _listed(definition):
            for dim, size in zip(dims, shape, strict=True):
                whole = {"E": "experts", "N": "layers of the pattern", "H": "heads"}.get(dim)
                for axis in self.plan.dims.get(dim, ()) if whole else ():
                    _fits(name, axis, n.get(axis, 1), size, f"{whole} of {path}")
                if dim == "D":
                    cut = [a for a in self.plan.stored if n.get(a, 1) > 1]
                    taken = {a for d in dims for a in self.plan.dims.get(d, ())}
                    for axis in (a for a in cut if a not in taken):
                        _fits(name, axis, n[axis], size, f"width of {path}")
        _fits(name, "context", n.get("context", 1), length, "tokens of a row")
        self._check_rows(rows, self.microbatches)

    def _check_rows(self, rows: int, parts: int = 1) -> None:
        n = self.sizes
        step = math.prod(n.get(a, 1) for a in self.plan.batch) * parts
        if rows % step:
            shown = ", ".join(f"{a}={n[a]}" for a in self.plan.batch if n.get(a, 1) > 1)
            times = f" x {parts} micro-batches" if parts > 1 else ""
            raise ValueError(
                f"mesh: plan {self.plan.name} deals {rows} rows of a batch over {shown or 'one'}"
                f"{times}, which is {step}; a batch of {max(rows // step, 1) * step} rows fits"
            )


class Compiled:
    """A jitted function that is called and lowered under its plan."""

    def __init__(self, placed: Placed, function: Any):
        self._placed, self._function = placed, function
        self._made: Any = None

    def __call__(self, *args: Any) -> Any:
        """As of `jax.jit`; several processes compile, then meet, and then run."""
        with self._placed.active():
            if jax.process_count() == 1:
                return self._function(*args)
            if self._made is None:
                self._made = self._function.lower(*args).compile()
                peers.meet()
            return self._made(*args)

    def lower(self, *args: Any) -> Any:
        """As of `jax.jit`."""
        with self._placed.active():
            return self._function.lower(*args)


def current() -> Placed | None:
    """What is being traced for; None on one device."""
    return _CURRENT.get()


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """No plan: for what runs on one device's part of everything."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def exchange(asked: str, platform: str) -> str:
    """How tokens travel to experts there: `ragged` only rows that are there, or `padded`.

    Auto is ragged on GPU alone. TPU's compiler has ragged_all_to_all, and refuses it on thousands
    of chips ("Assigned barrier is not acceptable", libtpu 0.0.50); CPU has none.
    Errors: ValueError naming the field where the platform cannot do what is asked.
    """
    if asked == "ragged" and platform == "cpu":
        raise ValueError("exchange: ragged, which cpu cannot do; padded and auto can")
    return asked if asked != "auto" else "ragged" if platform == "gpu" else "padded"


def entry(axes: tuple[str, ...]) -> Any:
    """One dim's entry in a PartitionSpec."""
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _fits(plan: str, axis: str, size: int, whole: int, what: str) -> None:
    if whole % size:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        shown = ", ".join(map(str, fits if len(fits) < 13 else [*fits[:6], "..", *fits[-6:]]))
        raise ValueError(
            f"mesh: {axis}={size} of plan {plan} does not divide the {whole} {what}; "
            f"sizes that fit: {shown}"
        )


def _listed(definition: Any) -> list[tuple[tuple[str, ...], tuple[int, ...], str]]:
    return [(d, s, ".".join(path)) for path, (d, s) in _by_path(definition).items()]


def _by_path(definition: Any) -> Mapping[tuple[str, ...], tuple[Any, Any]]:
    """Path -> (dims, shape) of every parameter."""
    dims = jax.tree.leaves(definition.dims, is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree_util.tree_leaves_with_path(definition.shapes)
    return {
        _keys(path): (d, tuple(leaf.shape)) for (path, leaf), d in zip(shapes, dims, strict=True)
    }


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
