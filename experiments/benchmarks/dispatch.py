"""Dispatch on CPU: how near do sorted experts come to the machine's dense matmul rate?

Question: sort, gather, three grouped products and the weighted sum, against the same FLOPs as one
          dense SwiGLU, and against a batched einsum over experts that all have equally many rows.
Command:  python3 experiments/benchmarks/dispatch.py
Method:   float32 or bfloat16 arrays throughout, weights included; all arms interleaved, medians of
          their rounds. `whole` is everything a mixture does but its router. `products` are the
          three grouped products alone, on rows already sorted.
          Bars: where experts see 64 rows or more and the width is 512 or more, the whole at 0.6 of
          dense; elsewhere at 0.8 of the batched einsum. Memory: temporaries of the compiled program
          per byte of the rows that the einsum's program must hold (1.5).
Measured: results/dispatch.json, two Intel cores without AMX (180 GFLOP/s), jax 0.12.0.1, at first
          priority beside other work: 13 of 24 at their bar (one, the quickstart's forward pass with
          even loads, only because the einsum was disturbed)
          GFLOP/s, bfloat16, width        load  pass   dense batched whole /dense /batched memory
          16 x 512 rows, 512               even  forw.   148     165   119   0.81     0.72  2.13 met
          16 x 512 rows, 512               even  both    129     146   112   0.87     0.77  2.00 met
          16 x 512 rows, 512               near  forw.   156     132   119   0.76     0.90  2.13
          16 x 512 rows, 512               near  both    132     147   112   0.85     0.76  2.00
          16 x 512 rows, 512               zipf  forw.   131     158   100   0.76     0.63  2.13 met
          16 x 512 rows, 512               zipf  both    148     152    94   0.64     0.62  2.00 met
          32 x 256 rows, 1024              even  forw.   149     169   141   0.95     0.84  2.33 met
          32 x 256 rows, 1024              even  both    144     148   135   0.94     0.91  0.93 met
          32 x 256 rows, 1024              near  forw.   166     130   122   0.73     0.94  2.33
          32 x 256 rows, 1024              near  both    149     152   109   0.73     0.72  0.93
          32 x 256 rows, 1024              zipf  forw.   153     167   103   0.67     0.62  2.33 met
          32 x 256 rows, 1024              zipf  both    142     139    89   0.63     0.64  0.93 met
          64 x 128 rows, 512               even  forw.   144     155   137   0.95     0.88  2.34 met
          64 x 128 rows, 512               even  both    138     113    94   0.68     0.83  0.93 met
          64 x 128 rows, 512               near  forw.   143     141    88   0.62     0.62  2.34
          64 x 128 rows, 512               near  both    141     115    81   0.57     0.70  0.93
          64 x 128 rows, 512               zipf  forw.   166     141    99   0.60     0.70  2.34 no
          64 x 128 rows, 512               zipf  both    144     123    72   0.50     0.59  0.93 no
          64 x 64 rows, 512                even  forw.   132     103   101   0.76     0.98  2.67 met
          64 x 64 rows, 512                even  both    144      88    87   0.60     0.99  0.80 met
          64 x 64 rows, 512                near  forw.   145     123    79   0.54     0.64  2.67
          64 x 64 rows, 512                near  both    146      88    65   0.44     0.73  0.80
          64 x 64 rows, 512                zipf  forw.   136     109    53   0.39     0.49  2.67 no
          64 x 64 rows, 512                zipf  both    144      91    50   0.35     0.55  0.80 no
          quickstart, 16 x 1536 rows, 256  even  forw.   127      79    66   0.52     0.83  2.08 met
          quickstart, 16 x 1536 rows, 256  even  both    139     145    97   0.69     0.67  1.63 no
          quickstart, 16 x 1536 rows, 256  near  forw.   155     150    90   0.58     0.60  2.08
          quickstart, 16 x 1536 rows, 256  near  both    140     146    81   0.58     0.56  1.63
          quickstart, 16 x 1536 rows, 256  zipf  forw.   139     141    91   0.65     0.64  2.08 no
          quickstart, 16 x 1536 rows, 256  zipf  both    136     128    67   0.49     0.52  1.63 no
          bake-off, 64 x 256 rows, 128     even  forw.    84      77    51   0.61     0.67  2.34 no
          bake-off, 64 x 256 rows, 128     even  both     96     111    53   0.55     0.48  1.84 no
          bake-off, 64 x 256 rows, 128     near  forw.    84      80    41   0.49     0.51  2.34
          bake-off, 64 x 256 rows, 128     near  both    108     115    41   0.38     0.36  1.84
          bake-off, 64 x 256 rows, 128     zipf  forw.    83      96    44   0.53     0.45  2.34 no
          bake-off, 64 x 256 rows, 128     zipf  both     74      78    34   0.46     0.44  1.84 no
          With Zipf loads, forward and both, before and after over dense: 64 x 128 rows 0.48 to 0.60
          and 0.33 to 0.50, 64 x 64 rows 0.30 to 0.39 and 0.24 to 0.35.
Learned:  a loop over blocks copies an expert's matrix for each and, for the weights' gradient,
          reads and writes a matrix of float32; one product over all experts does neither. So what
          all experts have goes in that product, and only what some have beyond it in the loop.
          With Zipf loads half of the rows still go through the loop, and most experts have far
          fewer rows than the mean, for which a product of all experts is slow itself: bars of
          uneven loads stay missed below 256 rows. At widths of 256 and less what is lost is copies
          of the rows (gather, homes, sum), which a fused kernel would not make. Memory stays above
          1.5 in forward passes: rows, gate and up alone are 1.6 times what the bar counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cpu_peers import commit, device
from peers_common import use_threads
from rich.progress import track

from kernels_pallas.grouped_matmul.xla import grouped_matmul
from kernels_pallas.linear.xla import split_rows
from sparse_pretrain.model import layers
from sparse_pretrain.routing import dispatch, experts
from sparse_pretrain.sharding import ops

RESULTS = Path(__file__).parents[1] / "results" / "dispatch.json"

# name: experts, seats a token, tokens, width, hidden
SHAPES = {
    "16 x 512 rows, 512 wide": (16, 2, 4096, 512, 512),
    "32 x 256 rows, 1024 wide": (32, 4, 2048, 1024, 512),
    "64 x 128 rows, 512 wide": (64, 4, 2048, 512, 256),
    "64 x 64 rows, 512 wide": (64, 4, 1024, 512, 256),
    "quickstart: 16 x 1536 rows, 256 wide": (16, 3, 8192, 256, 192),
    "bake-off: 64 x 256 rows, 128 wide": (64, 4, 4096, 128, 64),
}
# `near`: as routers with moving prices leave a batch's loads, 15 % apart in the mean; it has no bar
LOADS = ("even", "near", "zipf")


def assignment(shape, load, rng):
    """Experts of every token [T, C]: each expert equally often, nearly so, or by Zipf's law."""
    experts_, seats, tokens, _, _ = shape
    if load == "even":
        order = np.stack([rng.permutation(experts_) for _ in range(tokens * seats // experts_)])
        return order.reshape(tokens, seats)
    near = np.exp(0.15 * rng.standard_normal(experts_))
    weight = near if load == "near" else 1 / np.arange(1, experts_ + 1)
    noise = rng.gumbel(size=(tokens, experts_)) + np.log(weight)[None, :]
    return np.argsort(-noise, axis=1)[:, :seats]


@jax.custom_vjp
def batched(x, w):
    """[E, C, D] times [E, D, F], with the backward products in their fast forms."""
    return jnp.einsum("ecd,edf->ecf", x, w)


def _batched_backward(residuals, dy):
    x, w = residuals
    chunks = split_rows(x.shape[1])
    parts = [a.reshape(a.shape[0], chunks, -1, a.shape[2]) for a in (x, dy)]
    dw = jnp.einsum("ebcd,ebcf->edf", *parts, preferred_element_type=jnp.float32)
    return jnp.einsum("ecf,edf->ecd", dy, w), dw.astype(w.dtype)


batched.defvjp(lambda x, w: (batched(x, w), (x, w)), _batched_backward)


def arms(shape, load, dtype):
    """name -> (function of its arguments, arguments), all with the same useful FLOPs."""
    E, C, T, D, F = shape
    rng = np.random.default_rng(0)

    def array(*size):
        return jnp.asarray(rng.normal(size=size) / np.sqrt(size[-2]), dtype)

    weights = experts.Weights(array(E, D, F), array(E, D, F), array(E, F, D))
    one = experts.Weights(array(D, F), array(D, F), array(F, D))
    x, rows = array(T, D), array(T * C, D)
    expert = jnp.asarray(assignment(shape, load, rng), jnp.int32)
    share = jnp.full((T, C), 1 / C, jnp.float32)
    plan = jax.jit(dispatch.plan, static_argnums=1)(expert, E)
    sorted_rows = jax.jit(dispatch.dispatch)(x, plan)

    def swiglu(product, x, w):
        return product(layers.swiglu(product(x, w.gate), product(x, w.up)), w.down)

    def products(x, w, plan):
        y = swiglu(lambda a, b: grouped_matmul(a, b, plan.layout), x, w)
        # as `combine` gives its cotangent: nothing in rows that hold no pair
        return jnp.where(plan.used[:, None], y, 0)

    # integers are arguments too: as constants the compiler would plan for these loads
    return {
        "whole": (lambda x, w, e: experts.run(w, x, e, share), (x, weights, expert)),
        "products": (products, (sorted_rows, weights, plan)),
        "batched": (lambda x, w, _: swiglu(batched, x, w), (rows.reshape(E, -1, D), weights, 0)),
        "dense": (lambda x, w, _: swiglu(ops.linear, x, w), (rows, one, 0)),
    }


def compiled(function, arguments, backward):
    """The compiled forward pass, or forward and backward with a gradient for every argument."""
    if not backward:
        return jax.jit(function).lower(*arguments).compile()

    def both(dy, x, weights, data):
        y, pull = jax.vjp(lambda x, w: function(x, w, data), x, weights)
        return y, pull(dy)

    dy = jax.eval_shape(function, *arguments)
    made = jax.jit(both).lower(dy, *arguments).compile()
    filled = jnp.full(dy.shape, 0.01, dy.dtype)
    return lambda *a: made(filled, *a), made


def measure(shape, load, dtype, backward, seconds):
    """Median seconds of each arm over interleaved rounds, and the temporaries of two of them."""
    made, memory = {}, {}
    for name, (function, arguments) in arms(shape, load, dtype).items():
        run = compiled(function, arguments, backward)
        program = run[1] if backward else run
        run = run[0] if backward else run
        memory[name] = program.memory_analysis().temp_size_in_bytes
        jax.block_until_ready(run(*arguments))
        made[name] = (run, arguments)
    times = {name: [] for name in made}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["whole"]) < 5:
        for name, (run, arguments) in made.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}, memory


def main() -> None:
    """Prints the table and writes experiments/results/dispatch.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per row of the table")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    use_threads(2)
    found = []
    cases = [(n, load, b) for n in SHAPES for load in LOADS for b in (False, True)]
    for name, load, backward in track(cases, "measuring"):
        E, C, T, D, F = shape = SHAPES[name]
        seconds, memory = measure(shape, load, options.dtype, backward, options.seconds)
        flops = 6 * T * C * D * F * (3 if backward else 1)
        size = jnp.dtype(options.dtype).itemsize
        wide = D >= 512 and T * C // E >= 64
        row = {"shape": name, "load": load, "pass": "both" if backward else "forward"}
        row |= {f"{arm}_gflops": flops / s / 1e9 for arm, s in seconds.items()}
        row["of_dense"] = seconds["dense"] / seconds["whole"]
        row["of_batched"] = seconds["batched"] / seconds["whole"]
        row["products_of_batched"] = seconds["batched"] / seconds["products"]
        row["temporary_mb"] = memory["whole"] / 1e6
        row["memory"] = memory["whole"] / (memory["batched"] + T * C * D * size)
        if load != "near":
            row["bar"] = "0.6 of dense" if wide else "0.8 of batched"
            row["met"] = row["of_dense"] >= 0.6 if wide else row["of_batched"] >= 0.8
        found.append(row)
    head = "dense  batched  products  whole   of dense  of batched  memory  bar"
    print(f"{'GFLOP/s':38s} {'load':5s} {'pass':8s} {head}")
    for r in found:
        rates = [r[f"{a}_gflops"] for a in ("dense", "batched", "products", "whole")]
        print(
            f"{r['shape']:38s} {r['load']:5s} {r['pass']:8s} "
            f"{rates[0]:5.0f}  {rates[1]:7.0f}  {rates[2]:8.0f}  {rates[3]:5.0f}   "
            f"{r['of_dense']:8.2f}  {r['of_batched']:10.2f}  {r['memory']:6.2f}  "
            + (f"{r['bar']} {'met' if r['met'] else 'MISSED'}" if "bar" in r else "none")
        )
    result = {"dtype": options.dtype, "rows": found, "commit": commit(), **device()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    barred = [r["met"] for r in found if "bar" in r]
    print(f"{sum(barred)} of {len(barred)} at their bar")


if __name__ == "__main__":
    main()
