"""Our side of the length benchmark: a worker that holds one attention variant at one length.

Run by attention_length.py; speaks JSON over its pipe.
"""

import dataclasses
import math
import os
import sys
import time
from unittest import mock

import peers_common as common

common.use_threads(int(sys.argv[1]))  # before jax is imported
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import length_common as sizes  # noqa: E402
from executed_flops import executed_flops  # noqa: E402

from kernels_pallas import device  # noqa: E402
from sparse_pretrain import attention, nn, spec  # noqa: E402
from sparse_pretrain.attention import base  # noqa: E402
from sparse_pretrain.sharding import ops  # noqa: E402

GROUPED = {"heads": sizes.HEADS, "kv_heads": 1, "head_dim": sizes.HEAD_DIM}
LATENT = {"heads": sizes.HEADS, "kv_rank": 128, "nope_dim": 32, "rope_dim": 32, "v_dim": 64}
SHARED = {"heads": sizes.HEADS, "dim": sizes.HEAD_DIM, "rope_dim": 32, "q_rank": 128}
SHARED |= {"groups": 2, "group_rank": 128, "window": 128}

# As one would set them for long contexts, with full attention's heads and head widths. A kind that
# is not here runs at its own defaults, but for the fields of GROUPED that it has.
SETTINGS = {
    "full": GROUPED,
    "mla": LATENT,
    "sliding": GROUPED | {"window": 512},
    "moba": GROUPED | {"block": 256, "top_k": 4},
    "nsa": GROUPED | {"span": 32, "stride": 16, "block": 64, "top_k": 8, "window": 256},
    "dsa": LATENT | {"top": 256, "index_heads": 4, "index_dim": 32, "index_rope_dim": 16},
    "csa": SHARED | {"ratio": 4, "top": 128, "index_heads": 4, "index_dim": 32},
    "hca": SHARED | {"ratio": 128},
}


def settings(kind):
    """The configuration of a kind."""
    of = attention.TABLE[kind].Config
    known = {field.name for field in dataclasses.fields(of)}
    return SETTINGS.get(kind, {k: v for k, v in GROUPED.items() if k in known})


class Cell:
    """One variant at one length: its layer, and its projections alone."""

    def __init__(self, kind, length):
        self.variant, self.length = attention.TABLE[kind], length
        self.config = spec.build(self.variant.Config, settings(kind))
        self.trained = self.variant.trains_own(self.config)
        self.definition = nn.define(lambda keys: self.variant(self.config, sizes.WIDTH, keys))
        keys = jax.random.split(jax.random.key(0), 3)
        # all at once: nothing of the making stays behind to be counted as the layer's
        self.params, _ = jax.jit(self.definition.init)(keys[0])
        shape = (1, length, sizes.WIDTH)
        self.x, self.dy = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        self.context = base.Context(jnp.ones_like(positions), positions)

    def forward(self, params, x, context):
        """The output."""
        return self.definition.merge(params, {})(x, context)

    def both(self, params, x, dy, context):
        """Forward and backward, with gradients for every parameter and for x.

        As in training: with the loss of the variant's own part, an indexer, where it trains one.
        """

        def attend(params, x):
            if not self.trained:
                return self.forward(params, x, context), None
            y, loss = self.definition.merge(params, {}).attend(x, context)
            return y, loss.mean()

        (y, loss), pull = jax.vjp(attend, params, x)
        return y, pull((dy, None if loss is None else jnp.ones_like(loss)))

    def products(self):
        """(x, w) of every product with weights that the layer does, as ops.linear is given them."""
        seen = []

        def record(x, w, contract=1):
            size_in = math.prod(x.shape[x.ndim - contract :])
            seen.append(((x.size // size_in, size_in), (size_in, w.size // size_in)))
            return product(x, w, contract)

        product = ops.linear
        with mock.patch.object(ops, "linear", record):
            jax.eval_shape(self.forward, self.params, self.x, self.context)
        return seen

    def programs(self):
        """name -> compiled program and its arguments; `linear` is the projections alone."""
        shapes = self.products()
        rows = {x: jnp.full(x, 0.01, jnp.bfloat16) for x, _ in shapes}
        weights = [jnp.full(w, 0.01, jnp.float32) for _, w in shapes]

        def linear(weights, rows):
            return [ops.linear(rows[x], w) for (x, _), w in zip(shapes, weights, strict=True)]

        def linear_both(weights, rows, dy):
            y, pull = jax.vjp(linear, weights, rows)
            return y, pull(dy)

        cotangents = [jnp.full((x[0], w[1]), 0.01, jnp.bfloat16) for x, w in shapes]
        calls = {
            "forward": (self.forward, (self.params, self.x, self.context)),
            "both": (self.both, (self.params, self.x, self.dy, self.context)),
            "linear_forward": (linear, (weights, rows)),
            "linear_both": (linear_both, (weights, rows, cotangents)),
        }
        return {
            name: (jax.jit(call).lower(*arguments).compile(), arguments)
            for name, (call, arguments) in calls.items()
        }

    def counted(self):
        """FLOPs of the layer's products, forward and with backward, as they are executed.

        Products with weights are put in their plain form, two FLOPs per weight and pass: our own
        forms of their gradients do more, to be faster.
        """

        def plain(x, w, contract=1):
            size_in = math.prod(x.shape[x.ndim - contract :])
            y = jnp.matmul(x.reshape(-1, size_in), w.reshape(size_in, -1).astype(x.dtype))
            return y.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])

        with mock.patch.object(ops, "linear", plain):
            return {
                "forward": executed_flops(self.forward, self.params, self.x, self.context),
                "both": executed_flops(self.both, self.params, self.x, self.dy, self.context),
            }

    def formula(self):
        """FLOPs by the variant's own formula, of the whole row."""
        work = self.variant.work(self.config, sizes.WIDTH, self.length)
        found = {
            "forward": work.linear + work.core,
            "both": 3 * work.linear + work.core + work.core_backward,
            "core_forward": work.core,
            "core_both": work.core + work.core_backward,
            "model": work.core_model,
        }
        return {name: value * self.length for name, value in found.items()}


def build(request):
    """One cell: compiled, called once; then {"turn": program, "calls": n} and {"count": true}."""
    device.keep_memory()  # as every run does
    cell = Cell(request["kind"], request["length"])
    started = time.perf_counter()
    made = cell.programs()
    compiled = time.perf_counter() - started
    calls = {
        name: lambda run=run, args=args: jax.block_until_ready(run(*args))
        for name, (run, args) in made.items()
    }
    for name in ("linear_forward", "linear_both"):  # wakes the threads, outside of any peak
        calls[name]()
    reply = {
        **sizes.first_turns({name: calls[name] for name in sizes.PASSES}),
        "compile_seconds": compiled,
        "temporary": {n: made[n][0].memory_analysis().temp_size_in_bytes for n in sizes.PASSES},
        "compiler_flops": {n: made[n][0].cost_analysis()["flops"] for n in sizes.PASSES},
        "formula": cell.formula(),
        "settings": cell.config.to_dict(),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }

    def handle(request):
        if request.get("count"):
            started = time.perf_counter()
            return {"counted": cell.counted(), "seconds": time.perf_counter() - started}
        return sizes.turn(calls[request["turn"]], request["calls"])

    return reply, handle


if __name__ == "__main__":
    common.serve(build)
