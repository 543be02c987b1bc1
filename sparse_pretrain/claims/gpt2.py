"""The other side of a comparison: GPT-2's decoder and nanoGPT's recipe, in plain functions.

Learned positions, LayerNorm with biases, GELU, a tied head, AdamW under a cosine. It has the face
of an `arms.Arm`, so that both sides are tuned and kept by the same code.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sparse_pretrain.attention import base
from sparse_pretrain.claims.arms import Task
from sparse_pretrain.claims.bench import Bench
from sparse_pretrain.shapes import AnyArray, Batch

STD, EPS = 0.02, 1e-5
B1, B2, DECAY, CLIP, WARMUP, FLOOR = 0.9, 0.95, 0.1, 1.0, 0.05, 0.1


def init(key: jax.Array, *, vocab: int, length: int, width: int, layers: int) -> dict[str, Any]:
    """Normal weights of 0.02, those that end a residual branch smaller by sqrt(2 x layers).

    Source: GPT-2 (Radford et al. 2019), section 2.3; karpathy/nanoGPT, model.py.
    """
    keys = iter(jax.random.split(key, 2 + 4 * layers))

    def linear(rows: int, columns: int, gain: float = 1.0) -> dict[str, Array]:
        weights = STD * gain * jax.random.normal(next(keys), (rows, columns))
        return {"w": weights, "b": jnp.zeros((columns,))}

    def norm() -> dict[str, Array]:
        return {"scale": jnp.ones((width,)), "b": jnp.zeros((width,))}

    end = (2 * layers) ** -0.5
    return {
        "tokens": {"w": STD * jax.random.normal(next(keys), (vocab, width))},
        "places": {"w": STD * jax.random.normal(next(keys), (length, width))},
        "layers": [
            {
                "norm_attention": norm(),
                "qkv": linear(width, 3 * width),
                "out": linear(width, width, end),
                "norm_mlp": norm(),
                "up": linear(width, 4 * width),
                "down": linear(4 * width, width, end),
            }
            for _ in range(layers)
        ],
        "norm": norm(),
    }


def logits(
    params: dict[str, Any], tokens_BxL: Int[AnyArray, "B L"], heads: int
) -> Float[Array, "B L V"]:
    """Scores of the next token; a row is one text, where its documents end is not told."""
    B, L = tokens_BxL.shape
    x = params["tokens"]["w"][tokens_BxL] + params["places"]["w"][None, :L]
    D = x.shape[-1]
    past = jnp.tril(jnp.ones((L, L), bool))[None, None]
    for layer in params["layers"]:
        qkv = _linear(layer["qkv"], _norm(layer["norm_attention"], x))
        q, k, v = jnp.moveaxis(jnp.reshape(qkv, (B, L, 3, heads, D // heads)), 2, 0)
        scores = jnp.einsum("blhd,bshd->bhls", q, k) / math.sqrt(D // heads)
        weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
        mixed = jnp.reshape(jnp.einsum("bhls,bshd->blhd", weights, v), (B, L, D))
        x = x + _linear(layer["out"], mixed)
        hidden = jax.nn.gelu(_linear(layer["up"], _norm(layer["norm_mlp"], x)))
        x = x + _linear(layer["down"], hidden)
    return jnp.einsum("bld,vd->blv", _norm(params["norm"], x), params["tokens"]["w"])


def _linear(p, x):
    return jnp.einsum("blc,cd->bld", x, p["w"]) + p["b"][None, None]


def _norm(p, x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS)
    return centred * scale * p["scale"][None, None] + p["b"][None, None]


def nats(params: dict[str, Any], batch: Batch, heads: int) -> tuple[Array, Array]:
    """(sum of the targets' nats, number of targets)."""
    scores = logits(params, batch.tokens, heads)
    own = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
    lost = jax.nn.logsumexp(scores, axis=-1) - own
    return jnp.sum(lost * batch.weights), jnp.sum(batch.weights)


def flops_per_token(vocab: int, length: int, width: int, layers: int, heads: int) -> float:
    """Of training, counted as those of our models are: three times the forward products."""
    linear = layers * 24.0 * width**2
    core = base.core_work(linear, heads, width // heads, width // heads, length)
    return 3 * (linear + layers * core.core_model + 2.0 * width * vocab)


def cosine(step: int, steps: int) -> float:
    """Share of the peak rate at a step from 1: a linear rise, then half a cosine to a tenth."""
    rise = max(1, round(WARMUP * steps))
    if step <= rise:
        return step / rise
    along = (step - rise) / max(1, steps - rise)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * along))


class Arm:
    """GPT-2 for `steps` steps of a task; `run` as that of `arms.Arm`."""

    def __init__(self, label: str, task: Task, *, steps: int, width: int, layers: int, heads: int):
        self.label, self.task, self.steps, self.heads = label, task, steps, heads
        length, batch = task.facts["seq"], task.facts["batch"]
        self.sizes = {"vocab": task.vocab, "length": length, "width": width, "layers": layers}
        self.flops = steps * length * batch * flops_per_token(**self.sizes, heads=heads)
        self._step: Callable | None = None
        self._score = jax.jit(lambda params, batch: nats(params, batch, heads))

    def run(self, place: Bench, seed: int, *, rate: float) -> dict[str, Any]:
        """One run, or what was kept of it."""
        content = {"sizes": self.sizes, "heads": self.heads, "task": self.task.facts}
        content |= {"recipe": [B1, B2, DECAY, CLIP, WARMUP, FLOOR], "steps": self.steps}
        content |= {"seed": seed, "rate": rate}
        found = place.kept(f"{self.label}-s{seed}", content, lambda: self._run(seed, rate))
        place.say(
            f"  {self.label} seed {seed} rate {rate:g}: {found['loss']:.4f} nats, "
            f"{found['seconds']:.0f} s"
        )
        return found

    def _run(self, seed: int, rate: float) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        params = init(jax.random.key(seed), **self.sizes)
        tx = optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.scale_by_adam(b1=B1, b2=B2),
            optax.add_decayed_weights(
                DECAY, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
            ),
        )
        if self._step is None:  # the rate is data, so one program serves all rates

            @jax.jit
            def step(params, opt, batch, rate):
                def loss(p):
                    total, count = nats(p, batch, self.heads)
                    return total / count

                value, grads = jax.value_and_grad(loss)(params)
                with jax.numpy_dtype_promotion("standard"):
                    updates, opt = tx.update(grads, opt, params)
                return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt, value

            self._step = step
        opt, batches, told = tx.init(params), self.task.train(seed), []
        for n in range(1, self.steps + 1):
            now = jnp.float32(rate * cosine(n, self.steps))
            params, opt, value = self._step(params, opt, next(batches), now)
            told.append(value)
            if n % 16 == 0:  # the device's queue stays short
                jax.block_until_ready(value)
        losses = [float(x) for x in jax.device_get(told)]
        assert math.isfinite(losses[-1]), f"{self.label}: seed {seed} at rate {rate} diverged"
        sums = np.sum(
            [[float(x) for x in self._score(params, b)] for b in self.task.heldout()], axis=0
        )
        return {
            "loss": float(sums[0] / sums[1]),
            "losses": losses,
            "flops": self.flops,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "params": sum(int(np.size(x)) for x in jax.tree.leaves(params)),
        }
