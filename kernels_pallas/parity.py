"""Hold every backend that runs on this device to the reference in float64: values and gradients.

The reference computes in float64 what the backend gets in its own dtype, on the CPU where JAX has
one beside the device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import command, device, numerics
from kernels_pallas.cases import Case, cases
from kernels_pallas.grouped_matmul.layout import Layout, row_expert
from kernels_pallas.indexer.reference import _scores, _visible

EXAMPLES = """examples:
  python -m kernels_pallas.parity
  python -m kernels_pallas.parity --op grouped_matmul --backend mosaic_gpu
  python -m kernels_pallas.parity --op flash token_sparse --dtype bfloat16 --json > parity.json

columns: the largest error of the results and of the gradients in units of the tolerance of the
dtype (numerics.py; above 1 fails), each array's relative to its own largest magnitude; which array
is worst; whether two runs gave the same bits. The small workloads of each op's specs.py run unless
--spec names others: the float64 reference may need much memory for those that training runs.

exit status: 0 when all that ran agreed, 1 when one did not or broke, 2 for arguments."""

DTYPES = ("float32", "bfloat16")
# Logits of nothing, as lse gives for rows that see nothing: compared for being so only.
_NOTHING = -1e29
# Gradients may be zero but for rounding (of a softmax over one key, say): errors are held against
# at least this share of the largest gradient, and a divergence in nats against at least this.
_FLOOR = 0.1


@dataclasses.dataclass
class Row:
    """What became of one backend. Errors are in units of the tolerance."""

    op: str
    spec: str
    dtype: str
    backend: str
    values: float | None = None
    gradients: float | None = None
    worst: str | None = None
    same_bits: bool | None = None
    refused: str | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Return whether this fails the command."""
        if self.refused is not None:
            return False
        found = [x for x in (self.values, self.gradients) if x is not None]
        return bool(self.error) or not self.same_bits or not all(x <= 1 for x in found)


def oracle() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float64 is exact: on the CPU, or on a GPU where there is no CPU.

    Errors: ValueError on a device without float64 that has no CPU beside it.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.numpy_dtype_promotion("standard"))  # row numbers become int64
    try:
        stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
    except RuntimeError:
        if jax.default_backend() == "tpu":
            raise ValueError("the float64 reference needs a CPU beside the TPU: set "
                             "JAX_PLATFORMS=tpu,cpu") from None
    return stack


def _floats(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating)
                        else np.asarray(x), tree)


def _counting(case: Case, arguments: Any) -> Any:
    """What of the results counts, an array to multiply with, or None for all."""
    layouts = [x for x in arguments if isinstance(x, Layout)]
    return np.asarray(row_expert(layouts[0])[1])[:, None] if layouts else None


def _chosen_scores(arguments: Any, keywords: Any, chosen: Any) -> Any:
    """The float64 scores of chosen keys, best first, and how many different ones there are."""
    q, k, w = arguments
    chosen = np.asarray(chosen)
    alone = np.array([len(set(row[row >= 0])) for row in chosen.reshape(-1, chosen.shape[-1])])
    if k.shape[1] == 0:
        return alone, chosen
    own, others, ends = (keywords.get(n) for n in ("segments_q", "segments_k", "ends_BxS"))
    seen = _visible(q.shape[1], k.shape[1], own, others, ends, keywords["stride"],
                    keywords["span"], keywords.get("first", 0))
    scores = np.where(seen, _scores(q, k, w, keywords.get("scale", 1.0)), np.inf)
    found = np.take_along_axis(scores, np.clip(chosen, 0, k.shape[1] - 1), axis=-1)
    return alone, np.where(chosen >= k.shape[1], np.inf, np.where(chosen >= 0, found, 0))


def _function(case: Case, options: dict[str, Any], backend: str, counting: Any) -> Any:
    """(arguments, array keywords, cotangent) to results and gradients, jitted."""
    forward = case.function("forward", options, backend)

    def run(arguments, arrays, cotangent):
        if not case.wrt:
            return forward(arguments, arrays, None), ()

        def f(*some):
            changed = dict(zip(case.wrt, some, strict=True))
            whole = tuple(changed.get(i, x) for i, x in enumerate(arguments))
            out = forward(whole, arrays, None)
            if counting is None:
                return out
            return jnp.where(counting, out, jnp.zeros_like(out))

        out, pull = jax.vjp(f, *(arguments[i] for i in case.wrt))
        # nothing flows from rows that see nothing
        cotangent = jax.tree.map(lambda d, x: jnp.where(x < _NOTHING, jnp.zeros_like(d), d),
                                 cotangent, out)
        return out, pull(cotangent)

    return jax.jit(run)


def _compare(got: Any, want: Any, dtype: str, floor: float) -> dict[str, float]:
    """Errors of the arrays in units of the tolerance, by their places in the tree."""
    found = {}
    paths = jax.tree_util.tree_flatten_with_path(want)[0]
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        limit = numerics.tolerance(dtype)
        if jnp.dtype(g.dtype).name in numerics.TOLERANCE:  # a gradient has its argument's dtype
            limit = max(limit, numerics.tolerance(g.dtype))
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        nothing = w < _NOTHING
        g = np.where(nothing & (g < _NOTHING), 0, g)
        error = numerics.error(g, np.where(nothing, 0, w), floor=floor)
        found[jax.tree_util.keystr(path)] = error / limit
    return found


class Wanted:
    """The reference's results of one case in float64, made once for all backends."""

    def __init__(self, case: Case, made: Any):
        self.case = case
        self.arguments, keywords = made
        self.arrays = {k: x for k, x in keywords.items() if isinstance(x, jax.Array)}
        self.options = {k: x for k, x in keywords.items() if k not in self.arrays}
        self.counting = _counting(case, self.arguments)
        shapes = jax.eval_shape(case.function("forward", self.options, "reference"),
                                self.arguments, self.arrays, None)
        self.cotangent = numerics.uniform_like(shapes, seed=7) if case.wrt else None
        with oracle():
            self.inputs = _floats((self.arguments, self.arrays, self.cotangent), np.float64)
            run = _function(case, self.options, "reference", self.counting)
            self.out, self.gradients = jax.tree.map(np.asarray, run(*self.inputs))

    def check(self, row: Row) -> None:
        """Run the row's backend twice and fill in how it differs."""
        with contextlib.ExitStack() as stack:
            if row.dtype == "float32":  # a chip's products are narrower unless asked
                stack.enter_context(jax.default_matmul_precision("highest"))
            run = _function(self.case, self.options, row.backend, self.counting)
            first, again = (jax.tree.map(np.asarray, run(self.arguments, self.arrays,
                                                         self.cotangent)) for _ in range(2))
        row.same_bits = all(a.tobytes() == b.tobytes() for a, b in
                            zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
        out, gradients = first
        want = self.out
        if self.case.op.name == "index_select":
            with oracle():
                arguments, arrays, _ = self.inputs
                out, want = (_chosen_scores(arguments, self.options | arrays, x)
                             for x in (out, want))
        values = _compare(out, want, row.dtype,
                          _FLOOR if self.case.op.name.startswith("index_kl") else 0.0)
        largest = max((np.abs(g).max(initial=0) for g in jax.tree.leaves(self.gradients)),
                      default=0.0)
        slopes = _compare(gradients, self.gradients, row.dtype, _FLOOR * float(largest))
        errors = {f"result{k}": e for k, e in values.items()}
        errors |= {f"gradient{k}": e for k, e in slopes.items()}
        row.values = max(values.values())
        row.gradients = max(slopes.values(), default=None)
        row.worst = max(errors, key=lambda k: errors[k])


def check_case(case: Case, dtype: str, names: Sequence[str]) -> list[Row]:
    """Compare these backends on one workload: a row for each, refusals and errors in them."""
    arguments, keywords = made = case.make()
    refusals = case.op.explain(*arguments, **keywords)
    rows = [Row(case.op.name, case.spec, dtype, name, refused=refusals[name]) for name in names]
    running = [row for row in rows if row.refused is None]
    wanted = Wanted(case, made) if running else None
    for row in running:
        assert wanted is not None
        try:
            wanted.check(row)
        except Exception as e:  # of any backend: the others are still wanted
            row.error = f"{type(e).__name__}: {e}".splitlines()[0]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, refusals once per op and reason below."""
    names = ("op", "spec", "dtype", "backend", "values", "gradients", "worst", "bits", "")
    cells: list[tuple[str, ...]] = [names]
    refused: dict[str, int] = {}

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    for r in rows:
        if r.refused is not None:
            why = f"refused {r.op} {r.backend}: {r.refused}"
            refused[why] = refused.get(why, 0) + 1
            continue
        bits = {None: "-", True: "same", False: "differ"}[r.same_bits]
        state = "" if not r.failed else f"FAILED {r.error or ''}".strip()
        cells.append((r.op, r.spec, r.dtype, r.backend, number(r.values), number(r.gradients),
                      r.worst or "-", bits, state))
    lines = [f"{why} ({times} of its workloads)" for why, times in refused.items()]
    return "\n".join([command.columns(cells), *lines])


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("parity", __doc__, EXAMPLES)
    command.add_workloads(parser, specs="PARITY", backends="all but the reference", all_ops=True)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES,
                        help="both unless named")
    parser.add_argument("--json", action="store_true", help="print JSON and not a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    asked = parser.parse_args(argv)
    try:
        chosen = [(dtype, case) for dtype in asked.dtype for case in
                  cases(tuple(asked.op), tuple(asked.spec), parity=not asked.spec, dtype=dtype)]
        with oracle():
            pass
    except ValueError as e:
        parser.error(str(e))
    command.check_backends(parser, asked.backend, [case for _, case in chosen])
    rows: list[Row] = []
    for i, (dtype, case) in enumerate(chosen, 1):
        names = command.backends(case, asked.backend)
        found = check_case(case, dtype, names)
        rows += found
        bad = "FAILED" if any(row.failed for row in found) else "done"
        print(f"{i}/{len(chosen)} {case.op.name} {case.spec} {dtype}: {bad}", file=sys.stderr,
              flush=True)
    about = {"device": device.target().kind, "jax": jax.__version__}
    if asked.json:
        print(json.dumps(about | {"rows": [dataclasses.asdict(row) | {"failed": row.failed}
                                           for row in rows]}, indent=1))
    else:
        print(f"{about['device']}, jax {about['jax']}")
        print(table(rows))
    if not any(row.refused is None for row in rows):
        print("kernels_pallas.parity: nothing ran: every backend refused", file=sys.stderr)
        return 1
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
