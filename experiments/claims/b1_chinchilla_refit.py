"""B1: Chinchilla's law, refitted to the points of its own figure.

Source: 2404.10102, table 1; data of epoch-research/analyzing-chinchilla.
Published: A 477.84, B 2143.86, E 1.81724, alpha 0.347313, beta 0.367183 (exact Huber, grid);
    headline 482.01, 2085.43, 1.8172, 0.3478, 0.3658.
Kind: REFIT.
Tested: our fit: the sum of Huber losses at 1e-3 of log loss, from many starts, the five highest
    losses left out.
Criterion: E, alpha and beta within 1e-4 of the grid's, and 17.9 tokens a parameter at 5.76e23
    FLOPs.
Cost: seconds.
Result: PASS at bfee571+: A 477.83, B 2143.42, E 1.81722, alpha 0.347310, beta 0.367172; 17.9 tokens
    a parameter.
"""

from sparse_pretrain.claims import base


def measure(bench):
    """The five constants."""
    from sparse_pretrain.scaling.published import chinchilla

    del bench
    found = chinchilla.refit()
    off = {k: found[k] - chinchilla.PUBLISHED[k] for k in ("E", "alpha", "beta")}
    ratio = found["tokens_per_param"]
    low, high = found["intervals"]["alpha"]
    return base.Outcome(
        passed=all(abs(x) <= 1e-4 for x in off.values()) and f"{ratio:.1f}" == "17.9",
        measured=f"A {found['A']:.2f}, B {found['B']:.2f}, E {found['E']:.5f}, alpha "
        f"{found['alpha']:.6f}, beta {found['beta']:.6f}; {ratio:.1f} tokens a parameter",
        interval=(found["alpha"], low, high),
        of="alpha",
        numbers=found,
    )
