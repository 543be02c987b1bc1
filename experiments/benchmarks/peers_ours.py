"""Our side of the CPU comparison: a worker that trains our DeepSeek-V3 or dense model.

Run by cpu_peers.py; speaks JSON over its pipe.
"""

import os
import sys
import time

import peers_common as common

common.use_threads(int(sys.argv[1]))  # before jax is imported
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from kernels_pallas import device  # noqa: E402
from sparse_pretrain import optim, shapes  # noqa: E402
from sparse_pretrain.attention import full, mla  # noqa: E402
from sparse_pretrain.model import block, ffn, lm  # noqa: E402
from sparse_pretrain.optim import schedules  # noqa: E402
from sparse_pretrain.routing import moe, sigmoid_bias  # noqa: E402
from sparse_pretrain.training import state, step  # noqa: E402


def model_config(model, precision):
    """The peers' model: the same matrices, latents, experts and head; their routing options."""
    if model == "dense":
        attention = full.Config(
            heads=common.HEADS, head_dim=common.DENSE["head_dim"], qk_norm=False
        )
        feed = ffn.DenseConfig(hidden=common.DENSE["intermediate_size"])
    else:
        m = common.MOE
        attention = mla.Config(
            heads=common.HEADS,
            q_rank=m["q_lora_rank"],
            kv_rank=m["kv_lora_rank"],
            nope_dim=m["qk_nope_head_dim"],
            rope_dim=m["qk_rope_head_dim"],
            v_dim=m["v_head_dim"],
        )
        feed = moe.Config(
            experts=m["n_routed_experts"],
            top_k=m["num_experts_per_tok"],
            hidden=m["moe_intermediate_size"],
            shared=m["n_shared_experts"],
            router=sigmoid_bias.Config(scale=2.5),
        )
    return lm.Config(
        width=common.WIDTH,
        vocab=common.VOCAB,
        blocks={"block": block.Config(attention=attention, ffn=feed)},
        pattern=("block",),
        repeats=common.LAYERS,
        scan=False,  # as every experiment that ships: a tenth faster on CPU, longer to compile
        dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
    )


def batches():
    """Device batches of the shared tokens, each row one document."""
    out = []
    for rows in common.tokens():
        tokens, targets = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
        order = np.arange(common.SEQ, dtype=np.int32)
        out.append(
            shapes.Batch(
                tokens=tokens,
                targets=targets,
                segments=np.ones_like(tokens),
                positions=np.broadcast_to(order, tokens.shape).copy(),
                weights=np.ones(tokens.shape, np.float32),
                bytes=np.ones_like(tokens),
                domains=np.zeros_like(tokens),
            )
        )
    return out


def build(request):
    """Training steps of one model; everything a run's step does but the data and the logging."""
    device.keep_memory()  # as every run does
    config = model_config(request["model"], request["precision"])
    definition = lm.define(config)
    adamw = common.ADAMW
    schedule = schedules.make(
        schedules.Config(kind="constant", warmup=0.0),
        peak=adamw["lr"],
        total_tokens=10**9,
        tokens_per_step=common.SEQ * common.BATCH,
    )
    # no clipping: the peers do none here, and it is their time that it would be compared with
    rule = optim.AdamW.Config(
        lr=adamw["lr"],
        b1=adamw["betas"][0],
        b2=adamw["betas"][1],
        eps=adamw["eps"],
        weight_decay=adamw["weight_decay"],
        clip=0.0,
    )
    tx = optim.AdamW.build(rule, definition.dims, schedule)
    started = time.perf_counter()
    held = state.create(definition, tx, 0, ema=False)
    train_step = step.make_train_step(definition, config, tx, schedule=schedule)
    rows = batches()
    done = 0

    def run(steps):
        nonlocal held, done
        for _ in range(steps):
            held, metrics = train_step(held, rows[done % len(rows)])
            done += 1
        jax.block_until_ready(held)
        return float(metrics["loss"])

    run(1)
    reply = {
        "params": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(definition.shapes)),
        "first_step_seconds": time.perf_counter() - started,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }
    return reply, lambda request: common.timed(lambda: run(request["steps"]))


if __name__ == "__main__":
    common.serve(build)
