"""Claim B5: at 24,000 steps warm-up-stable-decay ends below cosine, and cosine below no decay."""

from sparse_pretrain.scaling.published import files

SIZES = ("25M", "100M", "400M")
FILES = {"wsd": "wsd_20000_24000", "cosine": "cosine_24000", "constant": "constant_24000"}


def final_losses() -> dict[str, dict[str, float]]:
    """The last loss by size and schedule.

    Errors: files.Absent. Source: Luo et al. (2503.12811), their loss curves.
    """
    return {
        size: {
            name: float(files.rows(f"published/schedules/{size}_{file}.csv")[-1]["loss"])
            for name, file in FILES.items()
        }
        for size in SIZES
    }


def ordered(losses: dict[str, dict[str, float]]) -> int:
    """In how many sizes wsd < cosine < constant."""
    return sum(row["wsd"] < row["cosine"] < row["constant"] for row in losses.values())
