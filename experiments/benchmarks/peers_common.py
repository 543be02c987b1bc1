"""What both sides of the CPU comparison share: the models' sizes, the tokens, the worker's pipe.

Standard library and numpy only: the torch worker runs it under another interpreter, in which
neither JAX nor this project need be installed.
"""

import json
import os
import sys
import time

import numpy as np

SEQ = 256
BATCH = 8
VOCAB = 1024
WIDTH = 256
LAYERS = 4
HEADS = 4

# The 15M DeepSeek-V3 shape: an expert is 256 wide, so 3 of them cost what the dense layer costs.
MOE = {
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
# The 3.9M Llama shape.
DENSE = {"intermediate_size": 768, "head_dim": 64}

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

BATCHES = 8


def tokens(seed=0):
    """Rows of SEQ + 1 uniformly drawn tokens, int64 [BATCHES, BATCH, SEQ + 1]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (BATCHES, BATCH, SEQ + 1))


def use_threads(count):
    """Asks every thread pool for `count` threads; call before importing torch or jax."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if hasattr(os, "sched_setaffinity"):  # XLA sizes its pool by the cores it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def timed(run):
    """Wall and processor seconds of `run()`, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "value": value,
    }


def serve(build):
    """Answers JSON requests from stdin, one line each, until it closes.

    `build(request)` handles the first and returns (reply, handler) for those that follow. Prints
    from libraries go to stderr, so that they cannot be taken for a reply.
    """
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(reply):
        pipe.write(json.dumps(reply) + "\n")

    handler = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if handler is None:
                reply, handler = build(request)
            else:
                reply = handler(request)
        except Exception as error:  # the driver names the arm and prints the reason
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
            raise
        answer(reply)
