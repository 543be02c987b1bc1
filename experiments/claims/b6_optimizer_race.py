"""B6: Muon, SOAP, Shampoo and Adam race to a loss on GPT-2.

Source: KellerJordan/modded-nanogpt, records of 2024-10-29.
Published: Muon 3.276, SOAP 3.275, Shampoo 3.286, Adam 3.341.
Kind: REFIT.
Tested: the published curves; where Muon's meets Adam's last loss. One run each.
Criterion: order (SOAP and Muon, a tie, then Shampoo, then Adam), and Muon there 1.1 to 1.7 times
    sooner.
Cost: under a second.
Result: PASS at bfee571: soap 3.275, muon 3.276, shampoo 3.286, adam 3.341; Muon 1.18 times sooner.
"""

from sparse_pretrain.claims import base


def measure(bench):
    """Last losses and the ratio of steps."""
    from sparse_pretrain.scaling.published import optimizers

    del bench
    found = optimizers.race()
    order, sooner = found["order"], found["sooner"]["muon"]
    passed = set(order[:2]) == {"muon", "soap"} and order[2:] == ["shampoo", "adam"]
    final = ", ".join(f"{name} {found['final'][name]:.3f}" for name in order)
    return base.Outcome(
        passed=passed and 1.1 <= sooner <= 1.7,
        measured=f"{final}; Muon {sooner:.2f} times sooner",
        numbers=found,
    )
