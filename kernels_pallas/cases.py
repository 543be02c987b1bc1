"""Every op with every named workload, as calls of arrays: what compile and bench go through.

A case knows its arguments, as shapes or as arrays, which of them have gradients, and how much
useful work it is: visible pairs of causal attention, rows that experts have; nothing for masked
tiles, padding or recomputation, but for attention's scores, which nobody keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import numerics
from kernels_pallas.block_sparse import block_sparse
from kernels_pallas.block_sparse import op as block_sparse_op
from kernels_pallas.block_sparse import specs as block_sparse_specs
from kernels_pallas.compress import compress
from kernels_pallas.compress import op as compress_op
from kernels_pallas.compress import specs as compress_specs
from kernels_pallas.cross_entropy import cross_entropy
from kernels_pallas.cross_entropy import op as cross_entropy_op
from kernels_pallas.cross_entropy import specs as cross_entropy_specs
from kernels_pallas.flash import flash
from kernels_pallas.flash import op as flash_op
from kernels_pallas.flash import specs as flash_specs
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul import op as grouped_matmul_op
from kernels_pallas.grouped_matmul import specs as grouped_matmul_specs
from kernels_pallas.grouped_swiglu import grouped_swiglu
from kernels_pallas.grouped_swiglu import op as grouped_swiglu_op
from kernels_pallas.grouped_swiglu import specs as grouped_swiglu_specs
from kernels_pallas.indexer import dense, index_kl_dense, index_kl_listed, index_select, listed
from kernels_pallas.indexer import op as index_select_op
from kernels_pallas.indexer import specs as indexer_specs
from kernels_pallas.linear import linear
from kernels_pallas.linear import op as linear_op
from kernels_pallas.linear import specs as linear_specs
from kernels_pallas.op import Op
from kernels_pallas.scaled_matmul import op as scaled_matmul_op
from kernels_pallas.scaled_matmul import scaled_matmul
from kernels_pallas.scaled_matmul import specs as scaled_matmul_specs
from kernels_pallas.sinkhorn import op as sinkhorn_op
from kernels_pallas.sinkhorn import sinkhorn
from kernels_pallas.sinkhorn import specs as sinkhorn_specs
from kernels_pallas.token_sparse import mass, token_mass, token_sparse
from kernels_pallas.token_sparse import op as token_sparse_op
from kernels_pallas.token_sparse import specs as token_sparse_specs

DIRECTIONS = ("forward", "gradient")  # gradient: forward and backward


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload of one op. Units: FLOPs, a multiply-add is 2."""

    op: Op
    spec: str
    call: Callable[..., Any]
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    wrt: tuple[int, ...]  # arguments with a gradient, none for an op without
    forward: float
    gradient: float
    hopper: bool = False  # made for the kernels of Hopper's tensor cores
    main: bool = False  # what training runs, and not made to be awkward

    @property
    def directions(self) -> tuple[str, ...]:
        """Return what can be computed: 'forward', and 'gradient' where there is one."""
        return DIRECTIONS if self.wrt else DIRECTIONS[:1]

    def flops(self, direction: str) -> float:
        """Return the useful work of this direction; a gradient includes its forward pass."""
        return self.forward if direction == "forward" else self.gradient

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments and keywords, a ShapeDtypeStruct for every array."""
        options: dict[str, Any] = {}

        def arrays():
            arguments, keywords = self.make()
            found = {k: v for k, v in keywords.items() if isinstance(v, jax.Array)}
            options.update({k: v for k, v in keywords.items() if k not in found})
            return arguments, found

        with numerics.shapes_only():
            arguments, found = jax.eval_shape(arrays)
        return arguments, found | options

    def function(self, direction: str, options: dict[str, Any], implementation: str | None):
        """Return a function (arguments, array keywords, cotangent) of arrays, to be traced.

        It is made anew, so that nothing traced for another device is found again.
        """
        call = functools.partial(self.call, implementation=implementation, **options)

        def forward(arguments, keywords, cotangent):
            del cotangent
            return call(*arguments, **keywords)

        def gradient(arguments, keywords, cotangent):
            def f(*some):
                changed = dict(zip(self.wrt, some, strict=True))
                return call(*(changed.get(i, x) for i, x in enumerate(arguments)), **keywords)

            out, pull = jax.vjp(f, *(arguments[i] for i in self.wrt))
            return out, pull(cotangent)

        return forward if direction == "forward" else gradient


def _visible(L, S, *, causal=True, window=None, stride=1, span=1, late=False) -> float:
    """Pairs of a query and a key that it sees by position, in one row of one head."""
    offset = 0 if late or (stride, span) != (1, 1) else S - L
    row = np.arange(L) + offset
    high = np.clip((row - span + 1) // stride + 1, 0, S) if causal else np.full(L, S)
    low = 0 if window is None else np.clip((row - window - span + 1) // stride + 1, 0, S)
    return float(np.maximum(high - low, 0).sum())


def _flash(s):
    pairs = s.B * _visible(s.L, s.S or s.L, causal=s.causal, window=s.window, stride=s.stride,
                           span=s.span, late=s.ends)
    return 2 * s.H * (s.Dk + s.Dv) * pairs, 3.5


def _block_sparse(s):
    seen = min(s.N * s.block, s.S or s.L)
    return 2 * s.B * s.L * s.H * (s.Dk + s.Dv) * seen, 3.5


def _token_sparse(s):
    return 2 * s.B * s.L * s.H * (s.Dk + s.v_dim) * s.N, 3.5


def _token_mass(s):
    return 2 * s.B * s.L * s.H * s.Dk * s.N, 1


def _index_scores(s):
    return 2 * s.B * s.J * s.D * _visible(s.L, s.keys, stride=s.stride, span=s.span, late=s.late)


def _index_select(s):
    return _index_scores(s), 1


def _index_kl_dense(s):
    main = 2 * s.B * s.H * s.Dk * _visible(s.L, s.keys, stride=s.stride, span=s.span, late=s.late)
    forward = _index_scores(s) + main
    return forward, (3 * _index_scores(s) + main) / forward if forward else 1


def _index_kl_listed(s):
    return 2 * s.B * s.L * s.J * s.D * s.top, 3


def _cross_entropy(s):
    return 2 * s.T * s.D * s.V, 3


def _grouped_matmul(s):
    return 2 * s.rows * s.D * s.F, 3


def _grouped_swiglu(s):
    return 4 * s.rows * s.D * s.F, 3


def _scaled_matmul(s):
    return 2 * s.rows * s.D * s.F, 3


def _sinkhorn(s):
    return 4 * s.T * s.R**2 * s.iterations, 3  # a sum and a division of every number, twice


def _compress(s):
    return 4 * s.B * s.M * s.R * s.S * s.C, 3  # a number's weight in the sum, and its own


def _linear(s):
    return 2 * s.T * s.D * s.F, 3


def _plain(spec):
    return spec.arguments()


def _mass_arguments(spec):
    arguments, keywords = spec.arguments()
    lse = numerics.normal(arguments[0].shape[:3], jnp.float32, seed=3)
    return (*arguments, lse), {"scale": keywords["scale"]}


def _select_arguments(spec):
    arguments, where = spec.arguments()
    return arguments, where | {"top": spec.top}


def _dense_arguments(spec):
    arguments, where = spec.arguments()
    main = spec.main()
    lse = numerics.normal(main[0].shape[:3], jnp.float32, seed=12)
    return (*arguments, *main, lse), where | {"main_scale": spec.Dk**-0.5}


def _listed_arguments(spec):
    arguments, _ = spec.arguments()
    shape = (spec.B, spec.L, spec.top)
    chosen = numerics.integers(lambda: np.broadcast_to(np.arange(spec.top) - 1, shape), shape)
    return (*arguments, chosen, jnp.ones(shape, jnp.float32)), {}


# op, its function, specs, arguments, what has a gradient, work (forward, with gradient over it)
_TABLE: tuple[tuple[Op, Any, Any, Any, tuple[int, ...], Any], ...] = (
    (linear_op, linear, linear_specs, _plain, (0, 1), _linear),
    (grouped_matmul_op, grouped_matmul, grouped_matmul_specs, _plain, (0, 1), _grouped_matmul),
    (grouped_swiglu_op, grouped_swiglu, grouped_swiglu_specs, _plain, (0, 1, 2), _grouped_swiglu),
    (scaled_matmul_op, scaled_matmul, scaled_matmul_specs, _plain, (0, 1), _scaled_matmul),
    (compress_op, compress, compress_specs, _plain, (0, 1), _compress),
    (sinkhorn_op, sinkhorn, sinkhorn_specs, _plain, (0,), _sinkhorn),
    (flash_op, flash, flash_specs, _plain, (0, 1, 2), _flash),
    (block_sparse_op, block_sparse, block_sparse_specs, _plain, (0, 1, 2), _block_sparse),
    (token_sparse_op, token_sparse, token_sparse_specs, _plain, (0, 1), _token_sparse),
    (mass, token_mass, token_sparse_specs, _mass_arguments, (), _token_mass),
    (index_select_op, index_select, indexer_specs, _select_arguments, (), _index_select),
    (dense, index_kl_dense, indexer_specs, _dense_arguments, (0, 1, 2), _index_kl_dense),
    (listed, index_kl_listed, indexer_specs, _listed_arguments, (0, 1, 2), _index_kl_listed),
    (cross_entropy_op, cross_entropy, cross_entropy_specs, _plain, (0, 1), _cross_entropy),
)
OPS = tuple(row[0].name for row in _TABLE)


def _specs(module: Any) -> dict[str, Any]:
    """All workloads of an op: its small ones, those of training, and those for tensor cores."""
    return module.PARITY | module.SPEED | getattr(module, "HOPPER", {})


def cases(ops: tuple[str, ...] = (), specs: tuple[str, ...] = (), *, abstract: bool = False,
          speed: bool = False, parity: bool = False, dtype: str | None = None) -> Iterator[Case]:
    """Yield the cases of these ops and specs, all of them when none are named.

    `abstract`: only their shapes are wanted, so that lists of choices may hold anything. `speed`:
    only what training runs; `parity`: only the small ones. `dtype` in place of the specs' own.
    Errors: ValueError for a name that no op or none of the chosen ops' specs has.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"op {name!r} is unknown; there are {', '.join(OPS)}")
    chosen = [row for row in _TABLE if not ops or row[0].name in ops]
    known = {name for row in chosen for name in _specs(row[2])}
    for name in specs:
        if name not in known:
            raise ValueError(f"spec {name!r} is unknown; there are {', '.join(sorted(known))}")
    for op, call, module, arguments, wrt, work in chosen:
        for name, spec in _specs(module).items():
            if specs and name not in specs:
                continue
            if (speed and name not in module.SPEED) or (parity and name not in module.PARITY):
                continue
            if dtype is not None:
                spec = dataclasses.replace(spec, dtype=dtype)
            forward, factor = work(spec)
            if abstract and hasattr(spec, "choice"):  # choosing takes long at training lengths
                spec = dataclasses.replace(spec, choice="none")
            yield Case(op, name, call, functools.partial(arguments, spec), wrt, float(forward),
                       float(forward * factor), name in getattr(module, "HOPPER", {}),
                       name not in module.PARITY and not name.startswith("tile_"))
