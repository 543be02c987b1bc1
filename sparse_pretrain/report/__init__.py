"""Self-contained HTML pages for runs and sweeps, and the statistics that compare them."""

from pathlib import Path


def write_report(path: Path | str) -> Path:
    """Write `report.html` into the workdir `path` and return where it is (see `page`)."""
    from sparse_pretrain.report import page  # brings numpy, which --help must not wait for

    return page.write_report(path)
