"""Where published data is looked for, and what is said where it is not."""

import csv
import gzip
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sparse_pretrain import data

VARIABLE = "SPARSE_PRETRAIN_DATA"

_DOMAINS = "allenai/OLMoE, scripts/routing_output/text, one file of {}"
# path below the data folder -> (public repository and path, first 16 digits of its sha256)
KNOWN = {
    "domains/arxiv/arxiv.txt": (_DOMAINS.format("arxiv"), "e72dc8afab4b4e5e"),
    "domains/c4/c4.txt": (_DOMAINS.format("c4"), "ee2fb5542e72c3b6"),
    "domains/github/github.txt": (_DOMAINS.format("github"), "1a8e4b8eb4d4c67b"),
    "domains/wikipedia/wikipedia.txt": (_DOMAINS.format("wikipedia"), "9168686a8b48cdca"),
    "names/names.txt": ("karpathy/makemore, names.txt", "0a30b5557f192f32"),
    "tinyshakespeare/input.txt": (
        "karpathy/char-rnn, data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042",
    ),
    "published/chinchilla/svg_extracted_data.csv": (
        "epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv",
        "193478df4e90f040",
    ),
    "published/optimizer_race/curves.csv": (
        "KellerJordan/modded-nanogpt, records of 2024-10-29, losses as one table",
        "c11bff5a6d71f464",
    ),
    "published/overtraining/runs.csv": (
        "mlfoundations/scaling, exp_data, as one table",
        "c47b6695b2adb310",
    ),
    "published/regmix/test_mixture_1B.csv": ("sail-sg/regmix, data", "dd38052949c0a5f8"),
    "published/regmix/test_mixture_1m.csv": ("sail-sg/regmix, data", "197267b7d6f15367"),
    "published/regmix/test_pile_loss_1B.csv": ("sail-sg/regmix, data", "b2451e2b7fa15400"),
    "published/regmix/test_pile_loss_1m.csv": ("sail-sg/regmix, data", "e027b1674f60140a"),
    "published/regmix/train_mixture_1m.csv": ("sail-sg/regmix, data", "04a32ef4ab594376"),
    "published/regmix/train_pile_loss_1m.csv": ("sail-sg/regmix, data", "49a959aa07ce5c20"),
    "published/routed_scaling/curves.csv.gz": (
        "google-deepmind/scaling_laws_for_routing, data",
        "c03e7531add85e59",
    ),
    "published/schedules/25M_wsd_20000_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "8649b7de4b4b31db",
    ),
    "published/schedules/25M_cosine_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "554e35f9efbe28a6",
    ),
    "published/schedules/25M_constant_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "5a7c0b440751e258",
    ),
    "published/schedules/100M_wsd_20000_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "e66df98c85dba705",
    ),
    "published/schedules/100M_cosine_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "dd544dc61a11fa13",
    ),
    "published/schedules/100M_constant_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "034a75e2415373a9",
    ),
    "published/schedules/400M_wsd_20000_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "8a56dbd8f6b553b4",
    ),
    "published/schedules/400M_cosine_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "aa18c9dbad66610d",
    ),
    "published/schedules/400M_constant_24000.csv": (
        "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo",
        "5d91536675592acd",
    ),
}


class Absent(ValueError):
    """A public file that is not on this machine; says in one line which it is and where it goes."""


def find(name: str) -> Path:
    """The file of this name, its hash checked.

    Looked for below $SPARSE_PRETRAIN_DATA, then below the user's cache.
    Errors: Absent with the public source, or ValueError with both hashes when it is another file.
    """
    source, digest = KNOWN[name]
    roots = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    roots.append(data.cache_dir() / "data")
    path = next((root / name for root in roots if (root / name).is_file()), None)
    if path is None:
        raise Absent(f"{name} is not below ${VARIABLE}; it is {source}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if found != digest:
        raise ValueError(f"{path}: its sha256 begins {found}, that of {source} {digest}")
    return path


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV, gzipped or not. Errors: as `find`."""
    path = find(name)
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as f:
        return list(csv.DictReader(f))


def table(name: str) -> tuple[Sequence[str], dict[int, list[float]]]:
    """(names of the columns but the first, their numbers by the first). Errors: as `find`."""
    with open(find(name)) as f:
        header, *lines = list(csv.reader(f))
    return header[1:], {int(line[0]): [float(x) for x in line[1:]] for line in lines}
