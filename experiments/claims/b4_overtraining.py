"""B4: Small runs forecast a model trained 32 times too long, and one far larger.

Source: 2403.08540, section 4; data of mlfoundations/scaling.
Published: 0.7103 % error at 1.4B and 32 times Chinchilla's tokens, 0.7320 % at 6.9B.
Kind: REFIT.
Tested: the law fitted to five runs, four at multiplier 1 and the smallest at 16.
Criterion: 0.001 points.
Cost: seconds.
Result: PASS at bfee571: 0.7103 % and 0.7320 %.
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Both errors in percent."""
    from sparse_pretrain.scaling.published import overtraining

    del bench
    found = overtraining.refit()
    errors = {name: f["error_percent"] for name, f in found["forecast"].items()}
    off = [errors[name] - percent for name, percent in overtraining.PUBLISHED.items()]
    return base.Outcome(
        passed=max(map(abs, off)) <= 0.001,
        measured=" and ".join(f"{error:.4f} %" for error in errors.values()),
        numbers=found,
    )
