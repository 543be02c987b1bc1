"""Public files that claims and tests read: never shipped, found on this machine, checked by hash.

They are looked for in the folder that SPARSE_PRETRAIN_DATA names, then under `published` in the
user's cache. Where one is absent, the error says which public repository and path holds it.
"""

import hashlib
import os
from pathlib import Path

from sparse_pretrain import data

VARIABLE = "SPARSE_PRETRAIN_DATA"

# The first 16 digits of each file's sha256.
FILES = {
    "domains/arxiv/arxiv.txt": "e72dc8afab4b4e5e",
    "domains/c4/c4.txt": "ee2fb5542e72c3b6",
    "domains/github/github.txt": "1a8e4b8eb4d4c67b",
    "domains/wikipedia/wikipedia.txt": "9168686a8b48cdca",
    "names/names.txt": "0a30b5557f192f32",
    "published/optimizer_race/curves.csv": "c11bff5a6d71f464",
    "published/overtraining/runs.csv": "c47b6695b2adb310",
    "published/regmix/test_mixture_1B.csv": "dd38052949c0a5f8",
    "published/regmix/test_mixture_1m.csv": "197267b7d6f15367",
    "published/regmix/test_mixture_60m.csv": "197267b7d6f15367",
    "published/regmix/test_pile_loss_1B.csv": "b2451e2b7fa15400",
    "published/regmix/test_pile_loss_1m.csv": "e027b1674f60140a",
    "published/regmix/test_pile_loss_60m.csv": "8fe69d59ab7dd4fa",
    "published/regmix/train_mixture_1m.csv": "04a32ef4ab594376",
    "published/regmix/train_pile_loss_1m.csv": "49a959aa07ce5c20",
    "published/routed_scaling/curves.csv.gz": "c03e7531add85e59",
    "published/schedules/100M_constant_24000.csv": "034a75e2415373a9",
    "published/schedules/100M_constant_72000.csv": "52b5752009e1e4c3",
    "published/schedules/100M_cosine_24000.csv": "dd544dc61a11fa13",
    "published/schedules/100M_cosine_72000.csv": "2e637203b48b3e3a",
    "published/schedules/100M_wsd_20000_24000.csv": "e66df98c85dba705",
    "published/schedules/100M_wsdcon_18.csv": "33cfea673dc0efde",
    "published/schedules/100M_wsdcon_3.csv": "a1cbb8c730ae0628",
    "published/schedules/100M_wsdcon_9.csv": "510256497a0ea9d4",
    "published/schedules/100M_wsdld_20000_24000.csv": "0ef6b02e260ff5ef",
    "published/schedules/25M_constant_24000.csv": "5a7c0b440751e258",
    "published/schedules/25M_constant_72000.csv": "99ee51a9be7b7fb7",
    "published/schedules/25M_cosine_24000.csv": "554e35f9efbe28a6",
    "published/schedules/25M_cosine_72000.csv": "af3b25a485966a0f",
    "published/schedules/25M_wsd_20000_24000.csv": "8649b7de4b4b31db",
    "published/schedules/25M_wsdcon_18.csv": "9b9bd40f519d20ec",
    "published/schedules/25M_wsdcon_3.csv": "3d37fcf82c237e5c",
    "published/schedules/25M_wsdcon_9.csv": "b7579f38b5e175d9",
    "published/schedules/25M_wsdld_20000_24000.csv": "8e3a9ae33ed586e5",
    "published/schedules/400M_constant_24000.csv": "5d91536675592acd",
    "published/schedules/400M_constant_72000.csv": "a453ef82f549470c",
    "published/schedules/400M_cosine_24000.csv": "aa18c9dbad66610d",
    "published/schedules/400M_cosine_72000.csv": "347acbdc80042cb7",
    "published/schedules/400M_wsd_20000_24000.csv": "8a56dbd8f6b553b4",
    "published/schedules/400M_wsdcon_18.csv": "998aaf3fd14de43f",
    "published/schedules/400M_wsdcon_3.csv": "e1a896755ea1e1a6",
    "published/schedules/400M_wsdcon_9.csv": "497aa4a60df8f520",
    "published/schedules/400M_wsdld_20000_24000.csv": "7c5d5141d9179554",
    "tinyshakespeare/input.txt": "86c4e6aa9db7c042",
}
# Where a folder's files are published, on GitHub.
WHERE = {
    "domains": "allenai/OLMoE, scripts/routing_output/text",
    "names": "karpathy/makemore, names.txt",
    "published/optimizer_race": "KellerJordan/modded-nanogpt, records of 2024-10-29, losses",
    "published/overtraining": "mlfoundations/scaling, exp_data, as one table",
    "published/regmix": "sail-sg/regmix, data",
    "published/routed_scaling": "google-deepmind/scaling_laws_for_routing, data",
    "published/schedules": "thu-yao-01-luo/MultiPowerLaw, loss_curve_repo, by model size",
    "tinyshakespeare": "karpathy/char-rnn, data/tinyshakespeare/input.txt",
}


class Missing(ValueError):
    """A public file is not on this machine, or is another."""


def find(name: str) -> Path:
    """The file of this name, such as 'names/names.txt'.

    Errors: Missing where it is absent, saying where it can be had, or where its hash differs.
    """
    where = next(text for part, text in WHERE.items() if name.startswith(part + "/"))
    given = os.environ.get(VARIABLE)
    folders = [Path(given).expanduser()] if given else []
    folders.append(data.cache_dir() / "published")
    for folder in folders:
        path = folder / name
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if digest != FILES[name]:
                raise Missing(f"{path}: its sha256 begins {digest}, expected {FILES[name]}")
            return path
    raise Missing(
        f"{name} is not in {' or '.join(map(str, folders))}; it is {where} on GitHub; put it there "
        f"or set {VARIABLE}"
    )
